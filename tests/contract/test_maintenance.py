"""One of three servers is in maintenance, each dialect in turn: it is not asked, and work on the others goes on."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import fakeredis
import pytest
import requests

from courier import telemetry
from courier.errors import InvalidRequest, NotFound, PacsUnavailable
from courier.ledger.breakers import Breakers
from courier.ledger.elsewhere import ElsewhereStudies
from courier.ledger.jobs import Ledger, Receipt
from courier.ledger.slots import Slots
from courier.ledger.suspensions import FRESH_S, Suspensions
from courier.settings import PREFIX, Settings
from courier.telemetry import CallEvent
from sandbox.synthetic import image, new_uid
from tests.stow import stow
from worker.batches import delete_all, deletions, migrations
from worker.dicom.instances import identify
from worker.jobs import audit, download, lookup, servers, studies, trace
from worker.jobs.attempt import Heartbeat
from worker.jobs.delete import delete
from worker.jobs.routing import decide
from worker.jobs.runner import Deferred, Done, Failed, execute
from worker.jobs.services import Services
from worker.jobs.upload import upload
from worker.pacs.fleet import Fleet
from worker.pacs.guard import Guard
from worker.pacs.registry import connect
from worker.storage.sources import Fetched

NAMES = ["msdicom", "dcm4chee", "orthanc"]


class Calls:
    """Counts the requests that go to each server."""

    def __init__(self):
        self.counts = Counter()

    @contextmanager
    def observe(self, seen):
        if isinstance(seen, CallEvent):
            self.counts[seen.server_name] += 1
        yield

    def count(self, *_):
        pass

    def carrier(self):
        return {}

    @contextmanager
    def continued(self, _):
        yield


class OneFile:
    """A source whose URLs are numbers of files."""

    def __init__(self):
        self.files = {}

    def put(self, body):
        url = f"http://host/{len(self.files)}"
        self.files[url] = body
        return url

    def fetch(self, url):
        body = self.files[url]
        return Fetched(io.BytesIO(body), len(body), hashlib.sha256(body).hexdigest(), url)


@dataclass
class MaintenanceSite:
    """A worker with three servers, ``away`` of which is in maintenance."""

    urls: dict
    away: str
    client: fakeredis.FakeRedis
    calls: Calls
    now_s: float = 0.0
    jobs: int = 0
    waits: dict = field(default_factory=dict)

    def __post_init__(self):
        self.settings = Settings.model_validate(
            {
                "servers": [
                    {"name": name, "type": name, "url": url, "viewer": "http://v/{study}"}
                    for name, url in self.urls.items()
                ],
                "jobs": {"max_attempts": 2, "backoff_base_s": 0.01},
            }
        )
        self.ledger = Ledger(self.client)
        self.suspensions = Suspensions(self.client, NAMES, clock=lambda: self.now_s)
        breakers = Breakers(self.client)
        guard = Guard(breakers, Slots(self.client), self.settings.servers, suspensions=self.suspensions)
        self.source = OneFile()
        self.services = Services(
            self.settings,
            ledger=self.ledger,
            sources=self.source,
            fleet=Fleet([connect(server, guard) for server in self.settings.servers]),
            probes=Fleet([connect(server) for server in self.settings.servers]),
            breakers=breakers,
            suspensions=self.suspensions,
        )

    @property
    def others(self):
        return [name for name in NAMES if name != self.away]

    def begin(self, name=None):
        self.suspensions.maintain(name or self.away, set_by="ana", reason="disk swap")
        self.now_s += FRESH_S
        self.calls.counts.clear()

    def end(self):
        assert self.suspensions.end(self.away, "maintenance")[0]
        self.now_s += FRESH_S
        self.ledger.wake_parked()

    def run(self, work, task, job_id=None, **job):
        """One attempt at a job, for which it is time."""
        self.jobs += 1
        job_id = job_id or f"j{self.jobs}"
        self.client.hset(f"{PREFIX}job:{job_id}", "woken", 1) if self.ledger.read_record(job_id) else None
        heartbeat = Heartbeat(self.ledger, lambda job_id, meta: self.waits.update({job_id: meta}))
        return execute(work, task=task, job_id=job_id, message=job, services=self.services, heartbeat=heartbeat)

    def upload(self, body, job_id=None, **job):
        return self.run(upload, "pacs.upload", job_id, image_url=self.source.put(body), **job)

    def put(self, name, *bodies):
        stow(self.urls[name], *bodies)

    def has(self, name, study):
        answer = requests.get(
            f"{self.urls[name]}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10
        )
        return len(answer.json()) if answer.status_code == 200 else 0

    def knows(self, name, study, sop):
        """The ledger's receipt of an image that a job of ours stored."""
        self.ledger.stored(sop, study, Receipt("earlier", name, "0" * 64, 1), series_instance_uid=f"{study}.1")


