"""One study from one server to another: both sandbox dialects in both directions, and a real Orthanc on either end."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pydicom
import pytest
from pydicom.uid import BasicTextSRStorage, EncapsulatedPDFStorage, KeyObjectSelectionDocumentStorage

from courier.errors import InvalidRequest, NotFound, PacsMisanswered, PacsRejected, PacsUnavailable, StudyConflict
from courier.settings import ServerSettings, ServerType
from sandbox.synthetic import image, new_uid
from worker.batches import study_copy
from worker.batches.study_copy import Transfer, images_on
from worker.batches.study_migration import (
    MigrationReceipt,
    copy_study,
    delete_source,
    preflight_study,
    undo_study,
    verify_moved,
    verify_study,
)
from worker.dicom.instances import identify
from worker.pacs.protocol import Fate, Found, Outcome, Pacs, Part, StreamedInstance
from worker.pacs.registry import connect

WHERE: Mapping[str, Callable[[pytest.FixtureRequest], str]] = {
    "msdicom": lambda request: str(request.getfixturevalue("sandbox").msdicom),
    "dcm4chee": lambda request: str(request.getfixturevalue("sandbox").dcm4chee),
    "orthanc": lambda request: str(request.getfixturevalue("orthanc")),
}
WAYS = [
    ("msdicom", "dcm4chee"),
    ("dcm4chee", "msdicom"),
    ("orthanc", "msdicom"),
    ("orthanc", "dcm4chee"),
    ("msdicom", "orthanc"),
    ("dcm4chee", "orthanc"),
]
#: Which servers give back what they were given (docs/pacs-oddities.md).
KEEPERS = {"msdicom", "orthanc"}


def server(kind: ServerType, url: str, name: str = "") -> Pacs:
    return connect(ServerSettings(name=name or kind, type=kind, url=url, read_timeout_s=5))


def put(pacs: Pacs, *contents: bytes) -> None:
    parts = [Part(identify(io.BytesIO(one)), lambda one=one: io.BytesIO(one), len(one)) for one in contents]  # type: ignore[misc]
    assert {outcome.fate for outcome in pacs.store(parts)} == {Fate.STORED}


@dataclass
class Move:
    """One study, from one server to another; what was written down outlives an attempt."""

    source: Pacs
    target: Pacs
    study: str = field(default_factory=new_uid)
    written: str = "{}"
    attempts: int = 0

    def put(self, pacs: Pacs, number: int = 1, *, series: int = 1, **more: Any) -> list[str]:
        """``number`` more images of the study on a server; their UIDs."""
        uids = [new_uid() for _ in range(number)]
        put(
            pacs,
            *(
                image(self.study, series=f"{self.study}.{series}", sop=uid, seed=n, **more)
                for n, uid in enumerate(uids)
            ),
        )
        return uids

    def transfer(self) -> Transfer:
        self.attempts += 1
        return Transfer(self.source, self.target, self.study)

    def receipt(self) -> MigrationReceipt:
        """As the last attempt has left it, if it lived on or not."""

        def save(receipt: MigrationReceipt) -> None:
            self.written = json.dumps(receipt.as_json())

        return MigrationReceipt.from_json(json.loads(self.written), save=save)

    def copy(self, attempt: int = 1) -> dict[str, Any]:
        receipt = self.receipt()
        try:
            return copy_study(self.transfer(), receipt, attempt=attempt)
        finally:
            receipt.save(receipt)

    def verify(self, digests: Any = "all", *, delete: bool = False, attempt: int = 1) -> dict[str, Any]:
        transfer, receipt = self.transfer(), self.receipt()
        if receipt.source_deleted and not self.on_source:
            return verify_moved(transfer, receipt, digests=digests)
        verified = verify_study(transfer, receipt, digests=digests, attempt=attempt)
        if delete:
            delete_source(transfer, receipt)
        return verified

    def undo(self) -> dict[str, Any]:
        return undo_study(self.transfer(), self.receipt())

    @property
    def added(self) -> set[str]:
        return set(self.receipt().added)

    @property
    def on_source(self) -> set[str]:
        return set(images_on(self.source, self.study))

    @property
    def on_target(self) -> set[str]:
        return set(images_on(self.target, self.study))


@pytest.fixture(params=WAYS, ids="-to-".join)
def way(request: pytest.FixtureRequest) -> Move:
    source, target = request.param
    return Move(*(server(kind, WHERE[kind](request)) for kind in (source, target)))


@pytest.fixture
def move(request: pytest.FixtureRequest) -> Move:
    """Where faults come from: sandbox servers on both ends."""
    return Move(*(server(kind, WHERE[kind](request)) for kind in ("msdicom", "dcm4chee")))


def pixels_of(pacs: Pacs, study: str) -> dict[str, bytes]:
    with pacs.retrieve(Found("study", study)) as parts:
        read = [pydicom.dcmread(io.BytesIO(b"".join(part.chunks))) for part in parts]
    return {ds.SOPInstanceUID: ds.PixelData for ds in read}


# Copying


def test_a_study_is_copied_verified_and_taken_back(way: Move) -> None:
    uids = {*way.put(way.source, 3), *way.put(way.source, 2, series=2)}
    copied = way.copy()
    assert way.added == way.on_target == way.on_source == uids
    assert (copied["images"], copied["there_before"]) == (5, 0)
    assert pixels_of(way.target, way.study) == pixels_of(way.source, way.study)

    verified = way.verify()
    kept = way.target.server.type in KEEPERS
    assert (verified["compared"], verified["compared_elements"]) == ((5, 0) if kept else (0, 5))
    unkept = {way.source.server.type, way.target.server.type} - KEEPERS
    assert set(verified["not_kept_by"]) == unkept
    assert (verified["images"], verified["images_on_target"], verified["topped_up"]) == (5, 5, 0)

    assert way.undo()["removed"] == 5
    assert way.on_target == set()
    assert way.on_source == uids


def test_only_what_the_target_lacks_is_brought_and_taken_back(way: Move) -> None:
    there = way.put(way.target, 2)
    shared = new_uid()
    for pacs in (way.source, way.target):
        put(pacs, image(way.study, sop=shared))
    missing = way.put(way.source, 2)
    copied = way.copy()
    assert way.added == set(missing)
    assert (copied["images"], copied["there_before"]) == (3, 1)
    assert way.verify()["images_on_target"] == 5
    assert way.undo()["removed"] == 2
    assert way.on_target == {*there, shared}


@pytest.mark.parametrize("target", ["msdicom", "orthanc"])
def test_what_was_stored_without_an_answer_is_ours_when_it_is_sent_again(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    move = Move(*(server(kind, WHERE[kind](request)) for kind in ("dcm4chee", target)))  # type: ignore[arg-type]
    uids = set(move.put(move.source, 3))
    store, forgotten = move.target.store_stream, []

    def forgetful(stream: Iterable[StreamedInstance]) -> list[Outcome]:
        outcomes = store(stream)
        if forgotten:
            return outcomes
        forgotten.extend(outcomes)
        return [Outcome(one.sop_instance_uid, Fate.UNMENTIONED) for one in outcomes]

    monkeypatch.setattr(move.target, "store_stream", forgetful)
    assert move.copy()["added"] == 3
    assert move.added == move.on_target == uids
    assert move.undo()["removed"] == 3
    assert move.on_target == set()


def test_a_study_that_the_source_does_not_have_is_not_found(move: Move) -> None:
    with pytest.raises(NotFound, match="msdicom does not have the study"):
        move.copy()
    move.put(move.target)
    with pytest.raises(NotFound, match="dcm4chee has 1 images"):
        preflight_study(move.transfer(), {})


def test_a_preflight_counts_and_warns(move: Move) -> None:
    move.put(move.source, 3)
    found = preflight_study(move.transfer(), {"third": True, "fourth": None, "fifth": False})
    assert (found["images"], found["images_on_target"], found["missing"]) == (3, 0, 3)
    assert [warning.split(" ")[0] for warning in found["warnings"]] == ["study_split:", "fourth"]


# A study that changes


def test_what_the_source_gets_meanwhile_is_topped_up_and_taken_back_too(way: Move) -> None:
    way.put(way.source, 2)
    way.copy()
    late = way.put(way.source, 2, series=2)
    verified = way.verify()
    assert verified["topped_up"] == 2
    assert set(late) < way.added
    assert way.on_target == way.on_source
    assert way.undo()["removed"] == 4
    assert way.on_target == set()


def test_a_study_that_grows_for_ever_is_given_up_with_a_sentence(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    move.put(move.source, 1)
    move.copy()
    retrieve = move.source.retrieve

    def growing(found: Found, **_: Any) -> Any:
        answer = retrieve(found)
        move.put(move.source, 1)
        return answer

    move.put(move.source, 1)
    monkeypatch.setattr(move.source, "retrieve", growing)
    with pytest.raises(StudyConflict, match="grows: after 3 rounds 1 images"):
        move.verify()


def test_an_image_that_is_retrieved_without_being_listed_is_brought_along(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    move.put(move.source, 2)
    listed = images_on(move.source, move.study)
    late = move.put(move.source, 1)
    monkeypatch.setattr(
        "worker.batches.study_migration.images_on", lambda pacs, _: listed if pacs is move.source else {}
    )
    move.copy()
    assert set(late) <= move.added == move.on_target


def test_what_the_target_has_lost_is_told_and_brought_again(move: Move) -> None:
    uids = move.put(move.source, 3)
    move.copy()
    lost = Found("image", move.study, f"{move.study}.1", uids[0])
    move.target.delete(lost, permanent=True)
    verified = move.verify()
    assert (verified["lost"], verified["topped_up"]) == (1, 0)
    assert move.on_target == set(uids)


# Digests


def different(move: Move) -> str:
    """The same UID with other bytes on both ends; the study else is whole."""
    uid = new_uid()
    put(move.source, image(move.study, sop=uid, seed=1))
    put(move.target, image(move.study, sop=uid, seed=2))
    return uid


@pytest.fixture
def keepers(request: pytest.FixtureRequest) -> Move:
    return Move(*(server(kind, WHERE[kind](request)) for kind in ("msdicom", "orthanc")))


def test_other_bytes_under_the_same_uid_are_found(keepers: Move) -> None:
    uid = different(keepers)
    keepers.put(keepers.source, 2)
    keepers.copy()
    with pytest.raises(StudyConflict, match="are not what msdicom has") as caught:
        keepers.verify()
    assert caught.value.details["different"] == [uid]
    assert keepers.verify("none")["compared"] == 0


def test_a_sample_is_one_image_of_each_series(keepers: Move) -> None:
    keepers.put(keepers.source, 3)
    keepers.put(keepers.source, 2, series=2)
    keepers.copy()
    verified = keepers.verify("sample")
    assert (verified["digests"], verified["compared"], verified["not_kept_by"]) == ("sample", 2, [])


def test_the_source_is_not_read_again_for_what_has_passed_whole(keepers: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    keepers.put(keepers.source, 3)
    keepers.copy()

    def never(found: Found, **_: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(keepers.source, "retrieve", never)
    assert keepers.verify()["compared"] == 3


def test_a_file_without_preamble_is_the_same_image(keepers: Move) -> None:
    put(keepers.target, image(keepers.study)[132:])
    keepers.source, keepers.target = keepers.target, keepers.source
    keepers.copy()
    assert keepers.verify()["compared"] == 1


# The source's copy


def test_the_source_is_deleted_after_verification_and_brought_back_by_undo(way: Move) -> None:
    shared = new_uid()
    for pacs in (way.source, way.target):
        put(pacs, image(way.study, sop=shared))
    uids = {*way.put(way.source, 2), shared}
    before = pixels_of(way.source, way.study)
    there = way.put(way.target, 1)
    way.copy()
    way.verify(delete=True)
    assert way.on_source == set()
    assert way.on_target == {*uids, *there}

    undone = way.undo()
    assert (undone["removed"], undone["restored"], undone["left"]) == (2, 3, 2)
    assert way.on_source == uids
    assert pixels_of(way.source, way.study) == before
    assert way.on_target == {shared, *there}


def test_nothing_is_deleted_where_the_bytes_differ(keepers: Move) -> None:
    different(keepers)
    keepers.put(keepers.source)
    keepers.copy()
    with pytest.raises(StudyConflict):
        keepers.verify(delete=True)
    assert len(keepers.on_source) == 2


def test_the_source_is_looked_at_once_more_right_before_it_is_deleted(move: Move) -> None:
    move.put(move.source, 2)
    move.copy()
    transfer, receipt = move.transfer(), move.receipt()
    verify_study(transfer, receipt, digests="all")
    late = move.put(move.source, 1)
    with pytest.raises(PacsMisanswered, match="got images while"):
        delete_source(transfer, receipt)
    assert set(late) < move.on_source
    move.verify(delete=True, attempt=2)
    assert set(late) < move.on_target
    assert move.undo()["removed"] == 3
    assert set(late) < move.on_source


def test_a_worker_that_died_while_deleting_the_source_knows_that_it_did(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    move.put(move.source, 2)
    move.copy()
    delete = move.source.delete

    def dying(found: Found, *, permanent: bool) -> Any:
        delete(found, permanent=permanent)
        raise KeyboardInterrupt

    monkeypatch.setattr(move.source, "delete", dying)
    with pytest.raises(KeyboardInterrupt):
        move.verify(delete=True)
    monkeypatch.undo()
    assert move.verify(delete=True, attempt=2)["source_deleted"]
    assert move.undo()["restored"] == 2
    assert len(move.on_source) == 2


def hide(monkeypatch: pytest.MonkeyPatch, pacs: Pacs, uid: str) -> None:
    """Let a server leave one of its images out of its lists, as one does whose index lags behind."""
    instances = pacs.instances

    def listed(found: Found) -> Iterator[Found]:
        return (image for image in instances(found) if image.sop_instance_uid != uid)

    monkeypatch.setattr(pacs, "instances", listed)


def test_a_source_stays_that_sends_an_image_without_listing_it(way: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be deleted with the others, and the target does not have it."""
    hidden, *others = way.put(way.source, 3)
    for uid in others:
        put(way.target, *contents_of(way.source, way.study, uid))
    with monkeypatch.context() as patched:
        hide(patched, way.source, hidden)
        assert way.copy()["added"] == 0
        with pytest.raises(PacsMisanswered, match="sent an image that it does not list; nothing was deleted"):
            way.verify(delete=True)
    assert way.on_source == {hidden, *others}


