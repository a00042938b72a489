"""Upload one image with the library of this project: python upload_with_courier.py IMAGE_URL

PACS_CONFIG names the settings, or BROKER_URL, RESULT_BACKEND and LEDGER_URL say where Redis is.
"""

import sys

from producer import Courier
from producer.errors import CourierError, StillRunning


def main(image_url: str) -> int:
    with Courier() as courier:
        job = courier.upload(image_url)
        try:
            stored = job.result(timeout_s=60)
        except CourierError as error:  # or its subclasses: ImageAlreadyExists, SourceNotFound, NotDicom …
            print(f"{error.code}: {error.message} [{error.server_name or 'no server'}]", file=sys.stderr)
            return 1
        except StillRunning:
            print(f"{job.id} is not over yet; ask again with courier.handle({job.id!r})", file=sys.stderr)
            return 3
    print(f"stored on {stored['server_name']}: {stored['viewer_url']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