@pytest.fixture(params=NAMES)
def site(request, sandbox, orthanc):
    urls = {"msdicom": sandbox.msdicom, "dcm4chee": sandbox.dcm4chee, "orthanc": orthanc}
    calls = Calls()
    telemetry.add_observer(calls)
    with fakeredis.FakeRedis(decode_responses=True) as client:
        found = MaintenanceSite(urls, request.param, client, calls)
        yield found
        if found.away in found.suspensions.read(NAMES):  # no test has sent it a request
            assert calls.counts[found.away] == 0
        found.services.fleet.close()
        found.services.probes.close()
    telemetry.remove_observers()


def done(result):
    assert isinstance(result, Done), result
    return result.payload


def error_of(result):
    assert isinstance(result, Failed), result
    return result.error


def entries(payload):
    return {entry["server_name"]: entry["status"] for entry in payload["servers"]}


# --- uploads ----------------------------------------------------------------------------------------------------


def test_an_image_goes_to_another_server_and_the_result_says_who_was_not_asked(site):
    study = new_uid()
    site.begin()
    payload = done(site.upload(image(study)))
    assert payload["server_name"] in site.others
    assert (payload["warnings"], payload["not_asked"]) == (["not_asked"], [site.away])
    assert site.has(payload["server_name"], study) == 1
    assert site.away not in payload["route"]["candidates"]
    site.end()
    payload = done(site.upload(image(new_uid())))
    assert (payload["warnings"], payload["not_asked"]) == ([], [])


def test_an_image_of_a_study_that_another_server_has_goes_there(site):
    study = new_uid()
    home = site.others[-1]
    site.put(home, image(study))
    site.begin()
    payload = done(site.upload(image(study)))
    assert (payload["server_name"], payload["route"]["reason"]) == (home, "study_exists")
    assert payload["not_asked"] == [site.away]


def test_an_image_that_another_server_has_is_there_already(site):
    study, sop = new_uid(), new_uid()
    home = site.others[0]
    site.put(home, image(study, sop=sop))
    site.begin()
    error = error_of(site.upload(image(study, sop=sop)))
    assert (error.code, error.server_name) == ("image_already_exists", home)


@pytest.mark.parametrize("known", ["by a receipt of another image", "by a copy", "by a claim"])
def test_an_image_of_a_study_that_is_known_to_be_there_waits_and_is_not_split_off(site, known):
    study = new_uid()
    if known == "by a receipt of another image":
        site.knows(site.away, study, new_uid())
    elif known == "by a copy":
        site.ledger.copying(site.away, study, job_id="b")
        site.ledger.copied(site.away, study, job_id="b", images=3)
    else:
        site.ledger.claim_study(study, server=site.away, job_id="earlier")
        site.knows(site.away, study, new_uid())
        site.client.delete(f"{PREFIX}pushes:{study}")
    site.begin()
    result = site.upload(image(study), "waits")
    assert isinstance(result, Deferred)
    waiting = site.ledger.standing(["waits"])["waits"].waiting
    assert (waiting["code"], waiting["server_name"]) == ("server_maintenance", site.away)
    assert "set by ana" in waiting["message"]
    assert [site.has(name, study) for name in site.others] == [0, 0]


def test_an_image_that_is_known_to_be_there_waits_though_another_server_has_its_study(site):
    study, sop = new_uid(), new_uid()
    site.put(site.others[0], image(study))
    site.knows(site.away, study, sop)
    site.begin()
    assert isinstance(site.upload(image(study, sop=sop), "waits"), Deferred)
    assert site.ledger.standing(["waits"])["waits"].waiting["code"] == "server_maintenance"
    assert done(site.upload(image(study)))["server_name"] == site.others[0]


