"""Flower as the product starts it: on loopback for whoever is on the machine, elsewhere only with a password."""

from __future__ import annotations

import subprocess
import sys

import pytest
import requests
from redis import Redis

from sandbox import processes as parts
from sandbox.processes import HOST, Processes
from worker.flower import main, refusal

LOGIN = ("ops", "planted-9d2")
GOOGLE = "flower.views.auth.GoogleAuth2LoginHandler"
PAGES = ("/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks")


@pytest.mark.parametrize(
    ("address", "environ", "words"),
    [
        ("127.0.0.1", {}, None),
        ("localhost", {}, None),
        ("::1", {}, None),
        ("0.0.0.0", {}, "0.0.0.0 is not loopback"),
        ("::", {}, "not loopback"),
        ("", {}, "every address is not loopback"),
        ("192.0.2.7", {}, "not loopback"),
        ("flower.example.org", {}, "not loopback"),
        ("0.0.0.0", {"FLOWER_BASIC_AUTH": "ops:secret"}, None),
        ("0.0.0.0", {"FLOWER_BASIC_AUTH": "ops:secret,me:too"}, None),
        ("0.0.0.0", {"FLOWER_AUTH_PROVIDER": GOOGLE}, "0.0.0.0 is not loopback"),
        ("0.0.0.0", {"FLOWER_AUTH_PROVIDER": GOOGLE, "FLOWER_AUTH": ""}, "0.0.0.0 is not loopback"),
        ("0.0.0.0", {"FLOWER_AUTH": "ops@example.org"}, "0.0.0.0 is not loopback"),
        ("0.0.0.0", {"FLOWER_AUTH_PROVIDER": GOOGLE, "FLOWER_AUTH": "ops@example.org"}, None),
        ("0.0.0.0", {"FLOWER_BASIC_AUTH": "ops:secret", "FLOWER_UNAUTHENTICATED_API": "true"}, "UNAUTHENTICATED_API"),
        ("127.0.0.1", {"FLOWER_BASIC_AUTH": "secret"}, "is not user:password"),
        ("0.0.0.0", {"FLOWER_BASIC_AUTH": "ops:"}, "is not user:password"),
        ("0.0.0.0", {"FLOWER_BASIC_AUTH": "ops:secret,"}, "is not user:password"),
    ],
)
def test_off_loopback_a_password_is_needed(address, environ, words):
    reason = refusal(address, environ)
    assert reason is None if words is None else words in reason
    assert "secret" not in str(reason)


@pytest.mark.parametrize("option", ["--basic-auth=a:b", "--basic_auth=a:b", "--conf=flower.py", "--auth=.*"])
def test_no_password_stands_on_the_command_line(option):
    with pytest.raises(SystemExit, match="FLOWER_BASIC_AUTH"):
        main([option], {})


def test_a_start_off_loopback_without_a_password_ends_with_one_sentence(redis):
    command = [sys.executable, "-m", "worker.flower", "--address=0.0.0.0", f"--port={parts.free_port()}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("pacs-courier: 0.0.0.0 is not loopback")
    assert ended.stderr.count("\n") == 1


@pytest.fixture
def redis_client(redis):
    with Redis.from_url(redis.broker_url) as client:
        yield client


@pytest.fixture
def start(tmp_path, redis):
    with Processes(tmp_path / "flower") as running:

        def flower(**environ):
            config = parts.write_settings(tmp_path / "pacs.toml", {"queue": parts.queue_settings(redis)})
            port = parts.free_port()
            child = running.start(
                "flower",
                [sys.executable, "-m", "worker.flower", f"--port={port}"],
                ready=lambda _: parts.answers(f"http://{HOST}:{port}/healthcheck"),
                environ={"PACS_CONFIG": str(config), **environ},
                grace_s=2,
            )
            child.wait_ready()
            return f"http://{HOST}:{port}", child

        yield flower


def test_with_a_password_neither_pages_nor_api_answer_without_it(start):
    url, child = start(FLOWER_BASIC_AUTH=":".join(LOGIN))
    for page in PAGES:
        for login in (None, ("ops", "wrong")):
            assert requests.get(url + page, auth=login, timeout=20).status_code == 401, page
        assert requests.get(url + page, auth=LOGIN, timeout=20).status_code == 200, page
    sent = requests.post(f"{url}/api/task/send-task/pacs.status", json={"kwargs": {"job": {}}}, timeout=20)
    assert sent.status_code == 401
    assert requests.post(f"{url}/api/worker/shutdown/worker@courier", timeout=20).status_code == 401
    assert LOGIN[1] not in child.log
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert LOGIN[1] not in listed


def test_with_a_provider_and_whom_it_lets_in_neither_pages_nor_api_answer_without_a_login(start):
    url, _ = start(FLOWER_AUTH_PROVIDER=GOOGLE, FLOWER_AUTH="ops@example.org")
    for page in PAGES:
        answer = requests.get(url + page, timeout=20, allow_redirects=False)
        assert answer.status_code in (302, 401), page
        assert "/login" in answer.headers.get("Location", "/login"), page


def test_without_one_it_listens_on_loopback_alone_and_its_api_sends_nothing(start):
    url, _ = start()
    port = int(url.rpartition(":")[2])
    assert requests.get(f"{url}/tasks", timeout=20).status_code == 200
    for page in PAGES:
        if page.startswith("/api"):
            assert requests.get(url + page, timeout=20).status_code == 401
    sent = requests.post(f"{url}/api/task/send-task/pacs.status", json={"kwargs": {"job": {}}}, timeout=20)
    assert sent.status_code == 401
    assert requests.post(f"{url}/api/worker/shutdown/worker@courier", timeout=20).status_code == 401
    assert listening_on(port) == {"0100007F"}


def test_its_broker_page_and_its_api_show_our_queues_while_no_worker_answers(start, redis, redis_client):
    url, child = start(FLOWER_BASIC_AUTH=":".join(LOGIN))
    redis_client.lpush("pacs.batches", "a", "b")
    redis_client.lpush("pacs\x06\x163", "c")
    told = requests.get(f"{url}/api/queues/length", auth=LOGIN, timeout=20).json()
    lengths = {queue["name"]: queue["messages"] for queue in told["active_queues"]}
    assert lengths == {"pacs": 1, "pacs.admin": 0, "pacs.batches": 2, "pacs.due": 0}
    page = requests.get(f"{url}/broker", auth=LOGIN, timeout=20)
    assert (page.status_code, "pacs.batches" in page.text) == (200, True)
    assert "Traceback" not in child.log
    assert "Unable to get queues" not in child.log


def test_at_the_level_debug_its_log_quotes_no_job_that_is_sent_by_its_api(start):
    url, child = start(FLOWER_DEBUG="true", FLOWER_UNAUTHENTICATED_API="true")
    for way in ("async-apply", "send-task"):
        job = {"kwargs": {"job": {"filters": {"PatientName": "Planted^Name"}}}}
        assert requests.post(f"{url}/api/task/{way}/pacs.list_studies", json=job, timeout=20).status_code == 200
    assert "Planted^Name" not in child.log


def listening_on(port):
    """The addresses of this port that are listened on, as /proc/net/tcp writes them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as rows:
            for row in list(rows)[1:]:
                address, _, hexadecimal = row.split()[1].partition(":")
                if int(hexadecimal, 16) == port and row.split()[3] == "0A":
                    found.add(address)
    return found
