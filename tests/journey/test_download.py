"""Downloads over a real broker and real workers: one is killed in the middle, the next delivers the whole."""

from __future__ import annotations

import hashlib
import json
import zipfile

from click.testing import CliRunner

from producer import Courier
from producer.cli import main
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 30
QUICK = {"max_attempts": 3, "backoff_base_s": 0.1, "sweep_s": 0.1, "lease_s": 1.5, "grace_s": 2}


def test_a_download_survives_its_worker_and_shows_nothing_before_it_is_whole(
    worker, sandbox, tmp_path, monkeypatch, is_running
):
    study = new_uid()
    images = [image(study, seed=seed) for seed in range(6)]
    stow(sandbox.msdicom, *images)
    out = tmp_path / "out"
    out.mkdir()
    doomed = worker(jobs=QUICK, downloads={"folders": [str(out)]})
    monkeypatch.setenv("PACS_CONFIG", str(doomed.config))
    with Courier() as courier:
        sandbox.set_fault("msdicom", "retrieve", drip_bytes_per_s=8000)
        handle = courier.download(study, (out / "study.zip").as_uri())
        for _, report in courier.watch([handle], timeout_s=WAIT_S):
            if report.stage.startswith("transfer 2/"):
                doomed.kill()
                break
        assert not is_running(doomed.child.pid)
        assert [path.name for path in out.iterdir()] == [".study.zip.unfinished"]
        sandbox.reset_faults()
        worker(jobs=QUICK, downloads={"folders": [str(out)]})
        payload = handle.result(timeout_s=WAIT_S)
    assert (payload["status"], payload["instances"], payload["attempts"]) == ("downloaded", 6, 2)
    assert [path.name for path in out.iterdir()] == ["study.zip"]
    with zipfile.ZipFile(out / "study.zip") as archive:
        contents = [archive.read(name) for name in archive.namelist() if name != "manifest.json"]
    assert sorted(contents) == sorted(images)
    assert payload["sha256"] == hashlib.sha256((out / "study.zip").read_bytes()).hexdigest()

    def pacs(*words):
        return CliRunner().invoke(main, ["download", *words])

    assert "already_there" in pacs(study, str(out / "study.zip")).output
    files = pacs(study, str(out / "files"), "--format", "files", "--json")
    assert (files.exit_code, json.loads(files.stdout)["server_name"]) == (0, "msdicom")
    assert len(list((out / "files").rglob("*.dcm"))) == 6
    assert pacs(new_uid(), str(out / "other.zip")).exit_code == 1
    assert pacs(study, str(tmp_path / "elsewhere.zip")).exit_code == 2
    sandbox.set_fault("msdicom", "*", refuse=True)
    assert pacs(study, str(out / "third.zip")).exit_code == 3
