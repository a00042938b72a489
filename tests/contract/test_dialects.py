"""What every dialect owes the jobs (worker/pacs/protocol.py), shown on every server that we have.

One suite for all of them; where products differ, `HABITS` says how, as documented.
"""

from __future__ import annotations

import io
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pydicom
import pytest

from courier.errors import (
    CourierError,
    InvalidRequest,
    InvalidUid,
    NotFound,
    PacsMisanswered,
    PacsUnauthorized,
    PacsUnavailable,
)
from courier.messages import Level
from courier.settings import AuthSettings, ServerSettings, ServerType
from sandbox import processes as parts_of_the_stack
from sandbox.processes import Processes
from sandbox.synthetic import image, new_uid
from tests.missing import missing
from worker.dicom.instances import identify
from worker.pacs.dicomjson import SOP_INSTANCE_UID, STUDY_INSTANCE_UID, text
from worker.pacs.protocol import Deletion, DeletionFate, Fate, Found, Pacs, Part, StreamedInstance
from worker.pacs.registry import DIALECTS, connect

GARBAGE = b"<html>This is no DICOM file</html>" * 20
LEVELS: tuple[Level, ...] = ("study", "series", "image")
DELETED, HIDDEN, REFUSED = DeletionFate.DELETED, DeletionFate.HIDDEN, DeletionFate.REFUSED


@dataclass(frozen=True)
class ProductHabits:
    """Where one product may differ from another."""

    server_type: ServerType
    where: Callable[[pytest.FixtureRequest], str]
    duplicate: Fate = Fate.STORED
    deletes: Mapping[Level, DeletionFate] = field(default_factory=lambda: dict.fromkeys(LEVELS, DELETED))
    hides: DeletionFate = REFUSED
    decodes_queries: bool = True
    knows_version: bool = False
    knows_database: bool = True
    knows_storage: bool = False


HABITS: Mapping[str, ProductHabits] = {
    "sandbox-msdicom": ProductHabits(
        "msdicom",
        lambda request: str(request.getfixturevalue("sandbox").msdicom),
        duplicate=Fate.ALREADY_THERE,
    ),
    "sandbox-dcm4chee": ProductHabits(
        "dcm4chee",
        lambda request: str(request.getfixturevalue("sandbox").dcm4chee),
        deletes={"study": DELETED, "series": HIDDEN, "image": HIDDEN},
        hides=HIDDEN,
        knows_storage=True,
        knows_version=True,
    ),
    "orthanc": ProductHabits(
        "orthanc",
        lambda request: str(request.getfixturevalue("orthanc")),
        duplicate=Fate.ALREADY_THERE,
        knows_version=True,
        knows_storage=True,
    ),
    "orthanc-as-plain-dicomweb": ProductHabits(
        "dicomweb",
        lambda request: str(request.getfixturevalue("orthanc")),
        deletes=dict.fromkeys(LEVELS, REFUSED),
        decodes_queries=False,
        knows_database=False,
    ),
}


@pytest.fixture(params=HABITS)
def habits(request: pytest.FixtureRequest) -> ProductHabits:
    return HABITS[request.param]


@pytest.fixture
def url(habits: ProductHabits, request: pytest.FixtureRequest) -> str:
    return habits.where(request)


@pytest.fixture
def pacs(habits: ProductHabits, url: str) -> Pacs:
    return server(habits, url)


def server(habits: ProductHabits, url: str, **settings: Any) -> Pacs:
    return connect(ServerSettings(name="ward", type=habits.server_type, url=url, **settings))


def part(content: bytes) -> Part:
    return Part(identify(io.BytesIO(content)), lambda: io.BytesIO(content), len(content))


def bad_part(study: str) -> Part:
    """A part that claims to be an image and is none."""
    claimed = part(image(study)).instance
    return Part(claimed, lambda: io.BytesIO(GARBAGE), len(GARBAGE))


def stored(pacs: Pacs, *images: bytes) -> list[Part]:
    parts = [part(content) for content in images]
    assert [outcome.fate for outcome in pacs.store(parts)] == [Fate.STORED] * len(parts)
    return parts