def test_undo_removes_nothing_where_the_target_sends_an_image_without_listing_it(
    way: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = way.put(way.source, 2)
    way.copy()
    (hidden,) = way.put(way.target, 1)
    for deletes_source in (False, True):
        if deletes_source:
            way.source.delete(Found("image", way.study, f"{way.study}.1", hidden), permanent=True)
            way.verify(delete=True)
        with monkeypatch.context() as patched:
            hide(patched, way.target, hidden)
            with pytest.raises(PacsMisanswered, match="does not list"):
                way.undo()
        assert way.on_target == {hidden, *uids}


def contents_of(pacs: Pacs, study: str, uid: str) -> list[bytes]:
    with pacs.retrieve(Found("study", study)) as parts:
        contents = [b"".join(part.chunks) for part in parts]
    return [one for one in contents if identify(io.BytesIO(one)).sop_instance_uid == uid]


def test_no_source_is_deleted_that_is_the_target_under_another_name(request: pytest.FixtureRequest) -> None:
    """Each image is equal to itself, and all of them would be gone."""
    url = WHERE["orthanc"](request)
    move = Move(server("orthanc", url), server("dicomweb", url, "other-name"))
    uids = move.put(move.source, 2)
    assert move.copy()["added"] == 0
    with pytest.raises(InvalidRequest, match="orthanc and other-name are one archive by their URLs"):
        move.verify(delete=True)
    assert move.on_source == set(uids)


def test_a_study_that_went_from_both_servers_is_not_called_verified(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers can be one behind URLs that do not show it."""
    uids = move.put(move.source, 2)
    move.copy()
    delete = move.source.delete

    def from_both(found: Found, *, permanent: bool) -> Any:
        move.target.delete(found, permanent=permanent)
        return delete(found, permanent=permanent)

    monkeypatch.setattr(move.source, "delete", from_both)
    with pytest.raises(StudyConflict, match="dcm4chee lacks 2 images of the study") as caught:
        move.verify(delete=True)
    assert caught.value.details["missing"] == sorted(uids)


def test_what_the_target_has_lost_of_a_moved_study_is_found(move: Move) -> None:
    uids = move.put(move.source, 2)
    move.copy()
    move.verify(delete=True)
    assert move.verify()["source_deleted"]
    move.target.delete(Found("image", move.study, f"{move.study}.1", uids[0]), permanent=True)
    with pytest.raises(StudyConflict, match="lacks 1 images") as caught:
        move.verify()
    assert caught.value.details["missing"] == [uids[0]]


def test_what_an_attempt_has_brought_that_never_ended_is_taken_back_too(move: Move, sandbox: Any) -> None:
    uids = move.put(move.source, 3)
    there = move.put(move.target, 1)
    sandbox.set_fault("dcm4chee", "store", commit_then_drop=True, times=1)
    with pytest.raises(PacsUnavailable):
        move.copy()
    assert move.on_target == {*uids, *there}
    assert move.undo()["removed"] == 3
    assert move.on_target == set(there)


def test_undo_removes_nothing_that_the_source_no_longer_has(move: Move) -> None:
    uids = move.put(move.source, 2)
    move.copy()
    move.source.delete(Found("image", move.study, f"{move.study}.1", uids[0]), permanent=True)
    with pytest.raises(StudyConflict, match="Nothing was removed"):
        move.undo()
    assert move.on_target == set(uids)


def test_undo_removes_nothing_if_what_has_to_go_back_is_gone(move: Move) -> None:
    uids = move.put(move.source, 2)
    move.copy()
    move.verify(delete=True)
    move.target.delete(Found("image", move.study, f"{move.study}.1", uids[0]), permanent=True)
    with pytest.raises(StudyConflict, match="no longer has 1"):
        move.undo()
    assert move.on_target == {uids[1]}


# What proves that both have the same

TWO_VALUES: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pixels": ({"seed": 1}, {"seed": 2}, "PixelData (7FE0,0010)"),
    "one element": ({"ImageLaterality": "R"}, {"ImageLaterality": "L"}, "ImageLaterality (0020,0062)"),
    "an element that only one has": ({"ImageComments": "HEAD"}, {}, "ImageComments (0020,4000)"),
    "an element that is empty on one": (
        {"ImageComments": "HEAD"},
        {"ImageComments": ""},
        "ImageComments (0020,4000)",
    ),
    "another character set": ({"SpecificCharacterSet": "ISO_IR 192"}, {}, "SpecificCharacterSet (0008,0005)"),
}


def other_content(move: Move, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The same UID with other content on the target, which had it before; the rest of the study is alike."""
    uid = new_uid()
    put(move.source, image(move.study, sop=uid, **ours))
    put(move.target, image(move.study, sop=uid, **theirs))
    move.put(move.source, 2)
    return uid


@pytest.mark.parametrize("what", TWO_VALUES)
def test_a_source_stays_where_the_target_had_other_content_under_a_uid_and_the_element_is_named(
    way: Move, what: str
) -> None:
    ours, theirs, tag = TWO_VALUES[what]
    uid = other_content(way, ours, theirs)
    before = way.on_source
    way.copy()
    with pytest.raises(StudyConflict, match="are not what") as caught:
        way.verify(delete=True)
    assert caught.value.details["different"] == [uid]
    assert tag in caught.value.details["tags"][uid]
    assert tag in caught.value.message
    assert way.on_source == before
    with pytest.raises(StudyConflict):
        way.verify()
    assert way.verify("none")["compared_elements"] == 0


def document(study: str, sop: str, **keywords: Any) -> bytes:
    """A PDF or a report, which has no pixels to compare."""
    ds = pydicom.dcmread(io.BytesIO(image(study, sop=sop, **keywords)))
    del ds.PixelData, ds.Rows, ds.Columns
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("sop_class", "ours", "theirs", "tag"),
    [
        (
            EncapsulatedPDFStorage,
            {"EncapsulatedDocument": b"%PDF-1"},
            {"EncapsulatedDocument": b"%PDF-2"},
            "EncapsulatedDocument (0042,0011)",
        ),
        (BasicTextSRStorage, {"VerificationFlag": "VERIFIED"}, {"VerificationFlag": "UNVERIFIED"}, "VerificationFlag"),
        (KeyObjectSelectionDocumentStorage, {"ContentLabel": "A"}, {"ContentLabel": "B"}, "ContentLabel (0070,0080)"),
    ],
    ids=["PDF", "SR", "KO"],
)
def test_what_has_no_pixels_is_compared_all_the_same(
    way: Move, sop_class: str, ours: dict[str, Any], theirs: dict[str, Any], tag: str
) -> None:
    alike, unlike = new_uid(), new_uid()
    for pacs, content in ((way.source, ours), (way.target, theirs)):
        put(pacs, document(way.study, unlike, SOPClassUID=sop_class, **content))
        put(pacs, document(way.study, alike, SOPClassUID=sop_class, **ours))
    way.copy()
    with pytest.raises(StudyConflict) as caught:
        way.verify(delete=True)
    assert caught.value.details["different"] == [unlike]
    assert tag in str(caught.value.details["tags"])
    assert way.on_source == {alike, unlike}


def odd(study: str) -> list[bytes]:
    """Images that DCM4CHEE rewrites in each of the ways that it is documented to."""
    whole = image(study)
    at = whole.index(b"\x20\x00\x0d\x00UI")
    return [
        whole[:at] + b"\x20\x00\x00\x00UL\x04\x00\x10\x00\x00\x00" + whole[at:],
        image(study, EncapsulatedPixelDataValueTotalLength=8192),
        image(study, IssuerOfPatientID=""),
        implicit(image(study)),
    ]


def implicit(content: bytes) -> bytes:
    ds, file = pydicom.dcmread(io.BytesIO(content)), io.BytesIO()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    ds.save_as(file, implicit_vr=True, little_endian=True)
    return file.getvalue()


def test_what_a_server_is_documented_to_rewrite_does_not_keep_a_study_from_being_moved(way: Move) -> None:
    contents = odd(way.study)
    put(way.source, *contents)
    put(way.target, contents[0], contents[-1])
    way.copy()
    verified = way.verify(delete=True)
    assert verified["compared"] + verified["compared_elements"] == 4
    assert (way.on_source, len(way.on_target)) == (set(), 4)
    assert way.undo()["restored"] == 4
    assert len(way.on_source) == 4


def test_a_study_without_patient_ids_is_moved_to_where_they_are_made_up(way: Move) -> None:
    put(way.source, *(image(way.study, PatientID="") for _ in range(3)))
    way.copy()
    way.verify(delete=True)
    assert (way.on_source, len(way.on_target)) == (set(), 3)
    assert way.undo()["restored"] == 3


def test_a_copy_without_patient_id_is_no_reason_to_delete_the_one_that_has_it(way: Move) -> None:
    """DCM4CHEE makes up a PatientID where there is none; whether it made up this one cannot be known."""
    uid = new_uid()
    put(way.source, image(way.study, sop=uid))
    put(way.target, image(way.study, sop=uid, PatientID=""))
    way.copy()
    with pytest.raises(StudyConflict) as caught:
        way.verify(delete=True)
    assert "PatientID (0010,0020)" in caught.value.details["tags"][uid]
    assert way.on_source == {uid}


def test_an_element_that_the_archive_replaces_by_an_earlier_image_s_keeps_the_source(move: Move) -> None:
    """DCM4CHEE lays the study's first values over each image: what the others said is lost there."""
    put(move.target, image(move.study, StudyDescription="first"))
    uid = new_uid()
    put(move.source, image(move.study, sop=uid, StudyDescription="second"))
    move.copy()
    with pytest.raises(StudyConflict) as caught:
        move.verify(delete=True)
    assert caught.value.details["tags"] == {uid: ["StudyDescription (0008,1030)"]}
    assert move.on_source == {uid}


def test_what_the_source_has_got_under_a_uid_since_it_was_copied_is_not_deleted(way: Move) -> None:
    (uid,) = way.put(way.source, 1, ImageLaterality="R")
    way.copy()
    way.source.delete(Found("study", way.study), permanent=True)
    put(way.source, image(way.study, series=f"{way.study}.1", sop=uid, ImageLaterality="L"))
    with pytest.raises(StudyConflict) as caught:
        way.verify(delete=True)
    assert caught.value.details["tags"] == {uid: ["ImageLaterality (0020,0062)"]}
    assert way.on_source == {uid}


def test_no_image_is_deleted_that_was_not_compared(way: Move) -> None:
    """As an order of 0.1.0 has it: what verification left out, the deletion itself makes up for."""
    uid = other_content(way, {"ImageLaterality": "R"}, {"ImageLaterality": "L"})
    way.copy()
    transfer, receipt = way.transfer(), way.receipt()
    for digests in ("none", "sample"):
        with contextlib.suppress(StudyConflict):
            verify_study(transfer, receipt, digests=digests)
        with pytest.raises(StudyConflict):
            delete_source(transfer, receipt)
    assert uid in way.on_source


def test_an_image_that_both_have_got_since_the_proof_is_proven_too(move: Move) -> None:
    move.put(move.source, 1)
    move.copy()
    transfer, receipt = move.transfer(), move.receipt()
    verify_study(transfer, receipt, digests="all", moves=True)
    late = new_uid()
    for pacs, seed in ((move.source, 1), (move.target, 2)):
        put(pacs, image(move.study, sop=late, seed=seed))
    with pytest.raises(StudyConflict) as caught:
        delete_source(transfer, receipt)
    assert caught.value.details["different"] == [late]
    assert late in move.on_source


@pytest.mark.parametrize("target", ["dcm4chee", "orthanc"])
def test_two_images_under_one_uid_are_not_proven_by_one_of_them(request: pytest.FixtureRequest, target: Any) -> None:
    """MSDICOM tells images by all of their UIDs, so one can be in two series; others know one of them at most."""
    move = Move(*(server(kind, WHERE[kind](request)) for kind in ("msdicom", target)))  # type: ignore[arg-type]
    twice = new_uid()
    put(move.source, *(image(move.study, series=f"{move.study}.{n}", sop=twice, seed=n) for n in (1, 2)))
    move.put(move.source, 1)
    with contextlib.suppress(PacsMisanswered, PacsUnavailable):
        move.copy()
    with pytest.raises(StudyConflict) as caught:
        move.verify(delete=True)
    assert caught.value.details["different"] == [twice]
    assert twice in move.on_source
    with move.source.retrieve(Found("study", move.study)) as parts:
        assert len([b"".join(part.chunks) for part in parts]) == 3


def test_undo_removes_no_copy_of_which_the_source_has_another(way: Move) -> None:
    (uid,) = way.put(way.source, 1, ImageLaterality="R")
    way.copy()
    way.source.delete(Found("study", way.study), permanent=True)
    put(way.source, image(way.study, series=f"{way.study}.1", sop=uid, ImageLaterality="L"))
    with pytest.raises(StudyConflict) as caught:
        way.undo()
    assert caught.value.details["tags"] == {uid: ["ImageLaterality (0020,0062)"]}
    assert way.on_target == {uid}


def test_undo_of_a_move_removes_nothing_if_the_source_has_got_another_image_since(way: Move) -> None:
    uids = way.put(way.source, 2, ImageLaterality="R")
    way.copy()
    way.verify(delete=True)
    put(way.source, image(way.study, series=f"{way.study}.1", sop=uids[0], ImageLaterality="L"))
    with pytest.raises(StudyConflict) as caught:
        way.undo()
    assert caught.value.details["different"] == [uids[0]]
    assert way.on_target == set(uids)


def test_a_comparison_holds_no_image_in_memory(move: Move) -> None:
    move.put(move.source, 1, side=5000)
    move.copy()
    tracemalloc.start()
    try:
        assert move.verify()["compared_elements"] == 1
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24 * 1_048_576, "of an image of 50 MB"


# When things go wrong


def attempts(move: Move, most: int = 5) -> dict[str, Any]:
    """As the engine does it: again, until it is done."""
    for attempt in range(1, most + 1):
        try:
            return move.copy(attempt)
        except (PacsUnavailable, PacsMisanswered):
            continue
    raise AssertionError(f"not done after {most} attempts")


FAULTS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "source cut off": ("msdicom", "retrieve", {"truncate": 30_000, "times": 2}),
    "source cut off cleanly": ("msdicom", "retrieve", {"truncate": "cleanly", "times": 1}),
    "source gone": ("msdicom", "retrieve", {"status": 503, "times": 2}),
    "target in trouble": ("dcm4chee", "store", {"status": 503, "times": 2}),
    "target busy": ("dcm4chee", "store", {"status": 429, "retry_after_s": 1, "times": 1}),
    "target full": ("dcm4chee", "store", {"disk_full": "A700", "times": 2}),
    "target resets": ("dcm4chee", "store", {"reset_after_bytes": 30_000, "times": 2}),
    "answer lost": ("dcm4chee", "store", {"commit_then_drop": True, "times": 2}),
    "last part lost": ("dcm4chee", "store", {"lose_last_part": True, "times": 3}),
}


