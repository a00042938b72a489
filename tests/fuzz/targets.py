"""What is fuzzed: every reader of what others wrote, with the properties that hold of it beyond not failing.

How a case is measured is the meter's; how one comes about, the mutator's and Hypothesis'.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pydicom
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from courier.errors import CourierError, PacsMisanswered
from courier.ledger.jobs import content_digest
from courier.messages import Job, read_job
from courier.redaction import redact_job, redact_url
from courier.results import Dataset
from courier.settings import ServerSettings, SourceSettings
from producer.inputs import Items, rows_of_stream, study_uid
from producer.plans import PlanFile, PlanHeader, PlanLine, write
from sandbox.synthetic import image
from tests.fuzz.meter import ALLOWANCE_BYTES, BrokenProperty, FuzzTarget, encodes
from tests.fuzz.secrets import SECRET, hides_it, must_not_show
from worker.dicom.instances import Instance, Reading, identify
from worker.pacs.dcm4chee import Dcm4chee, error_message
from worker.pacs.dicomjson import items, number, text
from worker.pacs.dicomweb import DicomWeb, path_of
from worker.pacs.generic import GenericDicomWeb
from worker.pacs.msdicom import MsDicom
from worker.pacs.multipart import read_parts
from worker.pacs.orthanc import Orthanc
from worker.pacs.protocol import Fate, Found, Outcome, Part, Retrieved
from worker.pacs.transport import Answer, Request, Transport
from worker.storage.policy import Policy
from worker.storage.policy import Target as Url
from worker.storage.spool import CHUNK_BYTES, Limits, spool
from worker.storage.zip_source import Archives

STUDY, SERIES, IMAGE = "1.2.840.99.1", "1.2.840.99.1.1", "1.2.840.99.1.1.1"
_SEED_BYTES = 64 * 1024
_MIB = 1024**2

# --- files -------------------------------------------------------------------------------------------------------


@functools.cache
def _files() -> list[bytes]:
    """pydicom's public samples and synthetic images, those that are small."""
    folder = Path(str(get_testdata_file("CT_small.dcm"))).parent
    samples = [path for path in sorted(folder.glob("*.dcm")) if path.stat().st_size <= _SEED_BYTES]
    return [
        *(path.read_bytes() for path in samples),
        image(STUDY, series=SERIES, sop=IMAGE, side=8),
        image(STUDY, series=SERIES, sop=IMAGE, side=64, seed=1),
        _bomb(),
    ]