def uid_of(level: Level, one: Part) -> str:
    instance = one.instance
    return {
        "study": instance.study_instance_uid,
        "series": instance.series_instance_uid,
        "image": instance.sop_instance_uid,
    }[level]


def found_once(pacs: Pacs, level: Level, one: Part) -> Found:
    (found,) = pacs.find(level, uid_of(level, one))
    return found


def image_uids(datasets: list[dict[str, Any]]) -> set[str]:
    return {text(ds, SOP_INSTANCE_UID) for ds in datasets}


# Finding


@pytest.mark.parametrize("level", LEVELS)
def test_what_was_stored_is_found_by_its_uid_alone_with_its_parents(pacs: Pacs, level: Level) -> None:
    (one,) = stored(pacs, image(new_uid()))
    found = found_once(pacs, level, one)
    assert found.level == level
    assert found.study_instance_uid == one.instance.study_instance_uid
    assert found.series_instance_uid == (None if level == "study" else one.instance.series_instance_uid)
    assert found.sop_instance_uid == (one.instance.sop_instance_uid if level == "image" else None)


@pytest.mark.parametrize("level", LEVELS)
def test_what_nobody_stored_is_not_found(pacs: Pacs, level: Level) -> None:
    stored(pacs, image(new_uid()))
    assert pacs.find(level, new_uid()) == []


@pytest.mark.parametrize("uid", ["*", "", "1.2,1.3", "abc"])
def test_what_is_no_uid_is_not_asked_for(pacs: Pacs, uid: str) -> None:
    with pytest.raises(InvalidUid):
        pacs.find("study", uid)


# Storing


def test_an_image_that_is_there_already_is_judged_as_the_product_documents(pacs: Pacs, habits: ProductHabits) -> None:
    content = image(new_uid())
    (one,) = stored(pacs, content)
    assert [outcome.fate for outcome in pacs.store([one])] == [habits.duplicate]
    assert len(pacs.metadata(found_once(pacs, "study", one))) == 1


def test_several_images_of_several_studies_have_one_outcome_each_in_order(pacs: Pacs) -> None:
    first, second = new_uid(), new_uid()
    parts = [part(image(study)) for study in (first, second, first)]
    outcomes = pacs.store(parts)
    assert [outcome.sop_instance_uid for outcome in outcomes] == [one.instance.sop_instance_uid for one in parts]
    assert [outcome.fate for outcome in outcomes] == [Fate.STORED] * 3
    assert len(pacs.metadata(found_once(pacs, "study", parts[0]))) == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_file_among_several_is_rejected_and_the_others_are_stored(pacs: Pacs, place: int) -> None:
    study = new_uid()
    parts = [part(image(study)), part(image(study))]
    parts.insert(place, bad_part(study))
    fates = [outcome.fate for outcome in pacs.store(parts)]
    assert fates.pop(place) is Fate.REJECTED
    assert fates == [Fate.STORED, Fate.STORED]
    assert len(pacs.metadata(found_once(pacs, "study", parts[0]))) == 2


def test_a_bad_file_alone_is_rejected_with_a_sentence(pacs: Pacs) -> None:
    (outcome,) = pacs.store([bad_part(new_uid())])
    assert outcome.fate is Fate.REJECTED
    assert outcome.message.endswith(".")


def test_two_bad_files_are_never_stored(pacs: Pacs) -> None:
    parts = [bad_part(new_uid()), bad_part(new_uid())]
    assert {outcome.fate for outcome in pacs.store(parts)} <= {Fate.REJECTED, Fate.UNMENTIONED}


def test_a_file_without_preamble_is_stored(pacs: Pacs) -> None:
    content = image(new_uid())[132:]
    one = part(content)
    assert one.instance.has_preamble is False
    stored(pacs, content)
    (whole,) = retrieved(pacs, found_once(pacs, "image", one)).values()
    assert whole[128:132] == b"DICM"


def test_an_image_of_many_blocks_is_stored_whole(pacs: Pacs) -> None:
    (one,) = stored(pacs, image(new_uid(), side=1024))
    with pacs.retrieve(found_once(pacs, "image", one)) as parts:
        (content,) = [b"".join(each.chunks) for each in parts]
    assert len(pydicom.dcmread(io.BytesIO(content)).PixelData) == 1024 * 1024 * 2


