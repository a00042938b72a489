"""What a real worker tells OpenTelemetry and Prometheus: one connected trace per job, and counts that add up."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import threading

import pytest
import requests
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from courier.ledger.jobs import Ledger
from courier.messages import UploadJob
from courier.settings import Settings
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes
from sandbox.synthetic import image, new_uid
from worker.observability.metrics import BREAKER_STATES

WAIT_S = 30
SIGNATURE, PATIENT = "SIGNATURE-0aa1", "PLANTED-PATIENT"
ENQUEUE = """
import sys
from producer import Courier
with Courier() as courier:
    print(courier.upload(sys.argv[1]).result(timeout_s=30)["job_id"])
"""


class Collector:
    """An OTLP/HTTP receiver on loopback: keeps every span that it is sent, and its bytes."""

    def __init__(self) -> None:
        self.spans, self.raw = [], b""
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _receive(self, request):
        body = await request.read()
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]
        return web.Response(body=b"", content_type="application/x-protobuf")

    def _serve(self):
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/v1/traces", self._receive)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        self.port = parts.free_port()
        self._loop.run_until_complete(web.TCPSite(runner, parts.HOST, self.port).start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def stop(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def of(self, job_id):
        """The spans of the trace in which the job is, oldest first."""
        wanted = {span.trace_id for _, span in self.spans if attributes(span).get("pacs.job_id") == job_id}
        return sorted(
            (one for one in self.spans if one[1].trace_id in wanted), key=lambda one: one[1].start_time_unix_nano
        )


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.stop()


def attributes(span):
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_an_upload_is_one_trace_from_the_producer_to_the_pacs(worker, image_server, collector, sandbox):
    endpoint = f"http://{parts.HOST}:{collector.port}"
    quick = {"OTEL_BSP_SCHEDULE_DELAY": "200"}
    running = worker(telemetry={"otlp_endpoint": endpoint}, environ={**quick, "OTEL_SERVICE_NAME": "the-worker"})
    url = image_server.put("a.dcm", image(new_uid(), PatientID=PATIENT)) + f"?sig={SIGNATURE}"
    environ = {"PACS_CONFIG": str(running.config), "OTEL_SERVICE_NAME": "the-program", "PATH": ""}
    command = [sys.executable, "-c", ENQUEUE, url]
    enqueued = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90, check=False)
    assert enqueued.returncode == 0, enqueued.stderr
    job_id = enqueued.stdout.strip()
    names = {"send pacs.upload", "pacs.upload", "fetch", "identify", "check", "route", "push", "describe"}
    assert parts.poll(lambda: names <= {span.name for _, span in collector.of(job_id)}, timeout_s=WAIT_S, every_s=0.2)
    trace = collector.of(job_id)
    assert len({span.trace_id for _, span in trace}) == 1
    by_id = {span.span_id: (service, span) for service, span in trace}
    (root,) = [span for _, span in trace if not span.parent_span_id]
    assert root.name == "send pacs.upload"
    assert all(span.parent_span_id in by_id for _, span in trace if span is not root), "nothing hangs in the air"
    parents = {span.name: by_id[span.parent_span_id][1].name for _, span in trace if span is not root}
    assert parents["pacs.upload"] == "send pacs.upload"
    assert {parents[step] for step in names - {"send pacs.upload", "pacs.upload"}} == {"pacs.upload"}
    assert {service for service, span in trace if span is root} == {"the-program"}
    assert {service for service, span in trace if span is not root} == {"the-worker"}
    calls = [span for _, span in trace if "pacs.server_name" in attributes(span)]
    assert {by_id[span.parent_span_id][1].name for span in calls} == {"check", "push", "describe"}
    (pushed,) = [span for span in calls if by_id[span.parent_span_id][1].name == "push" and "POST" in span.name]
    about = {"pacs.server_name": "msdicom", "pacs.server_type": "msdicom", "http.response.status_code": 200}
    assert about.items() <= attributes(pushed).items()
    (job,) = [span for _, span in trace if span.name == "pacs.upload"]
    assert {"pacs.end": "done", "pacs.attempt": 1}.items() <= attributes(job).items()
    assert [secret for secret in (SIGNATURE, PATIENT) if secret.encode() in collector.raw] == []
    told = [span.name for _, span in trace] + [str(value) for _, span in trace for value in attributes(span).values()]
    assert [text for text in told if "?" in text or "/" in text or text.startswith("2.25.")] == []
    assert not any(span.events for _, span in trace)


def test_a_job_that_the_sweeper_wakes_goes_on_with_its_trace(worker, image_server, collector, sandbox, plain):
    endpoint = f"http://{parts.HOST}:{collector.port}"
    running = worker(
        telemetry={"otlp_endpoint": endpoint},
        jobs={"sweep_s": 0.1, "backoff_base_s": 0.1, "backoff_cap_s": 0.1},
        environ={"OTEL_BSP_SCHEDULE_DELAY": "200"},
    )
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    header = f"00-{trace_id}-{parent}-01"
    ledger = Ledger.connect(running.settings.queue.ledger_url)
    job = UploadJob(image_url=image_server.put("lost.dcm", image(new_uid()))).model_dump(exclude_none=True)
    sandbox.set_fault("msdicom", "store", status=503, times=1)
    ledger.submit("lost", task="pacs.upload", job=job, due_in_s=0, trace=header)  # its message got lost
    other = {"image_url": image_server.put("plain.dcm", image(new_uid()))}
    sent = plain.send_task("pacs.upload", kwargs={"job": other}, headers={"traceparent": header})
    another = {"image_url": image_server.put("another.dcm", image(new_uid()))}
    bad = plain.send_task("pacs.upload", kwargs={"job": another}, headers={"traceparent": "x" * 2000})
    assert sent.get(timeout=WAIT_S)["status"] == "stored"
    assert bad.get(timeout=WAIT_S)["status"] == "stored"
    assert parts.poll(lambda: ledger.read_record("lost").get("state") == "done", timeout_s=WAIT_S)

    def attempts(job_id):
        found = [span for _, span in collector.of(job_id) if span.name == "pacs.upload"]
        return [span for span in found if attributes(span)["pacs.job_id"] == job_id]

    def ends(job_id):
        return [attributes(span)["pacs.end"] for span in attempts(job_id)]

    every = ("lost", sent.id, bad.id)
    assert parts.poll(lambda: all("done" in ends(job_id) for job_id in every), timeout_s=WAIT_S, every_s=0.2)
    assert sorted(end for job_id in every for end in ends(job_id)) == ["done", "done", "done", "parked"]
    for job_id in ("lost", sent.id):
        assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in attempts(job_id)} == {(trace_id, parent)}
    assert all(span.trace_id.hex() != trace_id for span in attempts(bad.id))


def scraped(port):
    answer = requests.get(f"http://{parts.HOST}:{port}/metrics", timeout=10)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }, answer.text


def test_metrics_count_what_was_done_and_show_what_waits(worker, image_server, sandbox):
    port = parts.free_port()
    telemetry, breaker = {"metrics_port": port}, {"failures": 1, "pause_s": 60}
    running = worker(telemetry=telemetry, breaker=breaker, jobs={"sweep_s": 0.1})
    with Courier(running.settings) as courier:
        url = image_server.put("a.dcm", image(new_uid(), PatientID=PATIENT)) + f"?sig={SIGNATURE}"
        assert courier.upload(url).result(timeout_s=WAIT_S)["status"] == "stored"
        for _ in courier.as_completed([courier.upload(url)], timeout_s=WAIT_S):
            pass
        sandbox.set_fault("msdicom", "store", status=503)
        parked = courier.upload(image_server.put("b.dcm", image(new_uid())))
        assert parts.poll(lambda: courier.ledger.parked().get("msdicom") == 1, timeout_s=20)
        # Jobs that are over are taken off the list of the open ones four times a second, many at a time.
        assert parts.poll(lambda: scraped(port)[0]["pacs_jobs_open",] == 1, timeout_s=WAIT_S)
        values, text = scraped(port)
        done = ("pacs_jobs_total", ("code", "done"), ("end", "done"), ("task", "pacs.upload"))
        refused = ("pacs_jobs_total", ("code", "image_already_exists"), ("end", "refused"), ("task", "pacs.upload"))
        waits = ("pacs_jobs_total", ("code", "pacs_unavailable"), ("end", "parked"), ("task", "pacs.upload"))
        assert (values[done], values[refused], values[waits]) == (1, 1, 1)
        msdicom = (("server_name", "msdicom"), ("server_type", "msdicom"))
        assert values["pacs_server_requests_total", ("method", "POST"), *msdicom] == 2
        assert values["pacs_server_errors_total", ("code", "pacs_unavailable"), *msdicom] == 1
        assert values["pacs_server_seconds_count", *msdicom] > 4
        assert values["pacs_step_seconds_count", ("step", "push"), ("task", "pacs.upload")] == 2
        assert values["pacs_sweeps_total",] > 0
        assert (values["pacs_jobs_in_flight",], values["pacs_jobs_open",]) == (0, 1)
        assert values["pacs_ledger_up",] == 1
        assert values["pacs_dead_letters",] == 0
        assert values["pacs_jobs_parked", ("server_name", "msdicom")] == 1
        states = {state: values["pacs_breaker_state", msdicom[0], ("state", state)] for state in BREAKER_STATES}
        assert states == {"closed": 0, "half-open": 0, "open": 1}
        assert (values["pacs_queue_messages", ("queue", "pacs")], values["pacs_queue_oldest_seconds",]) == (0, 0)
        sandbox.reset_faults()
        assert parked.cancel()
        assert [report.over for _, report in courier.as_completed([parked], timeout_s=WAIT_S)] == [True]
        assert not courier.ledger.parked()
    assert SIGNATURE not in text
    assert PATIENT not in text


def test_the_counts_of_child_processes_add_up(redis, sandbox, image_server, tmp_path):
    port, folder = parts.free_port(), tmp_path / "counts"
    folder.mkdir()
    with Processes(tmp_path / "prefork") as children:
        tree = {
            "servers": sandbox.servers(),
            "queue": parts.queue_settings(redis),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "telemetry": {"metrics_port": port},
        }
        config = parts.write_settings(tmp_path / "pacs.toml", tree)
        environ = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
        options = ["--pool", "prefork"]
        child = parts.worker(children, config, name="prefork", concurrency=2, options=options, environ=environ)
        child.wait_ready()
        with Courier(Settings.load({"PACS_CONFIG": str(config)})) as courier:
            handles = [courier.upload(image_server.put(f"{n}.dcm", image(new_uid()))) for n in range(6)]
            assert [handle.result(timeout_s=WAIT_S)["status"] for handle in handles] == ["stored"] * 6
        values, _ = scraped(port)
        assert values["pacs_jobs_total", ("code", "done"), ("end", "done"), ("task", "pacs.upload")] == 6
        assert values["pacs_jobs_in_flight",] == 0
        assert values["pacs_ledger_up",] == 1
        assert parts.poll(lambda: scraped(port)[0]["pacs_sweeps_total",] > 0, timeout_s=WAIT_S), "the parent's own"
        assert "Traceback" not in child.log


def test_without_telemetry_nothing_of_it_is_loaded():
    ours = {"opentelemetry.exporter", "prometheus_client", "courier.otlp", "worker.observability.metrics"}
    assert all(map(importlib.util.find_spec, ours)), "each could be loaded"
    show = f"import sys, worker.app, producer; print(*{ours} & set(sys.modules))"  # redis-py loads its part of the API
    command = [sys.executable, "-c", show]
    environ = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.strip() == ""
