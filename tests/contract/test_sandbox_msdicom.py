"""The sandbox's MSDICOM held against that product's own end-to-end tests, row by row.

Each function below is one or several rows of the product's conformance table, under the rows' own ids: what its
makers' tests send, and what they assert of the answer. Rows for both API versions run for ``/v1`` and ``/v2``. Rows
that are not run are listed with their reason in ``docs/sandbox.md``; the last test counts both.
"""

from __future__ import annotations

import io
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pydicom
import pytest
import requests
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian

from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.real_archive import only_the_sandbox

DICOM_JSON = "application/dicom+json"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
J2K = "1.2.840.10008.1.2.4.90"
MPEG2 = "1.2.840.10008.1.2.4.100"
HEVC = "1.2.840.10008.1.2.4.107"
MULTI = 'multipart/related; type="application/dicom"'
OCTETS = 'multipart/related; type="application/octet-stream"'
STUDY_DEFAULTS = {
    1: "00080005 00080020 00080030 00080050 00080056 00080090 00080201 00100010 00100020 00100030 00100040 "
    "0020000D 00200010",
    2: "00080020 00080050 00080090 00081030 00100010 00100020 00100030 0020000D",
}
SERIES_DEFAULTS = {
    1: "00080005 00080060 00080201 0008103E 0020000E 00400244 00400245 00400275",
    2: "00080060 00081090 0020000E 00400244",
}
INSTANCE_DEFAULTS = {
    1: "00080005 00080016 00080018 00080056 00080201 00200013 00280008 00280010 00280011 00280100",
    2: "00080018",
}


# -- a client that does only what it is told ------------------------------------------------------------------------


@dataclass
class MsDicomApi:
    """The sandbox's MSDICOM in one API version."""

    part: SandboxPart
    version: int
    http: requests.Session

    @property
    def base(self) -> str:
        return re.sub(r"/v2(?=/partitions/|$)", f"/v{self.version}", self.part.msdicom)

    @property
    def origin(self) -> str:
        return re.sub(r"/v\d(/partitions/[^/]+)?$", "", self.base)

    def send(self, method: str, path: str, **options: Any) -> requests.Response:
        root = f"{self.origin}/v{self.version}" if path.startswith("/changefeed") else self.base  # of all partitions
        url = path if path.startswith("http") else root + path
        options.setdefault("headers", {})
        options["headers"] = {"Accept": None, **options["headers"]}
        return self.http.request(method, url, timeout=60, **options)

    def get(self, path: str, accept: str | None = None, **headers: str) -> requests.Response:
        return self.send("GET", path, headers={"Accept": accept, **headers})

    def query(self, path: str) -> requests.Response:
        return self.get(path, DICOM_JSON)

    def delete(self, path: str) -> requests.Response:
        return self.send("DELETE", path)

    def single(self, content: Any, path: str = "/studies", **headers: str | None) -> requests.Response:
        headers = {"Accept": DICOM_JSON, "Content-Type": "application/dicom", **headers}
        return self.send("POST", path, data=content, headers=headers)

    def multi(self, *files: bytes, path: str = "/studies", **headers: str) -> requests.Response:
        content = {"Content-Type": f"{MULTI}; boundary=frontier", "Accept": DICOM_JSON, **headers}
        return self.send("POST", path, data=multipart(*files), headers=content)

    def stored(self, *files: bytes) -> requests.Response:
        """Store, and insist that all of it was."""
        answer = self.multi(*files)
        assert answer.status_code in (200, 202), answer.text
        assert "00081198" not in answer.json()
        return answer

    def instance_path(self, content: bytes) -> str:
        ds = parse(content)
        return f"/studies/{ds.StudyInstanceUID}/series/{ds.SeriesInstanceUID}/instances/{ds.SOPInstanceUID}"


def multipart(*files: bytes) -> bytes:
    parts = [b"--frontier\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for content in files]
    return b"".join(parts) + b"--frontier--\r\n"


def parse(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def parts_of(answer: requests.Response) -> list[Message]:
    """The parts of a multipart answer, which has to be whole."""
    assert answer.status_code == 200, answer.text
    kind = answer.headers["Content-Type"]
    assert kind.startswith("multipart/related")
    assert "type=" not in kind
    boundary = re.search(r'boundary="?([^";]+)', kind)
    assert boundary is not None
    assert answer.content.endswith(f"\r\n--{boundary[1]}--\r\n".encode())
    message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + answer.content)
    payload = message.get_payload()
    assert isinstance(payload, list)
    return payload


def contents_of(answer: requests.Response) -> list[bytes]:
    return [exact(part) for part in split(answer)]


def split(answer: requests.Response) -> list[bytes]:
    """The parts as raw bytes, headers included; the e-mail parser would mend their line ends."""
    boundary = re.search(r'boundary="?([^";]+)', answer.headers["Content-Type"])
    assert boundary is not None
    delimiter = f"--{boundary[1]}".encode()
    assert answer.content.endswith(b"\r\n" + delimiter + b"--\r\n")
    pieces = (b"\r\n" + answer.content).split(b"\r\n" + delimiter)
    return [piece.removeprefix(b"\r\n") for piece in pieces[1:-1]]


def exact(part: bytes) -> bytes:
    return part.partition(b"\r\n\r\n")[2]


def reasons(answer: requests.Response) -> list[int]:
    return [item["00081197"]["Value"][0] for item in answer.json().get("00081198", {}).get("Value", [])]


def comments(item: dict[str, Any]) -> list[str]:
    return [entry["00000902"]["Value"][0] for entry in item["00741048"].get("Value", [])]


def referenced(answer: requests.Response) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = answer.json()["00081199"]["Value"]
    return items


def sop_of(item: dict[str, Any]) -> str:
    return str(item["00081155"]["Value"][0])


def value(dataset: dict[str, Any], tag: str) -> Any:
    return dataset[tag]["Value"][0]


def sample(name: str) -> bytes:
    found = get_testdata_file(name)
    assert isinstance(found, str)
    return Path(found).read_bytes()


def with_new_uids(content: bytes, **keywords: Any) -> bytes:
    """The same image as another instance of another study."""
    ds = parse(content)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = new_uid(), new_uid(), new_uid()
    for keyword, one in keywords.items():
        setattr(ds, keyword, one)
    return written(ds)


def written(ds: Dataset) -> bytes:
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def encapsulated(transfer_syntax_uid: str, frames: Sequence[bytes], **keywords: Any) -> bytes:
    """A file in a syntax that nobody decodes; its frames are just bytes."""
    ds = parse(image(new_uid(), **keywords))
    ds.NumberOfFrames = len(frames)
    ds.PixelData = encapsulate(list(frames))
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = transfer_syntax_uid
    return written(ds)


def multi_frame(count: int) -> bytes:
    ds = parse(image(new_uid(), side=8))
    ds.NumberOfFrames = count
    ds.PixelData = b"".join(bytes([number]) * 128 for number in range(1, count + 1))
    return written(ds)


def patched(content: bytes, old: str, new: str) -> bytes:
    """A value replaced in the file's bytes by one of the same length, past every check of a writing library."""
    assert len(old) == len(new)
    assert content.count(old.encode()) >= 1
    return content.replace(old.encode(), new.encode("latin-1"))


def raw_value(content: bytes, tag: bytes, vr: bytes, new: bytes) -> bytes:
    """An element of a short VR (explicit little endian) given another value, however wrong."""
    start = content.index(tag + vr)
    length = int.from_bytes(content[start + 6 : start + 8], "little")
    new += b" " * (len(new) % 2)
    return content[: start + 6] + len(new).to_bytes(2, "little") + new + content[start + 8 + length :]


def without_pixels() -> bytes:
    ds = parse(image(new_uid()))
    del ds.PixelData
    return written(ds)


PATIENT_ID, MODALITY, STUDY_DATE = b"\x10\x00\x20\x00", b"\x08\x00\x60\x00", b"\x08\x00\x20\x00"
STUDY_UID, STUDY_DESCRIPTION = b"\x20\x00\x0d\x00", b"\x08\x00\x30\x10"


# -- the rows -------------------------------------------------------------------------------------------------------

Row = Callable[[MsDicomApi], None]
ROWS: dict[str, tuple[Row, tuple[int, ...]]] = {}


def row(*ids: str, versions: tuple[int, ...] = (1, 2)) -> Callable[[Row], Row]:
    """The rows that a function holds, and the API versions they are for; its name is what they say."""

    def keep(function: Row) -> Row:
        for one in ids:
            assert one not in ROWS
            ROWS[one] = (function, versions)
        return function

    return keep


# Store


@row("S01")
def an_empty_body_is_refused(server: MsDicomApi) -> None:
    answer = server.single(b"")
    assert answer.status_code == 409
    assert answer.json() == {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [43264]}}]}}


