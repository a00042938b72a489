"""Workers that are killed while a server hangs at a file, and a real file at which a real Orthanc hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from producer import Courier
from producer.errors import PacsRejected, Poisoned
from sandbox import processes as parts
from sandbox.processes import Processes, poll
from sandbox.synthetic import image, new_uid
from tests.hanging import hanging

WAIT_S = 60
JOBS = {"lease_s": 2, "sweep_s": 0.2, "backoff_base_s": 0.1, "backoff_cap_s": 0.2, "max_deaths": 5}


def test_two_workers_that_were_killed_while_a_server_hung_are_two_hangs(sandbox, image_server, worker):
    sop = new_uid()
    with hanging(sandbox.msdicom) as ward:
        ward.at = [sop.encode()]
        servers = [{"name": "msdicom", "type": "msdicom", "url": ward.url, "read_timeout_s": 4}]
        url = image_server.put("a.dcm", image(new_uid(), sop=sop, side=8))
        first = worker(servers=servers, jobs=JOBS)
        with Courier(first.settings) as courier:
            handle = courier.upload(url)
            for number in (1, 2):
                assert poll(lambda number=number: ward.seen(sop.encode()) == number, timeout_s=WAIT_S)
                assert poll(lambda number=number: _hangs(courier, number), timeout_s=WAIT_S)
                first.child.kill()
                first = worker(servers=servers, jobs=JOBS)
            with pytest.raises(Poisoned) as end:
                handle.result(timeout_s=WAIT_S)
        assert end.value.details["hangs"] == 2
        assert ward.seen(sop.encode()) == 2


def _hangs(courier: Courier, number: int) -> bool:
    """Whether the worker has noted so many hangs, and so may be killed."""
    assert courier.ledger is not None
    told: dict[str, Any] = courier.ledger.client.hgetall(courier.ledger.key("hangs", "msdicom"))
    return any(row.startswith(f"{number} ") for row in told.values())


def test_a_file_that_takes_orthanc_seconds_costs_only_itself(tmp_path, image_server, worker):
    """SC_rgb_jpeg.dcm of pydicom: Debian's Orthanc 1.10 reads it for seconds, or without end, and refuses it."""
    content = Path(str(get_testdata_file("SC_rgb_jpeg.dcm", download=False))).read_bytes()
    with Processes(tmp_path / "orthanc") as processes:
        server = parts.orthanc(processes)
        servers = [{"name": "orthanc", "type": "orthanc", "url": server.url, "read_timeout_s": 2}]
        own = worker(servers=servers, jobs=JOBS)
        study = new_uid()
        urls = [image_server.put(f"{number}.dcm", image(study, side=8)) for number in range(4)]
        urls.insert(2, image_server.put("slow.dcm", content))
        with Courier(own.settings) as courier:
            batch = courier.batch.upload(urls, server="orthanc")
            totals = batch.result(timeout_s=3 * WAIT_S)["passes"]["apply"]["totals"]
            assert totals in ({"stored": 4, "failed": 1}, {"stored": 4, "refused": 1})
            with pytest.raises((Poisoned, PacsRejected)):
                courier.upload(urls[2], server="orthanc").result(timeout_s=WAIT_S)