def test_what_was_deleted_there_since_does_not_keep_its_study_from_the_others(site):
    study, sop = new_uid(), new_uid()
    site.knows(site.away, study, sop)
    site.ledger.void(site.away, study, None, None, job_id="d")
    site.begin()
    assert done(site.upload(image(study)))["server_name"] in site.others


def test_an_upload_that_asks_for_the_server_waits_and_goes_there_afterwards(site):
    study = new_uid()
    site.begin()
    body = image(study)
    assert isinstance(site.upload(body, "asks", server=site.away), Deferred)
    assert site.ledger.standing(["asks"])["asks"].waiting["code"] == "server_maintenance"
    site.end()
    payload = done(site.run(upload, "pacs.upload", "asks", image_url="http://host/0", server=site.away))
    assert (payload["server_name"], payload["not_asked"], payload["attempts"]) == (site.away, [], 1)


def test_an_upload_that_asks_for_another_server_goes_there(site):
    study = new_uid()
    site.begin()
    payload = done(site.upload(image(study), server=site.others[1]))
    assert (payload["server_name"], payload["route"]["reason"]) == (site.others[1], "requested")
    assert payload["not_asked"] == [site.away]


def test_a_claim_under_which_nothing_was_stored_goes_over_to_another_server(site):
    study = new_uid()
    site.ledger.claim_study(study, server=site.away, job_id="gone")
    site.begin()
    payload = done(site.upload(image(study)))
    assert payload["server_name"] == site.ledger.claimed_server(study) != site.away


def test_an_image_waits_for_another_one_of_its_study_that_is_just_on_its_way_there(site):
    study = new_uid()
    order = {"task": "pacs.upload", "job": {"image_url": "http://host/first"}}
    taken = site.ledger.take("first", **order)
    site.ledger.claim_study(study, server=site.away, job_id="first")
    site.begin()
    assert isinstance(site.upload(image(study), "second"), Deferred)
    assert site.ledger.standing(["second"])["second"].waiting["code"] == "other_job"
    refusal = {"error": {"code": "pacs_rejected", "message": "No."}}
    site.ledger.finish("first", taken.fence, outcome=refusal, code="pacs_rejected", **order)
    payload = done(site.run(upload, "pacs.upload", "second", image_url="http://host/0"))
    assert payload["server_name"] in site.others
    assert payload["attempts"] == 1


def test_where_all_servers_are_in_maintenance_a_new_image_waits(site):
    for name in NAMES:
        site.begin(name)
    assert isinstance(site.upload(image(new_uid()), "nowhere"), Deferred)
    assert site.ledger.standing(["nowhere"])["nowhere"].waiting["code"] == "server_maintenance"


# --- look-ups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["either", "both"])
@pytest.mark.parametrize(("work", "task"), [(lookup.exists, "pacs.exists"), (lookup.metadata, "pacs.metadata")])
def test_a_look_up_that_finds_nothing_says_unavailable_and_never_not_found(site, work, task, mode):
    site.begin()
    error = error_of(site.run(work, task, "look", level="study", uid=new_uid(), mode=mode))
    assert isinstance(error, PacsUnavailable)
    assert (error.server_name, error.details["not_asked"]) == (site.away, [site.away])
    assert error.details["asked"] == site.others
    assert "set by ana" in error.message
    assert list(site.ledger.dead_letters()) == []
    assert site.ledger.read_record("look")["attempts"] == "1"


def test_a_look_up_that_names_the_server_ends_at_once(site):
    site.begin()
    error = error_of(site.run(lookup.exists, "pacs.exists", level="study", uid=new_uid(), mode=site.away))
    assert (error.code, error.details["asked"]) == ("pacs_unavailable", [])


def test_a_hit_elsewhere_is_a_hit_and_says_who_was_not_asked(site):
    study = new_uid()
    site.put(site.others[-1], image(study))
    site.begin()
    payload = done(site.run(lookup.exists, "pacs.exists", level="study", uid=study, mode="both"))
    assert payload["server_name"] == site.others[-1]
    assert (payload["warnings"], payload["not_asked"]) == (["not_asked"], [site.away])
    assert [entry["server_name"] for entry in payload["servers"]] == NAMES
    assert entries(payload)[site.away] == "not_asked"