@row("S02")
def a_study_in_the_path_that_is_no_uid_is_a_400(server: MsDicomApi) -> None:
    assert server.multi(image(new_uid()), path="/studies/" + "b" * 65).status_code == 400


@row("S03", versions=(2,))
def a_store_that_accepts_dicom_is_a_406(server: MsDicomApi) -> None:
    assert server.single(image(new_uid()), Accept="application/dicom").status_code == 406


@row("S04", versions=(2,))
def a_store_that_accepts_an_unknown_type_is_a_406(server: MsDicomApi) -> None:
    assert server.single(image(new_uid()), Accept="application/data").status_code == 406


@row("S05", versions=(2,))
def a_body_of_an_unknown_kind_is_a_415(server: MsDicomApi) -> None:
    content = 'multipart/form; type="application/dicom"; boundary=frontier'
    assert server.multi(image(new_uid()), **{"Content-Type": content}).status_code == 415


@row("S06", "N14")
def a_body_without_parts_is_a_204(server: MsDicomApi) -> None:
    answer = server.multi()
    assert (answer.status_code, answer.content) == (204, b"")


@row("S07")
def an_empty_part_alone_is_refused(server: MsDicomApi) -> None:
    answer = server.multi(b"")
    assert (answer.status_code, reasons(answer)) == (409, [43264])


@row("S08")
def an_empty_part_beside_a_good_one_is_left_out(server: MsDicomApi) -> None:
    good = image(new_uid())
    answer = server.multi(b"", good)
    assert answer.status_code == 202
    (item,) = referenced(answer)
    assert sop_of(item) == parse(good).SOPInstanceUID
    assert value(item, "00081150") == parse(good).SOPClassUID
    assert value(item, "00081190") == server.base + server.instance_path(good)


@row("S09")
def a_part_without_a_type_is_taken_for_dicom(server: MsDicomApi) -> None:
    good = image(new_uid())
    content = multipart(good).replace(b"Content-Type: application/dicom\r\n\r\n", b"\r\n", 1)
    headers = {"Content-Type": f"{MULTI}; boundary=frontier", "Accept": DICOM_JSON}
    answer = server.send("POST", "/studies", data=content, headers=headers)
    assert answer.status_code == 200
    assert [sop_of(item) for item in referenced(answer)] == [parse(good).SOPInstanceUID]


@row("S10")
def images_of_other_studies_than_the_paths_are_refused(server: MsDicomApi) -> None:
    strangers = [image(new_uid()), image(new_uid())]
    answer = server.multi(*strangers, path=f"/studies/{new_uid()}")
    assert answer.status_code == 409
    assert list(answer.json()) == ["00081198"]
    assert reasons(answer) == [43264, 43264]
    items = answer.json()["00081198"]["Value"]
    assert [sop_of(item) for item in items] == [parse(one).SOPInstanceUID for one in strangers]
    assert all(comments(item) for item in items)


@row("S11")
def of_a_mixed_body_the_images_of_the_study_in_the_path_are_stored(server: MsDicomApi) -> None:
    ours, stranger = image(new_uid()), image(new_uid())
    study = parse(ours).StudyInstanceUID
    answer = server.multi(ours, stranger, path=f"/studies/{study}")
    assert answer.status_code == 202
    assert list(answer.json()) == ["00081190", "00081198", "00081199"]
    assert value(answer.json(), "00081190").endswith(f"studies/{study}")
    assert [sop_of(item) for item in referenced(answer)] == [parse(ours).SOPInstanceUID]
    assert reasons(answer) == [43264]
    assert server.query(f"/studies/{parse(stranger).StudyInstanceUID}/metadata").status_code == 404


@row("S12")
def one_image_twice_in_a_body_is_stored_once(server: MsDicomApi) -> None:
    one = image(new_uid())
    answer = server.multi(one, one, path=f"/studies/{parse(one).StudyInstanceUID}")
    assert (answer.status_code, reasons(answer), len(referenced(answer))) == (202, [45070], 1)


@row("S13")
def an_image_that_is_there_is_a_conflict(server: MsDicomApi) -> None:
    one = image(new_uid())
    first = server.multi(one)
    assert first.status_code == 200
    assert "00081198" not in first.json()
    again = server.multi(one)
    assert (again.status_code, reasons(again)) == (409, [45070])
    assert "00741048" not in again.json()["00081198"]["Value"][0]


@row("S14", "S15")
def a_study_uid_with_a_forbidden_character_is_refused(server: MsDicomApi) -> None:
    for wrong in (b"abc.123", b"11|"):
        answer = server.single(raw_value(image(new_uid()), STUDY_UID, b"UI", wrong + b"\0" * (len(wrong) % 2)))
        assert (answer.status_code, reasons(answer)) == (409, [43264])
        assert "00081199" not in answer.json()


@row("S16", "S19")
def a_stored_image_is_answered_in_dicom_json(server: MsDicomApi) -> None:
    answer = server.single(image(new_uid()))
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].split(";")[0] == DICOM_JSON


@row("S17")
def an_image_of_fifty_megabytes_comes_back_as_it_was(server: MsDicomApi) -> None:
    big = image(new_uid(), side=5000)
    assert len(big) > 50_000_000
    assert server.single(big).status_code == 200
    answer = server.get(server.instance_path(big), f"application/dicom; transfer-syntax={EXPLICIT_LE}")
    assert answer.status_code == 200
    assert answer.content == big


@row("S18")
def three_large_images_in_one_body_come_back_as_they_were(server: MsDicomApi) -> None:
    study = new_uid()
    three = [image(study, side=2750, seed=seed) for seed in range(3)]
    assert server.multi(*three).status_code == 200
    for one in three:
        answer = server.get(server.instance_path(one), "application/dicom; transfer-syntax=*")
        assert answer.content == one


@row("S20")
def a_value_too_many_is_a_warning(server: MsDicomApi) -> None:
    answer = server.single(image(new_uid(), StudyDescription=["one", "two"]))
    assert answer.ok
    assert answer.headers["Warning"].startswith("299 ")


def _with_uid_and_spaces(content: bytes, uid: str, spaces: int) -> bytes:
    return raw_value(content, STUDY_UID, b"UI", (uid + " " * spaces).encode())


@row("S21")
def a_uid_padded_with_a_blank_is_kept_as_it_came_and_is_the_same_uid(server: MsDicomApi) -> None:
    uid = new_uid()
    uid += "1" * (1 - len(uid) % 2)  # odd, so that one blank pads it
    one = image(uid)
    spaced = _with_uid_and_spaces(one, uid, 1)
    assert server.single(spaced).ok
    answer = server.get(server.instance_path(one), "application/dicom; transfer-syntax=*")
    assert answer.content == spaced
    again = server.single(_with_uid_and_spaces(one, uid, 3))
    assert (again.status_code, reasons(again)) == (409, [45070])


@row("S22")
def an_element_of_unknown_representation_is_kept_and_not_told(server: MsDicomApi) -> None:
    ds = parse(image(new_uid()))
    ds.add_new(0x00070008, "UN", b"private?")
    ds.file_meta.TransferSyntaxUID = IMPLICIT_LE
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, implicit_vr=True, little_endian=True, enforce_file_format=True)
    answer = server.single(buffer.getvalue())
    assert answer.status_code == {1: 200, 2: 202}[server.version]
    assert value(referenced(answer)[0], "00081196") == 45063
    path = server.instance_path(buffer.getvalue())
    kept = server.get(path, "application/dicom; transfer-syntax=*")
    assert 0x00070008 in parse(kept.content)
    assert "00070008" not in server.query(path + "/metadata").json()[0]


@row("S30", versions=(2,))
def a_date_that_is_none_is_stored_with_a_comment_and_left_out_of_the_metadata(server: MsDicomApi) -> None:
    one = raw_value(image(new_uid()), STUDY_DATE, b"DA", b"NotAValidStudyDate")
    study = parse(one).StudyInstanceUID
    answer = server.single(one)
    assert answer.status_code == 202
    (comment,) = comments(referenced(answer)[0])
    assert comment.startswith("DICOM100: (0008,0020)")
    assert server.get(server.instance_path(one), "application/dicom; transfer-syntax=*").content == one
    (metadata,) = server.query(f"/studies/{study}/metadata").json()
    assert "00080020" not in metadata
    assert value(metadata, "00100030") == "19700101"
    found = server.query(f"/instances?PatientBirthDate=19700101&StudyInstanceUID={study}")
    assert len(found.json()) == 1
    refused = server.query("/instances?StudyDate=NotAValidStudyDate")
    assert refused.status_code == 400
    assert "yyyyMMdd" in refused.text


