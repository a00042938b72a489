"""Upload one image with plain Celery, nothing of this project installed: python upload_with_celery.py IMAGE_URL

BROKER_URL and RESULT_BACKEND say where the workers' Redis is.
"""

import os
import sys

from celery import Celery
from celery.exceptions import TimeoutError as NotOverYet

app = Celery(broker=os.environ["BROKER_URL"], backend=os.environ["RESULT_BACKEND"])


def main(image_url: str) -> int:
    job = app.send_task("pacs.upload", kwargs={"job": {"image_url": image_url}}, queue="pacs")
    try:
        result = job.get(timeout=60, propagate=False)
    except NotOverYet:
        print(f"{job.id} is not over yet; ask again with app.AsyncResult({job.id!r})", file=sys.stderr)
        return 3
    if job.failed():  # the result is an exception; its only argument is the error object
        error = result.args[0]
        print(f"{error['code']}: {error['message']} [{error['server_name'] or 'no server'}]", file=sys.stderr)
        return 1
    print(f"stored on {result['server_name']}: {result['viewer_url']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