def test_a_trace_does_not_ask_it_and_says_so(site):
    study = new_uid()
    site.knows(site.away, study, new_uid())
    site.begin()
    payload = done(site.run(trace.trace, "pacs.trace", uid=study))
    assert entries(payload)[site.away] == "not_asked"
    assert [push["state"] for push in payload["pushes"]] == ["unknown"]


def test_a_status_asks_it_all_the_same_and_says_in_which_state_it_is(site):
    site.begin()
    payload = done(site.run(servers.status, "pacs.status"))
    (entry,) = [one for one in payload["servers"] if one["server_name"] == site.away]
    assert (entry["status"], entry["suspension"]["state"], entry["suspension"]["set_by"]) == (
        "up",
        "maintenance",
        "ana",
    )
    assert "set by ana" in entry["note"]
    assert [one["suspension"] for one in payload["servers"] if one is not entry] == [None, None]
    site.calls.counts.clear()


def test_a_list_of_studies_is_incomplete_on_every_page(site):
    study, patient = new_uid(), new_uid()
    for name in site.others:
        site.put(name, *(image(uid, PatientID=patient) for uid in (study, new_uid(), new_uid())))
    site.begin()
    ask = partial(site.run, studies.list_studies, "pacs.list_studies", filters={"PatientID": patient}, limit=2)
    page = done(ask())
    assert page["not_asked"] == [site.away]
    assert entries(page)[site.away] == "not_asked"
    site.end()
    while page["cursor"] is not None:
        page = done(ask(cursor=page["cursor"]))
        assert page["not_asked"] == [site.away]
        assert entries(page)[site.away] == "not_asked"


def test_a_list_of_that_server_alone_cannot_be_had(site):
    site.begin()
    error = error_of(site.run(studies.list_studies, "pacs.list_studies", mode=site.away))
    assert (error.code, error.details["not_asked"]) == ("pacs_unavailable", [site.away])


def test_an_audit_compares_the_others_and_says_that_it_is_incomplete(site):
    study = new_uid()
    for name in site.others:
        site.put(name, image(study))
    site.begin()
    payload = done(site.run(audit.audit, "pacs.audit", study_uid=study))
    assert payload["not_asked"] == [site.away]
    assert [one["server_name"] for one in payload["entries"][0]["servers"]] == site.others
    error = error_of(site.run(audit.audit, "pacs.audit", study_uid=new_uid()))
    assert error.code == "pacs_unavailable"
    error = error_of(site.run(audit.audit, "pacs.audit", study_uid=study, servers=[site.away, site.others[0]]))
    assert error.code == "pacs_unavailable"


def test_a_download_waits_for_the_server_that_may_have_the_study(site):
    site.begin()
    job = {"study_uid": new_uid(), "destination": "file:///nowhere/x.zip"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "_destination", lambda *_: (FakePlace(), None))
        result = site.run(download.download, "pacs.download", "brings", **job)
    assert isinstance(result, Deferred)
    assert site.ledger.standing(["brings"])["brings"].waiting["code"] == "server_maintenance"


class FakePlace:
    shown = "file:///nowhere/x.zip"


# --- deletions --------------------------------------------------------------------------------------------------


def follow_up(site, payload):
    (entry,) = [entry for entry in payload["servers"] if entry["server_name"] == site.away]
    assert entry["status"] == "not_asked"
    return entry["follow_up_job_id"]


def delete_later(site, job_id):
    task, job = site.ledger.kind_of(job_id)
    return site.run(delete, task, job_id, **job)


@pytest.mark.parametrize("level", ["study", "image"])
def test_a_deletion_goes_on_without_it_and_is_made_up_for_once_afterwards(site, level):
    study, sop = new_uid(), new_uid()
    for name in NAMES:
        site.put(name, image(study, sop=sop))
    site.begin()
    who = {"requested_by": "dr who", "reason": "wrong patient"}
    uid = study if level == "study" else sop
    payload = done(site.run(delete, "pacs.delete", "orders", level=level, uid=uid, **who))
    assert {entries(payload)[name] for name in site.others} <= {"deleted", "hidden"}
    assert (payload["warnings"], payload["not_asked"]) == (["not_asked"], [site.away])
    later = follow_up(site, payload)
    assert site.has(site.away, study) == 1
    record = site.ledger.read_record(later)
    assert (record["requested_by"], record["reason"]) == ("dr who", "wrong patient")

    site.calls.counts.clear()  # the line above asked it by hand
    assert isinstance(delete_later(site, later), Deferred)
    assert site.ledger.standing([later])[later].waiting["code"] == "server_maintenance"
    assert site.calls.counts[site.away] == 0
    site.end()
    assert entries(done(delete_later(site, later))).keys() == {site.away}
    assert site.has(site.away, study) == 0


