"""The places of sources and downloads in ``pacs doctor``: a real worker tries them with its credentials and mounts."""

from __future__ import annotations

import socket

from producer import doctor
from sandbox import processes as parts


def test_the_places_of_sources_and_downloads_are_tried_by_a_worker_from_where_it_runs(worker, tmp_path):
    images, absent, out = tmp_path / "images", tmp_path / "absent", tmp_path / "out"
    images.mkdir()
    (images / "a.dcm").write_bytes(b"x" * 5000)
    nowhere = {"buckets": ["scans"], "endpoint_url": f"http://{parts.HOST}:{parts.free_port()}", "region": "here"}
    running = worker(
        sources={"folders": [str(images), str(absent)], "s3": nowhere},
        downloads={"folders": [str(out)]},
        environ={"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "swordfish"},
    )
    out.mkdir()
    found = {finding.check: finding for finding in doctor.examine(lambda: running.settings)}
    checks = [
        f"source {images.as_uri()}/",
        f"source {absent.as_uri()}/",
        "source s3://scans/",
        f"place {out.as_uri()}/",
    ]
    assert [found[check].state for check in checks] == ["ok", "failed", "unavailable", "ok"]
    assert socket.gethostname() in found[checks[0]].found
    assert "sources.folders" in found[checks[1]].advice
    assert "sources.s3" in found[checks[2]].advice
    assert list(out.iterdir()) == []
    assert "swordfish" not in running.log + str(found)
