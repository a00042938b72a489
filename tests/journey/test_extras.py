"""A worker that was installed without the SDKs of S3 and Azure: what it does, refuses, and does not start on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from producer import Courier, doctor
from producer.errors import CourierError
from sandbox.processes import HOST
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 60
S3 = "boto3 is not installed; run pip install 'pacs-courier[s3]'"
BLOBS = "azure-storage-blob is not installed; run pip install 'pacs-courier[azure]'"
IDENTITY = "azure-identity is not installed; run pip install 'pacs-courier[azure]'"
#: Python imports it at its start: what the extras install is not there.
SITECUSTOMIZE = """\
import sys

class NotInstalled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("boto3", "botocore", "s3transfer", "azure", "msal", "msal_extensions"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
"""
SERVER = '[[servers]]\nname = "cloud"\ntype = "msdicom"\nurl = "http://127.0.0.1:9/v2"\n'
AUTH = 'auth = { type = "azure_identity", scope = "https://dicom.healthcareapis.azure.com/.default" }\n'
AZURE = '[{}.azure]\ncontainers = ["images"]\naccount_url = "https://account.blob.core.windows.net"\n'


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has neither SDK."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def refused(handle: Any) -> CourierError:
    with pytest.raises(CourierError) as caught:
        handle.result(timeout_s=WAIT_S)
    return caught.value


def test_a_worker_without_the_sdks_reads_and_writes_all_else(worker, bare, image_server, tmp_path):
    images, out, study_uid = tmp_path / "images", tmp_path / "out", new_uid()
    for folder in (images, out):
        folder.mkdir()
    (images / "2.dcm").write_bytes(image(study_uid))
    running = worker(
        environ=bare,
        sources={"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True, "folders": [str(images)]},
        downloads={"folders": [str(out)]},
    )
    with Courier(running.settings) as courier:
        for url in (image_server.put("1.dcm", image(study_uid)), f"{images.as_uri()}/2.dcm"):
            assert courier.upload(url).result(timeout_s=WAIT_S)["status"] == "stored"
        zipped = courier.download(study_uid, f"{out.as_uri()}/study.zip")
        assert zipped.result(timeout_s=WAIT_S)["status"] == "downloaded"
        found = doctor.examine(lambda: running.settings)
    assert [finding for finding in found if finding.state not in ("ok", "unknown")] == []


def test_what_needs_an_sdk_is_refused_and_no_study_is_deleted_without_its_backup(worker, bare, sandbox):
    stow(sandbox.msdicom, image(study_uid := new_uid()))
    running = worker(environ=bare, jobs={"sweep_s": 0.2})
    with Courier(running.settings) as courier:
        for scheme, remedy in (("s3", S3), ("az", BLOBS)):
            place = f"{scheme}://images"
            reads, writes = f"This worker reads no {scheme}:// URLs", f"This worker writes to no {scheme}:// URLs"
            for handle, code, sentence in (
                (courier.upload(f"{place}/1.dcm"), "source_not_allowed", reads),
                (courier.batch.upload(f"{place}/monday/"), "source_not_allowed", reads),
                (courier.download(study_uid, f"{place}/1.zip"), "invalid_request", writes),
                (courier.delete_all("delete all studies", backup=f"{place}/backup/"), "invalid_request", writes),
            ):
                error = refused(handle)
                assert (error.code, error.message) == (code, f"{sentence}: {remedy}.")
            (failure,) = courier.batch.upload([f"{place}/1.dcm"]).result(timeout_s=WAIT_S)["failures"]
            assert (failure["code"], failure["message"]) == ("source_not_allowed", f"{reads}: {remedy}.")
    answer = requests.get(f"{sandbox.msdicom}/studies", headers={"Accept": "application/dicom+json"}, timeout=10)
    assert len(answer.json()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[sources.s3]\nbuckets = ["images"]\n', f"setting sources.s3.buckets cannot be followed: {S3}"),
        ('[downloads.s3]\nbuckets = ["*"]\n', f"setting downloads.s3.buckets cannot be followed: {S3}"),
        (AZURE.format("sources"), f"setting sources.azure.containers cannot be followed: {BLOBS}"),
        (AZURE.format("downloads"), f"setting downloads.azure.containers cannot be followed: {BLOBS}"),
        (AUTH, f"setting servers.cloud.auth.type: azure_identity cannot be used: {IDENTITY}"),
    ],
)
def test_settings_that_need_an_sdk_stop_the_start_with_one_sentence(bare, tmp_path, text, sentence):
    config = tmp_path / "pacs.toml"
    config.write_text(SERVER + text, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PACS_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", "worker"],
        env={**inherited, **bare, "PACS_CONFIG": str(config), "BROKER_URL": "redis://127.0.0.1:1/0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if "pacs-courier:" in line]
    assert sentence in line
    assert "Traceback" not in ended.stderr