@row("S31", versions=(2,))
def a_null_within_a_text_is_stored_with_a_comment(server: MsDicomApi) -> None:
    answer = server.single(raw_value(image(new_uid()), MODALITY, b"CS", b"X\0X"))
    assert answer.status_code == 202
    assert "VR CS" in comments(referenced(answer)[0])[0]
    assert "invalid character" in comments(referenced(answer)[0])[0]


@row("S32", versions=(2,))
def a_null_behind_a_text_is_kept_and_does_not_hide_it_from_a_search(server: MsDicomApi) -> None:
    one = raw_value(image(new_uid()), MODALITY, b"CS", b"X\0")
    study = parse(one).StudyInstanceUID
    answer = server.single(one)
    assert answer.status_code == 200
    assert referenced(answer)[0]["00741048"] == {"vr": "SQ"}
    assert server.get(server.instance_path(one), "application/dicom; transfer-syntax=*").content == one
    assert value(server.query(f"/studies/{study}/metadata").json()[0], "00080060") == "X\0"
    for modality in ("X%00", "X"):
        found = server.query(f"/instances?StudyInstanceUID={study}&Modality={modality}")
        assert len(found.json()) == 1


@row("S33", versions=(2,))
def a_uid_padded_with_two_nulls_is_the_same_uid(server: MsDicomApi) -> None:
    uid = new_uid()
    uid += "1" * (len(uid) % 2)  # even, so that a null makes it odd and a second one pads it
    answer = server.single(raw_value(image(uid), STUDY_UID, b"UI", uid.encode() + b"\0\0"), f"/studies/{uid}")
    assert answer.status_code == 200
    assert referenced(answer)[0]["00741048"] == {"vr": "SQ"}
    assert len(server.query(f"/studies/{uid}/metadata").json()) == 1
    assert server.delete(f"/studies/{uid}").status_code == 204


@row("S34", versions=(2,))
def a_patient_id_padded_with_a_null_is_stored(server: MsDicomApi) -> None:
    answer = server.single(raw_value(image(new_uid()), PATIENT_ID, b"LO", b"123\0"))
    assert answer.status_code == 200
    assert referenced(answer)[0]["00741048"] == {"vr": "SQ"}


@row("S35", versions=(2,))
def a_patient_id_with_nulls_around_it_is_refused(server: MsDicomApi) -> None:
    answer = server.single(raw_value(image(new_uid()), PATIENT_ID, b"LO", b"\x00123\0\0"))
    assert (answer.status_code, reasons(answer)) == (409, [43264])
    assert "00081199" not in answer.json()


@row("S36", "S37", "S38", versions=(2,))
def a_later_patient_id_fills_an_empty_one_and_an_empty_one_removes_none(server: MsDicomApi) -> None:
    study = new_uid()

    def store(patient_id: str) -> requests.Response:
        return server.single(image(study, PatientID=patient_id))

    def patient_id() -> dict[str, Any]:
        found = server.query(f"/studies?StudyInstanceUID={study}").json()[0]
        return dict(found.get("00100020", {}))

    first = store("")
    assert first.status_code == 202
    assert comments(referenced(first)[0])[0].startswith("DICOM100: (0010,0020)")
    assert patient_id() == {}
    second = store("123")
    assert second.status_code == 200
    assert referenced(second)[0]["00741048"] == {"vr": "SQ"}
    assert patient_id()["Value"] == ["123"]
    third = store("")
    assert third.status_code == 202
    assert comments(referenced(third)[0])[0].startswith("DICOM100: (0010,0020)")
    assert patient_id()["Value"] == ["123"]


TOO_LONG = b"MORETHAN16CHARACTERS"


@row("S39", versions=(2,))
def a_text_that_is_too_long_is_stored_with_a_warning(server: MsDicomApi) -> None:
    assert server.single(raw_value(image(new_uid()), MODALITY, b"CS", TOO_LONG)).status_code == 202