def test_many_threads_may_store_and_find_at_once(pacs: Pacs) -> None:
    images = [part(image(new_uid())) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda one: pacs.store([one])[0].fate, images))
        found = list(pool.map(lambda one: len(pacs.find("image", uid_of("image", one))), images))
    assert outcomes == [Fate.STORED] * 16
    assert found == [1] * 16


# Storing what arrives from elsewhere


def streamed(content: bytes, *, block_bytes: int = 1000) -> StreamedInstance:
    blocks = (content[at : at + block_bytes] for at in range(0, len(content), block_bytes))
    return StreamedInstance(part(content).instance, blocks)


def test_images_that_pass_by_once_are_stored_whole_and_judged_one_by_one(pacs: Pacs, habits: ProductHabits) -> None:
    study = new_uid()
    images = [image(study), image(study, side=600), image(study)[132:]]
    outcomes = pacs.store_stream(streamed(content) for content in images)
    assert [outcome.sop_instance_uid for outcome in outcomes] == [uid_of("image", part(one)) for one in images]
    assert [outcome.fate for outcome in outcomes] == [Fate.STORED] * 3
    came = retrieved(pacs, Found("study", study))
    assert [pydicom.dcmread(io.BytesIO(came[outcome.sop_instance_uid])).Rows for outcome in outcomes] == [64, 600, 64]
    (again,) = pacs.store_stream([streamed(images[0])])
    assert again.fate is habits.duplicate


def test_what_breaks_off_while_it_passes_is_not_stored(pacs: Pacs) -> None:
    study, broken = new_uid(), streamed(image(new_uid(), side=600))

    def breaking() -> Iterator[bytes]:
        yield next(broken.chunks)
        yield b"x" * 300_000
        raise PacsUnavailable("the other server is gone")

    with pytest.raises(PacsUnavailable, match="the other server is gone"):
        pacs.store_stream([streamed(image(study)), StreamedInstance(broken.instance, breaking())])
    assert pacs.find("image", broken.instance.sop_instance_uid) == []
    (outcome,) = pacs.store_stream([streamed(image(study))])
    assert outcome.fate is Fate.STORED, "and nothing is stuck"


# Describing and listing


def test_metadata_are_those_of_every_image_below(pacs: Pacs) -> None:
    study = new_uid()
    parts = stored(pacs, image(study), image(study), image(study, series=new_uid()))
    uids = [uid_of("image", one) for one in parts]
    assert image_uids(pacs.metadata(found_once(pacs, "study", parts[0]))) == set(uids)
    assert image_uids(pacs.metadata(found_once(pacs, "series", parts[0]))) == set(uids[:2])
    assert image_uids(pacs.metadata(found_once(pacs, "image", parts[2]))) == {uids[2]}


def test_metadata_of_what_is_gone_are_none(pacs: Pacs) -> None:
    assert pacs.metadata(Found("image", new_uid(), new_uid(), new_uid())) == []


def listed(pacs: Pacs, *, limit: int, filters: Mapping[str, str] | None = None) -> list[str]:
    """All pages, with what stands on two of them once, as the caller has to make of them."""
    uids: dict[str, None] = {}
    offset: int | None = 0
    while offset is not None:
        page = pacs.studies(filters=filters or {}, limit=limit, offset=offset)
        assert len(page.studies) <= limit
        uids |= dict.fromkeys(text(ds, STUDY_INSTANCE_UID) for ds in page.studies)
        offset = page.next_offset
    return list(uids)


def test_every_study_is_on_some_page(pacs: Pacs) -> None:
    studies = [new_uid() for _ in range(5)]
    stored(pacs, *[image(study) for study in studies])
    assert set(studies) <= set(listed(pacs, limit=2))


