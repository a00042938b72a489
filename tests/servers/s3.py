"""The client of another program that uses the same S3 as the worker."""

from __future__ import annotations

from typing import Any

from botocore.config import Config

from worker.runtime.botocore_internals import new_session


def s3_client(endpoint_url: str, **keys: str) -> Any:
    """Without ``keys`` with the credentials of the environment as it is now: boto3's own client keeps those of before.

    To be closed.
    """
    config = Config(signature_version="s3v4")
    return new_session().create_client("s3", endpoint_url=endpoint_url, region_name="us-east-1", config=config, **keys)
