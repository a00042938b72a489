"""What the settings forbid to delete on a server: a table of policy, order and what is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from courier.errors import CourierError, InvalidRequest, PacsUnavailable
from courier.messages import Level
from courier.settings import ServerSettings, ServerType
from worker.batches.coordinator import Usage
from worker.batches.throttle import metered_fleet
from worker.pacs.fleet import Fleet
from worker.pacs.protection import check_allowed, check_two_archives, refusal
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs
from worker.pacs.registry import connect

DELETED, HIDDEN = Deletion(DeletionFate.DELETED), Deletion(DeletionFate.HIDDEN)
IMAGE = Found("image", "1.2", "1.2.3", "1.2.3.4")
LEVELS: Mapping[Level, Found] = {
    "study": Found("study", "1.2"),
    "series": Found("series", "1.2", "1.2.3"),
    "image": IMAGE,
}


class RecordingShelf:
    """A server that can hide, and writes down what it is asked."""

    def __init__(self, deletions: str, there: list[Found] | CourierError) -> None:
        self.server = ServerSettings.model_validate(
            {"name": "ward", "type": "dcm4chee", "url": "http://host", "deletions": deletions}
        )
        self.there = there
        self.asked: list[str] = []

    def find(self, level: Level, uid: str) -> list[Found]:
        self.asked.append(f"find {level} {uid}")
        if isinstance(self.there, CourierError):
            raise self.there
        return self.there

    def deletion(self, level: Level, *, permanent: bool) -> Deletion:
        return DELETED if permanent else HIDDEN

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        self.asked.append(f"delete {found.level}")
        return self.deletion(found.level, permanent=permanent)


def behind_the_fleet(shelf: RecordingShelf) -> list[Pacs]:
    """The server as jobs have it, as chunks of batches have it, and as a fleet made of a fleet has it."""
    fleet = Fleet([cast(Any, shelf)])
    return [fleet["ward"], metered_fleet(fleet, Usage())["ward"], Fleet(fleet)["ward"]]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("deletions", "permanent", "fate"),
    [
        ("allow", True, DeletionFate.DELETED),
        ("allow", False, DeletionFate.HIDDEN),
        ("hide", True, DeletionFate.REFUSED),
        ("hide", False, DeletionFate.HIDDEN),
        ("never", True, DeletionFate.REFUSED),
        ("never", False, DeletionFate.REFUSED),
    ],
)
def test_no_deletion_reaches_a_server_that_the_settings_protect_from_it(
    deletions: str, permanent: bool, fate: DeletionFate, level: Level
) -> None:
    for number in range(3):
        shelf = RecordingShelf(deletions, [LEVELS[level]])
        pacs = behind_the_fleet(shelf)[number]
        assert pacs.deletion(level, permanent=permanent).fate is fate
        answer = pacs.delete(LEVELS[level], permanent=permanent)
        assert answer.fate is fate
        assert ("delete" in " ".join(shelf.asked)) is (fate is not DeletionFate.REFUSED)
        if fate is DeletionFate.REFUSED:
            assert answer.code == "invalid_request"
            assert ("ward" in answer.note, f'deletions = "{deletions}"' in answer.note) == (True, True)


@pytest.mark.parametrize("there", [[], [Found("image", "9.9", "9.9.1", "1.2.3.4")]])
def test_what_is_not_on_a_protected_server_is_not_refused_there(there: list[Found]) -> None:
    for found in LEVELS.values():
        shelf = RecordingShelf("never", there if found.level == "image" else [])
        assert Fleet([cast(Any, shelf)])["ward"].delete(found, permanent=True).fate is DeletionFate.NOT_THERE


def test_a_protected_server_that_is_silent_is_never_said_to_refuse_or_to_be_without_it() -> None:
    fleet = Fleet([cast(Any, RecordingShelf("never", PacsUnavailable("Silent.")))])
    with pytest.raises(PacsUnavailable):
        fleet["ward"].delete(IMAGE, permanent=True)


@pytest.mark.parametrize("kind", ["msdicom", "orthanc", "dicomweb"])
def test_where_a_dialect_cannot_hide_the_sentence_says_that_nothing_can_be_deleted(kind: ServerType) -> None:
    server = ServerSettings(name="ward", type=kind, url="http://host/v2", deletions="hide")
    why = refusal(connect(server), permanent=True)
    assert f"a server of the type {kind} cannot hide" in why
    pacs = Fleet([connect(server)])["ward"]
    assert pacs.deletion("study", permanent=False).fate is DeletionFate.REFUSED, "by the dialect itself"


def test_an_order_that_names_a_protected_server_is_refused_with_the_server_and_its_setting() -> None:
    servers = [
        connect(ServerSettings(name="a", type="orthanc", url="http://host")),
        connect(ServerSettings(name="b", type="dcm4chee", url="http://host/rs", deletions="hide")),
    ]
    with pytest.raises(InvalidRequest, match=r'b is protected \(setting deletions = "hide"\).*--hide') as caught:
        check_allowed(servers, permanent=True)
    assert (caught.value.server_name, caught.value.server_type) == ("b", "dcm4chee")
    check_allowed(servers, permanent=False)
    check_allowed(servers[:1], permanent=True)


# Two names of one archive


def at(server_type: ServerType, url: str) -> Pacs:
    return connect(ServerSettings(name=server_type, type=server_type, url=url))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("orthanc", "http://host:8042/dicom-web"), ("dicomweb", "http://host:8042/dicom-web/")),
        (("orthanc", "http://host/pacs/dicom-web"), ("orthanc", "http://HOST:80/pacs/dicom-web")),
        (
            ("dcm4chee", "https://host/dcm4chee-arc/aets/ONE/rs"),
            ("dcm4chee", "https://host:443/dcm4chee-arc/aets/TWO/rs"),
        ),
        (("msdicom", "http://host/v1"), ("dicomweb", "http://host/v2")),
    ],
)
def test_two_names_of_one_archive_are_no_two_ends_of_a_move(
    one: tuple[ServerType, str], other: tuple[ServerType, str]
) -> None:
    with pytest.raises(InvalidRequest, match="are one archive by their URLs"):
        check_two_archives(at(*one), at(*other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("orthanc", "http://host:8042/dicom-web"), ("orthanc", "http://host:8043/dicom-web")),
        (("orthanc", "http://host/one/dicom-web"), ("orthanc", "http://host/two/dicom-web")),
        (("msdicom", "http://host/v2/partitions/one"), ("msdicom", "http://host/v2/partitions/two")),
        (("dcm4chee", "http://host/dcm4chee-arc/aets/A/rs"), ("dcm4chee", "http://other/dcm4chee-arc/aets/A/rs")),
    ],
)
def test_two_archives_of_one_host_or_one_product_are_two(
    one: tuple[ServerType, str], other: tuple[ServerType, str]
) -> None:
    check_two_archives(at(*one), at(*other))
