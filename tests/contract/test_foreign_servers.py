"""DICOMweb servers of no known product, several habits of each combined: what the worker reads, and what it refuses."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from courier.errors import PacsMisanswered
from courier.messages import Level
from courier.settings import ServerSettings
from sandbox.synthetic import image, new_uid
from tests.servers.foreign_dicomweb import (
    BY_LEVELS,
    DICOM_RST,
    DICOMWEB_PACS,
    GOOGLE,
    HIERARCHICAL,
    ROOTS,
    STATIC_WADO,
    Foreign,
    Habits,
    foreign,
)
from worker.dicom.instances import identify
from worker.pacs.dicomjson import SOP_INSTANCE_UID, text
from worker.pacs.finding import find_in_study, find_known
from worker.pacs.protocol import Deletion, DeletionFate, Fate, Found, Pacs, Part
from worker.pacs.registry import connect

PRODUCTS: dict[str, Habits] = {
    "standard": Habits(),
    "dicomweb-pacs": DICOMWEB_PACS,
    "dicom-rst": DICOM_RST,
    "static-wado": STATIC_WADO,
    "google": GOOGLE,
    "hierarchical": HIERARCHICAL,
    "no-roots-and-only-named": Habits(lacks=ROOTS, only_named=True, nothing="404", spelling="keywords"),
    "no-roots-and-no-uids": Habits(lacks=ROOTS, only_named=True, includes=frozenset(), missing=400),
    "ignores-all-but-paths": Habits(
        ignores_filters=True, ignores_offset=True, nothing="empty", one_as_object=True, twice=True
    ),
    "no-lists-below": Habits(
        lacks=ROOTS | {"/studies/*/instances", "/studies/*/series"}, missing=501, nothing="null", spelling="lower"
    ),
    "no-includefield": Habits(lacks=ROOTS, refuses_includefield=True, only_named=True, missing=405, nothing="{}"),
    "by-levels": BY_LEVELS,
    "by-levels-404": replace(BY_LEVELS, nothing="404", spelling="keywords", twice=True),
    "by-studies": Habits(parents="study", nothing="[]", lacks=frozenset(("/studies/*/metadata",))),
    "caps-and-ignores-offset": Habits(cap=2, ignores_offset=True, nothing="404 []", lacks=ROOTS),
}


@pytest.fixture(params=PRODUCTS)
def server(request: pytest.FixtureRequest) -> Iterator[Foreign]:
    with foreign(PRODUCTS[request.param]) as site:
        yield site


@pytest.fixture
def plain() -> Iterator[Callable[..., Foreign]]:
    """Opens a server with the habits that a test names."""
    opened = []

    def build(**habits: object) -> Foreign:
        context = foreign(Habits(**habits))  # type: ignore[arg-type]
        opened.append(context)
        return context.__enter__()

    yield build
    for context in opened:
        context.__exit__(None, None, None)


def ward(site: Foreign) -> Pacs:
    return connect(ServerSettings(name="foreign", type="dicomweb", url=site.url))


def part(content: bytes) -> Part:
    return Part(identify(io.BytesIO(content)), partial(io.BytesIO, content), len(content))


def filled(site: Foreign) -> tuple[str, list[tuple[str, str, str]]]:
    """A study of two series with five images, beside another study; its UIDs."""
    site.put(image(new_uid(), side=8))
    study, other = new_uid(), new_uid()
    uids = [site.put(image(study, side=8)) for _ in range(3)]
    uids += [site.put(image(study, series=other, side=8)) for _ in range(2)]
    return study, uids


def found_of(level: Level, uids: tuple[str, str, str]) -> Found:
    depth = {"study": 1, "series": 2, "image": 3}[level]
    return Found(level, *uids[:depth])


def keys(founds: list[Found]) -> list[tuple[str, str | None, str | None]]:
    return [(one.study_instance_uid, one.series_instance_uid, one.sop_instance_uid) for one in founds]


# --- every habit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["study", "series", "image"])
def test_what_is_there_is_found_at_every_level_and_what_is_not_there_is_not(server: Foreign, level: Level) -> None:
    _, uids = filled(server)
    pacs = ward(server)
    known = found_of(level, uids[4])
    assert keys(find_known(pacs, known)) == keys([known])
    unused = (new_uid(), new_uid(), new_uid())
    assert find_known(pacs, found_of(level, unused)) == []
    if level != "study":
        uid = uids[4][1] if level == "series" else uids[4][2]
        assert keys(find_in_study(pacs, level, uid, uids[4][0])) == keys([known])
        assert find_in_study(pacs, level, new_uid(), uids[4][0]) == []


def test_all_images_of_a_study_and_of_a_series_are_listed_once(server: Foreign) -> None:
    study, uids = filled(server)
    pacs = ward(server)
    assert sorted(keys(list(pacs.instances(Found("study", study))))) == sorted(uids)
    series = found_of("series", uids[0])
    assert sorted(keys(list(pacs.instances(series)))) == sorted(uids[:3])
    assert list(pacs.instances(Found("study", new_uid()))) == []


@pytest.mark.parametrize("number", [2, 5])
def test_which_of_several_images_are_there_is_known(server: Foreign, number: int) -> None:
    study, uids = filled(server)
    wanted = {image for _, _, image in uids[:number]}
    assert ward(server).present(study, {*wanted, new_uid()}) == wanted
    assert ward(server).present(new_uid(), wanted) == set()


@pytest.mark.parametrize(("level", "number"), [("study", 5), ("series", 2), ("image", 1)])
def test_metadata_are_those_of_all_images_below(server: Foreign, level: Level, number: int) -> None:
    _, uids = filled(server)
    rows = ward(server).metadata(found_of(level, uids[4]))
    assert {text(ds, SOP_INSTANCE_UID) for ds in rows} == {image for _, _, image in uids[5 - number :]}
    assert ward(server).metadata(Found("study", new_uid())) == []


def test_what_is_stored_is_found_and_what_is_deleted_is_gone(server: Foreign) -> None:
    pacs, content = ward(server), image(new_uid(), side=8)
    server.put(image(new_uid(), side=8))
    (outcome,) = pacs.store([part(content)])
    assert outcome.fate is Fate.STORED
    instance = part(content).instance
    uids = (instance.study_instance_uid, instance.series_instance_uid, instance.sop_instance_uid)
    for level in ("image", "series", "study"):
        assert find_known(pacs, found_of(level, uids)), level
    deletion = pacs.delete(found_of("study", uids), permanent=True)
    if server.habits.deletes == 204:
        assert deletion == Deletion(DeletionFate.DELETED)
        assert [find_known(pacs, found_of(level, uids)) for level in ("image", "series", "study")] == [[], [], []]
    else:
        assert deletion.fate is DeletionFate.REFUSED, "a 404 to DELETE is no deletion while the study is there"


@pytest.mark.parametrize("status", [200, 202])
@pytest.mark.parametrize("level", ["study", "series", "image"])
@pytest.mark.parametrize("habits", [Habits(), Habits(lacks=ROOTS), BY_LEVELS])
def test_what_is_still_there_is_not_deleted_whatever_the_server_answers(
    plain: Callable[..., Foreign], habits: Habits, level: Level, status: int
) -> None:
    site = plain(**vars(habits) | {"deletes": status})
    _, uids = filled(site)
    pacs, found = ward(site), found_of(level, uids[0])
    with pytest.raises(PacsMisanswered, match=f"answered {status} to a deletion and still has the {level}") as caught:
        pacs.delete(found, permanent=True)
    assert not caught.value.is_lasting
    site.set(deletes=204)
    assert pacs.delete(found, permanent=True) == Deletion(DeletionFate.DELETED)
    assert pacs.delete(found, permanent=True) == Deletion(DeletionFate.NOT_THERE)


@pytest.mark.parametrize("nothing", ["204", "404", "empty", "null"])
def test_the_last_study_of_a_server_is_deleted_however_it_then_says_that_it_has_nothing(
    plain: Callable[..., Foreign], nothing: str
) -> None:
    site = plain(nothing=nothing)
    study, _, _ = site.put(image(new_uid(), side=8))
    assert ward(site).delete(Found("study", study), permanent=True) == Deletion(DeletionFate.DELETED)


def test_lists_of_studies_hold_each_study(server: Foreign) -> None:
    filled(server)
    if server.habits.only_named and (server.habits.refuses_includefield or not server.habits.includes):
        with pytest.raises(PacsMisanswered, match="without their UIDs") as caught:
            ward(server).studies(filters={}, limit=100, offset=0)
        assert caught.value.is_lasting
        return
    page = ward(server).studies(filters={}, limit=100, offset=0)
    assert {ds["0020000D"]["Value"][0] for ds in page.studies} <= {study for study, _, _ in server.stored}
    assert page.studies


def test_a_list_of_all_studies_is_no_empty_list_on_a_server_that_wants_a_key(plain: Callable[..., Foreign]) -> None:
    site = plain(needs_key=True)
    assert ward(site).studies(filters={}, limit=10, offset=0).studies == [], "it has none yet"
    study, _ = filled(site)
    with pytest.raises(PacsMisanswered, match="narrow the list") as caught:
        ward(site).studies(filters={}, limit=10, offset=0)
    assert caught.value.is_lasting
    assert ward(site).studies(filters={"StudyInstanceUID": study}, limit=10, offset=0).studies
    assert ward(site).studies(filters={"StudyInstanceUID": new_uid()}, limit=10, offset=0).studies == []


# --- images by their UID alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "habits",
    [
        {"lacks": ROOTS},
        {"lacks": ROOTS, "missing": 403},
        {"ignores_filters": True},
        {"only_named": True, "includes": frozenset()},
        {"lacks": ROOTS, "needs_key": True},
        {"parents": "study"},
        {"parents": "all", "nothing": "404"},
        {"parents": "all", "needs_key": True, "nothing": "[]"},
    ],
)
@pytest.mark.parametrize("level", ["series", "image"])
def test_where_only_the_study_leads_to_an_image_the_error_is_lasting_and_asks_for_the_study(
    plain: Callable[..., Foreign], habits: dict[str, object], level: Level
) -> None:
    site = plain(**habits)
    filled(site)
    with pytest.raises(PacsMisanswered, match="Name its study as well") as caught:
        ward(site).find(
            level, new_uid() if "ignores_filters" in habits else list(site.stored)[-1][2 - (level == "series")]
        )
    assert caught.value.is_lasting


@pytest.mark.parametrize("level", ["series", "image"])
def test_a_root_is_believed_to_find_nothing_once_it_has_found_what_is_there(
    plain: Callable[..., Foreign], level: Level
) -> None:
    site = plain()
    filled(site)
    pacs = ward(site)
    assert pacs.find(level, new_uid()) == []
    asked = len(site.asked)
    assert pacs.find(level, new_uid()) == []
    assert len(site.asked) == asked + 1


def test_a_server_without_roots_and_without_studies_has_no_image_either(plain: Callable[..., Foreign]) -> None:
    assert ward(plain(lacks=ROOTS)).find("image", new_uid()) == []


# --- nothing found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", ["204", "[]", "404 []", "empty", "null", "{}"])
def test_an_empty_server_says_in_many_ways_that_it_has_nothing(plain: Callable[..., Foreign], nothing: str) -> None:
    pacs = ward(plain(nothing=nothing))
    assert pacs.find("study", new_uid()) == []
    assert pacs.find("image", new_uid()) == []
    assert pacs.studies(filters={}, limit=10, offset=0).studies == []


def test_a_404_to_every_search_is_no_nothing_found_and_says_what_to_do(plain: Callable[..., Foreign]) -> None:
    site = plain(nothing="404")
    with pytest.raises(PacsMisanswered, match="it has no studies, or its url is wrong") as caught:
        ward(site).find("study", new_uid())
    assert caught.value.is_lasting
    site.put(image(new_uid(), side=8))
    assert ward(site).find("study", new_uid()) == [], "and here another search has rows"


def test_a_404_that_is_not_the_servers_way_is_trouble(plain: Callable[..., Foreign]) -> None:
    """Behind a balancer one of two backends may be gone."""
    site = plain()
    site.put(image(new_uid(), side=8))
    site.instead = [(404, b"no backend", "text/plain")]
    with pytest.raises(PacsMisanswered) as caught:
        ward(site).find("study", new_uid())
    assert not caught.value.is_lasting


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"results": []}', "application/json"),
        (b'["1.2.3"]', "application/json"),
        (b'"none"', "application/json"),
        (b"<NativeDicomModel/>", "application/dicom+xml"),
        (b"<html>Log in</html>", "text/html"),
        (
            b'[{"0020000d": {"vr": "UI", "Value": ["1.2"]}, "0020000D": {"vr": "UI", "Value": ["1.3"]}}]',
            "application/json",
        ),
        (b'[{"00100020": {"vr": "LO", "Value": ["7"]}}]', "application/dicom+json"),
    ],
)
def test_what_means_nothing_certain_is_misanswered_at_once(
    plain: Callable[..., Foreign], content: bytes, kind: str
) -> None:
    site = plain()
    site.instead = [(200, content, kind)] * 6
    with pytest.raises(PacsMisanswered) as caught:
        ward(site).find("study", "1.2")
    assert caught.value.is_lasting, caught.value.message
    assert "1.3" not in caught.value.message


def test_a_web_page_of_a_server_that_answered_just_before_is_trouble(plain: Callable[..., Foreign]) -> None:
    site = plain()
    site.put(image(new_uid(), side=8))
    pacs = ward(site)
    assert pacs.find("study", new_uid()) == []
    site.set(web_page=True)
    with pytest.raises(PacsMisanswered) as caught:
        pacs.find("study", new_uid())
    assert not caught.value.is_lasting


# --- what status and doctor say ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("habits", "named"),
    [
        ({"lacks": ROOTS}, "no /series and /instances"),
        ({"lacks": frozenset(("/instances",)), "missing": 400}, "no /instances"),
        ({"ignores_filters": True}, "no /series and /instances"),
    ],
)
def test_the_status_names_the_resources_that_a_servers_root_lacks(
    plain: Callable[..., Foreign], habits: dict[str, object], named: str
) -> None:
    site = plain(**habits)
    filled(site)
    state = ward(site).state()
    assert state.ready
    assert named in state.warnings[0]
    assert "--study" in state.warnings[0]


@pytest.mark.parametrize("habits", [{}, {"nothing": "404"}, {"only_named": True}, {"one_as_object": True}])
def test_the_status_of_a_server_that_can_be_searched_has_no_warning(
    plain: Callable[..., Foreign], habits: dict[str, object]
) -> None:
    site = plain(**habits)
    filled(site)
    assert (ward(site).state().ready, ward(site).state().warnings) == (True, ())
    if "nothing" not in habits:
        assert ward(plain(**habits)).state().warnings == (), "nor of an empty one"


def test_a_url_that_leads_nowhere_is_no_server_without_roots(plain: Callable[..., Foreign]) -> None:
    site = plain()
    site.url = site.url.removesuffix("/dicomweb")
    state = ward(site).state()
    assert (state.ready, state.warnings) == (False, ())
    assert "check the server's url" in state.note
