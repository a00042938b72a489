"""Every question that a job asks, over three servers at once: both dialects of the sandbox and a real Orthanc."""

from __future__ import annotations

import fakeredis
import pytest
import requests

from courier.ledger.jobs import Ledger
from courier.settings import ServerSettings, Settings
from sandbox import synthetic
from sandbox.synthetic import image, new_uid
from worker.jobs import lookup, servers, studies, trace
from worker.jobs.attempt import Attempt
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.registry import connect

NAMES = ["msdicom", "dcm4chee", "orthanc"]


@pytest.fixture
def urls(sandbox, orthanc):
    return {"msdicom": sandbox.msdicom, "dcm4chee": sandbox.dcm4chee, "orthanc": orthanc}


@pytest.fixture
def services(urls):
    settings = Settings.model_validate(
        {
            "servers": [
                {"name": name, "type": name, "url": url, "viewer": "http://v/{study}"} for name, url in urls.items()
            ]
        }
    )
    fleet = Fleet([connect(server) for server in settings.servers])
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Services(settings, ledger=Ledger(client), sources=None, fleet=fleet)
    fleet.close()


@pytest.fixture
def ask(services):
    def run(work, **job):
        return work(job, Attempt("j1", 1, 1, last=False, ledger=services.ledger), services)

    return run


@pytest.fixture(params=NAMES)
def stored(request, urls):
    """A study of two images on one of the servers: its name, and the UIDs of the study, the series and the images."""
    study, sops = new_uid(), [new_uid(), new_uid()]
    for sop in sops:
        body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + image(study, sop=sop) + b"\r\n--b--\r\n"
        kind = 'multipart/related; type="application/dicom"; boundary=b'
        headers = {"Accept": "application/dicom+json", "Content-Type": kind}
        requests.post(f"{urls[request.param]}/studies", data=body, headers=headers, timeout=10).raise_for_status()
    return request.param, study, f"{study}.1", sops


def test_it_is_found_at_every_level_with_what_is_above_it(ask, stored):
    name, study, series, sops = stored
    for level, uid, above in (
        ("image", sops[0], (study, series, sops[0])),
        ("series", series, (study, series, None)),
        ("study", study, (study, None, None)),
    ):
        payload = ask(lookup.exists, level=level, uid=uid, mode="both")
        assert [entry["server_name"] for entry in payload["servers"]] == NAMES
        (entry,) = [entry for entry in payload["servers"] if entry["status"] == "found"]
        assert (entry["server_name"], payload["server_name"], payload["server_type"]) == (name, name, name)
        assert (entry["study_uid"], entry["series_uid"], entry["image_uid"]) == above


def test_its_metadata_are_those_of_all_its_images(ask, stored):
    name, study, _, sops = stored
    payload = ask(lookup.metadata, level="study", uid=study)
    described = payload["servers"][-1]
    assert described["server_name"] == name
    assert {ds["00080018"]["Value"][0] for ds in described["metadata"]} == set(sops)


def test_it_is_listed_where_it_is(ask, stored):
    name, study, _, _ = stored
    page = ask(studies.list_studies, filters={"StudyInstanceUID": study})
    (entry,) = page["studies"]
    assert entry["study_uid"] == study
    assert [place["server_name"] for place in entry["servers"]] == [name]
    assert entry["patient_id"] == synthetic.PATIENT_ID
    assert (page["cursor"], [server["status"] for server in page["servers"]]) == (None, ["complete"] * 3)


def test_it_is_traced_without_a_word_about_its_level(ask, stored):
    name, study, series, sops = stored
    for level, uid in (("image", sops[1]), ("series", series), ("study", study)):
        payload = ask(trace.trace, uid=uid)
        assert (payload["level"], payload["server_name"], payload["viewer_url"]) == (level, name, f"http://v/{study}")


def test_each_server_says_how_it_is_and_nothing_is_invented(ask):
    told = {
        work.__name__: {entry["server_name"]: entry for entry in ask(work)["servers"]}
        for work in (servers.status, servers.storage, servers.database)
    }
    assert {entry["status"] for entries in told.values() for entry in entries.values()} == {"up"}
    assert {name: entry["database"] for name, entry in told["database"].items()} == dict.fromkeys(NAMES, "ok")
    assert told["status"]["orthanc"]["product"] == "Orthanc"
    assert told["status"]["orthanc"]["version"] != "unknown"
    assert told["status"]["msdicom"]["version"] == "unknown"
    known = {
        name: [entry[f"{kind}_bytes"] for kind in ("total", "free", "used")] for name, entry in told["storage"].items()
    }
    assert known["msdicom"] == ["unknown"] * 3
    assert all(isinstance(size, int) for size in known["dcm4chee"])
    assert [size == "unknown" for size in known["orthanc"]] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("msdicom", lambda url: url.removesuffix("/v2")),
        ("msdicom", lambda url: url.removesuffix("/v2") + "/v1beta"),
        ("dcm4chee", lambda url: url.removesuffix("/rs")),
        ("dcm4chee", lambda url: url.partition("/aets")[0]),
        ("orthanc", lambda url: url.removesuffix("/dicom-web")),
        ("orthanc", lambda url: url.removesuffix("-web")),
    ],
    ids=["no /v2", "another version", "no /rs", "no /aets", "no /dicom-web", "/dicom"],
)
def test_a_server_whose_url_is_no_root_of_dicomweb_is_not_up(urls, name, wrong):
    server = ServerSettings(name=name, type=name, url=wrong(urls[name]))
    fleet = Fleet([connect(server)])
    with fakeredis.FakeRedis(decode_responses=True) as client:
        services = Services(Settings(servers=[server]), ledger=Ledger(client), sources=None, fleet=fleet)
        attempt = Attempt("j1", 1, 1, last=False, ledger=services.ledger)
        (entry,) = servers.status({}, attempt, services)["servers"]
    fleet.close()
    assert entry["status"] == "degraded"
    assert "check the server's url" in f"{entry['note']} {entry['error']}".lower()
