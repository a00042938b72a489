"""Azure's blob storage both ways: a real worker fetches images from Azurite and downloads a study into it."""

from __future__ import annotations

import io
import random
import zipfile
from datetime import UTC, datetime, timedelta

import pytest
from azure.storage.blob import BlobSasPermissions, BlobServiceClient, generate_blob_sas

from producer import Courier
from producer.errors import CourierError, InvalidRequest, SourceDenied, SourceNotAllowed, SourceNotFound
from sandbox.processes import AZURITE_ACCOUNT, AZURITE_KEY, HOST
from sandbox.synthetic import image, new_uid

WAIT_S = 30


@pytest.fixture
def container(azurite):
    with BlobServiceClient.from_connection_string(azurite.connection_string) as account:
        yield account.create_container(f"scans-{random.randrange(10**9)}")


@pytest.fixture
def running(worker, azurite, container):
    azure = {"containers": [container.container_name], "connection_string_env": "AZURE_SECRET"}
    return worker(
        sources={"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True, "azure": azure},
        downloads={"azure": azure},
        environ={"AZURE_SECRET": azurite.connection_string},
    )


def signed(container, name, *, expires_s=60, key=AZURITE_KEY):
    token = generate_blob_sas(
        AZURITE_ACCOUNT,
        container.container_name,
        name,
        account_key=key,
        permission=BlobSasPermissions(read=True),
        expiry=datetime.now(UTC) + timedelta(seconds=expires_s),
    )
    return f"{container.get_blob_client(name).url}?{token}"


def code_of(handle) -> str:
    with pytest.raises(CourierError) as caught:
        handle.result(timeout_s=WAIT_S)
    assert "sig=" not in str(caught.value)
    return caught.value.code


def test_images_come_from_azure_and_their_study_goes_back_there(running, container):
    name, study = container.container_name, new_uid()
    first, second = image(study), image(study)
    container.upload_blob("2024/a b.dcm", first)
    container.upload_blob("c.dcm", second)
    with Courier(running.settings) as courier:
        by_name = courier.upload(f"az://{name}/2024/a b.dcm").result(timeout_s=WAIT_S)
        assert (by_name["status"], by_name["source"]) == ("stored", f"az://{name}/2024/a b.dcm")
        by_signature = courier.upload(url := signed(container, "c.dcm")).result(timeout_s=WAIT_S)
        assert (by_signature["status"], by_signature["source"]) == ("stored", url.partition("?")[0])
        wrong = {
            signed(container, "c.dcm", expires_s=-60): SourceDenied,
            signed(container, "c.dcm", key="d3Jvbmc="): SourceDenied,
            signed(container, "nothing.dcm"): SourceNotFound,
            f"az://{name}/nothing.dcm": SourceNotFound,
            "az://elsewhere/c.dcm": SourceNotAllowed,
        }
        handles = {courier.upload(url): kind for url, kind in wrong.items()}
        assert [code_of(handle) for handle in handles] == [kind.code for kind in handles.values()]
        payload = courier.download(study, f"az://{name}/out/study.zip").result(timeout_s=WAIT_S)
        assert (payload["status"], payload["instances"]) == ("downloaded", 2)
        assert code_of(courier.download(study, "az://elsewhere/study.zip")) == InvalidRequest.code
    content = container.get_blob_client("out/study.zip").download_blob().readall()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        dicom = [archive.read(name) for name in archive.namelist() if name.endswith(".dcm")]
    assert sorted(dicom) == sorted([first, second])
    assert "sig=" not in running.log
    assert AZURITE_KEY not in running.log
