"""Clients that nobody here wrote, on both dialects: what works, and the refusals that the products are known for.

dicomweb-client asks as its authors read the standard; where a product deviates, the refusal is what a user of the real
product would meet, and the sandbox has to give it too.
"""

from __future__ import annotations

import io
from pathlib import Path

import pydicom
import pytest
import requests
from dicomweb_client import DICOMwebClient, cli
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000

from sandbox import synthetic
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.real_archive import only_the_sandbox

DIALECTS = ["msdicom", "dcm4chee"]
EXPLICIT_LE = "1.2.840.10008.1.2.1"


def dataset(study: str, **keywords: object) -> Dataset:
    return pydicom.dcmread(io.BytesIO(image(study, **keywords)))  # type: ignore[arg-type]


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(sandbox: SandboxPart, dialect: str) -> DICOMwebClient:
    return DICOMwebClient(getattr(sandbox, dialect))


def status(error: pytest.ExceptionInfo[requests.HTTPError]) -> int:
    return int(error.value.response.status_code)


def test_it_stores_and_reads_the_answer(client: DICOMwebClient, dialect: str) -> None:
    study = new_uid()
    sent = [dataset(study), dataset(study)]
    answer = client.store_instances(sent)
    told = [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence]
    assert told == [one.SOPInstanceUID for one in sent]
    if dialect == "dcm4chee":
        assert answer.RetrieveURL.endswith(f"/studies/{study}")
    assert len(client.search_for_instances(study)) == 2


def test_it_reads_of_each_image_whether_it_was_stored(client: DICOMwebClient, dialect: str) -> None:
    there, new = dataset(new_uid()), dataset(new_uid())
    client.store_instances([there])
    answer = client.store_instances([there, new])
    stored = [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence]
    if dialect == "dcm4chee":  # a duplicate is a success there
        assert stored == [there.SOPInstanceUID, new.SOPInstanceUID]
        return
    assert stored == [new.SOPInstanceUID]
    (failed,) = answer.FailedSOPSequence
    assert (failed.ReferencedSOPInstanceUID, failed.FailureReason) == (there.SOPInstanceUID, 45070)


@pytest.mark.parametrize("dialect", ["msdicom"], indirect=True)
def test_with_a_charset_behind_the_type_it_reads_an_empty_answer(client: DICOMwebClient, sandbox: SandboxPart) -> None:
    """It compares the whole Content-Type. docs/pacs-oddities.md: "The type of its JSON has a charset"."""
    sandbox.set_fault("msdicom", "*", charset=True)
    assert len(client.store_instances([dataset(new_uid())])) == 0


def test_it_stores_into_a_named_study(client: DICOMwebClient) -> None:
    study = new_uid()
    client.store_instances([dataset(study)], study_instance_uid=study)
    assert len(client.search_for_instances(study)) == 1


def test_it_searches_on_every_level(client: DICOMwebClient) -> None:
    study = new_uid()
    one = dataset(study)
    client.store_instances([one])
    (found,) = client.search_for_studies(search_filters={"StudyInstanceUID": study})
    assert found["0020000D"]["Value"] == [study]
    (found,) = client.search_for_series(study)
    assert found["0020000E"]["Value"] == [one.SeriesInstanceUID]
    (found,) = client.search_for_instances(study, one.SeriesInstanceUID)
    assert found["00080018"]["Value"] == [one.SOPInstanceUID]
    (found,) = client.search_for_studies(search_filters={"PatientID": synthetic.PATIENT_ID}, limit=1)
    assert found["00100020"]["Value"] == [synthetic.PATIENT_ID]
    assert client.search_for_studies(search_filters={"StudyInstanceUID": new_uid()}) == []


def test_an_unknown_filter_is_refused(client: DICOMwebClient) -> None:
    with pytest.raises(requests.HTTPError) as refused:
        client.search_for_studies(search_filters={"NoSuchKeyword": "1"})
    assert status(refused) == 400


def test_it_retrieves_what_was_stored(client: DICOMwebClient) -> None:
    study = new_uid()
    one = dataset(study)
    client.store_instances([one])
    where = (study, one.SeriesInstanceUID, one.SOPInstanceUID)
    as_stored = (("application/dicom", "*"),)
    for (found,) in (
        client.retrieve_study(study, media_types=as_stored),
        client.retrieve_series(study, one.SeriesInstanceUID, media_types=as_stored),
        [client.retrieve_instance(*where, media_types=as_stored)],
    ):
        assert found.SOPInstanceUID == one.SOPInstanceUID
        assert found.PixelData == one.PixelData
    (metadata,) = client.retrieve_study_metadata(study)
    assert Dataset.from_json(metadata, bulk_data_uri_handler=lambda _uri: b"").SOPInstanceUID == one.SOPInstanceUID
    assert client.retrieve_series_metadata(study, one.SeriesInstanceUID)
    assert client.retrieve_instance_metadata(*where)["00080018"]["Value"] == [one.SOPInstanceUID]
    (frame,) = client.retrieve_instance_frames(*where, frame_numbers=[1])
    assert frame == one.PixelData


