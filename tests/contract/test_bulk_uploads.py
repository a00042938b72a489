"""Many images at a time into real servers: the sandbox's two, and a real Orthanc where a product matters."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, cast

import pytest

from courier.batches.store import CHUNK_ITEMS, Item, ItemOutcome, Row
from courier.errors import CourierError, SourceNotFound, SourceUnreachable
from courier.ledger.breakers import CHANGES, Breakers
from courier.ledger.jobs import Ledger, Receipt
from courier.settings import Settings
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import RedisPart, SandboxPart
from sandbox.synthetic import image, new_uid
from worker.batches.coordinator import PassCheckpoint, PassContext
from worker.batches.throttle import metered_fleet
from worker.batches.upload_checks import NAMED, undo, verify
from worker.batches.uploads import FIRST_IMAGES, LOAD_IMAGES, Uploads
from worker.dicom.instances import identify
from worker.jobs.attempt import Attempt
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Found, Outcome, Pacs, Part
from worker.pacs.registry import connect
from worker.storage.sources import Sources

_CHUNKS = itertools.count()


class Counted:
    """A server that counts what is stored per request, and otherwise is the one behind it."""

    def __init__(self, pacs: Pacs) -> None:
        self._pacs = pacs
        self.requests: list[int] = []
        self.request_bytes = pacs.request_bytes
        self.look: Callable[[Part], object] = lambda part: None
        self.seen: list[object] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pacs, name)

    def store(self, parts: Sequence[Part]) -> list[Outcome]:
        self.requests.append(len(parts))
        self.seen += [self.look(part) for part in parts]
        return self._pacs.store(parts)


@dataclass
class Chunk:
    """Attempts at the same items, each taking up where the one before left off."""

    services: Services
    urls: Sequence[str]
    server: str = ""
    last: bool = False
    rows: dict[int, Row] = field(default_factory=dict)
    job_id: str = field(default_factory=lambda: f"B.apply.{next(_CHUNKS)}")
    outcomes: dict[int, ItemOutcome] = field(default_factory=dict)

    def attempt(self) -> list[ItemOutcome | CourierError | None]:
        """Those that are open; what is settled is as the batch would have it."""
        results = self.execute()
        self.outcomes.update({one.item.number: one for one in results if isinstance(one, ItemOutcome)})
        return results

    def execute(self) -> list[ItemOutcome | CourierError | None]:
        items = [Item(n, self.server, url) for n, url in enumerate(self.urls) if n not in self.outcomes]
        return Uploads(self.begin()).execute(items)

    def begin(self) -> PassContext:
        """What the engine gives to a kind; the memo of the attempt before is in it."""
        ledger = self.services.ledger
        ledger.client.hset(f"courier:job:{self.job_id}", "lease_ms", 0)
        taken = ledger.take(self.job_id, task="pacs.batch.chunk", job={})
        attempt = Attempt(
            self.job_id, taken.fence, taken.attempt, last=self.last, ledger=ledger, checkpoint=taken.checkpoint
        )
        return PassContext(
            cast(Any, None),
            attempt,
            self.services,
            rows=self.rows,
            pass_checkpoint=PassCheckpoint.of(taken.checkpoint, throttle={}),
        )

    @property
    def ends(self) -> list[str]:
        """In the order of the items, what became of each."""
        return [self.outcomes[n].code or self.outcomes[n].status for n in range(len(self.urls))]


def words(results: Sequence[ItemOutcome | CourierError | None]) -> list[str]:
    """How an attempt ended, item by item; with a question mark for what stays open."""
    return [
        "another's"
        if one is None
        else f"{one.payload['code']}?"
        if isinstance(one, CourierError)
        else one.code or one.status
        for one in results
    ]


@dataclass
class UploadSite:
    services: Services
    images: ImageServer
    servers: dict[str, Counted]

    @property
    def context(self) -> PassContext:
        return Chunk(self.services, []).begin()

    def chunk(self, *urls: str, **more: Any) -> Chunk:
        return Chunk(self.services, urls, **more)

    def put(self, study: str, **more: Any) -> str:
        sop = more.pop("sop", new_uid())
        return self.images.put(f"{next(_CHUNKS)}.dcm", image(study, sop=sop, side=8, **more))

    def study(self, count: int, study: str | None = None) -> list[str]:
        study = study or new_uid()
        return [self.put(study) for _ in range(count)]

    def count(self, server: str, study: str) -> int:
        return len({one.sop_instance_uid for one in self.servers[server].instances(Found("study", study))})


@pytest.fixture
def site_of(redis: RedisPart, image_server: ImageServer) -> Iterator[Callable[..., UploadSite]]:
    opened: list[Services] = []

    def build(servers: Sequence[dict[str, Any]], **sections: Any) -> UploadSite:
        tree = {
            "servers": list(servers),
            "queue": parts.queue_settings(redis),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            **sections,
        }
        settings = Settings.model_validate(tree)
        counted = {server.name: Counted(connect(server)) for server in settings.servers}
        fleet = Fleet(counted.values())  # type: ignore[arg-type]  # it stands in for what is behind it
        ledger = Ledger.connect(redis.ledger_url)
        opened.append(Services(settings, ledger, Sources(settings.sources), fleet, Breakers(ledger.client)))
        return UploadSite(opened[-1], image_server, counted)

    yield build
    for services in opened:
        services.fleet.close()
        services.sources.close()
        services.ledger.client.close()


@pytest.fixture
def site(site_of: Callable[..., UploadSite], sandbox: SandboxPart) -> UploadSite:
    return site_of(sandbox.servers())


@pytest.fixture(params=["msdicom", "dcm4chee", "orthanc"])
def any_server(request: pytest.FixtureRequest, site_of: Callable[..., UploadSite]) -> UploadSite:
    """One server, called ward."""
    if request.param == "orthanc":
        url = request.getfixturevalue("orthanc")
    else:
        url = getattr(request.getfixturevalue("sandbox"), request.param)
    return site_of([{"name": "ward", "type": request.param, "url": url}])


def test_a_group_is_stored_in_few_requests_and_each_item_has_its_receipt(any_server: UploadSite) -> None:
    study = new_uid()
    chunk = any_server.chunk(*any_server.study(FIRST_IMAGES + LOAD_IMAGES + 3, study))
    chunk.attempt()
    assert set(chunk.ends) == {"stored"}
    assert any_server.servers["ward"].requests == [FIRST_IMAGES, LOAD_IMAGES, 3]
    assert any_server.count("ward", study) == FIRST_IMAGES + LOAD_IMAGES + 3
    receipt = chunk.outcomes[0].result
    assert chunk.outcomes[0].server_name == "ward"
    assert set(receipt) == {"study_uid", "series_uid", "image_uid", "sha256", "size_bytes"}
    assert (receipt["study_uid"], len(receipt["sha256"])) == (study, 64)
    assert any_server.services.ledger.uid_record(study).writers == []


def test_a_request_is_no_larger_than_the_server_takes(site: UploadSite) -> None:
    study = new_uid()
    site.servers["msdicom"].request_bytes = 3500
    chunk = site.chunk(*site.study(7, study))
    chunk.attempt()
    assert chunk.ends == ["stored"] * 7
    assert sorted(site.servers["msdicom"].requests) == [1, 2, 2, 2]  # 1.1 KB each, and their headers


def test_images_that_are_refused_together_are_each_sent_alone(site: UploadSite, sandbox: SandboxPart) -> None:
    chunk = site.chunk(*site.study(4))
    sandbox.set_fault("msdicom", "store", status=413, times=1)
    assert words(chunk.attempt()) == ["pacs_misanswered?"] * 4
    chunk.attempt()
    assert (chunk.ends, site.servers["msdicom"].requests) == (["stored"] * 4, [4, 1, 1, 1, 1])
    refused = site.chunk(site.put(new_uid()))
    sandbox.set_fault("msdicom", "store", status=413)
    refused.attempt()
    assert refused.ends == ["pacs_rejected"]


def test_an_account_that_may_not_store_is_a_failure_that_can_be_tried_again(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    sandbox.set_fault("msdicom", "store", status=403)
    chunk = site.chunk(*site.study(2))
    chunk.attempt()
    assert [(one.status, one.code, one.server_name) for one in chunk.outcomes.values()] == [
        ("failed", "pacs_unauthorized", "msdicom")
    ] * 2


def test_the_pace_of_a_batch_is_told_what_was_fetched_asked_and_sent(site: UploadSite) -> None:
    contents = [image(new_uid(), side=8) for _ in range(4)]
    urls = [site.images.put(f"paced{number}.dcm", content) for number, content in enumerate(contents)]
    items = [Item(number, "", url) for number, url in enumerate(urls)]
    context = site.context
    Uploads(
        replace(context, services=replace(context.services, fleet=metered_fleet(context.services.fleet, context.usage)))
    ).execute(items)
    assert context.usage.requests == 4 + 4 * 2 + 1  # images, servers asked for their studies, one push
    assert context.usage.size_bytes == sum(map(len, contents))


def test_each_item_of_a_mixed_group_ends_in_its_own_way(any_server: UploadSite) -> None:
    before, images = new_uid(), any_server.images
    there = any_server.put(before)
    any_server.chunk(there).attempt()
    urls = [
        any_server.put(before),
        there,
        *any_server.study(4),
        images.put("page.html", b"<!doctype html><title>Log in</title>"),
        images.url("absent.dcm"),
        images.put("secret.dcm", b"", status=403),
        images.put("cut.dcm", image(new_uid())[:-90]),
        "http://elsewhere.example.org/a.dcm",
    ]
    chunk = any_server.chunk(*urls)
    chunk.attempt()
    assert chunk.ends == [
        "stored",
        "image_already_exists",
        *["stored"] * 4,
        "not_dicom",
        "source_not_found",
        "source_denied",
        "not_dicom",
        "source_not_allowed",
    ]
    known = chunk.outcomes[1]
    assert (known.status, known.server_name) == ("already_there", "ward")
    assert any_server.count("ward", before) == 2


def test_studies_go_where_a_single_upload_would_take_them(site: UploadSite) -> None:
    old, split, new = new_uid(), new_uid(), new_uid()
    for server, study in (("dcm4chee", old), ("dcm4chee", split), ("msdicom", split)):
        site.servers[server].store([_part(image(study))])
    site.services.ledger.claim_study(new, server="dcm4chee", job_id="another")
    chunk = site.chunk(site.put(old), site.put(split), site.put(new), *site.study(2))
    chunk.attempt()
    places = [chunk.outcomes[n].server_name for n in range(5)]
    assert places == ["dcm4chee", "msdicom", "dcm4chee", "msdicom", "msdicom"]
    asked = site.chunk(site.put(old), *site.study(2), server="msdicom")
    asked.attempt()
    assert asked.ends == ["study_conflict", "stored", "stored"]
    assert site.services.breakers is not None
    site.services.breakers.failed("msdicom" + CHANGES)
    healthy = site.chunk(*site.study(2))
    healthy.attempt()
    assert {one.server_name for one in healthy.outcomes.values()} == {"dcm4chee"}


def test_a_study_whose_images_were_all_refused_is_free_for_the_server_that_is_asked_for(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    study, ledger = new_uid(), site.services.ledger
    sandbox.set_fault("msdicom", "store", status=413)
    refused = site.chunk(site.put(study))
    refused.attempt()
    assert (refused.ends, ledger.claimed_server(study)) == (["pacs_rejected"], None)
    asked = site.chunk(site.put(study), server="dcm4chee")
    asked.attempt()
    assert (asked.ends, asked.outcomes[0].server_name) == (["stored"], "dcm4chee")
    claim = ledger.uid_record(study).claim
    assert (claim["server"], claim["opened_by"]) == ("dcm4chee", asked.job_id)
    assert ledger.placed() == {"msdicom": 0, "dcm4chee": 1}


def test_a_study_of_which_one_image_was_stored_keeps_its_claim_whatever_else_is_refused(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    study = new_uid()
    first = site.chunk(site.put(study))
    first.attempt()
    sandbox.set_fault("msdicom", "store", status=413)
    site.chunk(site.put(study)).attempt()
    assert site.services.ledger.claimed_server(study) == "msdicom"


def test_two_servers_that_are_asked_for_in_one_chunk_do_not_split_a_study(site: UploadSite) -> None:
    study = new_uid()
    chunk = site.chunk(site.put(study), site.put(study))
    items = [Item(0, "msdicom", chunk.urls[0]), Item(1, "dcm4chee", chunk.urls[1])]
    results = Uploads(chunk.begin()).execute(items)
    assert words(results) == ["stored", "study_conflict"]
    assert (site.count("msdicom", study), site.count("dcm4chee", study)) == (1, 0)


def test_an_image_that_is_on_any_server_is_not_stored_on_another(site: UploadSite) -> None:
    study, sop = new_uid(), new_uid()
    site.servers["dcm4chee"].store([_part(image(study, sop=sop))])
    site.servers["msdicom"].store([_part(image(study))])
    chunk = site.chunk(site.put(study, sop=sop), *site.study(6, study))
    chunk.attempt()
    assert chunk.ends == ["image_already_exists", *["stored"] * 6]
    assert chunk.outcomes[0].server_name == "dcm4chee"


def test_one_image_under_two_urls_is_stored_once(site: UploadSite) -> None:
    study, sop = new_uid(), new_uid()
    chunk = site.chunk(*(site.put(study, sop=sop, seed=n) for n in range(3)))
    assert words(chunk.attempt()) == ["stored", "another's", "another's"]
    chunk.attempt()
    assert chunk.ends == ["stored", "image_already_exists", "image_already_exists"]
    assert site.count("msdicom", study) == 1


def test_an_image_in_another_jobs_hands_is_left_to_it(site: UploadSite) -> None:
    study, sop, ledger = new_uid(), new_uid(), site.services.ledger
    single = ledger.take("single", task="pacs.upload", job={})
    ledger.lock_image(sop, job_id="single", fence=single.fence, into=(study,))
    chunk = site.chunk(site.put(study, sop=sop), site.put(study))
    assert words(chunk.attempt()) == ["another's", "stored"]
    deletion = ledger.take("deletion", task="pacs.delete", job={})
    assert ledger.lock_for_delete(study, job_id="deletion", fence=deletion.fence) == "single"
    assert words(site.chunk(site.put(study)).attempt()) == ["another's"]


def test_silence_is_never_taken_as_not_there(site: UploadSite, sandbox: SandboxPart) -> None:
    study, sop = new_uid(), new_uid()
    site.servers["msdicom"].store([_part(image(study, sop=sop))])
    chunk = site.chunk(site.put(study, sop=sop), *site.study(3))
    sandbox.set_fault("dcm4chee", "query", status=503)
    assert words(chunk.attempt()) == ["image_already_exists", *["pacs_unavailable?"] * 3]
    assert site.servers["msdicom"].requests == [1]
    sandbox.reset_faults()
    chunk.attempt()
    assert chunk.ends == ["image_already_exists", *["stored"] * 3]


@pytest.mark.parametrize("server", ["msdicom", "dcm4chee"])
def test_an_answer_that_was_lost_is_asked_for_and_nothing_is_stored_twice(
    site: UploadSite, sandbox: SandboxPart, server: str
) -> None:
    study = new_uid()
    chunk = site.chunk(*site.study(8, study), server=server)
    sandbox.set_fault(server, "store", commit_then_drop=True, times=1)
    assert words(chunk.attempt()) == ["pacs_unavailable?"] * 8
    single = site.services.ledger.take("single", task="pacs.upload", job={})
    (owner,) = site.services.ledger.lock_images([_first_uids(site, server, study)], job_id="single", fence=single.fence)
    assert owner == chunk.job_id  # no other job may store it until it is known whether ours did
    fetched = len(site.images.requests)
    chunk.attempt()
    assert chunk.ends == ["stored"] * 8
    assert (site.servers[server].requests, len(site.images.requests)) == ([8], fetched)
    assert site.count(server, study) == 8


def test_what_may_have_arrived_on_a_server_that_no_worker_knows_any_more_is_stored_on_no_other(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    study = new_uid()
    chunk = site.chunk(*site.study(2, study), server="msdicom")
    sandbox.set_fault("msdicom", "store", commit_then_drop=True, times=1)
    assert words(chunk.attempt()) == ["pacs_unavailable?"] * 2
    fleet = chunk.services.fleet
    chunk.server = ""
    chunk.services = replace(chunk.services, fleet=Fleet([fleet["dcm4chee"]]))
    assert words(chunk.attempt()) == ["pacs_unavailable?"] * 2
    assert (site.count("dcm4chee", study), site.count("msdicom", study)) == (0, 2)
    chunk.services = replace(chunk.services, fleet=fleet)
    assert words(chunk.attempt()) == ["stored"] * 2


def test_of_a_request_that_was_cut_off_what_arrived_is_kept_and_the_rest_sent(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    study = new_uid()
    chunk = site.chunk(*site.study(8, study))
    sandbox.set_fault("msdicom", "store", lose_last_part=True, times=1)
    assert words(chunk.attempt()) == [*["stored"] * 7, "pacs_misanswered?"]
    chunk.attempt()
    assert chunk.ends == ["stored"] * 8
    assert site.servers["msdicom"].requests == [8, 1]


@pytest.mark.parametrize(
    ("server", "fault"),
    [
        ("msdicom", {"transient_272": True}),
        ("dcm4chee", {"transient_272": True}),
        ("dcm4chee", {"disk_full": "A700"}),
        ("msdicom", {"status": 503}),
        ("msdicom", {"reset_after_bytes": 900}),
        ("msdicom", {"truncate": True}),
    ],
)
def test_what_a_server_could_not_store_now_it_stores_later(
    site: UploadSite, sandbox: SandboxPart, server: str, fault: dict[str, Any]
) -> None:
    study = new_uid()
    chunk = site.chunk(*site.study(5, study), server=server)
    sandbox.set_fault(server, "store", **fault, times=1)
    assert all(word.endswith("?") for word in words(chunk.attempt()))
    chunk.attempt()
    assert chunk.ends == ["stored"] * 5
    assert site.count(server, study) == 5


def test_what_stays_pending_for_ever_is_cleared_and_stored(site: UploadSite, sandbox: SandboxPart) -> None:
    chunk = site.chunk(*site.study(3))
    sandbox.set_fault("msdicom", "store", pending_45071="never", times=1)
    for _ in range(4):
        assert set(words(chunk.attempt())) <= {"pacs_unavailable?", "stored"}
    chunk.attempt()
    assert chunk.ends == ["stored"] * 3


def test_a_conflict_is_the_images_own(site: UploadSite) -> None:
    study = new_uid()
    site.servers["dcm4chee"].store([_part(image(study))])
    chunk = site.chunk(site.put(study), site.put(study, PatientID="SOMEBODY-ELSE"), site.put(study))
    chunk.attempt()
    assert chunk.ends == ["stored", "study_conflict", "stored"]
    assert chunk.outcomes[1].server_name == "dcm4chee"


def test_images_that_nobody_can_read_are_told_by_orthanc_at_once(
    site_of: Callable[..., UploadSite], orthanc: str
) -> None:
    site = site_of([{"name": "ward", "type": "orthanc", "url": orthanc}])
    bad = [site.images.put(f"bad{n}.dcm", _unreadable(image(new_uid(), side=8))) for n in range(2)]
    chunk = site.chunk(*site.study(3, new_uid()), *bad)
    chunk.attempt()
    assert chunk.ends == [*["stored"] * 3, *["pacs_rejected"] * 2]
    assert site.servers["ward"].requests == [5]


def test_an_image_that_nobody_can_read_is_found_by_sending_each_alone(
    site_of: Callable[..., UploadSite], orthanc: str
) -> None:
    site = site_of([{"name": "ward", "type": "dicomweb", "url": orthanc}])
    study = new_uid()
    bad = [site.images.put(f"bad{n}.dcm", _unreadable(image(new_uid(), side=8))) for n in range(2)]
    chunk = site.chunk(*site.study(3, study), *bad)
    assert words(chunk.attempt()) == [*["stored"] * 3, *["pacs_misanswered?"] * 2]
    chunk.attempt()
    assert chunk.ends == [*["stored"] * 3, *["pacs_rejected"] * 2]
    assert site.servers["ward"].requests == [5, 1, 1]


def test_a_server_that_fails_a_push_is_not_tried_again_in_the_same_attempt(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    sandbox.set_fault("msdicom", "store", status=503)
    chunk = site.chunk(*site.study(2 * LOAD_IMAGES, new_uid()))
    assert set(words(chunk.attempt())) == {"pacs_unavailable?"}
    assert site.servers["msdicom"].requests == [FIRST_IMAGES]


def test_a_worker_that_dies_before_the_batch_knows_finds_its_own_images(site: UploadSite) -> None:
    """The results of the first attempt are thrown away, as by a kill between the push and the record."""
    study = new_uid()
    chunk = site.chunk(*site.study(LOAD_IMAGES + 5, study))
    assert set(words(chunk.execute())) == {"stored"}
    fetched = len(site.images.requests)
    chunk.attempt()
    assert set(chunk.ends) == {"stored"}
    assert len(site.images.requests) == fetched
    assert site.servers["msdicom"].requests == [FIRST_IMAGES, LOAD_IMAGES - FIRST_IMAGES + 5]


def test_an_image_that_others_put_there_first_is_not_taken_for_ours_after_a_death(site: UploadSite) -> None:
    study, sop = new_uid(), new_uid()
    url = site.put(study, sop=sop)
    site.servers["msdicom"].store([_part(image(study, sop=sop, side=8))])
    site.servers["msdicom"].present = lambda study, uids: set()  # type: ignore[attr-defined]  # it came after the check
    chunk = site.chunk(url, site.put(study))
    assert words(chunk.execute()) == ["image_already_exists", "stored"]
    del site.servers["msdicom"].present  # type: ignore[attr-defined]
    chunk.attempt()
    assert chunk.ends == ["image_already_exists", "stored"]


def test_every_image_is_held_when_it_is_pushed_though_the_load_before_it_was_let_go(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    server, ledger = site.servers["msdicom"], site.services.ledger
    server.look = lambda part: ledger.uid_record(part.instance.sop_instance_uid).holder
    sandbox.set_fault("msdicom", "store", latency_ms=300)
    chunk = site.chunk(*site.study(FIRST_IMAGES + LOAD_IMAGES + 5))
    chunk.attempt()
    assert server.seen == [chunk.job_id] * len(chunk.urls)
    assert {ledger.uid_record(one.result["image_uid"]).holder for one in chunk.outcomes.values()} == {None}


def test_what_is_large_waits_on_the_disk_and_arrives_whole(site: UploadSite) -> None:
    study = new_uid()
    urls = [site.images.put(f"{n}.dcm", image(study, side=900, seed=n)) for n in range(14)]
    chunk = site.chunk(*urls)
    chunk.attempt()
    assert chunk.ends == ["stored"] * 14
    assert site.servers["msdicom"].requests == [11, 3]  # 1.6 MB each: 16 MiB make a load
    assert words(verify(list(chunk.outcomes.values()), site.context)) == ["verified"] * 14


def test_what_may_have_arrived_when_it_was_given_up_is_ours_when_it_is_tried_again(
    site: UploadSite, sandbox: SandboxPart
) -> None:
    study = new_uid()
    chunk = site.chunk(*site.study(4, study), last=True)
    sandbox.set_fault("msdicom", "store", commit_then_drop=True)
    results = chunk.attempt()
    assert (chunk.ends, [one.status for one in chunk.outcomes.values()]) == (["pacs_unavailable"] * 4, ["failed"] * 4)
    assert words(undo(list(chunk.outcomes.values()), site.context, resumed=set())) == ["kept"] * 4
    sandbox.reset_faults()
    rows = {one.item.number: Row(one.item, {"apply": one}) for one in results if isinstance(one, ItemOutcome)}
    again = site.chunk(*chunk.urls, rows=rows)
    again.attempt()
    assert again.ends == ["stored"] * 4
    assert site.servers["msdicom"].requests == [4]
    site.servers["msdicom"].delete(Found("study", study), permanent=True)
    assert words(undo(list(chunk.outcomes.values()), site.context, resumed=set())) == ["not_there"] * 4


# --- verify and undo ------------------------------------------------------------------------------------------------


def test_what_was_stored_is_verified_by_its_bytes_where_the_server_keeps_them(any_server: UploadSite) -> None:
    study = new_uid()
    other = any_server.chunk(any_server.put(study))
    other.attempt()
    bare = any_server.images.put("bare.dcm", image(study, side=8)[132:])
    chunk = any_server.chunk(*any_server.study(6, study), bare)
    chunk.attempt()
    assert chunk.ends == ["stored"] * 7
    keeps = any_server.servers["ward"].keeps_bytes
    seen = verify(list(chunk.outcomes.values()), any_server.context)
    assert [(one.status, one.result["compared"]) for one in seen if isinstance(one, ItemOutcome)] == [
        ("verified", "bytes" if keeps else "uids")
    ] * 7
    wrong = [
        ItemOutcome(one.item, "stored", server="ward", result={**one.result, "sha256": "0"})
        for one in chunk.outcomes.values()
    ]
    assert set(words(verify(wrong, any_server.context))) == {"differs" if keeps else "verified"}
    gone = [
        ItemOutcome(one.item, "stored", server="ward", result={**one.result, "image_uid": new_uid()}) for one in wrong
    ]
    assert set(words(verify(gone, any_server.context))) == {"missing"}


def test_another_file_under_the_uid_of_an_image_differs_and_the_same_file_does_not(any_server: UploadSite) -> None:
    study, sop = new_uid(), new_uid()
    earlier = any_server.chunk(any_server.put(study, sop=sop, seed=1))
    earlier.attempt()
    same, other = any_server.put(study, sop=sop, seed=1), any_server.put(study, sop=sop, seed=2)
    bare = any_server.images.put("bare.dcm", image(study, sop=sop, side=8, seed=1)[132:])
    chunk = any_server.chunk(same, other, bare)
    chunk.attempt()
    assert [one.status for one in chunk.outcomes.values()] == ["already_there"] * 3
    seen = verify([chunk.outcomes[number] for number in range(3)], any_server.context)
    keeps = any_server.servers["ward"].keeps_bytes
    assert words(seen) == ["verified", "differs" if keeps else "verified", "verified"]
    assert [one.result.get("compared") for one in seen if isinstance(one, ItemOutcome)] == (
        ["bytes", None, "bytes"] if keeps else ["uids"] * 3
    )


def named_elements(seen: Sequence[ItemOutcome | CourierError | None]) -> list[tuple[str, ...]]:
    """The elements that are named, item by item."""
    return [tuple(one.result.get("tags", ())) for one in seen if isinstance(one, ItemOutcome)]


def test_verify_names_the_elements_in_which_the_first_files_of_a_study_differ(site: UploadSite) -> None:
    study, uids = new_uid(), [new_uid() for _ in range(NAMED + 2)]
    earlier = site.chunk(*(site.put(study, sop=uid, PatientName="One") for uid in uids), server="msdicom")
    earlier.attempt()
    later = site.chunk(*(site.put(study, sop=uid, PatientName="Two", StudyID="7") for uid in uids), server="msdicom")
    later.attempt()
    seen = verify([later.outcomes[number] for number in range(len(uids))], site.context)
    assert words(seen) == ["differs"] * len(uids)
    assert named_elements(seen) == [("PatientName (0010,0010)", "StudyID (0020,0010)")] * NAMED + [()] * 2
    first = seen[0]
    assert isinstance(first, ItemOutcome)
    assert first.message.endswith("not stored: the two differ in PatientName (0010,0010), StudyID (0020,0010).")
    assert "One" not in str(first)


def test_verify_names_who_may_have_changed_what_came_from_dcm4chee(site: UploadSite) -> None:
    study = new_uid()
    content = image(study, side=8)
    site.servers["dcm4chee"].store([_part(content)])
    with site.servers["dcm4chee"].retrieve(Found("study", study)) as parts_of_study:
        (copy,) = [b"".join(part.chunks) for part in parts_of_study]
    site.servers["msdicom"].store([_part(copy)])
    site.servers["dcm4chee"].delete(Found("study", study), permanent=True)
    chunk = site.chunk(site.images.put("original.dcm", content))
    chunk.attempt()
    (one,) = verify(list(chunk.outcomes.values()), site.context)
    assert isinstance(one, ItemOutcome)
    assert (one.status, one.result["made_by"]) == ("differs", ["dcm4chee"])
    assert "IssuerOfPatientID (0010,0021)" in one.result["tags"]
    assert "as dcm4chee may have added or changed" in one.message


@pytest.mark.parametrize("change", ["gone", "replaced", "silent"])
def test_verify_names_nothing_of_a_file_that_is_another_one_by_now(
    site: UploadSite, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    study, uids = new_uid(), [new_uid(), new_uid()]
    site.chunk(*(site.put(study, sop=uid, seed=1) for uid in uids), server="msdicom").attempt()
    urls = [site.put(study, sop=uid, seed=2) for uid in uids]
    chunk = site.chunk(*urls, server="msdicom")
    chunk.attempt()
    name = urls[0].rpartition("/")[2]
    if change == "replaced":
        site.images.put(name, image(study, sop=uids[0], side=8, seed=3))
    else:
        kind = SourceNotFound if change == "gone" else SourceUnreachable
        fetch = site.services.sources.fetch

        def fails(url: str) -> Any:
            if url == urls[0]:
                raise kind("not now")
            return fetch(url)

        monkeypatch.setattr(site.services.sources, "fetch", fails)
    seen = verify([chunk.outcomes[0], chunk.outcomes[1]], site.context)
    assert words(seen) == ["differs"] * 2
    assert named_elements(seen) == [(), () if change == "silent" else ("PixelData (7FE0,0010)",)]


def test_of_two_files_with_one_uid_in_a_chunk_the_one_that_was_stored_is_verified(any_server: UploadSite) -> None:
    study, sop = new_uid(), new_uid()
    chunk = any_server.chunk(*(any_server.put(study, sop=sop, seed=seed) for seed in (1, 2, 1)))
    chunk.attempt()
    chunk.attempt()
    done = [chunk.outcomes[number] for number in range(3)]
    assert [one.status for one in done] == ["stored", "already_there", "already_there"]
    assert words(verify(done, any_server.context)) == ["verified", "differs", "verified"]
    assert words(verify(done[::-1], any_server.context)) == ["verified", "differs", "verified"]
    assert words(undo(done, chunk.begin(), resumed=set())) == ["undone", "kept", "kept"]


@pytest.mark.parametrize("server", ["msdicom", "dcm4chee"])
@pytest.mark.parametrize("same", [True, False])
def test_a_receipt_says_nothing_of_the_bytes_that_are_there_and_verify_asks_the_server(
    site: UploadSite, server: str, same: bool
) -> None:
    study, sop, ledger = new_uid(), new_uid(), site.services.ledger
    content = image(study, sop=sop, side=8, seed=1)
    site.servers[server].store([_part(content)])
    ledger.stored(sop, study, Receipt("single", server, "0" * 64 if same else sha256(content).hexdigest(), 1))
    chunk = site.chunk(site.put(study, sop=sop, seed=1 if same else 2))
    chunk.attempt()
    (one,) = chunk.outcomes.values()
    assert (one.status, one.code) == ("already_there", "image_already_exists")
    assert "same_bytes" not in one.result
    assert "with other bytes" not in one.message
    keeps = site.servers[server].keeps_bytes
    assert words(verify([one], site.context)) == ["differs" if keeps and not same else "verified"]


def test_a_whole_chunk_of_one_study_is_verified_image_by_image(site: UploadSite) -> None:
    chunk = site.chunk(*site.study(CHUNK_ITEMS))
    chunk.attempt()
    assert words(verify(list(chunk.outcomes.values()), site.context)) == ["verified"] * CHUNK_ITEMS


def test_of_a_silent_server_nothing_is_said_when_it_is_verified(site: UploadSite, sandbox: SandboxPart) -> None:
    chunk = site.chunk(*site.study(2))
    chunk.attempt()
    sandbox.set_fault("msdicom", "query", status=503)
    assert words(verify(list(chunk.outcomes.values()), site.context)) == ["pacs_unavailable?"] * 2


def test_undo_removes_what_the_batch_stored_and_nothing_else(any_server: UploadSite) -> None:
    study, alone = new_uid(), new_uid()
    before = any_server.chunk(any_server.put(study))
    before.attempt()
    chunk = any_server.chunk(before.urls[0], *any_server.study(5, study), *any_server.study(2, alone))
    chunk.attempt()
    assert chunk.ends == ["image_already_exists", *["stored"] * 7]
    stored = [one for one in chunk.outcomes.values() if one.status == "stored"]
    assert words(undo(list(chunk.outcomes.values()), chunk.begin(), resumed=set())) == ["kept", *["undone"] * 7]
    assert (any_server.count("ward", study), any_server.count("ward", alone)) == (1, 0)
    assert any_server.services.ledger.claimed_server(alone) is None
    assert words(verify(list(before.outcomes.values()), any_server.context)) == ["verified"]
    again = Chunk(any_server.services, [])
    assert words(undo(stored, again.begin(), resumed=set())) == ["not_there"] * 7


def test_undo_keeps_an_image_that_somebody_has_replaced_since(site: UploadSite) -> None:
    study, sop = new_uid(), new_uid()
    chunk = site.chunk(site.put(study, sop=sop), site.put(study))
    chunk.attempt()
    server = site.servers["msdicom"]
    server.delete(Found("image", study, f"{study}.1", sop), permanent=True)
    server.store([_part(image(study, sop=sop, side=8, seed=7))])
    assert words(undo(list(chunk.outcomes.values()), chunk.begin(), resumed=set())) == ["kept", "undone"]
    assert site.count("msdicom", study) == 1


def test_undo_waits_for_the_job_that_has_the_image_and_knows_its_own_work_after_a_death(site: UploadSite) -> None:
    chunk = site.chunk(*site.study(3))
    chunk.attempt()
    stored = list(chunk.outcomes.values())
    ledger = site.services.ledger
    single = ledger.take("single", task="pacs.delete", job={})
    ledger.lock_image(stored[0].result["image_uid"], job_id="single", fence=single.fence)
    back = Chunk(site.services, [])
    assert words(undo(stored, back.begin(), resumed=set())) == ["another's", "undone", "undone"]
    assert words(undo(stored[1:], back.begin(), resumed={1, 2})) == ["undone", "undone"]


def _part(content: bytes) -> Part:
    return Part(identify(io.BytesIO(content)), lambda: io.BytesIO(content), len(content))


def _first_uids(site: UploadSite, server: str, study: str) -> tuple[str, str, str]:
    found = next(iter(site.servers[server].instances(Found("study", study))))
    return str(found.sop_instance_uid), study, str(found.series_instance_uid)


def _unreadable(content: bytes) -> bytes:
    """A file that says which image it is, and then has an element of a type that does not exist."""
    return content.replace(b"\x10\x00\x10\x00PN", b"\x10\x00\x10\x00ZZ")