@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "turned"])
@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_next_attempt_goes_on_and_ends_clean(
    move: Move, sandbox: Any, monkeypatch: pytest.MonkeyPatch, fault: str, turned: bool
) -> None:
    monkeypatch.setattr(study_copy, "REQUEST_IMAGES", 4)
    dialect, operation, injected = FAULTS[fault]
    if turned:
        move.source, move.target = move.target, move.source
        dialect = {"msdicom": "dcm4chee", "dcm4chee": "msdicom"}[dialect]
        injected = {**injected, "disk_full": "272"} if "disk_full" in injected else injected
    uids = move.put(move.source, 10)
    there = move.put(move.target, 1)
    sandbox.set_fault(dialect, operation, **injected)
    attempts(move)
    assert move.attempts > 1 or fault == "last part lost"
    assert move.added == set(uids), "what an attempt before has brought is ours too"
    verified = move.verify()
    assert (verified["topped_up"], move.on_target) == (0, {*uids, *there})
    assert move.undo()["removed"] == 10
    assert move.on_target == set(there)


def test_what_was_answered_before_the_source_broke_off_is_not_sent_again(
    move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source breaks off between two images: those before are stored in a request that ends well."""
    uids = move.put(move.source, 3)
    retrieve = move.source.retrieve

    class Broken:
        def __init__(self, found: Found, **_: Any) -> None:
            self._answer = retrieve(found)

        def __enter__(self) -> Iterator[Any]:
            return self._parts(self._answer.__enter__())

        def __exit__(self, *_: object) -> None:
            self._answer.__exit__(None, None, None)

        @staticmethod
        def _parts(parts: Any) -> Iterator[Any]:
            yield next(parts)
            yield next(parts)
            raise PacsMisanswered("cut off")

    monkeypatch.setattr(move.source, "retrieve", Broken)
    with pytest.raises(PacsMisanswered, match="cut off"):
        move.copy()
    assert len(move.on_target) == 2
    monkeypatch.undo()
    move.copy(2)
    assert move.added == set(uids)


def test_an_image_that_the_target_refuses_is_told_and_the_others_are_there(move: Move) -> None:
    uids = move.put(move.source, 3)
    bad = move.put(move.source, 1, PatientName="Somebody^Else")
    with pytest.raises(StudyConflict, match="another patient") as caught:
        move.copy()
    assert caught.value.details["refused"] == bad
    assert move.added == set(uids) == move.on_target


@pytest.mark.parametrize(("kind", "sent"), [("orthanc", 4), ("dicomweb", 6)])
def test_several_bad_images_in_one_request_do_not_take_the_others_with_them(
    keepers: Move, kind: ServerType, sent: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real Orthanc tells all of an archive; by STOW it answers 400 and names none, so those are sent again, alone."""
    keepers.target = server(kind, WHERE["orthanc"](request))
    monkeypatch.setattr(keepers.target, "accepts_streams", True)
    uids = keepers.put(keepers.source, 4)
    seen: list[int] = []
    send = keepers.target.store_stream

    def spoiling(stream: Iterable[StreamedInstance]) -> Any:
        def spoiled() -> Iterator[StreamedInstance]:
            for number, one in enumerate(stream):
                seen.append(number)
                bad = one.instance.sop_instance_uid in uids[:2]
                content = b"".join(one.chunks)
                yield StreamedInstance(one.instance, iter([b"<html>" * 50 if bad else content]))

        return send(spoiled())

    monkeypatch.setattr(keepers.target, "store_stream", spoiling)
    with pytest.raises(PacsRejected) as caught:
        keepers.copy()
    assert caught.value.details["refused"] == sorted(uids[:2])
    assert keepers.on_target == set(uids[2:])
    assert len(seen) == sent


def test_a_store_that_was_left_behind_is_cleared_after_some_attempts(move: Move, sandbox: Any) -> None:
    move.source, move.target = move.target, move.source
    uids = move.put(move.source, 2)
    sandbox.set_fault("msdicom", "store", pending_45071="never", times=1)
    attempts(move)
    assert move.attempts == 4
    assert move.added == set(uids) == move.on_target


# What cannot pass


@pytest.fixture
def guarded(request: pytest.FixtureRequest) -> Move:
    """A target of which nobody knows whether it takes a body of unknown length."""
    source = server("dcm4chee", WHERE["dcm4chee"](request))
    return Move(source, server("dicomweb", WHERE["orthanc"](request), "plain"))


def test_images_are_spooled_one_by_one_where_lengths_have_to_be_announced(
    guarded: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    uids = guarded.put(guarded.source, 3)
    monkeypatch.setattr(guarded.target, "store_stream", None)
    guarded.copy()
    assert guarded.added == set(uids) == guarded.on_target
    assert guarded.verify()["not_kept_by"] == ["dcm4chee", "plain"]


def test_a_target_that_wants_to_know_the_length_is_given_spooled_images_from_then_on(move: Move, sandbox: Any) -> None:
    uids = move.put(move.source, 3)
    sandbox.set_fault("dcm4chee", "store", status=411, times=1)
    move.copy()
    assert move.added == set(uids) == move.on_target
    assert move.attempts == 1


def test_an_image_of_any_size_passes_in_the_same_memory(move: Move) -> None:
    move.put(move.source, 1, side=5000)
    tracemalloc.start()
    try:
        move.copy()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * 1_048_576, "of an image of 50 MB"