def test_a_follow_up_that_waits_keeps_no_upload_of_the_study_waiting(site):
    study, sop = new_uid(), new_uid()
    site.begin()
    later = follow_up(site, done(site.run(delete, "pacs.delete", level="study", uid=study)))
    assert isinstance(delete_later(site, later), Deferred)
    assert done(site.upload(image(study, sop=sop)))["server_name"] in site.others


def test_a_deletion_that_was_interrupted_orders_its_follow_up_once(site):
    study = new_uid()
    site.put(site.others[0], image(study))
    site.begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.jobs.delete._execute", interrupted)
        assert isinstance(site.run(delete, "pacs.delete", "orders", level="study", uid=study), Deferred)
    payload = done(site.run(delete, "pacs.delete", "orders", level="study", uid=study))
    later = follow_up(site, payload)
    known = [key for key in site.client.keys(f"{PREFIX}job:*") if site.client.hget(key, "task") == "pacs.delete"]
    assert sorted(known) == sorted([f"{PREFIX}job:orders", f"{PREFIX}job:{later}"])


def interrupted(*_):
    raise PacsUnavailable("No answer.", server_name="x", details={"phase": "answer"})


def test_a_follow_up_whose_record_is_gone_is_not_ordered_again(site):
    study = new_uid()
    site.put(site.others[0], image(study))
    site.begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.jobs.delete._execute", interrupted)
        site.run(delete, "pacs.delete", "orders", level="study", uid=study)
    for key in site.client.keys(f"{PREFIX}job:*"):
        if key != f"{PREFIX}job:orders":
            site.client.delete(key)
    payload = done(site.run(delete, "pacs.delete", "orders", level="study", uid=study))
    assert site.ledger.read_record(follow_up(site, payload)) == {}


def test_a_follow_up_spares_what_was_stored_since_it_was_ordered(site):
    study, sop = new_uid(), new_uid()
    site.put(site.away, image(study, sop=sop))
    site.begin()
    later = follow_up(site, done(site.run(delete, "pacs.delete", level="study", uid=study)))
    site.end()
    site.knows(site.away, study, new_uid())
    error = error_of(delete_later(site, later))
    assert isinstance(error, InvalidRequest)
    assert "since this deletion was ordered" in error.message
    assert site.has(site.away, study) == 1


def test_a_follow_up_that_finds_nothing_says_so(site):
    site.begin()
    later = follow_up(site, done(site.run(delete, "pacs.delete", level="study", uid=new_uid())))
    site.end()
    assert isinstance(error_of(delete_later(site, later)), NotFound)


def test_a_deletion_that_names_the_server_alone_is_left_to_a_follow_up(site):
    site.begin()
    payload = done(site.run(delete, "pacs.delete", level="study", uid=new_uid(), servers=[site.away]))
    assert site.ledger.read_record(follow_up(site, payload))["state"] == "queued"


def test_a_dry_run_says_who_was_not_asked_and_orders_nothing(site):
    study = new_uid()
    site.put(site.others[0], image(study))
    site.begin()
    payload = done(site.run(delete, "pacs.delete", "looks", level="study", uid=study, dry_run=True))
    assert follow_up(site, payload) is None
    assert entries(payload)[site.others[0]].startswith("would_")
    assert site.client.keys(f"{PREFIX}job:*") == [f"{PREFIX}job:looks"]


def test_a_cancelled_deletion_takes_its_follow_up_along(site):
    study = new_uid()
    site.put(site.others[0], image(study))
    site.begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.jobs.delete._execute", interrupted)
        site.run(delete, "pacs.delete", "orders", level="study", uid=study)
    memo = site.ledger.read_record("orders")["memo"]
    site.ledger.cancel("orders")
    assert error_of(site.run(delete, "pacs.delete", "orders", level="study", uid=study)).code == "cancelled"
    (later,) = [key for key in site.client.keys(f"{PREFIX}job:*") if key.rpartition(":")[2] in memo]
    assert site.client.hget(later, "cancel") == "1"


