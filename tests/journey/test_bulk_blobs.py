"""Batches whose images lie in S3 or Azure's blob storage, and whose copies go there, by a real worker."""

from __future__ import annotations

import io
import random
import zipfile

import boto3
import pytest
from azure.storage.blob import BlobServiceClient

from producer import Courier
from sandbox.processes import HOST
from sandbox.synthetic import image, new_uid

WAIT_S = 60
AWS = {"AWS_ACCESS_KEY_ID": "COURIERTESTKEY", "AWS_SECRET_ACCESS_KEY": "couriertestsecret"}


@pytest.fixture
def s3(worker, moto):
    """A running worker, where images lie, and what puts one there."""
    bucket = f"many-{random.randrange(10**9)}"
    secrets = {"aws_access_key_id": AWS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": AWS["AWS_SECRET_ACCESS_KEY"]}
    client = boto3.client("s3", endpoint_url=moto, region_name="us-east-1", **secrets)
    client.create_bucket(Bucket=bucket)
    place = {"buckets": [bucket], "endpoint_url": moto, "region": "us-east-1"}
    running = worker(
        sources={"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True, "s3": place},
        downloads={"s3": place},
        environ=AWS,
    )
    yield running, f"s3://{bucket}", lambda key, body: client.put_object(Bucket=bucket, Key=key, Body=body)
    client.close()


@pytest.fixture
def az(worker, azurite):
    with BlobServiceClient.from_connection_string(azurite.connection_string) as account:
        container = account.create_container(f"many-{random.randrange(10**9)}")
        place = {"containers": [container.container_name], "connection_string_env": "AZURE_SECRET"}
        running = worker(
            sources={"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True, "azure": place},
            downloads={"azure": place},
            environ={"AZURE_SECRET": azurite.connection_string},
        )
        yield running, f"az://{container.container_name}", container.upload_blob


@pytest.mark.parametrize("kind", ["s3", "az"])
def test_images_below_a_prefix_and_in_an_archive_are_stored_deleted_with_a_copy_and_brought_back(kind, request):
    running, root, put = request.getfixturevalue(kind)
    studies = {new_uid(): 12 for _ in range(3)}
    for study, number in studies.items():
        for at in range(number):
            put(f"2026/{study}/{at} of {number}.dcm", image(study, side=8))
    put("2026/notes.txt", b"no image")
    put("2025/old.dcm", image(new_uid(), side=8))
    packed, archived = io.BytesIO(), new_uid()
    with zipfile.ZipFile(packed, "w") as archive:
        for at in range(5):
            archive.writestr(f"{at}.dcm", image(archived, side=8))
    put("all.zip", packed.getvalue())
    with Courier(running.settings) as courier:
        batch = courier.batch.upload(f"{root}/2026/")
        assert batch.result(timeout_s=WAIT_S)["totals"] == {"stored": 36, "refused": 1}
        rows = list(courier.batch.report(batch.id))
        assert {row["item"] for row in rows if row["status"] == "refused"} == {f"{root}/2026/notes.txt"}
        zipped = courier.batch.upload(f"{root}/all.zip").result(timeout_s=WAIT_S)
        assert zipped["totals"] == {"stored": 5}

        def there() -> dict[str, int]:
            listed = courier.studies().result(timeout_s=WAIT_S)["studies"]
            return {one["study_uid"]: sum(place["images"] for place in one["servers"]) for one in listed}

        assert there() == {**studies, archived: 5}
        gone = courier.batch.delete(list(studies), backup=f"{root}/kept/")
        assert gone.result(timeout_s=WAIT_S)["failures_total"] == 0
        assert there() == {archived: 5}
        assert courier.batch.undo(gone.id).result(timeout_s=WAIT_S)["failures_total"] == 0
        assert there() == {**studies, archived: 5}