def _bomb() -> bytes:
    """A file whose 16 KiB inflate to 16 MiB without a UID among them."""
    meta = b"\x02\x00\x10\x00UI\x16\x00" + b"1.2.840.10008.1.2.1.99"
    dataset = b"\x08\x00\x08\x00LO\x02\x00A " * (16 * _MIB // 10)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return bytes(128) + b"DICM" + meta + deflate.compress(dataset) + deflate.flush()


@st.composite
def _shaped_file(draw: st.DrawFn) -> bytes:
    """Elements with every VR, right and wrong lengths, nested or not, behind a preamble and a meta group."""
    syntax = draw(st.sampled_from((b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0")))
    meta = b"\x02\x00\x10\x00UI" + len(syntax).to_bytes(2, "little") + syntax
    return bytes(128) + b"DICM" + meta + b"".join(draw(st.lists(_element, max_size=14)))


def _explicit(tag: bytes, vr: bytes, value: bytes, length: int) -> bytes:
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return tag + vr + b"\0\0" + (length % 2**32).to_bytes(4, "little") + value
    return tag + vr + (length % 2**16).to_bytes(2, "little") + value


_TAGS = st.sampled_from(
    [
        bytes.fromhex(tag)
        for tag in ("08001600", "08001800", "20000d00", "20000e00", "08000500", "e07f1000", "feff00e0", "feffdde0")
    ]
)
_element = st.builds(
    lambda tag, vr, value, off: _explicit(tag, vr, value, len(value) + off if off is not None else -1),
    st.one_of(_TAGS, _TAGS, st.binary(min_size=4, max_size=4)),
    st.sampled_from((b"UI", b"UI", b"UI", b"LO", b"SQ", b"UN", b"OB", b"UT", b"zz")),
    st.one_of(st.sampled_from((b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.3 ", b"1.2.3.4\0", b"")), st.binary(max_size=80)),
    st.sampled_from((0, 0, 0, 0, 0, 1, -1, 100_000, None)),
)


def _identify(case: bytes) -> Instance:
    """Both ways of reading a file; they have to agree."""
    arriving = _arriving(case)
    try:
        instance = identify(io.BytesIO(case))
    except CourierError as error:
        if not isinstance(arriving, CourierError):
            raise BrokenProperty(f"refused with {error}, and while it arrives {arriving}") from error
        raise
    if arriving != instance:
        raise BrokenProperty(f"says {instance}, and while it arrives {arriving}")
    return instance


def _arriving(case: bytes) -> Instance | CourierError | None:
    reading = Reading()
    try:
        for at in range(0, len(case), 4096):
            reading.feed(case[at : at + 4096])
        reading.end()
    except CourierError as error:
        return error
    return reading.instance


def _agrees_with_pydicom(case: bytes, result: Any) -> None:
    if not isinstance(result, Instance):
        return
    theirs = _by_pydicom(case)
    ours = (result.study_instance_uid, result.series_instance_uid, result.sop_instance_uid, result.sop_class_uid)
    if theirs is not None and theirs != ours:
        raise BrokenProperty(f"says {ours}, and pydicom {theirs}")


def _by_pydicom(case: bytes) -> tuple[str, ...] | None:
    """What pydicom reads; None where it fails or complains, or where it does not find all four."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ds = pydicom.dcmread(io.BytesIO(case), stop_before_pixels=True)
            found = (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID, ds.SOPClassUID)
    except Exception:  # noqa: BLE001 - whatever pydicom makes of a broken file is no concern of ours
        return None
    return tuple(str(uid).rstrip("\0 ") for uid in found) if all(found) else None


def _identify_allowance(case: bytes) -> int:
    """What may be read in two ways is looked at with the 64 KiB behind it; a deflated dataset comes in such pieces."""
    return ALLOWANCE_BYTES + _MIB


# --- answers of a server ------------------------------------------------------------------------------------------


class _CannedTransport:
    """Stands where the transport stands and has one answer to everything."""

    base_path = "/base"

    def __init__(self, server_type: str, body: bytes, status: int = 200) -> None:
        self.server = ServerSettings.model_validate(
            {"name": "one", "type": server_type, "url": "http://127.0.0.1:1/base"}
        )
        self.body, self.status, self.asked = body, status, 0

    def exchange(self, request: Request) -> Answer:
        self.asked += 1
        if ".." in request.target or not request.target.startswith("/") or not request.target.isprintable():
            raise BrokenProperty(f"asks for {request.target!r}")
        return Answer(self.status, {}, self.body if self.asked == 1 else b"[]")

    def error(self, kind: type[CourierError], sentence: str, **more: Any) -> CourierError:
        return kind(sentence, server_name=self.server.name, server_type=self.server.type, **more)


def _canned(server_type: str, body: bytes, status: int = 200) -> Transport:
    return cast(Transport, _CannedTransport(server_type, body, status))


def _each(*calls: Any) -> list[Any]:
    """The result, or our error, of each call: one that is refused must not keep the next from being made."""
    results = []
    for call in calls:
        try:
            results.append(call())
        except CourierError as error:
            results.append(_bare(error))
    return results


def _bare(error: CourierError) -> CourierError:
    """The error without its frames, which would keep one answer in memory while the next is read."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


_PARTS = [
    Part(Instance(STUDY, SERIES, uid, "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"), io.BytesIO, 0)
    for uid in (IMAGE, f"{IMAGE}.2", "")
]
_STOW_DIALECTS = (("msdicom", MsDicom), ("dcm4chee", Dcm4chee), ("dicomweb", GenericDicomWeb))
_DIALECTS = (*_STOW_DIALECTS, ("orthanc", Orthanc))


def _store(case: bytes) -> list[Any]:
    return _each(
        *(
            functools.partial(dialect(_canned(name, case, status)).store, _PARTS[:2])
            for name, dialect in _STOW_DIALECTS
            for status in (200, 409)
        )
    )


def _outcomes_are_told(case: bytes, results: Any) -> None:
    for outcomes in _one_for_each_part(results):
        for outcome in outcomes:
            _outcome_is_told(case, outcome)


def _one_for_each_part(results: Iterable[Any]) -> Iterator[list[Outcome]]:
    """The outcomes of each store that did not end in one of our errors."""
    for outcomes in results:
        if isinstance(outcomes, CourierError):
            _no_secret(str(outcomes))
            continue
        if [outcome.sop_instance_uid for outcome in outcomes] != [
            part.instance.sop_instance_uid for part in _PARTS[:2]
        ]:
            raise BrokenProperty("does not give one outcome for each part")
        yield outcomes


def _outcome_is_told(case: bytes, outcome: Outcome) -> None:
    _no_secret(" ".join((outcome.message, *outcome.warnings)))
    if outcome.fate is Fate.STORED and outcome.sop_instance_uid not in _read(case):
        raise BrokenProperty("takes an image for stored that the answer does not name")


def _import(case: bytes) -> list[Any]:
    return _each(functools.partial(Orthanc(_canned("orthanc", case)).store, _PARTS[:2]))


def _imports_are_told(case: bytes, results: Any) -> None:
    """Orthanc names images by keys of its own: no more are stored than it says, each by its key."""
    for outcomes in _one_for_each_part(results):
        _no_secret(" ".join(outcome.message for outcome in outcomes))
        told = [one for one in json.loads(case) if one.get("Status") == "Success"]
        if sum(outcome.fate is Fate.STORED for outcome in outcomes) > len(told):
            raise BrokenProperty("takes more images for stored than the answer does")


def _read(case: bytes) -> str:
    """The answer without JSON's escapes, to look for what it names."""
    return json.dumps(json.loads(case), ensure_ascii=False)


def _no_secret(shown: str) -> None:
    if SECRET in shown:
        raise BrokenProperty(f"shows what a server wrote: {shown!r}")


def _web(case: bytes) -> DicomWeb:
    return DicomWeb(_canned("dicomweb", case))


def _paths(found: Iterable[Found]) -> list[str]:
    return [_read_elements(one.attributes) or path_of(one) for one in found]


def _read_elements(ds: Dataset) -> None:
    for tag in islice(ds, 50):
        text(ds, tag)
        number(ds, tag)
        items(ds, tag)


def _metadata(case: bytes) -> list[str]:
    for ds in _web(case).metadata(Found("study", STUDY)):
        _read_elements(ds)
    return []


def _call(case: bytes, name: str, dialect: Any, call: str) -> list[str]:
    """What a server says of itself; each call meets a server that has said nothing yet."""
    getattr(dialect(_canned(name, case)), call)()
    return []


def _words(case: bytes) -> list[str]:
    """An archive's error, which is quoted in an outcome."""
    words = error_message(Answer(500, {}, case))
    if len(words) > 300 or not words.isprintable():
        raise BrokenProperty(f"quotes what cannot be shown: {words!r:.400}")
    return []


_QUESTIONS: tuple[Callable[[bytes], list[str]], ...] = (
    lambda case: _paths(_web(case).find("study", STUDY)),
    lambda case: _paths(_web(case).find("series", SERIES)),
    lambda case: _paths(_web(case).find("image", IMAGE)),
    lambda case: _paths(_web(case).instances(Found("study", STUDY), page=100)),
    lambda case: _paths(Orthanc(_canned("orthanc", case)).instances(Found("study", STUDY))),
    lambda case: [text(ds, "0020000D")[:0] for ds in _web(case).studies([])],
    _metadata,
    _words,
    *(
        functools.partial(_call, name=name, dialect=dialect, call=call)
        for name, dialect in _DIALECTS
        for call in ("state", "storage", "database")
    ),
)


def _paths_are_fit_to_be_asked(_case: bytes, result: Any) -> None:
    """The paths that would be asked next, or our error."""
    if isinstance(result, CourierError):
        _no_secret(str(result))
        return
    for path in result:
        if path and not _PATH.fullmatch(path):
            raise BrokenProperty(f"would ask for {path!r}")


_PATH = re.compile(r"/studies/[\w.-]+(/series/[\w.-]+(/instances/[\w.-]+)?)?", re.ASCII)
_JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from((STUDY, SERIES, IMAGE)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(("vr", "Value", "BulkDataURI")), inner, max_size=3),
        st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
    max_leaves=12,
)
_TAG_NAMES = st.sampled_from(
    [
        "0020000D",
        "0020000E",
        "00080018",
        "00081155",
        "00081196",
        "00081197",
        "00081198",
        "00081199",
        "00741048",
        "00000902",
        "00080061",
    ]
)
_ELEMENT = st.one_of(
    _JSON,
    st.fixed_dictionaries({"vr": st.sampled_from(("UI", "US", "SQ", "PN")), "Value": st.lists(_JSON, max_size=3)}),
)
_DATASET = st.dictionaries(_TAG_NAMES, _ELEMENT, max_size=6)
_STOW = st.dictionaries(
    st.sampled_from(("00081198", "00081199", "00081190")),
    st.fixed_dictionaries({"vr": st.just("SQ"), "Value": st.lists(_DATASET, max_size=4)}),
    max_size=3,
)


def _imported(number: int, status: str) -> dict[str, Any]:
    return {"ID": "-".join([f"{number:08x}"] * 5), "ParentStudy": SECRET, "Path": f"/{SECRET}", "Status": status}


_IMPORTS = st.lists(
    st.fixed_dictionaries(
        {"Status": st.sampled_from(("Success", "AlreadyStored", "Failure", "FilteredOut", ""))},
        optional={"ID": st.one_of(_JSON, st.just(_imported(1, "")["ID"]))},
    ),
    max_size=3,
)


_SAID = st.dictionaries(  # what servers say of themselves
    st.sampled_from(
        ("details", "overallStatus", "status", "name", "totalSpace", "usableSpace", "dcmStorageID", "Version")
    ),
    st.one_of(_JSON, st.lists(st.dictionaries(st.sampled_from(("name", "status")), _JSON), max_size=2)),
    max_size=4,
)


def _as_json(document: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return document.map(lambda value: json.dumps(value).encode())


def _element_of(vr: str, *values: object) -> dict[str, Any]:
    return {"vr": vr, "Value": list(values)}


def _item(uid: str, **more: object) -> dict[str, Any]:
    return {"00081150": _element_of("UI", "1.2.3"), "00081155": _element_of("UI", uid), **more}


@functools.cache
def _stow_answers() -> list[bytes]:
    comment = {"00000902": _element_of("LO", f"DICOM100: (0010,0010) - value {SECRET} is not valid")}
    warned = _item(IMAGE, **{"00081196": _element_of("US", 45063), "00741048": _element_of("SQ", comment)})
    failed = _item(f"{IMAGE}.2", **{"00081197": _element_of("US", 272), "00741048": _element_of("SQ", comment)})
    nameless = {"00081197": _element_of("US", "49152")}
    answers: list[Any] = [
        {"00081199": _element_of("SQ", warned, _item(f"{IMAGE}.2"))},
        {"00081199": _element_of("SQ", warned), "00081198": _element_of("SQ", failed)},
        [{"00081198": _element_of("SQ", failed, nameless)}],
        {"00081198": _element_of("SQ", nameless, nameless), "00081190": {"vr": "UR"}},
        {"errors": [f"the patient {SECRET} is unknown"]},
    ]
    return [json.dumps(answer).encode() for answer in answers]


@functools.cache
def _import_answers() -> list[bytes]:
    answers: list[Any] = [
        [_imported(1, "Success"), _imported(2, "AlreadyStored")],
        [_imported(1, "Success"), {"Status": "Failure"}],
        [_imported(1, "FilteredOut")],
        [],
        {"Message": SECRET, "HttpStatus": 400},
    ]
    return [json.dumps(answer).encode() for answer in answers]


@functools.cache
def _qido_answers() -> list[bytes]:
    one = {
        "0020000D": _element_of("UI", STUDY),
        "0020000E": _element_of("UI", SERIES),
        "00080018": _element_of("UI", IMAGE),
        "00100010": _element_of("PN", {"Alphabetic": f"{SECRET}^A"}),
        "00201208": _element_of("IS", 3, "3", 3.0),
    }
    health = {
        "overallStatus": "Healthy",
        "details": [{"name": "DataStoreHealthCheck", "status": "Healthy"}, {"name": "other"}],
    }
    storage = [{"dcmStorageID": "fs1", "usableSpace": 1000, "totalSpace": 2000, "dicomDeviceName": "x"}]
    orthanc = {"Version": "1.12", "TotalDiskSize": "100", "DatabaseVersion": 6, "Name": "o"}
    key = "-".join(["0123abcd"] * 5)
    tags = {"SOPInstanceUID": IMAGE, "SeriesInstanceUID": SERIES, "PatientName": SECRET}
    listed = [{"ID": key, "ParentStudy": key, "ParentSeries": key, "MainDicomTags": tags}] * 3
    documents: list[Any] = [
        listed,
        [one],
        [one] * 60,
        [],
        health,
        storage,
        {"status": "STARTED"},
        orthanc,
        [{}] * 60_000,
    ]
    documents += [
        [{"00080020": {"vr": "DA"}}] * 6_000,
        [{"00080020": {"vr": "DA", "Value": ["1"]}}] * 5_000,
        ["ab"] * 40_000,
    ]
    return [json.dumps(document, separators=(",", ":")).encode() for document in documents]


# --- streamed answers -----------------------------------------------------------------------------------------------

_MULTIPART_TYPE = b'multipart/related; type="application/dicom"; boundary=BB'
_BLOCK_BYTES = 256 * 1024  # as the transport gives them
_MAX_HEADER_BYTES = 8 * 1024  # longer ones are http.client's to refuse


@dataclass
class _Received:
    """What came out of an answer, without keeping it: there may be a part in every dozen bytes."""

    parts: int = 0
    size_bytes: int = 0
    digest: int = 0

    def take(self, part: Retrieved) -> None:
        before = self.size_bytes
        for chunk in part.chunks:
            self.size_bytes += len(chunk)
            self.digest = zlib.crc32(chunk, self.digest)
        self.parts += 1
        self.digest = zlib.crc32(f"{part.transfer_syntax_uid!r} {self.size_bytes - before}".encode(), self.digest)


def _multipart(case: bytes, block_bytes: int = _BLOCK_BYTES) -> _Received:
    content_type, _, body = case.partition(b"\n")
    content_type = content_type[:_MAX_HEADER_BYTES]
    blocks = (body[at : at + block_bytes] for at in range(0, len(body), block_bytes))
    received = _Received()
    for part in read_parts(blocks, content_type.decode("latin-1"), error=PacsMisanswered):
        received.take(part)
    return received


def _no_byte_is_made_up_and_cuts_do_not_matter(case: bytes, result: Any) -> None:
    step = 1 + zlib.crc32(case) % 97
    again = _each(functools.partial(_multipart, case, step))[0]
    if isinstance(again, CourierError) != isinstance(result, CourierError):
        raise BrokenProperty(f"ends otherwise when it comes in pieces of {step} bytes")
    if isinstance(result, CourierError):
        return
    if result.size_bytes > len(case):
        raise BrokenProperty("gives more bytes than came")
    if again != result:
        raise BrokenProperty(f"reads other parts when it comes in pieces of {step} bytes")


@functools.cache
def _multipart_answers() -> list[bytes]:
    part = b"--BB\r\nContent-Type: application/dicom; transfer-syntax=1.2.840.10008.1.2.1\r\n\r\n%b\r\n"
    bodies = (
        part % b"first" + part % b"second\r\n--B" + b"--BB--\r\n",
        part % image(STUDY, series=SERIES, sop=IMAGE, side=8) + b"--BB--",
        b"preamble\r\n--BB\r\n\r\n\r\n--BB--\r\nepilogue",
        b"--BB\r\n\r\n\r\n" * 5_000 + b"--BB--",
    )
    return [
        *(_MULTIPART_TYPE + b"\n" + body for body in bodies),
        b"application/dicom; transfer-syntax=1.2.840.10008.1.2.1\n" + bytes(128) + b"DICM",
        b"text/html\n<html>",
    ]


_HEADER = st.sampled_from(
    (b"Content-Type: application/dicom\r\n", b"X: \r\n", b": x\r\n", b"X\r\n", b"X: y\n", b" x\r\n", b"")
)
_PIECE = st.one_of(
    st.builds(lambda header, body: b"--BB\r\n" + header + b"\r\n" + body + b"\r\n", _HEADER, st.binary(max_size=30)),
    st.sampled_from((b"--BB--\r\n", b"--BB--", b"--BB", b"\r\n", b"--", b"\n")),
    st.binary(max_size=12),
)
_SHAPED_MULTIPART = st.lists(_PIECE, max_size=8).map(lambda pieces: _MULTIPART_TYPE + b"\n" + b"".join(pieces))

# --- jobs ---------------------------------------------------------------------------------------------------------


def _kinds(kind: type[Job] = Job) -> Iterator[type[Job]]:
    for child in kind.__subclasses__():
        yield child
        yield from _kinds(child)


_KINDS = tuple(_kinds())


def _message(case: bytes) -> Any:
    """What a worker is handed: Celery parses, and refuses what it cannot parse."""
    try:
        return json.loads(case)
    except (ValueError, RecursionError):
        return None


def _jobs(message: Any) -> list[Any]:
    results = _each(*(functools.partial(read_job, kind, message) for kind in _KINDS))
    shown = [redact_job(message)]
    if isinstance(message, dict):
        digest = content_digest("pacs.upload", message)
        if content_digest("pacs.upload", {**message, "idempotency_key": "another"}) != digest:
            raise BrokenProperty("counts a job with another idempotency key as another job")
    return results + shown


def _jobs_are_told(message: Any, results: Any) -> None:
    texts = [str(result) for result in results if isinstance(result, CourierError | str)]
    if not all(encodes(shown) and shown.isprintable() and len(shown) <= 1_000 for shown in texts):
        raise BrokenProperty(
            f"cannot be logged as it is: {next(t for t in texts if not (encodes(t) and t.isprintable()))!r:.200}"
        )
    if must_not_show(message) and any(SECRET in shown for shown in texts):
        raise BrokenProperty(f"shows a secret: {next(shown for shown in texts if SECRET in shown)!r}")
    for job in results:
        if isinstance(job, Job) and read_job(type(job), json.loads(json.dumps(job.model_dump(mode="json")))) != job:
            raise BrokenProperty(f"a {type(job).__name__} is not the same after a round trip")


@functools.cache
def _messages() -> list[bytes]:
    messages: list[Any] = [
        {
            "version": 1,
            "image_url": f"https://images.example.org/a.dcm?X-Amz-Signature={SECRET}",
            "idempotency_key": "k",
        },
        {"image_url": f"https://user:{SECRET}@images.example.org/a.dcm#x", "server": "one", "metadata": True},
        {"level": "study", "uid": STUDY, "mode": "both", "servers": ["a", "b"], "permanent": True, "dry_run": False},
        {"mode": "both", "filters": {"PatientID": "x", "StudyDate": "20260101-"}, "limit": 500, "cursor": "abc"},
        {"servers": ["one"], "confirm": "delete all studies", "batch_id": "b", "chunk": 3, "study_uid": STUDY},
        {"study_uid": STUDY, "destination": f"az://account/box/?sig={SECRET}", "format": "zip", "mode": "either"},
        {"image_url": [f"https://h/?sig={SECRET}"], "extra": {"deep": f"https://u:{SECRET}@h/"}},
    ]
    return [json.dumps(message).encode() for message in messages]


_FIELDS = sorted({name for kind in _KINDS for name in kind.model_fields})
_URLS = st.sampled_from((f"https://h/a?sig={SECRET}", f"https://u:{SECRET}@h/a", f"az://h/a?x={SECRET}#y", "file:///a"))
_VALUES = st.one_of(
    _JSON,
    _URLS,
    st.sampled_from(("study", "both", STUDY, 1, True, "zip")),
    st.lists(_URLS),
    st.dictionaries(_URLS, _URLS),
)
_JOBS = st.dictionaries(
    st.one_of(st.sampled_from(_FIELDS), st.sampled_from(_FIELDS), st.text(), _URLS), _VALUES, max_size=6
)

# --- source URLs --------------------------------------------------------------------------------------------------

_OPEN = Policy(SourceSettings(allow_hosts=("*:*",), allow_private_networks=True))
_STRICT = Policy(SourceSettings(allow_hosts=("images.example.org", "*.example.net", "192.0.2.1:8080")))


def _url(case: bytes) -> str:
    """Celery's messages can hold lone surrogates, which stand here for bytes that are no UTF-8."""
    return case.decode("utf-8", "surrogateescape")


def _policies(url: str) -> tuple[str, list[Any]]:
    return redact_url(url), _each(lambda: _OPEN.read(url), lambda: _STRICT.read(url))


def _urls_are_told(url: str, result: Any) -> None:
    shown, results = result
    texts = [shown, *(str(one) for one in results if isinstance(one, CourierError))]
    if hides_it(url) and any(SECRET in one for one in texts):
        raise BrokenProperty(f"shows a secret: {next(one for one in texts if SECRET in one)!r}")
    for error in (one for one in results if isinstance(one, CourierError)):
        if len(str(error)) > 1_000 or not encodes(str(error)) or not str(error).isprintable():
            raise BrokenProperty(f"gives an error that cannot be logged as it is: {str(error)!r:.200}")
    for target in (one for one in results if isinstance(one, Url)):
        if not target.host.isascii() or not target.host.isprintable() or "@" in target.host:
            raise BrokenProperty(f"would connect to {target.host!r}")
        if _OPEN.read(target.url) != target:
            raise BrokenProperty(f"reads {target.url!r} otherwise the second time")


_FORMS = (
    "https://images.example.org/a.dcm?sig=s3cr3t",
    "http://user:s3cr3t@images.example.org/a.dcm",
    "http://a.example.net:8080/x/../y?token=s3cr3t#s3cr3t",
    "http://[2001:db8::1]:80/?s3cr3t",
    "http://[::ffff:192.0.2.1]/",
    "http://192.0.2.1:8080/a%20b?x=%2F",
    "http://0x7f.1/",
    "http://2130706433/",
    "http://bücher.example/ä?ö",
    "http://xn--bcher-kva.example./",
    "http://images.example.org\\@evil.example/?s3cr3t",
    "http://⓵②⑦.0.0.1/",
    "http://user:s3?cr3t@host/#s3cr3t",
)
_SHAPED_URL = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(("http://", "https://", "HTTP://", "http:/", "//", "ftp://", "http:\\\\", "")),
        st.sampled_from(("", "", f"u:{SECRET}@", f"{SECRET}@", f"u@v:{SECRET}@", "%40@")),
        st.one_of(
            st.sampled_from(("images.example.org", "a.example.net.", "[::1]", "[fe80::1%25e]", "1.2.3.4", "0300.1")),
            st.text(max_size=12),
            st.from_regex(r"[a-z0-9.\-:\[\]]{1,20}", fullmatch=True),
        ),
        st.sampled_from(("", "", ":80", ":0", ":99999", ":x", ":٣")),
        st.sampled_from(("", "/", "/a.dcm", "/a@b", "\\a", "/%00", "/ä")),
        st.sampled_from(("", f"?sig={SECRET}", f"#{SECRET}", f"?a=http://x@{SECRET}", f"?{SECRET}#{SECRET}")),
    ),
).map(lambda url: url.encode("utf-8", "surrogatepass"))

# --- all ----------------------------------------------------------------------------------------------------------

#: Ordinary DICOM JSON takes ten times its size in Python's memory: 22 bytes are an element without values, and a `dict`
#: of one key takes 190. No parser that gives dicts can do better.
JSON_FACTOR = 18


# --- archives, lists and plans ------------------------------------------------------------------------------------

_ENTRY_BYTES = 100_000


def _archive(case: bytes) -> list[Any]:
    """What an archive says it holds, and its first entries."""
    limits = Limits(_ENTRY_BYTES, time.monotonic() + 60, 60)
    whole = replace(limits, max_bytes=len(case))
    archives = Archives(lambda url, _: spool(iter([case]), source=url, limits=whole), lambda: whole)
    try:
        found = [one for page in archives.pages(_ARCHIVE_URL) for one in page]
        return [found, *_each(*(functools.partial(_entry, archives, one.url, limits) for one in found[:3]))]
    finally:
        archives.close()


def _entry(archives: Archives, url: str, limits: Limits) -> int:
    with archives.fetch(url, limits) as fetched:
        return fetched.size_bytes


def _entries_are_told(case: bytes, results: Any) -> None:
    """What is listed without a reason is read in the length that was listed, or refused."""
    if isinstance(results, CourierError):
        return
    found, *read = results
    for one, size_bytes in zip(found, read, strict=False):
        if one.skip_reason and not isinstance(size_bytes, CourierError):
            raise BrokenProperty("reads what it lists as no image")
        if isinstance(size_bytes, int) and size_bytes != one.size_bytes:
            raise BrokenProperty("reads another size than it lists")
        if "/../" in one.url and not one.skip_reason:
            raise BrokenProperty("lists a name that leads out")


@functools.cache
def _archives() -> list[bytes]:
    packed = []
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", how) as archive:
            archive.writestr("ct/1.dcm", image(STUDY, side=8))
            archive.writestr("../out.dcm", b"0123456789" * 50)
            archive.writestr("dicomdir/", b"")
        packed.append(out.getvalue())
    return packed


_ARCHIVE_URL = "https://images.example.org/all.zip"
_SHAPED_ARCHIVE = st.builds(
    lambda bodies, junk: junk + b"".join(bodies),
    st.lists(st.deferred(lambda: st.sampled_from(_archives())), max_size=3),
    st.binary(max_size=40),
)


def _rows(case: bytes, column: str | None) -> int:
    with Items() as items:
        items.add(rows_of_stream(io.BytesIO(case), "a file", column=column), study_uid)
        return items.count + items.bad_total


def _plan(case: bytes) -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.write(case)
        file.flush()
        return PlanFile(Path(file.name)).totals.items


#: A file of rows in each form, and as a plan.
_LISTS = (functools.partial(_rows, column=None), functools.partial(_rows, column="study"), _plan)


def _no_more_items_than_lines(case: bytes, count: Any) -> None:
    if isinstance(count, int) and count > case.count(b"\n") + case.count(b"\r") + 1:
        raise BrokenProperty("finds more items than there are lines")


@functools.cache
def _lists() -> list[bytes]:
    out = io.StringIO()
    write(PlanHeader(kind="delete"), [PlanLine(item="1.2.3"), PlanLine(item="1.2.4", do="skip", why="x")], out)
    return [
        b"# of Monday\n1.2.3\r\n1.2.4\n",
        b'\xef\xbb\xbfno;study\n1;1.2.3\n2;"1.2.4"\n',
        b'{"study": "1.2.3"}\n{"study": "1.2.4"}\n',
        out.getvalue().encode(),
    ]


_SHAPED_LIST = st.lists(
    st.one_of(
        st.sampled_from((b"1.2.3", b"study", b'"', b",", b";", b"{", b"\n", b"\r\n", b"#")), st.binary(max_size=8)
    ),
    max_size=30,
).map(b"".join)


def _same(case: bytes) -> bytes:
    return case


_JSON_ANSWER = functools.partial(FuzzTarget, prepare=_same, factor=JSON_FACTOR)
TARGETS = (
    FuzzTarget(
        "identify",
        seeds=_files,
        shaped=_shaped_file(),
        prepare=_same,
        acts=(_identify,),
        check=_agrees_with_pydicom,
        allowance_bytes=_identify_allowance,
    ),
    _JSON_ANSWER(
        "stow",
        seeds=_stow_answers,
        shaped=_as_json(st.one_of(_STOW, _DATASET, _JSON)),
        acts=(_store,),
        check=_outcomes_are_told,
    ),
    _JSON_ANSWER(
        "imports",
        seeds=_import_answers,
        shaped=_as_json(st.one_of(_IMPORTS, _JSON)),
        acts=(_import,),
        check=_imports_are_told,
    ),
    _JSON_ANSWER(
        "qido",
        seeds=_qido_answers,
        shaped=_as_json(st.one_of(st.lists(_DATASET, max_size=4), _JSON, _SAID, st.lists(_SAID, max_size=2))),
        acts=_QUESTIONS,
        check=_paths_are_fit_to_be_asked,
    ),
    FuzzTarget(
        "multipart",
        seeds=_multipart_answers,
        shaped=_SHAPED_MULTIPART,
        prepare=_same,
        acts=(_multipart,),
        check=_no_byte_is_made_up_and_cuts_do_not_matter,
    ),
    FuzzTarget(
        "jobs",
        seeds=_messages,
        shaped=_as_json(st.one_of(_JOBS, _JOBS, _JSON)),
        prepare=_message,
        acts=(_jobs,),
        check=_jobs_are_told,
    ),
    FuzzTarget(
        "urls",
        seeds=lambda: [form.encode() for form in _FORMS],
        shaped=_SHAPED_URL,
        prepare=_url,
        acts=(_policies,),
        check=_urls_are_told,
    ),
    FuzzTarget(
        "archives",
        seeds=_archives,
        shaped=_SHAPED_ARCHIVE,
        prepare=_same,
        acts=(_archive,),
        check=_entries_are_told,
        allowance_bytes=lambda _: ALLOWANCE_BYTES + 3 * _ENTRY_BYTES + 2 * CHUNK_BYTES,
    ),
    FuzzTarget(
        "lists",
        seeds=_lists,
        shaped=_SHAPED_LIST,
        prepare=_same,
        acts=_LISTS,
        check=_no_more_items_than_lines,
        allowance_bytes=lambda _: 2 * ALLOWANCE_BYTES,
    ),
)