@pytest.mark.parametrize(
    ("keyword", "value", "other"),
    [
        ("PatientName", "Hall^Peter {n}", "Hall^Pete {n}"),
        ("PatientID", "A {n}", "A{n}"),
        ("AccessionNumber", "{n}", "x{n}"),
    ],
)
def test_studies_are_filtered_by_keywords_with_any_characters(
    pacs: Pacs, habits: ProductHabits, keyword: str, value: str, other: str
) -> None:
    if not habits.decodes_queries and value != "{n}":
        pytest.skip("Orthanc does not decode a query's values, which plain DICOMweb cannot know")
    n = re.sub(r"\D", "", new_uid())[-10:]
    wanted, unwanted = new_uid(), new_uid()
    images = [image(wanted, **{keyword: value.format(n=n)}), image(unwanted, **{keyword: other.format(n=n)})]
    stored(pacs, *images)
    assert listed(pacs, limit=10, filters={keyword: value.format(n=n)}) == [wanted]


def test_a_filter_that_is_no_keyword_is_refused_and_not_ignored(pacs: Pacs) -> None:
    with pytest.raises(InvalidRequest):
        pacs.studies(filters={"NoSuchKeyword": "1"}, limit=1, offset=0)


# Retrieving


def retrieved(pacs: Pacs, found: Found) -> dict[str, bytes]:
    with pacs.retrieve(found) as parts:
        contents = [b"".join(one.chunks) for one in parts]
    return {str(pydicom.dcmread(io.BytesIO(content)).SOPInstanceUID): content for content in contents}


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_retrieved_is_what_was_stored(pacs: Pacs, level: Level) -> None:
    study = new_uid()
    images = [image(study, seed=seed) for seed in range(3)]
    parts = stored(pacs, *images)
    expected = dict(zip([uid_of("image", one) for one in parts], images, strict=True))
    contents = retrieved(pacs, found_once(pacs, level, parts[0]))
    assert len(contents) == (1 if level == "image" else 3)
    for uid, content in contents.items():
        if pacs.keeps_bytes:
            assert content == expected[uid]
        stored_ds = pydicom.dcmread(io.BytesIO(expected[uid]))
        assert pydicom.dcmread(io.BytesIO(content)).PixelData == stored_ds.PixelData


def test_a_compressed_image_comes_back_in_its_own_syntax(pacs: Pacs) -> None:
    ds = pydicom.dcmread(str(pydicom.data.get_testdata_file("JPEG2000.dcm")))
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = new_uid(), new_uid(), new_uid()
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    file = io.BytesIO()
    ds.save_as(file)
    (one,) = stored(pacs, file.getvalue())
    (content,) = retrieved(pacs, found_once(pacs, "image", one)).values()
    assert pydicom.dcmread(io.BytesIO(content)).file_meta.TransferSyntaxUID == ds.file_meta.TransferSyntaxUID


@pytest.mark.parametrize("level", LEVELS)
def test_every_image_below_an_object_is_listed_however_many_pages_it_takes(
    pacs: Pacs, monkeypatch: pytest.MonkeyPatch, level: Level
) -> None:
    monkeypatch.setattr(sys.modules[type(pacs).__module__], "MAX_PAGE", 2)
    study = new_uid()
    (one, *_) = stored(pacs, *(image(study) for _ in range(3)), image(study, series=new_uid()), image(new_uid()))
    images = list(pacs.instances(found_once(pacs, level, one)))
    assert len(images) == len({one.sop_instance_uid for one in images}) == {"study": 4, "series": 3, "image": 1}[level]
    assert {(one.level, one.study_instance_uid) for one in images} == {("image", study)}


def test_what_is_gone_cannot_be_retrieved(pacs: Pacs) -> None:
    with pytest.raises(NotFound), pacs.retrieve(Found("study", new_uid())) as parts:
        list(parts)


# Deleting


@pytest.mark.parametrize("level", LEVELS)
def test_a_delete_ends_as_the_product_documents_and_takes_nothing_else_with_it(
    pacs: Pacs, habits: ProductHabits, level: Level
) -> None:
    study = new_uid()
    (one, *_) = stored(pacs, image(study), image(study), image(study, series=new_uid()), image(new_uid()))
    found = found_once(pacs, level, one)
    expected = pacs.deletion(level, permanent=True)
    deletion = pacs.delete(found, permanent=True)
    assert deletion.fate is habits.deletes[level]
    assert deletion in (expected, Deletion(REFUSED, deletion.note))
    left = {"study": 0, "series": 1, "image": 2}[level]
    whole_study = Found("study", study)
    assert len(pacs.metadata(whole_study)) == (3 if deletion.fate is REFUSED else left)
    if deletion.fate is HIDDEN:
        assert "one day" in deletion.note
    if deletion.fate is not REFUSED:
        assert pacs.find(level, uid_of(level, one)) == []
        assert pacs.delete(found, permanent=True).fate is DeletionFate.NOT_THERE