def compressed(study: str) -> Dataset:
    path = get_testdata_file("JPEG2000.dcm")
    assert isinstance(path, str)
    ds = pydicom.dcmread(path)
    assert ds.file_meta.TransferSyntaxUID == JPEG2000
    ds.StudyInstanceUID = study
    ds.PatientID, ds.PatientName, ds.PatientBirthDate = synthetic.PATIENT_ID, "Synthetic^Square", "19700101"
    return ds


def test_a_study_without_a_transfer_syntax_is_refused_by_msdicom_and_decompressed_by_dcm4chee(
    client: DICOMwebClient, dialect: str
) -> None:
    study = new_uid()
    client.store_instances([dataset(study), compressed(study)])
    kept = client.retrieve_study(study, media_types=(("application/dicom", "*"),))
    assert {one.file_meta.TransferSyntaxUID for one in kept} == {EXPLICIT_LE, JPEG2000}
    if dialect == "dcm4chee":
        only_the_sandbox("decompresses JPEG 2000, for which an archive needs its native codecs")
        found = client.retrieve_study(study)
        assert {one.file_meta.TransferSyntaxUID for one in found} == {EXPLICIT_LE}
        assert all(len(one.PixelData) == one.Rows * one.Columns * 2 for one in found)
    else:
        with pytest.raises(requests.HTTPError) as refused:
            client.retrieve_study(study)
        assert status(refused) == 406


def test_a_missing_study_is_a_404(client: DICOMwebClient) -> None:
    for retrieve in (client.retrieve_study_metadata, client.retrieve_study):
        with pytest.raises(requests.HTTPError) as refused:
            retrieve(new_uid())
        assert status(refused) == 404


def test_a_second_store_of_the_same_instance_is_told_on_one_server_only(client: DICOMwebClient, dialect: str) -> None:
    """DCM4CHEE takes it silently; MSDICOM answers 409, FailureReason 45070."""
    one = dataset(new_uid())
    client.store_instances([one])
    if dialect == "dcm4chee":
        assert len(client.store_instances([one]).ReferencedSOPSequence) == 1
        return
    with pytest.raises(requests.HTTPError) as refused:
        client.store_instances([one])
    assert status(refused) == 409
    assert refused.value.response.json()["00081198"]["Value"][0]["00081197"]["Value"] == [45070]


def test_deleting_is_one_call_on_msdicom_and_needs_a_rejection_on_dcm4chee(
    sandbox: SandboxPart, client: DICOMwebClient, dialect: str
) -> None:
    study = new_uid()
    one = dataset(study)
    client.store_instances([one])
    if dialect == "dcm4chee":
        with pytest.raises(requests.HTTPError) as refused:
            client.delete_study(study)
        assert status(refused) == 403
        for delete, uids in (
            (client.delete_series, (study, one.SeriesInstanceUID)),
            (client.delete_instance, (study, one.SeriesInstanceUID, one.SOPInstanceUID)),
        ):
            with pytest.raises(requests.HTTPError) as refused:
                delete(*uids)
            assert status(refused) == 405
        rejection = requests.post(f"{sandbox.dcm4chee}/studies/{study}/reject/113039%5EDCM", timeout=10)
        assert rejection.json() == {"count": 1}
    client.delete_study(study)
    assert client.search_for_studies(search_filters={"StudyInstanceUID": study}) == []
    with pytest.raises(requests.HTTPError) as refused:
        client.delete_study(study)
    assert status(refused) == 404


def test_series_and_instances_can_be_deleted_on_msdicom(sandbox: SandboxPart) -> None:
    client = DICOMwebClient(sandbox.msdicom)
    study = new_uid()
    kept, gone, other = (dataset(study, series=series) for series in (f"{study}.1", f"{study}.1", f"{study}.2"))
    client.store_instances([kept, gone, other])
    client.delete_instance(study, gone.SeriesInstanceUID, gone.SOPInstanceUID)
    client.delete_series(study, other.SeriesInstanceUID)
    (left,) = client.search_for_instances(study)
    assert left["00080018"]["Value"] == [kept.SOPInstanceUID]


def test_its_command_line_stores_finds_and_fetches(
    client: DICOMwebClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = new_uid()
    file = tmp_path / "one.dcm"
    file.write_bytes(image(study))
    url = ["--url", client.base_url]
    parser = cli._get_parser()
    for command in (
        ["store", "instances", str(file)],
        ["search", "studies", "--filter", f"StudyInstanceUID={study}"],
        ["retrieve", "studies", "--study", study, "metadata", "--save", "--output-dir", str(tmp_path)],
    ):
        args = parser.parse_args([*url, *command])
        args.func(client, args)
    assert study in capsys.readouterr().out
    assert list(tmp_path.glob("*.json"))
