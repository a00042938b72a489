"""Jobs and batches on DICOMweb servers of no known product: uploads, migrations, downloads and deletions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from tests.contract.test_foreign_servers import PRODUCTS
from tests.servers.foreign_dicomweb import ROOTS, Foreign, Habits, foreign
from worker.batches.downloads import download_all
from worker.jobs import delete, download, lookup
from worker.jobs.runner import Failed, JobResult
from worker.jobs.upload import upload

#: Those that combine the most habits.
ODDEST = (
    "static-wado",
    "no-roots-and-only-named",
    "no-roots-and-no-uids",
    "ignores-all-but-paths",
    "no-lists-below",
    "caps-and-ignores-offset",
    "by-levels",
)


@pytest.fixture(params=ODDEST)
def server(request: pytest.FixtureRequest) -> Iterator[Foreign]:
    with foreign(PRODUCTS[request.param]) as site:
        yield site


@pytest.fixture
def odd() -> Iterator[Foreign]:
    with foreign(Habits(lacks=ROOTS)) as site:
        yield site


@pytest.fixture
def build(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, tmp_path: Path) -> Callable[..., BatchSite]:
    """A site of MSDICOM and the foreign server, in an order that a test names."""

    def at(site: Foreign, *, alone: bool = False, first: bool = False) -> BatchSite:
        (tmp_path / "out").mkdir(exist_ok=True)
        own = {"name": "foreign", "type": "dicomweb", "url": site.url}
        other = {"name": "msdicom", "type": "msdicom", "url": sandbox.msdicom}
        servers = [own] if alone else [own, other] if first else [other, own]
        folders = [str(tmp_path)]
        return batch_site(servers, sources={"folders": folders}, downloads={"folders": folders})

    return at


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], str]:
    def write(content: bytes) -> str:
        path = tmp_path / f"{new_uid()}.dcm"
        path.write_bytes(content)
        return path.as_uri()

    return write


def single(site: BatchSite, work: Any, task: str, **job: Any) -> JobResult:
    return site.see_to_its_end(task, work, new_uid(), job)


uploaded = partial(single, work=upload, task="pacs.upload")


def code(result: JobResult) -> str:
    assert isinstance(result, Failed), result
    return str(result.error.payload["code"])


def test_single_images_go_where_their_study_is(
    server: Foreign, build: Callable[..., BatchSite], file: Callable[[bytes], str]
) -> None:
    site, study = build(server), new_uid()
    server.put(image(study, side=8))
    content = image(study, side=8)
    told = payload(uploaded(site, image_url=file(content)))
    assert (told["server_name"], told["study_action"], told["warnings"]) == ("foreign", "updated", [])
    assert told["metadata"]["00080018"]["Value"] == [told["image_uid"]]
    assert told["image_uid"] in server.images
    assert code(uploaded(site, image_url=file(content))) == "image_already_exists"
    new = payload(uploaded(site, image_url=file(image(new_uid(), side=8))))
    assert new["server_name"] == "msdicom", "it does not stop what goes elsewhere"


def test_batches_of_uploads_go_where_their_studies_are(
    server: Foreign, build: Callable[..., BatchSite], file: Callable[[bytes], str]
) -> None:
    site, study = build(server), new_uid()
    server.put(image(study, side=8))
    contents = [image(study, side=8) for _ in range(5)] + [image(new_uid(), side=8)]
    urls = [file(content) for content in contents]
    payload(site.upload(*urls, urls[0]))
    assert site.ends() == ["stored"] * 6, [row.passes["apply"].message for row in site.rows]
    assert [row.outcome.server for row in site.rows] == ["foreign"] * 5 + ["msdicom"]
    assert len(server.images) == 6
    payload(site.go_on(lambda coordinator: coordinator.verify(), "verify"))
    assert set(site.ends("verify")) == {"verified"}


def test_studies_are_migrated_to_it_and_from_it(server: Foreign, build: Callable[..., BatchSite]) -> None:
    site, study = build(server), new_uid()
    server.put(image(new_uid(), side=8))
    uids = site.put("msdicom", study, 3)
    payload(site.order(study, from_server="msdicom", to_server="foreign", delete_source=True))
    assert site.ends() == ["copied"], [row.passes["apply"].message for row in site.rows]
    assert uids <= server.images
    assert not site.on("msdicom", study)
    site.batch = "C"
    other = new_uid()
    for _ in range(3):
        server.put(image(other, side=8))
    payload(site.order(other, from_server="foreign", to_server="msdicom", delete_source=False))
    assert site.ends() == ["copied"], [row.passes["apply"].message for row in site.rows]
    assert len(site.on("msdicom", other)) == 3


def test_a_study_is_downloaded_and_deleted(server: Foreign, build: Callable[..., BatchSite], tmp_path: Path) -> None:
    site, study = build(server), new_uid()
    uids = [server.put(image(study, side=8)) for _ in range(3)]
    where = (tmp_path / "out").as_uri()
    told = payload(single(site, download.download, "pacs.download", study_uid=study, destination=where, format="files"))
    assert told["server_name"] == "foreign"
    payload(
        site.see_to_its_end(
            "pacs.batch.download", download_all, "B", {"items": [study], "destination": where, "format": "zip"}
        )
    )
    assert site.ends() == ["downloaded"]
    site.batch = "C"
    result = single(site, delete.delete, "pacs.delete", level="study", uid=study)
    if server.habits.deletes == 204:
        assert payload(result)["servers"][1]["status"] == "deleted"
        assert not server.images & {image for _, _, image in uids}
    else:
        assert code(result) == "pacs_rejected"
        assert len(server.images) == 3


# --- a server without /instances at its root --------------------------------------------------------------------


@pytest.mark.parametrize("missing", [404, 400])
def test_among_few_studies_an_image_is_looked_for_in_each(
    odd: Foreign, build: Callable[..., BatchSite], missing: int
) -> None:
    odd.set(missing=missing)
    site = build(odd)
    for _ in range(3):
        study, series, uid = odd.put(image(new_uid(), side=8))
    for level, wanted in (("series", series), ("image", uid)):
        told = payload(single(site, lookup.exists, "pacs.exists", level=level, uid=wanted))
        assert (told["server_name"], told["servers"][-1]["study_uid"]) == ("foreign", study)
        assert code(single(site, lookup.exists, "pacs.exists", level=level, uid=new_uid())) == "not_found"
    assert (
        payload(single(site, delete.delete, "pacs.delete", level="image", uid=uid))["servers"][1]["status"] == "deleted"
    )
    assert len(odd.images) == 2


def test_a_list_that_may_be_cut_is_no_proof_that_an_image_is_in_no_study(
    odd: Foreign, build: Callable[..., BatchSite]
) -> None:
    odd.set(cap=2, ignores_offset=True)
    for _ in range(3):
        odd.put(image(new_uid(), side=8))
    result = single(build(odd), lookup.exists, "pacs.exists", level="image", uid=list(odd.stored)[-1][2])
    assert code(result) == "pacs_misanswered"


def test_an_image_is_found_described_and_deleted_by_its_uid_and_its_study(
    odd: Foreign, build: Callable[..., BatchSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "SEARCHED_STUDIES", 1)
    site = build(odd)
    odd.put(image(new_uid(), side=8))
    study, series, uid = odd.put(image(new_uid(), side=8))
    for level, wanted in (("series", series), ("image", uid)):
        alone = single(site, lookup.exists, "pacs.exists", level=level, uid=wanted)
        assert code(alone) == "pacs_misanswered"
        assert "Name its study as well (--study, study_uid)" in alone.error.message  # type: ignore[union-attr]
        told = payload(single(site, lookup.exists, "pacs.exists", level=level, uid=wanted, study_uid=study))
        assert (told["server_name"], told["servers"][-1]["study_uid"]) == ("foreign", study)
        told = payload(single(site, lookup.metadata, "pacs.metadata", level=level, uid=wanted, study_uid=study))
        assert told["servers"][-1]["metadata"][0]["00080018"]["Value"] == [uid]
    missing = single(site, lookup.exists, "pacs.exists", level="image", uid=new_uid(), study_uid=study)
    assert code(missing) == "not_found"
    assert f"in the study {study}" in missing.error.message  # type: ignore[union-attr]
    elsewhere = single(site, delete.delete, "pacs.delete", level="image", uid=uid, study_uid=new_uid())
    assert code(elsewhere) == "not_found"
    assert uid in odd.images
    done = payload(single(site, delete.delete, "pacs.delete", level="image", uid=uid, study_uid=study))
    assert [entry["status"] for entry in done["servers"]] == ["not_there", "deleted"]
    assert uid not in odd.images


def test_an_error_that_comes_again_ends_a_job_at_its_first_attempt(
    odd: Foreign, build: Callable[..., BatchSite], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "SEARCHED_STUDIES", 0)
    site = build(odd, alone=True)
    odd.put(image(new_uid(), side=8))
    before = len(odd.asked)
    assert code(single(site, lookup.exists, "pacs.exists", level="image", uid=new_uid())) == "pacs_misanswered"
    assert len(odd.asked) - before <= 4, "the image, any image, and some studies"
    assert site.ledger.load(overdue_s=60).dead == 1, "an operator can replay it"


def test_a_server_that_answers_404_to_everything_ends_uploads_elsewhere_at_once_and_takes_its_own(
    odd: Foreign, build: Callable[..., BatchSite], file: Callable[[bytes], str]
) -> None:
    odd.set(lacks=frozenset(), nothing="404")
    site = build(odd)
    result = uploaded(site, image_url=file(image(new_uid(), side=8)))
    assert code(result) == "pacs_misanswered"
    assert "--server foreign" in result.error.message  # type: ignore[union-attr]
    urls = [file(image(new_uid(), side=8)) for _ in range(2)]
    payload(site.upload(*urls))
    assert site.ends() == ["pacs_misanswered"] * 2
    assert odd.images == set()
    told = payload(uploaded(site, image_url=file(image(new_uid(), side=8)), server="foreign"))
    assert told["server_name"] == "foreign"
    payload(site.go_on(lambda coordinator: coordinator.retry(), "retry"))
    assert site.ends() == ["stored"] * 2, "it has a study now, and says 404 only where there is none"
    assert len(odd.images) == 1


def test_the_only_server_is_taken_at_its_word_when_it_is_empty(
    odd: Foreign, build: Callable[..., BatchSite], file: Callable[[bytes], str]
) -> None:
    odd.set(nothing="404")
    site = build(odd, alone=True)
    payload(site.upload(*[file(image(new_uid(), side=8)) for _ in range(3)]))
    assert site.ends() == ["stored"] * 3
    assert len(odd.images) == 3


def test_an_image_is_not_stored_that_its_server_says_it_has_stored_and_does_not_find(
    build: Callable[..., BatchSite], file: Callable[[bytes], str]
) -> None:
    with foreign(Habits(loses=True)) as odd:
        result = uploaded(build(odd, alone=True), image_url=file(image(new_uid(), side=8)))
        assert code(result) == "pacs_misanswered"
        assert "nor does it find it. Look there" in str(result)


@pytest.mark.parametrize("answer", [b'{"results": []}', b"<NativeDicomModel/>"])
def test_items_of_a_batch_whose_server_cannot_be_read_fail_at_once(
    odd: Foreign, build: Callable[..., BatchSite], file: Callable[[bytes], str], answer: bytes
) -> None:
    site = build(odd)
    kind = "application/json" if answer.startswith(b"{") else "application/dicom+xml"
    odd.instead = [(200, answer, kind)] * 100
    payload(site.upload(*[file(image(new_uid(), side=8)) for _ in range(3)]))
    assert site.ends() == ["pacs_misanswered"] * 3
    assert len(odd.asked) <= 6, "one attempt"