def test_what_was_deleted_can_be_stored_again(pacs: Pacs, habits: ProductHabits) -> None:
    if habits.deletes["study"] is REFUSED:
        pytest.skip("this server deletes nothing over DICOMweb")
    content = image(new_uid())
    (one,) = stored(pacs, content)
    pacs.delete(found_once(pacs, "study", one), permanent=True)
    stored(pacs, content)
    assert len(pacs.metadata(found_once(pacs, "study", one))) == 1


def test_a_delete_that_can_be_undone_is_hidden_or_refused_with_a_reason(pacs: Pacs, habits: ProductHabits) -> None:
    content = image(new_uid())
    (one,) = stored(pacs, content)
    deletion = pacs.delete(found_once(pacs, "study", one), permanent=False)
    assert deletion.fate is habits.hides
    assert deletion.note
    if deletion.fate is HIDDEN:
        assert pacs.find("study", uid_of("study", one)) == []
        stored(pacs, content)
    assert len(pacs.find("study", uid_of("study", one))) == 1


# Its own state


def test_a_server_tells_what_it_can_and_never_invents_the_rest(pacs: Pacs, habits: ProductHabits) -> None:
    state, storage, database = pacs.state(), pacs.storage(), pacs.database()
    assert state.ready is True
    assert (state.version is not None) is habits.knows_version
    assert (database.ok is True) is habits.knows_database
    assert (storage.used_bytes is not None) is habits.knows_storage
    for answer, known in ((database, habits.knows_database), (storage, habits.knows_storage)):
        assert known or answer.note


# When things go wrong


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def whole_retrieval(pacs: Pacs) -> None:
    with pacs.retrieve(Found("study", "1.2")) as parts:
        list(parts)


CALLS: Mapping[str, Callable[[Pacs], object]] = {
    "find": lambda pacs: pacs.find("study", "1.2"),
    "present": lambda pacs: pacs.present("1.2", ["1.2.3"]),
    "store": lambda pacs: pacs.store([part(image("1.2"))]),
    "store_stream": lambda pacs: pacs.store_stream([streamed(image("1.2"))]),
    "metadata": lambda pacs: pacs.metadata(Found("study", "1.2")),
    "studies": lambda pacs: pacs.studies(filters={}, limit=1, offset=0),
    "instances": lambda pacs: list(pacs.instances(Found("study", "1.2"))),
    "delete": lambda pacs: pacs.delete(Found("study", "1.2"), permanent=True),
    "retrieve": whole_retrieval,
    "state": lambda pacs: pacs.state(),
    "storage": lambda pacs: pacs.storage(),
    "database": lambda pacs: pacs.database(),
}
#: These have nothing to ask where the product has no such call.
SILENT = {("msdicom", "storage"), ("dicomweb", "storage"), ("dicomweb", "database")}


def test_every_call_of_the_protocol_is_in_the_list() -> None:
    asking_nothing = {"deletion", "check_order_filters"}
    members = {name for name, member in vars(Pacs).items() if callable(member) and name[0] != "_"}
    assert set(CALLS) == members - asking_nothing


@pytest.mark.parametrize("name", sorted(HABITS))
@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_is_down_is_unavailable_and_never_empty(name: str, call: str) -> None:
    habits = HABITS[name]
    pacs = server(habits, f"http://127.0.0.1:{closed_port()}/a/aets/b/rs")
    if (habits.server_type, call) in SILENT:
        answer: Any = CALLS[call](pacs)
        said = asdict(answer)
        assert said.pop("note")
        assert set(said.values()) == {None}, "what was not asked is unknown, never invented"
        return
    with pytest.raises(PacsUnavailable) as error:
        CALLS[call](pacs)
    assert (error.value.server_name, error.value.server_type) == ("ward", habits.server_type)