class BigImage:
    """A file of 1.7 GB as a stream: a real header, then zeros for pixels."""

    def __init__(self, around: tuple[bytes, bytes] = (b"", b"")) -> None:
        small = image(new_uid())
        start = small.index(b"\xe0\x7f\x10\x00OW\0\0")
        pixels = 1_700_000_000
        self._head = around[0] + small[: start + 8] + pixels.to_bytes(4, "little")
        self._pixels, self._tail = pixels, around[1]
        self.size_bytes = len(self._head) + pixels + len(self._tail)

    def __len__(self) -> int:
        return self.size_bytes

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        megabyte = bytes(1_000_000)
        for _ in range(self._pixels // len(megabyte)):
            yield megabyte
        yield self._tail


@row("S40", versions=(2,))
def an_image_of_nearly_two_gigabytes_is_stored(server: MsDicomApi) -> None:
    assert server.single(iter(BigImage())).status_code == 200


@row("S41", versions=(2,))
def an_image_of_nearly_two_gigabytes_is_stored_as_a_part(server: MsDicomApi) -> None:
    around = (b"--frontier\r\nContent-Type: application/dicom\r\n\r\n", b"\r\n--frontier--\r\n")
    headers = {"Content-Type": f"{MULTI}; boundary=frontier", "Accept": DICOM_JSON}
    answer = server.send("POST", "/studies", data=iter(BigImage(around)), headers=headers)
    assert answer.status_code == 200


@row("S50", versions=(1,))
def version_1_refuses_a_text_that_is_too_long(server: MsDicomApi) -> None:
    answer = server.single(raw_value(image(new_uid()), MODALITY, b"CS", TOO_LONG))
    assert (answer.status_code, reasons(answer)) == (409, [43264])
    assert "00081199" not in answer.json()
    assert comments(answer.json()["00081198"]["Value"][0])


@row("S51", versions=(1,))
def version_1_refuses_a_null_within_a_patient_id_and_names_the_element(server: MsDicomApi) -> None:
    answer = server.single(raw_value(image(new_uid()), PATIENT_ID, b"LO", b"1\x0023"))
    assert answer.status_code == 409
    text = comments(answer.json()["00081198"]["Value"][0])[0]
    assert text.startswith("DICOM100: (0010,0020)")
    assert all(word in text for word in ("PatientID", "VR LO", "invalid character"))


# Delete


class Tree:
    """A study with so many instances in each of its series, stored."""

    def __init__(self, server: MsDicomApi, *counts: int) -> None:
        self.server = server
        self.study = new_uid()
        self.series = [new_uid() for _ in counts]
        self.files = [
            [image(self.study, series=series, seed=n) for n in range(count)]
            for series, count in zip(self.series, counts, strict=True)
        ]
        server.stored(*(one for files in self.files for one in files))

    @property
    def study_path(self) -> str:
        return f"/studies/{self.study}"

    def series_path(self, number: int) -> str:
        return f"{self.study_path}/series/{self.series[number]}"

    def instance_path(self, series: int, number: int) -> str:
        return self.server.instance_path(self.files[series][number])

    def count(self, path: str) -> int:
        """Parts of a retrieve; 0 stands for 404."""
        answer = self.server.get(path, f"{MULTI}; transfer-syntax=*")
        return 0 if answer.status_code == 404 else len(split(answer))


@row("D01")
def with_its_last_image_a_study_goes(server: MsDicomApi) -> None:
    tree = Tree(server, 1)
    assert server.delete(tree.instance_path(0, 0)).status_code == 204
    for path in (tree.instance_path(0, 0), tree.series_path(0), tree.study_path):
        assert tree.count(path) == 0


@row("D02", "D07", "D10")
def what_is_deleted_is_not_there_to_be_deleted_again(server: MsDicomApi) -> None:
    for level in (
        lambda tree: tree.instance_path(0, 0),
        lambda tree: tree.series_path(0),
        lambda tree: tree.study_path,
    ):
        path = level(Tree(server, 1))
        assert [server.delete(path).status_code for _ in range(2)] == [204, 404]


@row("D03")
def with_an_image_no_other_image_of_its_series_goes(server: MsDicomApi) -> None:
    tree = Tree(server, 2)
    server.delete(tree.instance_path(0, 0))
    assert (tree.count(tree.instance_path(0, 0)), tree.count(tree.series_path(0))) == (0, 1)


@row("D04")
def with_the_last_image_of_a_series_no_other_series_goes(server: MsDicomApi) -> None:
    tree = Tree(server, 1, 1)
    server.delete(tree.instance_path(0, 0))
    assert [tree.count(path) for path in (tree.series_path(0), tree.series_path(1), tree.study_path)] == [0, 1, 1]


@row("D05")
def with_one_of_two_images_its_series_stays(server: MsDicomApi) -> None:
    tree = Tree(server, 2, 1)
    server.delete(tree.instance_path(0, 0))
    assert [tree.count(path) for path in (tree.series_path(0), tree.series_path(1), tree.study_path)] == [1, 1, 2]


@row("D06")
def with_its_last_series_a_study_goes(server: MsDicomApi) -> None:
    tree = Tree(server, 1)
    assert server.delete(tree.series_path(0)).status_code == 204
    for path in (tree.instance_path(0, 0), tree.series_path(0), tree.study_path):
        assert tree.count(path) == 0


@row("D08")
def with_a_series_all_its_images_go(server: MsDicomApi) -> None:
    tree = Tree(server, 2)
    server.delete(tree.series_path(0))
    assert [tree.count(tree.instance_path(0, number)) for number in range(2)] == [0, 0]


@row("D09", "D11")
def with_a_study_all_its_series_and_images_go(server: MsDicomApi) -> None:
    for counts in ((1,), (2, 1)):
        tree = Tree(server, *counts)
        assert server.delete(tree.study_path).status_code == 204
        paths = [tree.instance_path(series, n) for series, count in enumerate(counts) for n in range(count)]
        paths += [tree.study_path, *(tree.series_path(number) for number in range(len(counts)))]
        assert {tree.count(path) for path in paths} == {0}


@row("D12", "D13", "D14")
def a_deletion_by_what_is_no_uid_is_a_400(server: MsDicomApi) -> None:
    good = new_uid()
    for path in (
        "/studies/notAStudyInstanceUid",
        "/studies/bad/series/bad",
        f"/studies/{good}/series/bad",
        "/studies/bad/series/bad/instances/bad",
        f"/studies/{good}/series/{good}/instances/bad",
    ):
        assert server.delete(path).status_code == 400


# Search


def tags(text: str) -> set[str]:
    return set(text.split())


def reduced(server: MsDicomApi, content: bytes, wanted: str) -> dict[str, Any]:
    """What the metadata says of an image, restricted to some attributes."""
    (metadata,) = server.query(server.instance_path(content) + "/metadata").json()
    return {tag: element for tag, element in metadata.items() if tag in tags(wanted)}


@row("Q01")
def a_search_for_studies_by_an_attribute_of_the_series_is_a_400(server: MsDicomApi) -> None:
    answer = server.query("/studies?Modality=CT")
    assert answer.status_code == 400
    assert "not queryable" in answer.text


@row("Q02")
def a_search_without_a_hit_is_a_204(server: MsDicomApi) -> None:
    server.stored(image(new_uid(), StudyDate="20260101"))
    answer = server.query("/studies?StudyDate=20200101")
    assert (answer.status_code, answer.content) == (204, b"")


@row("Q03")
def a_study_is_found_by_its_date_with_the_default_attributes(server: MsDicomApi) -> None:
    one = image(new_uid(), StudyDate="20190101")
    server.stored(one)
    answer = server.query("/studies?StudyDate=20190101")
    assert answer.status_code == 200
    assert answer.json() == [reduced(server, one, STUDY_DEFAULTS[server.version])]


@row("Q04", "Q05")
def a_study_is_found_by_a_modality_and_told_with_all_of_them(server: MsDicomApi) -> None:
    study, series = new_uid(), new_uid()
    two = [image(study, series=series, Modality="CT") for _ in range(2)]
    server.stored(*two, image(study, series=new_uid(), Modality="MR"))
    server.stored(image(new_uid(), Modality="US"))
    asked = f"/studies?ModalitiesInStudy=CT&StudyInstanceUID={study}&includefield=NumberOfStudyRelatedInstances"
    (found,) = server.query(asked).json()
    assert sorted(found["00080061"]["Value"]) == ["CT", "MR"]
    # The table says 00201206, which PS3.6 calls NumberOfStudyRelatedSeries; see docs/pacs-oddities.md.
    assert found["00201208"]["Value"] == [3]
    assert "00201206" not in found
    (found,) = server.query(f"/studies?ModalitiesInStudy=CT&StudyInstanceUID={study}").json()
    assert "00080061" in found
    assert server.query(f"/studies?ModalitiesInStudy=US&StudyInstanceUID={study}").status_code == 204


@row("Q06")
def a_name_is_found_without_its_accent(server: MsDicomApi) -> None:
    study = new_uid()
    server.stored(image(study, PatientName="Hall^X^Tá", SpecificCharacterSet="ISO_IR 192"))
    (found,) = server.query(f"/studies?StudyInstanceUID={study}&PatientName={quote('Hall^X^Ta')}").json()
    assert value(found, "00100010") == {"Alphabetic": "Hall^X^Tá"}


@row("Q07", "Q10", "Q11")
def series_and_images_of_a_study_are_found_by_their_modality(server: MsDicomApi) -> None:
    study = new_uid()
    first = image(study, series=new_uid(), Modality="MRI")
    server.stored(first, image(study, series=new_uid(), Modality="CT"))
    (found,) = server.query(f"/studies/{study}/series?Modality=MRI").json()
    assert found == reduced(server, first, SERIES_DEFAULTS[server.version] + " 0020000D")
    both = server.query(f"/studies/{study}/series").json()
    assert [value(one, "0020000D") for one in both] == [study, study]
    (found,) = server.query(f"/studies/{study}/instances?Modality=MRI").json()
    wanted = SERIES_DEFAULTS[server.version] + " " + INSTANCE_DEFAULTS[server.version] + " 0020000D"
    assert found == reduced(server, first, wanted)


@row("Q08")
def series_are_found_across_studies_with_the_attributes_of_both(server: MsDicomApi) -> None:
    one = image(new_uid(), Modality="MRI")
    server.stored(one)
    answer = server.query("/series?Modality=MRI")
    assert answer.headers["Content-Type"].split(";")[0] == DICOM_JSON
    wanted = STUDY_DEFAULTS[server.version] + " " + SERIES_DEFAULTS[server.version]
    assert reduced(server, one, wanted) in answer.json()


@row("Q09")
def the_images_of_a_series_are_counted(server: MsDicomApi) -> None:
    study, series = new_uid(), new_uid()
    server.stored(*(image(study, series=series, Modality="CT") for _ in range(2)))
    asked = f"/series?Modality=CT&includefield=NumberOfSeriesRelatedInstances&StudyInstanceUID={study}"
    (found,) = server.query(asked).json()
    assert found["00201209"]["Value"] == [2]


@row("Q12")
def an_image_of_a_series_is_found_by_its_uid(server: MsDicomApi) -> None:
    tree = Tree(server, 2)
    sop = parse(tree.files[0][0]).SOPInstanceUID
    (found,) = server.query(f"{tree.series_path(0)}/instances?SOPInstanceUID={sop}").json()
    assert [value(found, tag) for tag in ("0020000D", "0020000E", "00080018")] == [tree.study, tree.series[0], sop]


@row("Q13")
def images_are_found_across_studies_with_the_attributes_of_all_levels(server: MsDicomApi) -> None:
    one = image(new_uid(), Modality="XRAY")
    server.stored(one)
    defaults = (STUDY_DEFAULTS, SERIES_DEFAULTS, INSTANCE_DEFAULTS)
    wanted = " ".join(level[server.version] for level in defaults)
    assert reduced(server, one, wanted) in server.query("/instances?Modality=XRAY").json()


def polled(server: MsDicomApi, path: str, *, want: int) -> list[dict[str, Any]]:
    """The hits of a search whose index lags behind, once there are so many."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        answer = server.query(path)
        if answer.status_code == 200 and len(answer.json()) == want:
            found: list[dict[str, Any]] = answer.json()
            return found
        assert answer.status_code in (200, 204)
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {want} hits")


@row("Q14")
def a_fuzzy_search_finds_what_begins_alike_in_patients_names(server: MsDicomApi) -> None:
    middle = f"Mid{time.time_ns()}"
    server.stored(image(new_uid(), PatientName=f"Jonathan^{middle}^Stone"))
    server.stored(image(new_uid(), PatientName=f"Jon^{middle}^StoneHall"))
    assert len(polled(server, f"/studies?PatientName={middle}&FuzzyMatching=true", want=2)) == 2


@row("Q15")
def a_fuzzy_search_finds_what_begins_alike_in_physicians_names(server: MsDicomApi) -> None:
    name = f"Mid{time.time_ns()}"
    server.stored(image(new_uid(), ReferringPhysicianName=f"Jonathan^{name}^Stone"))
    assert polled(server, f"/studies?ReferringPhysicianName={name[:-4]}&FuzzyMatching=true", want=1)


@row("Q16")
def a_search_takes_limit_offset_fields_and_a_range_of_dates_together(server: MsDicomApi) -> None:
    server.stored(image(new_uid(), StudyDate="20200101"))
    asked = "/studies?limit=25&offset=0&includefield=00081030%2C00080060&StudyDate=19521125-20210507"
    assert server.query(asked).status_code == 200


# Retrieve


def lossless() -> tuple[bytes, np.ndarray[Any, Any]]:
    """An image stored as JPEG 2000 lossless, and its pixels."""
    one = with_new_uids(sample("MR_small_jp2klossless.dcm"))
    return one, parse(one).pixel_array


def accept(single: bool, syntax: str | None) -> str:
    kind = "application/dicom" if single else MULTI
    return kind if syntax is None else f"{kind}; transfer-syntax={syntax}"


def one_body(answer: requests.Response, single: bool) -> bytes:
    if not single:
        (body,) = contents_of(answer)
        return body
    assert answer.headers["Content-Type"].startswith("application/dicom")
    return answer.content


def check_transcoding(server: MsDicomApi, path_of: Callable[[bytes], str], single: bool = False) -> None:
    """R01-R04 and their like at the other levels."""
    compressed, pixels = lossless()
    server.stored(compressed)
    path = path_of(compressed)
    assert one_body(server.get(path, accept(single, "*")), single) == compressed
    for syntax in (None, EXPLICIT_LE):
        decoded = parse(one_body(server.get(path, accept(single, syntax)), single))
        assert decoded.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert np.array_equal(decoded.pixel_array, pixels)
    plain = with_new_uids(sample("MR_small.dcm"))
    server.stored(plain)
    encoded = parse(one_body(server.get(path_of(plain), accept(single, J2K)), single))
    assert encoded.file_meta.TransferSyntaxUID == J2K
    assert np.array_equal(encoded.pixel_array, parse(plain).pixel_array)


def study_path(content: bytes) -> str:
    return f"/studies/{parse(content).StudyInstanceUID}"


def series_path(content: bytes) -> str:
    return f"{study_path(content)}/series/{parse(content).SeriesInstanceUID}"


@row("R01", "R02", "R03", "R04")
def a_study_is_transcoded_as_asked(server: MsDicomApi) -> None:
    check_transcoding(server, study_path)


@row("R20", "R21", "R22", "R23")
def a_series_is_transcoded_as_asked(server: MsDicomApi) -> None:
    check_transcoding(server, series_path)


@row("R40", "R41", "R42", "R43")
def an_image_is_transcoded_as_asked(server: MsDicomApi) -> None:
    check_transcoding(server, server.instance_path, single=True)


@row("R05", "R06", "R07", "R24", "R25", "R26", "R47", "R48")
def a_retrieve_of_an_unknown_kind_is_a_406_before_it_is_a_404(server: MsDicomApi) -> None:
    study = f"/studies/{new_uid()}"
    series = f"{study}/series/{new_uid()}"
    for path in (study, series):
        for wrong in (accept(True, "*"), f"{OCTETS}; transfer-syntax=*", accept(False, MPEG2)):
            assert server.get(path, wrong).status_code == 406
    for wrong in ("application/octet-stream; transfer-syntax=*", accept(True, MPEG2)):
        assert server.get(f"{series}/instances/{new_uid()}", wrong).status_code == 406


@row("R08", "R27")
def all_images_of_a_study_and_of_a_series_come_as_they_were(server: MsDicomApi) -> None:
    tree = Tree(server, 2)
    server.stored(image(new_uid()))
    other = Tree(server, 2, 1)
    for path, files in (
        (tree.study_path, tree.files[0]),
        (other.series_path(0), other.files[0]),
        (other.study_path, other.files[0] + other.files[1]),
    ):
        assert sorted(contents_of(server.get(path, accept(False, "*")))) == sorted(files)


def check_mixed(server: MsDicomApi, level: Callable[[bytes], str]) -> None:
    plain = image(new_uid())
    ds = parse(plain)
    video = encapsulated(MPEG2, [b"mpeg"])
    moved = parse(video)
    moved.StudyInstanceUID, moved.SeriesInstanceUID = ds.StudyInstanceUID, ds.SeriesInstanceUID
    server.stored(plain, written(moved))
    assert server.get(level(plain), accept(False, EXPLICIT_LE)).status_code == 406
    answer = server.get(level(plain), accept(False, "*"))
    assert sorted(contents_of(answer)) == sorted([plain, written(moved)])
    kinds = {part.partition(b"\r\n\r\n")[0].decode() for part in split(answer)}
    assert kinds == {f"Content-Type: application/dicom; transfer-syntax={uid}" for uid in (EXPLICIT_LE, MPEG2)}


@row("R09", "R10")
def a_study_of_which_one_image_cannot_be_transcoded_comes_only_as_it_is(server: MsDicomApi) -> None:
    check_mixed(server, study_path)


@row("R28", "R29")
def a_series_of_which_one_image_cannot_be_transcoded_comes_only_as_it_is(server: MsDicomApi) -> None:
    check_mixed(server, series_path)


@row("R11", "R30", "R51")
def a_retrieve_of_what_is_not_there_is_a_404_at_each_level(server: MsDicomApi) -> None:
    known = image(new_uid())
    server.stored(known)
    for path in (
        f"/studies/{new_uid()}",
        f"{study_path(known)}/series/{new_uid()}",
        f"{series_path(known)}/instances/{new_uid()}",
    ):
        answer = server.get(path, accept(False, "*"))
        assert answer.status_code == 404
        assert answer.text


@row("R12", "R31", "R52")
def an_image_without_pixels_comes_as_it_was(server: MsDicomApi) -> None:
    plain = without_pixels()
    server.stored(plain)
    for path in (study_path(plain), series_path(plain)):
        assert contents_of(server.get(path, accept(False, "*"))) == [plain]
    assert server.get(server.instance_path(plain), accept(True, "*")).content == plain


@row("R44", "R45", "R46")
def a_single_image_comes_as_a_part_too(server: MsDicomApi) -> None:
    one = image(new_uid())
    server.stored(one)
    for syntax in ("*", None, EXPLICIT_LE):
        assert contents_of(server.get(server.instance_path(one), accept(False, syntax))) == [one]


@row("R49", "R50")
def a_video_comes_only_as_it_is(server: MsDicomApi) -> None:
    video = encapsulated(MPEG2, [b"mpeg"])
    server.stored(video)
    path = server.instance_path(video)
    assert server.get(path, accept(True, EXPLICIT_LE)).status_code == 406
    assert server.get(path, accept(True, "*")).content == video


@row("R53", "R54", "R55", "R56")
def a_uid_is_found_with_its_blank_and_without(server: MsDicomApi) -> None:
    for spaces in (0, 1):
        uid = new_uid()
        uid += "1" * ((len(uid) + spaces) % 2)
        one = _with_uid_and_spaces(image(uid), uid, spaces)
        assert server.single(one).ok
        for asked in (uid, uid + "%20"):
            answer = server.get(f"/studies/{asked}", accept(False, "*"))
            assert contents_of(answer) == [one]
            (found,) = server.query(f"/studies?StudyInstanceUID={asked}").json()
            assert value(found, "0020000D") == uid + " " * spaces


@row("R57")
def a_sample_of_pydicom_comes_as_file_metadata_and_frame(server: MsDicomApi) -> None:
    server.stored(sample("CT_small.dcm"))
    path = server.instance_path(sample("CT_small.dcm"))
    answers = [
        server.get(path, accept(True, "*")),
        server.query(path + "/metadata"),
        server.get(path + "/frames/1", "application/octet-stream"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]


# Frames


@row("F01", "F02", "F03")
def a_frame_comes_decoded_or_as_it_was(server: MsDicomApi) -> None:
    compressed, pixels = lossless()
    server.stored(compressed)
    path = server.instance_path(compressed) + "/frames/1"
    for wanted in (OCTETS, f"{OCTETS}; transfer-syntax={EXPLICIT_LE}"):
        assert contents_of(server.get(path, wanted)) == [pixels.tobytes()]
    (original,) = contents_of(server.get(path, f"{OCTETS}; transfer-syntax=*"))
    assert original.startswith(b"\xff\x4f\xff\x51")
    assert original in compressed


@row("F04", "F05")
def a_frame_is_encoded_as_jpeg_2000(server: MsDicomApi) -> None:
    plain = with_new_uids(sample("MR_small.dcm"))
    server.stored(plain)
    for syntax in ("", f"; transfer-syntax={J2K}"):
        answer = server.get(server.instance_path(plain) + "/frames/1", f'multipart/related; type="image/jp2"{syntax}')
        (frame,) = contents_of(answer)
        assert frame.startswith(b"\xff\x4f\xff\x51")


@row("F06", "F07", "F08")
def a_frame_of_a_video_comes_only_as_it_is(server: MsDicomApi) -> None:
    video = encapsulated(HEVC, [b"hevc-frame"])
    server.stored(video)
    path = server.instance_path(video) + "/frames/1"
    for wanted in (f"{OCTETS}; transfer-syntax=*", "*/*"):
        assert contents_of(server.get(path, wanted)) == [b"hevc-frame"]
    assert server.get(path, f"{OCTETS}; transfer-syntax={J2K}").status_code == 406


@row("F09", "F10")
def several_frames_come_in_parts_and_one_alone(server: MsDicomApi) -> None:
    three = multi_frame(3)
    server.stored(three)
    path = server.instance_path(three) + "/frames/"
    for comma in (",", "%2C"):
        frames = contents_of(server.get(f"{path}1{comma}2", f"{OCTETS}; transfer-syntax=*"))
        assert frames == [bytes([1]) * 128, bytes([2]) * 128]
    answer = server.get(path + "1", "application/octet-stream")
    assert answer.headers["Content-Type"].split(";")[0] == "application/octet-stream"
    assert answer.content == bytes([1]) * 128


@row("F11")
def a_frame_behind_the_last_is_a_404(server: MsDicomApi) -> None:
    two = multi_frame(2)
    server.stored(two)
    assert server.get(server.instance_path(two) + "/frames/4", OCTETS).status_code == 404


@row("F12", "F13", "F14", "F15")
def a_number_that_is_no_frames_is_a_400(server: MsDicomApi) -> None:
    for frames in ("0", "-1", "1,-1", "0,1"):
        path = f"/studies/{new_uid()}/series/{new_uid()}/instances/{new_uid()}/frames/{frames}"
        assert server.get(path, OCTETS).status_code == 400


@row("F16")
def a_frame_with_an_odd_number_of_bytes_comes_as_it_was(server: MsDicomApi) -> None:
    tiled = with_new_uids(sample("SC_rgb_small_odd_jpeg.dcm"))
    server.stored(tiled)
    (frame,) = contents_of(server.get(server.instance_path(tiled) + "/frames/1", "*/*"))
    assert frame.startswith(b"\xff\xd8")


# Rendered


@row("V01", "V02")
def an_image_is_rendered_as_jpeg_and_png(server: MsDicomApi) -> None:
    one = with_new_uids(sample("CT_small.dcm"))
    server.stored(one)
    for media, magic in (("image/jpeg", b"\xff\xd8"), ("image/png", b"\x89PNG")):
        answer = server.get(server.instance_path(one) + "/rendered", media)
        assert answer.ok
        assert answer.headers["Content-Type"] == media
        assert answer.content.startswith(magic)


@row("V03", "V04", "V05")
def a_frame_is_rendered_in_the_quality_asked_for(server: MsDicomApi) -> None:
    three = multi_frame(3)
    server.stored(three)
    path = server.instance_path(three) + "/frames/"
    for number in (1, 2):
        answer = server.get(f"{path}{number}/rendered")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/jpeg")
        for quality in (1, 100):
            assert server.get(f"{path}{number}/rendered?quality={quality}", "image/jpeg").ok
    assert server.get(path + "5/rendered").status_code == 404
    assert server.get(path + "1/rendered?quality=101").status_code == 400
    assert server.get(path + "1/rendered", "*/*").status_code == 406


# Metadata


def metadata_paths(content: bytes, server: MsDicomApi) -> list[str]:
    levels = (study_path(content), series_path(content), server.instance_path(content))
    return [path + "/metadata" for path in levels]


@row("M01", "M02", "M03")
def metadata_of_an_unknown_kind_are_a_406(server: MsDicomApi) -> None:
    for path in metadata_paths(image(new_uid()), server):
        assert server.get(path, "application/data").status_code == 406


@row("M04", "M05", "M06")
def metadata_of_what_is_not_there_are_a_404(server: MsDicomApi) -> None:
    known = image(new_uid())
    server.stored(known)
    for path in (
        f"/studies/{new_uid()}",
        f"{study_path(known)}/series/{new_uid()}",
        f"{series_path(known)}/instances/{new_uid()}",
    ):
        assert server.query(path + "/metadata").status_code == 404


@row("M07", "M08", "M09")
def metadata_of_a_study_and_of_a_series_hold_all_images_and_no_bulk_data(server: MsDicomApi) -> None:
    tree = Tree(server, 2)
    item = Dataset()
    item.add_new(0x00091001, "OB", b"bulk")
    item.CodeValue = "here"
    ds = parse(image(tree.study, series=tree.series[0]))
    ds.ProcedureCodeSequence = [item]
    server.stored(written(ds))
    for path in (tree.study_path, tree.series_path(0)):
        answer = server.query(path + "/metadata")
        assert answer.headers["Content-Type"].split(";")[0] == DICOM_JSON
        assert len(answer.json()) == 3
        assert "7FE00010" not in answer.text
        assert "00091001" not in answer.text
        assert "BulkDataURI" not in answer.text
    (one,) = server.query(server.instance_path(written(ds)) + "/metadata").json()
    assert one["00081032"]["Value"] == [{"00080100": {"vr": "SH", "Value": ["here"]}}]
    assert value(one, "00200013") == 1


@row("M10", "M11", "M12", "M13", "M14", "M15", "M16", "M17", "M18")
def metadata_that_did_not_change_are_a_304(server: MsDicomApi) -> None:
    one = image(new_uid())
    server.stored(one)
    for path in metadata_paths(one, server):
        full = server.query(path)
        etag = full.headers["ETag"]
        assert not etag.startswith('"')
        same = server.get(path, DICOM_JSON, **{"If-None-Match": etag})
        assert (same.status_code, same.content) == (304, b"")
        assert "ETag" not in same.headers
        other = server.get(path, DICOM_JSON, **{"If-None-Match": "1" + etag})
        assert (other.status_code, other.json()) == (200, full.json())


@row("M19", "M20")
def metadata_change_with_a_new_image(server: MsDicomApi) -> None:
    tree = Tree(server, 1)
    for path in (tree.study_path, tree.series_path(0)):
        etag = server.query(path + "/metadata").headers["ETag"]
        before = len(server.query(path + "/metadata").json())
        server.stored(image(tree.study, series=tree.series[0]))
        answer = server.get(path + "/metadata", DICOM_JSON, **{"If-None-Match": etag})
        assert (answer.status_code, len(answer.json())) == (200, before + 1)


@row("M21", "M22")
def metadata_change_with_a_deletion(server: MsDicomApi) -> None:
    tree = Tree(server, 3)
    for number, path in enumerate((tree.study_path, tree.series_path(0))):
        etag = server.query(path + "/metadata").headers["ETag"]
        server.delete(tree.instance_path(0, number))
        answer = server.get(path + "/metadata", DICOM_JSON, **{"If-None-Match": etag})
        assert (answer.status_code, len(answer.json())) == (200, 2 - number)


# Change feed


def feed(server: MsDicomApi, query: str = "") -> list[dict[str, Any]]:
    answer = server.get("/changefeed" + query)
    assert answer.status_code == 200
    entries: list[dict[str, Any]] = answer.json()
    return entries


def newest(server: MsDicomApi) -> dict[str, Any] | None:
    """The last entry so far; None if the server has never stored anything."""
    answer = server.get("/changefeed/latest")
    return None if answer.status_code == 204 else answer.json()


def feed_after(server: MsDicomApi, last: dict[str, Any] | None, more: str = "") -> list[dict[str, Any]]:
    if last is None:
        return feed(server, f"?{more}")
    if server.version == 1:
        return feed(server, f"?offset={last['sequence']}&{more}")
    entries = feed(server, f"?startTime={stamp(last)}&limit=200&{more}")
    return [entry for entry in entries if entry["sequence"] > last["sequence"]]


def fed_sop(entry: dict[str, Any]) -> str:
    return str(entry["sopInstanceUid"])


def stored_ten(server: MsDicomApi) -> list[str]:
    ten = [image(new_uid(), side=8) for _ in range(10)]
    server.stored(*ten)
    return [str(parse(one).SOPInstanceUID) for one in ten]


@row("C01", versions=(1,))
def version_1_feeds_the_latest_change(server: MsDicomApi) -> None:
    one = image(new_uid())
    server.stored(one)
    latest = server.get("/changefeed/latest").json()
    assert fed_sop(latest) == parse(one).SOPInstanceUID
    assert (latest["action"].lower(), latest["state"].lower()) == ("create", "current")
    stored_ten(server)


@row("C02", "C03", versions=(1,))
def version_1_feeds_ten_changes_from_an_offset(server: MsDicomApi) -> None:
    server.stored(image(new_uid()))
    sops = stored_ten(server)
    assert len(feed(server)) == 10
    latest = server.get("/changefeed/latest").json()["sequence"]
    entries = feed(server, f"?offset={latest - 10}")
    assert [fed_sop(entry) for entry in entries] == sops
    assert all(entry["metadata"]["00080018"] for entry in entries)


def stamp(entry: dict[str, Any]) -> str:
    return quote(str(entry["timestamp"]))


@row("C04", versions=(2,))
def version_2_feeds_changes_of_a_time(server: MsDicomApi) -> None:
    server.stored(image(new_uid()))
    t0 = stamp(server.get("/changefeed/latest").json())
    sops = []
    for _n in range(3):
        one = image(new_uid(), side=8)
        server.stored(one)
        sops.append(parse(one).SOPInstanceUID)
    entries = feed(server, f"?startTime={t0}&limit=10")[1:]
    assert [fed_sop(entry) for entry in entries] == sops
    page = feed(server, f"?startTime={t0}&limit=1&offset=2")
    assert [fed_sop(entry) for entry in page] == [sops[1]]
    before_last = feed(server, f"?startTime={t0}&endTime={stamp(entries[-1])}")[1:]
    assert [fed_sop(entry) for entry in before_last] == sops[:2]


@row("C05")
def a_change_says_whether_its_image_was_replaced_or_deleted(server: MsDicomApi) -> None:
    one, last = image(new_uid()), newest(server)

    def latest() -> tuple[str, str, bool]:
        entry = server.get("/changefeed/latest").json()
        assert fed_sop(entry) == parse(one).SOPInstanceUID
        return entry["action"].lower(), entry["state"].lower(), "metadata" in entry

    server.stored(one)
    assert latest() == ("create", "current", True)
    server.delete(server.instance_path(one))
    assert latest() == ("delete", "deleted", False)
    server.stored(one)
    assert latest() == ("create", "current", True)
    states = [entry["state"].lower() for entry in feed_after(server, last)]
    assert states == ["replaced", "replaced", "current"]


@row("C06", "C25")
def a_change_comes_without_metadata_if_none_are_wanted(server: MsDicomApi) -> None:
    last = newest(server)
    server.stored(image(new_uid()))
    (entry,) = feed_after(server, last, "includeMetadata=false")
    assert "metadata" not in entry
    assert "filePath" not in entry


@row("C07", "C08", "C09", "C10", "C11", "C12", versions=(2,))
def a_time_of_the_feed_that_is_none_is_a_400(server: MsDicomApi) -> None:
    for wrong in (
        "startTime=foo",
        "endTime=foo",
        "startTime=2024-01-01T00:00:00",
        "endTime=2024-01-01T00:00:00",
        "startTime=2024-01-02T00:00:00Z&endTime=2024-01-02T00:00:00Z",
        "startTime=2024-01-02T00:00:00Z&endTime=2024-01-01T00:00:00Z",
    ):
        assert server.get(f"/changefeed?{wrong}").status_code == 400


@row("C13", "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21")
def a_limit_or_offset_of_the_feed_that_is_none_is_a_400(server: MsDicomApi) -> None:
    for wrong in (
        *("limit=-1", "limit=0", "limit=foo", "offset=-1", "offset=12345678901234567890123", "offset=foo"),
        *("includeMetadata=0", "includeMetadata=foo", "includeMetadata="),
    ):
        assert server.get(f"/changefeed?{wrong}").status_code == 400


@row("C22", versions=(1,))
def version_1_feeds_a_hundred_changes_at_most(server: MsDicomApi) -> None:
    assert server.get("/changefeed?limit=101").status_code == 400


@row("C23", versions=(2,))
def version_2_feeds_two_hundred_changes_at_most(server: MsDicomApi) -> None:
    assert server.get("/changefeed?limit=101").status_code == 200
    assert server.get("/changefeed?limit=201").status_code == 400


@row("C24")
def the_latest_change_takes_no_odd_word_for_metadata(server: MsDicomApi) -> None:
    assert server.get("/changefeed/latest?includeMetadata=asdf").status_code == 400


# Bulk update, health, tokens


@row("U01", versions=(1,))
def version_1_has_no_bulk_update(server: MsDicomApi) -> None:
    assert server.send("POST", "/studies/$bulkUpdate", json={}).status_code == 404


@row("H01")
def its_health_has_four_checks(server: MsDicomApi) -> None:
    answer = server.get(server.origin + "/health/check")
    assert answer.status_code == 200
    names = {"DataStoreHealthCheck", "DcmHealthCheck", "MetadataHealthCheck", "WorkitemHealthCheck"}
    assert {entry["name"] for entry in answer.json()["details"]} == names


def bearer(server: MsDicomApi, client: str) -> dict[str, str]:
    form = {
        "grant_type": "client_credentials",
        "client_id": client,
        "client_secret": f"{client}-secret",
        "scope": "https://dicom.healthcareapis.azure.com/.default",
    }
    only_the_sandbox("asks its own endpoint for tokens", "msdicom")
    answer = server.http.post(f"{server.part.control}/entra/tenant/oauth2/v2.0/token", data=form, timeout=10)
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


@row("A01")
def without_a_token_it_is_a_401(server: MsDicomApi) -> None:
    server.part.set_fault("msdicom", "*", bearer=True)
    answer = server.query("/studies")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@row("A02", "A03")
def a_reader_may_search_and_not_store(server: MsDicomApi) -> None:
    server.part.set_fault("msdicom", "*", bearer=True)
    reader = bearer(server, "visitor")
    assert server.get("/studies", DICOM_JSON, **reader).status_code == 204
    assert server.get("/changefeed", **reader).status_code == 200
    assert server.single(image(new_uid()), **reader).status_code == 403
    assert server.single(image(new_uid()), **bearer(server, "courier")).status_code == 200


# Unit-level rows


@row("N01", "N02", "N03", "N04")
def only_what_means_dicom_json_is_accepted(server: MsDicomApi) -> None:
    server.stored(image(new_uid()))
    for good in (
        *("*/*", "application/*", "application/json", "APPLICATION/DICOM+JSON"),
        *("application/dicom+json; transfer-syntax=*", "application/dicom, text/html, application/dicom+json"),
    ):
        assert server.get("/studies", good).status_code == 200, good
    strict = "application/dicom+json, multipart/related; type=application/octet-stream"
    for bad in (None, "", "application/dicom+json+x", "application/dicom", "text/*", strict):
        answer = server.get("/studies", bad)
        assert (answer.status_code, answer.content) == (406, b""), bad


@row("N05", "N06")
def only_what_means_dicom_is_stored(server: MsDicomApi) -> None:
    for content, status in (
        (MULTI, 415),
        ("text/plain", 415),
        ('multipart/form-data; boundary="frontier"', 415),
        ("multipart/related; type=application/dicom; boundary=frontier", 415),
        ("application/dicom; transfer-syntax=1.2.840.10008.1.2.1", 415),
        (f"{MULTI}; boundary=frontier; start=here", 400),
    ):
        assert server.multi(image(new_uid()), **{"Content-Type": content}).status_code == status, content
    part = multipart(image(new_uid())).replace(b"application/dicom\r\n", b"application/dicom; a=b\r\n", 1)
    headers = {"Content-Type": f"{MULTI}; boundary=frontier", "Accept": DICOM_JSON}
    assert server.send("POST", "/studies", data=part, headers=headers).status_code == 415
    assert server.query("/studies").status_code == 204


def broken(server: MsDicomApi, content: bytes) -> requests.Response:
    headers = {"Content-Type": f"{MULTI}; boundary=frontier", "Accept": DICOM_JSON}
    return server.send("POST", "/studies", data=content, headers=headers)


@row("N07")
def of_a_body_that_is_cut_short_the_whole_parts_are_stored(server: MsDicomApi) -> None:
    first, second = image(new_uid()), image(new_uid())
    answer = broken(server, multipart(first, second)[:-1000])
    assert answer.status_code == 200
    assert [sop_of(item) for item in referenced(answer)] == [parse(first).SOPInstanceUID]
    answer = broken(server, multipart(second)[:-1000])
    assert (answer.status_code, answer.content) == (204, b"")


@row("N08")
def a_body_without_its_last_boundary_is_a_204_and_one_without_any_a_400(server: MsDicomApi) -> None:
    only = image(new_uid())
    answer = broken(server, multipart(only).removesuffix(b"\r\n--frontier--\r\n"))
    assert answer.status_code == 204
    assert broken(server, b"--frontier\r\nContent-Type: application/dic").status_code == 400
    assert broken(server, b"no boundary at all").status_code == 400


@row("N09")
def a_body_above_two_gigabytes_is_a_413_by_its_length(server: MsDicomApi) -> None:
    only_the_sandbox("writes to the socket", "msdicom")
    place = urlsplit(server.base)
    head = (
        f"POST {place.path}/studies HTTP/1.1\r\nHost: {place.netloc}\r\nAccept: {DICOM_JSON}\r\n"
        f"Content-Type: {MULTI}; boundary=frontier\r\nContent-Length: 2147483648\r\n\r\n"
    )
    with socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=10) as wire:
        wire.sendall(head.encode())
        assert wire.recv(100).startswith(b"HTTP/1.1 413 ")


@row("N10", "N11", "N12", "N13")
def a_search_by_what_is_no_value_is_a_400(server: MsDicomApi) -> None:
    for wrong in (
        *("StudyDate=20200110-20200109", "StudyDate=-", "StudyDate=20200230", "StudyDate=2020/02/28"),
        *("PatientID=1&00100020=1", "PatientID=1&PatientID=2"),
        *("PatientName=%20", "PatientName=", "NoSuchKeyword=1", "00390061=1", "patientid=1", "StudyTime=12"),
        *(
            "fuzzymatching=true&PatientName=a%22b",
            "fuzzymatching=maybe",
            "limit=0",
            "limit=201",
            "limit=x",
            "offset=-1",
        ),
        *(
            "includefield=all&includefield=StudyDate",
            "includefield=nope",
            "PatientID=%3Cscript",
            "OtherPatientIDsSequence.PatientID=1",
        ),
    ):
        answer = server.query(f"/studies?{wrong}")
        assert answer.status_code == 400, wrong
        assert answer.headers["Content-Type"].startswith("text/plain")


@row("N15")
def without_its_database_it_answers_503_and_refuses_each_image(server: MsDicomApi) -> None:
    server.stored(image(new_uid()))
    server.part.set_fault("msdicom", "*", database_down=True)
    for path in ("/studies", f"/studies/{new_uid()}/metadata"):
        assert server.query(path).status_code == 503
    answer = server.single(image(new_uid()))
    assert (answer.status_code, reasons(answer)) == (409, [272])


# -- all of them ------------------------------------------------------------------------------------------------------

#: A minute of zeros: in `make chaos`.
_FULL = {"S40", "S41"}
_LENGTHS = {
    "S": [*range(1, 23), *range(30, 42), 50, 51, 52],
    "D": range(1, 16),
    "Q": range(1, 17),
    "R": [*range(1, 13), *range(20, 32), *range(40, 58)],
    "F": range(1, 17),
    "V": range(1, 6),
    "M": range(1, 23),
    "C": range(1, 26),
    "P": range(1, 10),
    "X": range(1, 6),
    "U": range(1, 5),
    "W": range(1, 8),
    "H": [1],
    "A": range(1, 4),
    "E": [1],
    "N": range(1, 16),
}
ALL_ROWS = {f"{letter}{number:02}" for letter, numbers in _LENGTHS.items() for number in numbers}


@pytest.fixture(scope="module")
def http() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def _all_of_them() -> list[Any]:
    held: dict[Row, list[str]] = {}
    for one, (function, _) in sorted(ROWS.items()):
        held.setdefault(function, []).append(one)
    return [
        pytest.param(
            function, id=f"{' '.join(ids)} {function.__name__}", marks=[pytest.mark.full] if _FULL & set(ids) else []
        )
        for function, ids in held.items()
    ]


@pytest.mark.parametrize("holds", _all_of_them())
def test_what_was_seen_of_an_msdicom_holds(holds: Row, sandbox: SandboxPart, http: requests.Session) -> None:
    (versions,) = {versions for function, versions in ROWS.values() if function is holds}
    for version in versions:
        sandbox.reset_faults()
        sandbox.empty()
        holds(MsDicomApi(sandbox, version, http))


def test_every_row_is_run_or_listed_with_its_reason() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text(encoding="utf-8")
    section = text.split("### Rows of MSDICOM that are not run")[1].split("\n#")[0]
    listed = {
        one
        for line in section.splitlines()
        if line.startswith("| ")
        for one in re.findall(r"\b[A-Z]\d\d\b", line.split("|")[1])
    }
    assert listed.isdisjoint(ROWS)
    assert listed | set(ROWS) == ALL_ROWS
    assert len(listed) * 4 <= len(ALL_ROWS)


# -- what has no row --------------------------------------------------------------------------------------------------


@pytest.fixture
def v2(sandbox: SandboxPart, http: requests.Session) -> MsDicomApi:
    return MsDicomApi(sandbox, 2, http)


def test_paths_bear_a_known_version_and_answers_name_them(v2: MsDicomApi) -> None:
    origin = v2.origin
    assert v2.get(origin + "/v3/studies", DICOM_JSON).status_code == 400
    assert v2.get(origin + "/studies", DICOM_JSON).status_code == 404
    answer = v2.get(origin + "/v1.0/studies", DICOM_JSON)
    assert answer.status_code == 204
    assert answer.headers["api-supported-versions"]


def test_there_is_no_put_and_no_partition(v2: MsDicomApi) -> None:
    assert v2.send("PUT", f"/studies/{new_uid()}", data=b"").status_code == 405
    assert v2.get("/partitions").status_code == 400
    assert v2.get("/partitions/one/studies", DICOM_JSON).status_code == 400


def test_retrieves_want_an_accept_header_and_answer_a_wildcard_in_parts(v2: MsDicomApi) -> None:
    one = image(new_uid())
    v2.stored(one)
    path = v2.instance_path(one)
    for resource in (study_path(one), path, path + "/frames/1", path + "/metadata"):
        assert v2.get(resource).status_code == 406
    assert contents_of(v2.get(path, "*/*")) == [one]
    (part,) = parts_of(v2.get(path, "*/*"))
    assert part.items() == [("Content-Type", f"application/dicom; transfer-syntax={EXPLICIT_LE}")]


def test_several_instances_are_only_given_as_stored(v2: MsDicomApi) -> None:
    tree = Tree(v2, 2)
    for syntax in (None, EXPLICIT_LE):
        assert v2.get(tree.study_path, accept(False, syntax)).status_code == 406


def test_an_implicit_file_comes_back_explicit_unless_asked_for_as_stored(v2: MsDicomApi) -> None:
    ds = parse(image(new_uid()))
    ds.file_meta.TransferSyntaxUID = IMPLICIT_LE
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, implicit_vr=True, little_endian=True, enforce_file_format=True)
    implicit = buffer.getvalue()
    assert v2.single(implicit).ok
    path = v2.instance_path(implicit)
    assert v2.get(path, "application/dicom; transfer-syntax=*").content == implicit
    explicit = parse(v2.get(path, "application/dicom").content)
    assert explicit.file_meta.TransferSyntaxUID == EXPLICIT_LE
    assert explicit.PixelData == ds.PixelData


def test_a_deleted_instance_can_be_stored_again_at_once(v2: MsDicomApi) -> None:
    one = image(new_uid())
    v2.stored(one)
    assert v2.delete(v2.instance_path(one)).status_code == 204
    assert v2.single(one).status_code == 200


def test_frames_are_served_from_a_cache_that_no_delete_clears(v2: MsDicomApi) -> None:
    only_the_sandbox("sets its clock", "msdicom")
    one = image(new_uid())
    v2.stored(one)
    path = v2.instance_path(one)
    before = v2.get(path + "/frames/1", "application/octet-stream")
    assert before.status_code == 200
    v2.delete(path)
    after = v2.get(path + "/frames/1", "application/octet-stream")
    assert (after.status_code, after.content) == (200, before.content)
    requests.put(f"{v2.part.control}/clock", json={"advance_s": 301}, timeout=10)
    assert v2.get(path + "/frames/1", "application/octet-stream").status_code == 404


def test_a_file_without_preamble_is_none(v2: MsDicomApi) -> None:
    answer = v2.single(image(new_uid())[132:])
    assert (answer.status_code, reasons(answer)) == (409, [43264])
    assert set(answer.json()["00081198"]["Value"][0]) == {"00081197"}


def test_pages_end_with_a_204_and_are_filled_newest_first(v2: MsDicomApi) -> None:
    studies = [new_uid() for _ in range(5)]
    for study in studies:
        v2.stored(image(study, side=8))
    pages = [v2.query(f"/studies?limit=2&offset={offset}") for offset in (0, 2, 4, 6)]
    found = [{value(hit, "0020000D") for hit in page.json()} for page in pages[:3]]
    assert found == [set(studies[3:]), set(studies[1:3]), {studies[0]}]
    assert (pages[3].status_code, pages[3].content) == (204, b"")


def test_fields_beyond_the_index_come_from_the_newest_instance(v2: MsDicomApi) -> None:
    study = new_uid()
    v2.stored(image(study, BodyPartExamined="HEAD"))
    v2.stored(image(study, BodyPartExamined="FOOT"))
    (found,) = v2.query(f"/studies?StudyInstanceUID={study}&includefield=BodyPartExamined").json()
    assert value(found, "00180015") == "FOOT"
    (found,) = v2.query(f"/studies?StudyInstanceUID={study}").json()
    assert set(found) <= tags(STUDY_DEFAULTS[2])


def test_the_stored_url_follows_the_host_header(v2: MsDicomApi) -> None:
    only_the_sandbox("answers to any name", "msdicom")
    one = image(new_uid())
    headers = {"Accept": DICOM_JSON, "Content-Type": "application/dicom", "Host": "pacs.example"}
    answer = v2.send("POST", "/studies", data=one, headers=headers)
    assert value(referenced(answer)[0], "00081190") == "http://pacs.example/v2" + v2.instance_path(one)
