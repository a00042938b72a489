"""What the doctor finds: nothing on a healthy system, and each thing that is wrong with what to do about it."""

from __future__ import annotations

import json
import socket
import time

import pytest
import redis
from click.testing import CliRunner

from courier.ledger.jobs import PREFIX, Ledger
from courier.settings import Settings, TelemetrySettings
from producer import doctor
from producer.cli import main
from producer.client import Courier
from sandbox import processes as parts
from worker.runtime.watchdog import HealthReport


def states(findings):
    return {finding["check"]: finding["state"] for finding in findings}


def settings_of(redis_server, sandbox_server, **queue):
    tree = {"servers": sandbox_server.servers(), "queue": parts.queue_settings(redis_server) | queue}
    return Settings.model_validate(tree)


def examined(settings):
    return {finding.check: finding for finding in doctor.examine(lambda: settings)}


def test_a_healthy_system_has_no_finding_that_is_not_ok(pacs):
    status, document, _ = pacs("doctor")
    assert set(states(document["findings"]).values()) == {"ok"}
    assert {"settings", "broker", "result back-end", "ledger", "persistence", "eviction", "clock"} < set(
        states(document["findings"])
    )
    assert {"workers", "progress", "server msdicom", "server dcm4chee"} < set(states(document["findings"]))
    assert status == 0


def test_workers_are_found_by_a_program_whose_connections_redis_has_closed_since(steady, redis_server):
    with redis.Redis.from_url(redis_server.broker_url) as client, Courier(steady.settings) as courier:
        others = {one["id"] for one in client.client_list()}
        for _ in range(3):
            assert list(courier.workers()) != []
            for one in client.client_list():
                if one["id"] not in others:
                    client.client_kill_filter(_id=one["id"])


def test_a_silent_server_and_a_sick_one_are_named_with_what_to_do(pacs, sandbox):
    sandbox.set_fault("msdicom", "*", refuse=True)
    status, document, _ = pacs("doctor")
    (finding,) = [one for one in document["findings"] if one["state"] != "ok"]
    assert (status, finding["check"], finding["state"]) == (3, "server msdicom", "unavailable")
    assert finding["advice"]


def test_dead_letters_and_overdue_jobs_are_found(steady, redis_server):
    with redis.Redis.from_url(redis_server.ledger_url) as client:
        client.zadd(f"{PREFIX}dead", {"j1": 1})
        findings = examined(steady.settings)
        client.zrem(f"{PREFIX}dead", "j1")
    assert (findings["dead letters"].state, findings["dead letters"].found) == ("warning", "1")


def test_what_redis_does_not_keep_is_found(steady, redis_server):
    with redis.Redis.from_url(redis_server.ledger_url) as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            findings = examined(steady.settings)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "0")
            client.config_set("appendonly", "yes")
    assert (findings["persistence"].state, findings["eviction"].state) == ("failed", "failed")
    assert "noeviction" in findings["eviction"].advice


def test_without_a_worker_nothing_is_carried_and_what_is_due_stays_due(redis_server, sandbox_server, monkeypatch):
    away = settings_of(redis_server, sandbox_server, broker_url=redis_server.url(5), ledger_url=redis_server.url(6))
    ledger = Ledger.connect(away.queue.ledger_url)
    ledger.submit("j1", task="pacs.upload", job={}, due_in_s=-60)
    with Courier(away) as courier:
        courier.exists("study", "1.2")
    findings = examined(away)
    assert (findings["workers"].state, findings["due jobs"].state) == ("failed", "failed")
    assert "pacs: 1" in findings["queues"].found
    assert findings["due jobs"].advice


def test_a_worker_that_answers_but_carries_nothing_is_found_out(steady, sandbox, monkeypatch):
    sandbox.set_fault("msdicom", "*", latency_ms=3000)
    monkeypatch.setattr(doctor, "CARRY_S", 0.1)
    findings = examined(steady.settings)
    assert (findings["workers"].state, findings["progress"].state) == ("ok", "failed")


@pytest.mark.parametrize("part", ["broker_url", "result_backend", "ledger_url"])
def test_each_part_of_redis_that_is_away_is_named(redis_server, sandbox_server, part):
    nowhere = f"redis://{parts.HOST}:{parts.free_port()}/0"
    findings = examined(settings_of(redis_server, sandbox_server, **{part: nowhere}))
    unavailable = [check for check, finding in findings.items() if finding.state == "unavailable"]
    assert unavailable == [{"broker_url": "broker", "result_backend": "result back-end", "ledger_url": "ledger"}[part]]


def test_wrong_settings_are_the_first_finding(tmp_path, monkeypatch):
    config = tmp_path / "pacs.toml"
    config.write_text('[jobs]\nlease_s = "soon"\n', encoding="utf-8")
    monkeypatch.setenv("PACS_CONFIG", str(config))
    ended = CliRunner().invoke(main, ["doctor", "--json"])
    assert ended.exit_code == 1
    (finding,) = json.loads(ended.stdout)["findings"]
    assert "jobs.lease_s" in finding["found"]
    shown = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
    assert "docs/settings.md" in shown.stdout


def test_a_worker_that_answers_and_is_stuck_is_named_by_its_own_watchdog(steady):
    ledger = Ledger.connect(steady.settings.queue.ledger_url)
    ledger.report_health("steady@courier", HealthReport(False, "it has taken no message for 130 s", 10.0).as_json())
    ledger.report_health("deaf@courier", HealthReport(False, "its loop has not turned for 130 s", 10.0).as_json())
    told = ledger.workers(now_s=time.time())
    found = {finding.check: finding for finding in doctor._progress(ledger, {"steady@courier", "new@courier"})}
    ledger.report_health("old@courier", json.dumps({**told["deaf@courier"], "at": time.time() - 90_000}))
    assert "old@courier" not in ledger.workers(now_s=time.time())
    ledger.client.delete(f"{PREFIX}workers")
    assert {check: finding.state for check, finding in found.items()} == dict.fromkeys(
        ("worker steady@courier", "worker deaf@courier", "worker new@courier"), "failed"
    )
    assert "its loop has not turned" in found["worker deaf@courier"].found


def test_telemetry_that_nobody_takes_or_serves_is_found(redis_server, sandbox_server):
    settings = settings_of(redis_server, sandbox_server)
    port = parts.free_port()
    telemetry = TelemetrySettings(otlp_endpoint=f"http://{parts.HOST}:{port}", metrics_port=port)
    findings = {finding.check: finding for finding in doctor._telemetry(telemetry)}
    assert {check: finding.state for check, finding in findings.items()} == {"traces": "warning", "metrics": "warning"}
    assert list(doctor._telemetry(settings.telemetry)) == []
    with socket.create_server((parts.HOST, port)):
        assert {finding.state for finding in doctor._telemetry(telemetry)} == {"ok"}


@pytest.mark.parametrize(("hung_s", "found"), [(120, ["watchdog"]), (121, [])])
def test_a_watchdog_that_is_less_patient_than_a_request_is_found(redis_server, sandbox_server, hung_s, found):
    settings = settings_of(redis_server, sandbox_server)
    hasty = settings.model_copy(update={"worker": settings.worker.model_copy(update={"hung_s": hung_s})})
    assert [finding.check for finding in doctor._patience(hasty)] == found