@pytest.mark.parametrize("call", ["find", "store", "studies"])
def test_a_wrong_path_is_misanswered_and_never_empty(habits: ProductHabits, url: str, call: str) -> None:
    with pytest.raises(PacsMisanswered):
        CALLS[call](server(habits, f"{url}/elsewhere"))


def test_a_page_of_another_server_is_misanswered(habits: ProductHabits, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("image_server").put("/studies", b"<html>It works!</html>")
    with pytest.raises(CourierError) as error:
        server(habits, url.removesuffix("/studies")).find("study", "1.2")
    assert isinstance(error.value, PacsMisanswered | PacsUnavailable)


@pytest.fixture(scope="module")
def guarded_orthanc(processes: Processes) -> Iterator[str]:
    """A real Orthanc that wants a password."""
    overrides = {"AuthenticationEnabled": True, "RegisteredUsers": {"loader": "secret"}}
    try:
        running = parts_of_the_stack.orthanc(processes, name="guarded-orthanc", overrides=overrides)
    except parts_of_the_stack.PartMissing as error:
        missing(str(error))
    yield running.url
    processes.stop_one(running.child)


@pytest.mark.parametrize("server_type", ["orthanc", "dicomweb"])
def test_a_real_server_takes_the_right_password_and_no_other(
    guarded_orthanc: str, server_type: ServerType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_password(password: str) -> Pacs:
        monkeypatch.setenv("WARD_PASSWORD", password)
        auth = AuthSettings(type="basic", username="loader", password_env="WARD_PASSWORD")
        return connect(ServerSettings(name="ward", type=server_type, url=guarded_orthanc, auth=auth))

    stored(with_password("secret"), image(new_uid()))
    for call in ("find", "store", "store_stream", "metadata", "retrieve"):
        with pytest.raises(PacsUnauthorized):
            CALLS[call](with_password("wrong"))


# The suite itself


def test_every_dialect_is_in_this_suite() -> None:
    assert {habits.server_type for habits in HABITS.values()} == set(DIALECTS)


@pytest.mark.parametrize("several", [2, 7, 60])
def test_of_many_images_of_a_study_those_are_named_that_are_there(pacs: Pacs, several: int) -> None:
    study = new_uid()
    there = stored(pacs, *(image(study, side=8) for _ in range(several)))
    elsewhere = stored(pacs, image(new_uid(), side=8))
    uids = [uid_of("image", one) for one in there]
    absent = [new_uid() for _ in range(several)]
    assert pacs.present(study, [*uids, *absent, uid_of("image", elsewhere[0])]) == set(uids)
    assert pacs.present(study, uids[:1]) == set(uids[:1])
    assert pacs.present(study, absent) == pacs.present(new_uid(), uids) == pacs.present(study, []) == set()


def test_one_request_may_be_as_large_as_the_product_documents(pacs: Pacs, habits: ProductHabits) -> None:
    documented = {"msdicom": 2_147_483_647, "dcm4chee": 10_000_000_000, "orthanc": None, "dicomweb": None}
    assert pacs.request_bytes == documented[habits.server_type]


def test_a_study_far_larger_than_what_is_asked_for_is_not_listed_to_its_end(
    sandbox_server_of_pages: tuple[Pacs, str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pacs, study, uids = sandbox_server_of_pages
    monkeypatch.setattr("worker.pacs.msdicom.MAX_PAGE", 2)
    asked = [uids[0], uids[-1], new_uid(), new_uid()]
    assert pacs.present(study, asked) == {uids[0], uids[-1]}
    assert pacs.present(study, uids) == set(uids)


@pytest.fixture
def sandbox_server_of_pages(request: pytest.FixtureRequest) -> tuple[Pacs, str, list[str]]:
    """An MSDICOM with a study of twelve images, which are more than four pages of two."""
    habits, study = HABITS["sandbox-msdicom"], new_uid()
    pacs = server(habits, habits.where(request))
    return pacs, study, [uid_of("image", one) for one in stored(pacs, *(image(study, side=8) for _ in range(12)))]
