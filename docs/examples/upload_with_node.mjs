// Upload one image from Node, with the Celery client of npm: node upload_with_node.mjs IMAGE_URL
//
// BROKER_URL and RESULT_BACKEND say where the workers' Redis is. `npm install` in this folder brings the client.
import celery from "celery-node";

const client = celery.createClient(process.env.BROKER_URL, process.env.RESULT_BACKEND, "pacs");
const job = client.sendTask("pacs.upload", [], { job: { image_url: process.argv[2] } });

try {
  const stored = await job.get(60_000, 200);
  console.log(`stored on ${stored.server_name}: ${stored.viewer_url}`);
} catch (failure) {
  if (failure.message === "FAILURE") {
    const [error] = failure.exc_message; // the error object is the exception's only argument
    console.error(`${error.code}: ${error.message} [${error.server_name ?? "no server"}]`);
    process.exitCode = 1;
  } else {
    console.error(`${job.taskId} is not over yet; ask again with client.asyncResult("${job.taskId}")`);
    process.exitCode = 3;
  }
} finally {
  await client.disconnect();
}
