// Upload many images as a batch from Node, with the Celery client of npm: node batch_with_node.mjs IMAGE_URL…
//
// BROKER_URL and RESULT_BACKEND say where the workers' Redis is. `npm install` in this folder brings the client.
// A message takes 5,000 items; a longer list is better a source that workers list: { source: "s3://bucket/prefix/" }.
import celery from "celery-node";

const client = celery.createClient(process.env.BROKER_URL, process.env.RESULT_BACKEND, "pacs.batches");

// The result of one job of the queue of batches.
async function ask(task, job, timeoutMs) {
  const sent = client.sendTask(task, [], { job });
  try {
    return await sent.get(timeoutMs, 200);
  } catch (failure) {
    if (failure.message === "FAILURE") {
      const [error] = failure.exc_message; // the error object is the exception's only argument
      console.error(`${error.code}: ${error.message}`);
      process.exitCode = 1;
    } else {
      console.error(`${sent.taskId} is not over yet; pacs.batch.show tells how far it is`);
      process.exitCode = 3;
    }
    return null;
  }
}

const order = { items: process.argv.slice(2), name: "an example", dry_run: true };
const planned = await ask("pacs.batch.upload", order, 60_000);
if (planned) {
  console.log(`${planned.items} images planned`);
  const batch = await ask("pacs.batch.apply", { batch_id: planned.batch_id }, 600_000);
  if (batch) {
    const counts = Object.entries(batch.totals).filter(([, count]) => count);
    console.log(`batch ${batch.state}: ${counts.map(([status, count]) => `${status} ${count}`).join(", ")}`);
    for (const failure of batch.failures) { // the first hundred
      console.error(`${failure.item}: ${failure.code}: ${failure.message}`);
    }
    if (batch.failures_total) process.exitCode = 1;
  }
}
await client.disconnect();