def test_a_deletion_of_all_studies_is_refused_with_a_sentence(site):
    site.begin()
    for work, task, job in (
        (delete_all.delete_all, "pacs.delete_all", {"confirm": "delete all studies"}),
        (delete_all.delete_all, "pacs.delete_all", {"dry_run": True}),
        (deletions.delete_many, "pacs.batch.delete", {"everything": True, "confirm": "delete all studies"}),
    ):
        error = error_of(site.run(work, task, **job))
        assert isinstance(error, InvalidRequest)
        assert error.server_name == site.away
        assert "set by ana" in error.message
    named = {"confirm": "delete all studies", "servers": site.others}
    result = site.run(delete_all.delete_all, "pacs.delete_all", "named", **named)
    assert isinstance(result, Deferred | Done)


@pytest.mark.parametrize("direction", ["from it", "to it"])
def test_a_move_from_or_to_it_is_refused_with_a_sentence(site, direction):
    site.begin()
    pair = [site.away, site.others[0]] if direction == "from it" else [site.others[0], site.away]
    job = {"from_server": pair[0], "to_server": pair[1], "items": [new_uid()], "delete_source": True}
    error = error_of(site.run(migrations.migrate, "pacs.batch.migrate", **job))
    assert isinstance(error, InvalidRequest)
    assert (error.server_name, "a move" in error.message) == (site.away, True)
    between = {**job, "from_server": site.others[0], "to_server": site.others[1]}
    assert isinstance(site.run(migrations.migrate, "pacs.batch.migrate", "moves", **between), Deferred)


# --- what is looked at afterwards -----------------------------------------------------------------------------


def looked_at(site):
    """The audit that is to come, or has been."""
    return ElsewhereStudies(site.client).read(site.away)


def test_the_studies_stored_elsewhere_are_audited_by_themselves_when_the_server_is_back(site):
    split, whole = new_uid(), new_uid()
    sop = new_uid()
    site.put(site.away, image(split, sop=sop), image(split))  # by another program: the ledger knows nothing of it
    site.begin()
    home = done(site.upload(image(split, sop=sop)))["server_name"]
    done(site.upload(image(whole)))
    done(site.upload(image(whole)))
    to_come = looked_at(site)
    assert (to_come.studies, to_come.split) == (2, None)
    task, job = site.ledger.kind_of(to_come.job_id)
    assert (task, job) == ("pacs.audit", {"version": 1, "maintenance": site.away})

    assert isinstance(site.run(audit.audit, task, to_come.job_id, **job), Deferred)
    assert site.ledger.standing([to_come.job_id])[to_come.job_id].waiting["code"] == "server_maintenance"
    site.end()
    payload = done(site.run(audit.audit, task, to_come.job_id, **job))
    assert (payload["studies"], payload["split"], payload["not_asked"]) == (2, 1, [])
    (entry,) = payload["entries"]
    assert (entry["study_uid"], entry["overlap"]) == (split, "partial")
    assert {one["server_name"] for one in entry["servers"]} == {home, site.away}
    found = looked_at(site)
    assert (found.studies, found.split, found.job_id) == (2, 1, to_come.job_id)
    assert f"pacs audit --maintenance {site.away}" in str(found)
    again = done(site.run(audit.audit, task, **job))
    assert (again["split"], again["maintenance"]) == (1, site.away)


def test_a_status_tells_of_the_audit_until_nothing_is_split(site):
    study = new_uid()
    site.begin()
    done(site.upload(image(study)))

    def told():
        payload = done(site.run(servers.status, "pacs.status", servers=[site.away]))
        site.calls.counts.clear()
        return payload["servers"][0]["elsewhere"]

    assert (told()["studies"], told()["split"]) == (1, None)
    job_id = told()["job_id"]
    site.end()
    site.put(site.away, image(study))
    done(site.run(audit.audit, "pacs.audit", job_id, maintenance=site.away, version=1))
    assert (told()["split"], told()["job_id"]) == (1, job_id)
    for name in NAMES:
        if name != site.away and site.has(name, study):
            done(site.run(delete, "pacs.delete", level="study", uid=study, servers=[name]))
    done(site.run(audit.audit, "pacs.audit", maintenance=site.away))
    assert told() is None


