"""Upload many images as a batch with plain Celery, nothing of this project installed.

    python batch_with_celery.py IMAGE_URL…

BROKER_URL and RESULT_BACKEND say where the workers' Redis is. A message takes 5,000 items; a longer list is better a
prefix, a folder or an archive, which workers list themselves: {"source": "s3://bucket/prefix/"}.
"""

import os
import sys

from celery import Celery
from celery.exceptions import TimeoutError as NotOverYet

app = Celery(broker=os.environ["BROKER_URL"], backend=os.environ["RESULT_BACKEND"])


def ask(task: str, job: dict, timeout_s: float) -> dict:
    """The result of one job of the queue of batches; SystemExit says why there is none."""
    sent = app.send_task(task, kwargs={"job": job}, queue="pacs.batches")
    try:
        result = sent.get(timeout=timeout_s, propagate=False)
    except NotOverYet:
        print(f"{sent.id} is not over yet; pacs.batch.show tells how far it is", file=sys.stderr)
        raise SystemExit(3) from None
    if sent.failed():  # the result is an exception; its only argument is the error object
        error = result.args[0]
        print(f"{error['code']}: {error['message']}", file=sys.stderr)
        raise SystemExit(1)
    return result


def main(image_urls: list[str]) -> int:
    planned = ask("pacs.batch.upload", {"items": image_urls, "name": "an example", "dry_run": True}, 60)
    print(f"{planned['items']} images planned")
    batch = ask("pacs.batch.apply", {"batch_id": planned["batch_id"]}, 600)
    told = ", ".join(f"{status} {count}" for status, count in batch["totals"].items() if count)
    print(f"batch {batch['state']}: {told}")
    for failure in batch["failures"]:  # the first hundred
        print(f"{failure['item']}: {failure['code']}: {failure['message']}", file=sys.stderr)
    return 1 if batch["failures_total"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
