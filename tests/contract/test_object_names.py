"""Objects whose names have `?` and `#` on their way into a server: each is itself, and is named whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from courier.batches.result import end_payload
from courier.batches.store import Batches
from courier.redaction import redact_job
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from tests.servers.s3 import s3_client
from worker.jobs.upload import upload


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "KEY",
        "AWS_SECRET_ACCESS_KEY": "SECRET",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("pattern", ["order?{}.dcm", "order#{}.dcm", "day?x=1/order?{}&y"])
def test_two_objects_whose_names_begin_alike_are_two_items_and_two_jobs_named_whole(
    batch_site: Callable[..., BatchSite], moto: str, sandbox: SandboxPart, pattern: str
) -> None:
    s3 = {"buckets": ["imgs-*"], "endpoint_url": moto, "region": "us-east-1"}
    site, study = batch_site(sandbox.servers(), sources={"s3": s3}), new_uid()
    client: Any = s3_client(moto)
    bucket = f"imgs-{new_uid().rpartition('.')[2][:20]}"
    client.create_bucket(Bucket=bucket)
    uids = {f"s3://{bucket}/{pattern.format(number)}": new_uid() for number in (1, 2, 3)}
    for url, uid in uids.items():
        key = url.removeprefix(f"s3://{bucket}/")
        client.put_object(Bucket=bucket, Key=key, Body=image(study, sop=uid, side=16))
    client.close()
    *batched, single = uids
    missing = f"s3://{bucket}/{pattern.format('none')}"

    told = payload(site.see_to_its_end("pacs.upload", upload, new_uid(), {"image_url": single}))
    assert (told["source"], told["image_uid"]) == (single, uids[single])

    site.batch = new_uid()
    site.upload(*batched, missing)
    rows = [row.as_json({}) for row in site.rows]
    assert [row["item"] for row in rows] == [*batched, missing]
    assert [row["status"] for row in rows] == ["stored", "stored", "refused"]
    assert missing in rows[2]["message"]
    store = Batches(site.ledger)
    batch = store.get(site.batch)
    assert batch is not None
    (failure,) = end_payload(batch, store, job_id=site.batch)["failures"]
    assert failure["item"] == missing
    assert redact_job({"image_url": single}) == f'{{"image_url": "{single}"}}'
    assert site.on("msdicom", study) | site.on("dcm4chee", study) == set(uids.values())