def test_an_upload_that_was_killed_after_its_push_is_among_them(site, monkeypatch):
    study = new_uid()
    site.begin()
    body = image(study)

    def lost(*_, **__):
        raise PacsUnavailable("No answer.", server_name=site.others[0], details={"phase": "answer"})

    with monkeypatch.context() as patch:
        patch.setattr(site.services.fleet[site.others[0]], "store", lost)
        assert isinstance(site.upload(body, "dies", server=site.others[0]), Deferred)
    assert looked_at(site).studies == 1


def test_what_is_stored_elsewhere_while_the_audit_looks_is_looked_at_too(site, monkeypatch):
    study = new_uid()
    site.begin()
    done(site.upload(image(new_uid())))
    job_id = looked_at(site).job_id
    site.end()
    elsewhere, walked = ElsewhereStudies(site.client), []

    def looks(studies, *more):
        if not walked:
            elsewhere.note(site.away, [study])
        walked.append(studies)
        return look_for(studies, *more)

    look_for = audit._look_for
    monkeypatch.setattr(audit, "_look_for", looks)
    assert isinstance(site.run(audit.audit, "pacs.audit", job_id, maintenance=site.away, version=1), Deferred)
    assert looked_at(site).split is None
    payload = done(site.run(audit.audit, "pacs.audit", job_id, maintenance=site.away, version=1))
    assert [len(studies) for studies in walked] == [1, 2]
    assert payload["attempts"] == 1
    assert looked_at(site).split == 0


def test_nothing_is_noted_where_every_server_was_asked(site):
    done(site.upload(image(new_uid())))
    assert looked_at(site) is None
    assert site.client.keys(f"{PREFIX}elsewhere:*") == []


@pytest.mark.parametrize(
    "more", [{"servers": ["msdicom", "orthanc"]}, {"study_uid": "1.2"}, {"filters": {"PatientID": "*"}}]
)
def test_an_audit_after_a_maintenance_takes_no_other_choice(site, more):
    error = error_of(site.run(audit.audit, "pacs.audit", maintenance=site.away, **more))
    assert isinstance(error, InvalidRequest)
    assert isinstance(error_of(site.run(audit.audit, "pacs.audit", maintenance="nobody")), InvalidRequest)


# --- when it begins and ends ------------------------------------------------------------------------------------


def test_a_maintenance_that_begins_between_look_and_push_lets_the_attempt_end(site, monkeypatch):
    study = new_uid()

    def decided(answers):
        if site.away not in site.suspensions.read(NAMES):
            site.suspensions.maintain(site.away, set_by="ana")
            site.now_s += FRESH_S
        return decide(answers)

    monkeypatch.setattr("worker.jobs.upload.decide", decided)
    payload = done(site.upload(image(study), server=site.away))
    assert (payload["server_name"], payload["not_asked"]) == (site.away, [])
    site.calls.counts.clear()
    assert payload["status"] == "stored"


def test_a_maintenance_that_ends_between_look_and_push_changes_nothing_of_the_attempt(site, monkeypatch):
    study = new_uid()
    site.begin()

    def decided(answers):
        site.end()
        return decide(answers)

    monkeypatch.setattr("worker.jobs.upload.decide", decided)
    payload = done(site.upload(image(study)))
    assert payload["server_name"] in site.others
    assert payload["not_asked"] == [site.away]


def test_a_push_that_may_have_arrived_there_is_waited_for(site, monkeypatch):
    study = new_uid()
    body = image(study)
    instance = identify(io.BytesIO(body))
    pacs = site.services.fleet[site.away]

    def lost(_):
        raise PacsUnavailable("No answer.", server_name=site.away, details={"phase": "answer"})

    with monkeypatch.context() as patch:
        patch.setattr(pacs, "store", lost)
        assert isinstance(site.upload(body, "lost", server=site.away), Deferred)
    site.begin()
    result = site.run(upload, "pacs.upload", "lost", image_url="http://host/0", server=site.away)
    assert isinstance(result, Deferred)
    assert site.ledger.standing(["lost"])["lost"].waiting["code"] == "server_maintenance"
    another = site.upload(image(study), "another")
    assert isinstance(another, Deferred)  # the study may be there
    assert [site.has(name, instance.study_instance_uid) for name in site.others] == [0, 0]
