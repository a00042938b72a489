"""An application with a ``worker.py``, ``celeryconfig.py``, ``tasks.py`` and Celery app of its own uses our wheel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from courier import celery_settings
from sandbox import processes as parts
from sandbox.processes import HOST, Child, Processes, poll
from sandbox.synthetic import image, new_uid
from tests.packages import run, succeeded

WAIT_S = 60

CELERYCONFIG = """\
import os

broker_url = os.environ["HOST_BROKER"]
result_backend = os.environ["HOST_RESULTS"]
task_default_queue = "reports"
broker_transport_options = {"visibility_timeout": 90, "socket_timeout": 7, "global_keyprefix": "reports:"}
broker_pool_limit = 3
worker_prefetch_multiplier = 7
task_acks_late = False
task_time_limit = 20
timezone = "Europe/Vienna"
"""
WORKER = """\
import os

from celery import Celery

app = Celery("reports", include=["tasks"])
app.config_from_object("celeryconfig")
if "HOST_DEFAULT" in os.environ:
    app.set_default()
"""
TASKS = """\
from celery import shared_task
from producer import Courier


@shared_task(name="reports.fetch")
def fetch(url):
    with Courier() as courier:
        return courier.upload(url).id


@shared_task(name="reports.add")
def add(one, another):
    return one + another
"""
#: What Celery's Django fix-up needs of Django.
DJANGO = {
    "django/__init__.py": "VERSION = (5, 2)\n",
    "django/conf/__init__.py": "settings = object()\n",
    "django/db/__init__.py": "transaction = object()\n",
}

#: What a program that enqueues does not load.
HEAVY = ("pydicom", "requests", "boto3", "botocore", "azure", "sandbox", "worker.app", "worker.tasks")

#: Sends one message of its own and one of ours, then says what it sees.
PROGRAM = """\
import json
import sys
import threading

import kombu.pools
from celery import current_app

def ours():
    from producer import Courier
    return Courier()

def theirs():
    import worker
    import tasks
    return worker.app

first, second = (ours, theirs) if sys.argv[1] == "ours first" else (theirs, ours)
made = {one.__name__: one() for one in (first, second)}
app, courier = made["theirs"], made["ours"]
import tasks

own = [tasks.add.delay(1, 2).id]
job = courier.upload(sys.argv[2])
own.append(app.send_task("reports.add", (3, 4)).id)

elsewhere = {}
def look():
    elsewhere.update(app=current_app.main, task=tasks.add.app.main)
thread = threading.Thread(target=look)
thread.start()
thread.join()

OPTIONS = ("visibility_timeout", "socket_timeout", "global_keyprefix")
def seen(app):
    connection = app.connection_for_write()
    settings = ("task_default_queue", "worker_prefetch_multiplier", "task_acks_late", "task_time_limit", "timezone")
    return {
        **{name: app.conf[name] for name in settings},
        **{name: connection.transport_options.get(name) for name in OPTIONS},
        "broker": connection.as_uri(include_password=True).replace(":@", ""),
        "results": app.backend.as_uri(),
    }

print(json.dumps({
    "job": job.id, "status": job.report().status, "own": own,
    "ours": seen(courier._sender) | {"results": courier._app.backend.as_uri()}, "theirs": seen(app),
    "current": [current_app.main, *elsewhere.values()],
    "pool_limits": [kombu.pools.get_limit(), app.pool.limit],
    "modules": {name: getattr(sys.modules.get(name), "__file__", None) for name in ("worker", "celeryconfig", "tasks")},
    "loaded": sorted(set(sys.argv[3:]) & set(sys.modules)),
}))
courier.close()
"""

#: What the surrounding program may have set for its Celery app, and what then is its broker (a number of a database).
ENVIRONMENTS: dict[str, tuple[dict[str, str], int]] = {
    "nothing set": ({}, 5),
    "a config module": ({"CELERY_CONFIG_MODULE": "celeryconfig", "CELERY_LOADER": "default"}, 5),
    "a broker": ({"CELERY_BROKER_URL": "{7}", "CELERY_RESULT_BACKEND": "{6}"}, 7),
    "brokers to read and to write": ({"CELERY_BROKER_READ_URL": "{7}", "CELERY_BROKER_WRITE_URL": "{7}"}, 7),
    "a default app": ({"HOST_DEFAULT": "yes"}, 5),
    "Django": ({"DJANGO_SETTINGS_MODULE": "settings"}, 5),
}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The application's folder."""
    folder = tmp_path / "host"
    modules = {"celeryconfig.py": CELERYCONFIG, "worker.py": WORKER, "tasks.py": TASKS, "program.py": PROGRAM}
    for name, text in {**modules, "settings.py": "DEBUG = False\n"}.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def environ(redis: Any) -> dict[str, str]:
    """Where both find their Redis; the application uses databases of its own.

    Ours has its long names: the command ``celery`` takes ``BROKER_URL`` for that of any application.
    """
    ours = {f"PACS__QUEUE__{key.upper()}": url for key, url in parts.queue_settings(redis).items()}
    return {"HOST_BROKER": redis.url(5), "HOST_RESULTS": redis.url(6), **ours}


def messages(url: str, key: str) -> list[str]:
    """The ids of the messages in a queue."""
    with Redis.from_url(url, decode_responses=True) as client:
        return [json.loads(one)["headers"]["id"] for one in client.lrange(key, 0, -1)]


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_our_settings_apply_to_our_messages_and_the_applications_to_its_own(
    installed: Path, host: Path, environ: dict[str, str], redis: Any, order: str, environment: str
) -> None:
    variables, database = ENVIRONMENTS[environment]
    if environment == "Django":
        for name, text in DJANGO.items():
            (host / name).parent.mkdir(parents=True, exist_ok=True)
            (host / name).write_text(text, encoding="utf-8")
    set_for_theirs = {name: value.format(*map(redis.url, range(8))) for name, value in variables.items()}
    url = f"http://{HOST}/1.dcm"
    done = run(installed, "program.py", order, url, *HEAVY, cwd=host, environ={**environ, **set_for_theirs})
    found = json.loads(succeeded(done))
    assert done.stderr == ""

    assert messages(redis.broker_url, "pacs") == [found["job"]]
    assert sorted(messages(redis.url(database), "reports:reports")) == sorted(found["own"])
    assert found["status"] == "queued"
    options = celery_settings.broker_transport_options
    assert found["ours"] == {
        "task_default_queue": "pacs",
        "worker_prefetch_multiplier": 1,
        "task_acks_late": True,
        "task_time_limit": None,
        "timezone": "UTC",
        "visibility_timeout": options["visibility_timeout"],
        "socket_timeout": options["socket_timeout"],
        "global_keyprefix": None,
        "broker": redis.broker_url,
        "results": redis.result_backend,
    }
    assert found["theirs"] == {
        "task_default_queue": "reports",
        "worker_prefetch_multiplier": 7,
        "task_acks_late": False,
        "task_time_limit": 20,
        "timezone": "Europe/Vienna",
        "visibility_timeout": 90,
        "socket_timeout": 7,
        "global_keyprefix": "reports:",
        "broker": redis.url(database),
        "results": redis.url(6),
    }
    others = "reports" if environment in ("a default app", "Django") else "default"
    assert found["current"] == ["reports", others, others], "here, and in another thread"
    assert found["pool_limits"] == [3, 3]
    assert found["modules"] == {name: str(host / f"{name}.py") for name in ("worker", "celeryconfig", "tasks")}
    assert found["loaded"] == []


@pytest.fixture
def start(tmp_path: Path, installed: Path, environ: dict[str, str]) -> Iterator[Callable[..., Child]]:
    """Starts ``celery -A APP worker`` of the environment that has the wheel."""
    with Processes(tmp_path / "running") as running:

        def started(app: str, folder: Path, more: Mapping[str, str]) -> Child:
            name = app.partition(".")[0]
            command = ["sh", "-c", 'cd "$0" && exec "$@"', folder, installed, "-m", "celery", "-A", app, "worker"]
            command += ["--pool", "threads", "--concurrency", 2, "--loglevel", "INFO", "--hostname", f"{name}@courier"]
            child = running.start(
                f"{name}-{folder.name}",
                [*command, "--without-mingle", "--without-gossip"],
                ready=lambda child: f"{name}@courier ready." in child.log,
                environ={**environ, **more},
            )
            child.wait_ready(timeout_s=60)
            return child

        yield started


@pytest.mark.slow
def test_the_applications_worker_enqueues_and_ours_beside_its_modules_does_the_job(
    installed: Path, host: Path, environ: Any, start: Any, redis: Any, sandbox: Any, image_server: Any, tmp_path: Path
) -> None:
    tree = {
        "servers": sandbox.servers(),
        "sources": {"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True},
    }
    config = {"PACS_CONFIG": str(parts.write_settings(tmp_path / "pacs.toml", tree))}
    beside = tmp_path / "beside"  # our worker's package is found first wherever there is no worker.py
    beside.mkdir()
    for name in ("celeryconfig.py", "tasks.py", "settings.py"):
        (beside / name).write_text('raise SystemExit("This is the application\'s")\n', encoding="utf-8")
    pacs = start("worker.app", beside, {**config, "CELERY_CONFIG_MODULE": "celeryconfig"})
    reports = start("worker", host, {})
    url = image_server.put("1.dcm", image(new_uid()))
    program = (
        "import json, sys, tasks, worker; from producer import Courier;"
        "job_id = tasks.fetch.delay(sys.argv[1]).get(timeout=60);"
        "print(json.dumps(Courier().handle(job_id).result(timeout_s=60)))"
    )
    done = run(installed, "-c", program, url, cwd=host, environ=environ)
    assert json.loads(succeeded(done))["status"] == "stored"
    for child in (pacs, reports):
        assert "Traceback" not in child.log
    assert "reports.fetch" in reports.log
    assert "reports.fetch" not in pacs.log
    seen = succeeded(run(installed, "-c", INSPECT, cwd=beside, environ={**environ, **config}))
    assert json.loads(seen) == {"prefetch": 2, "queues": ["pacs", "pacs.admin", "pacs.batches", "pacs.due"]}
    with Redis.from_url(redis.broker_url) as client:
        assert poll(lambda: client.hlen("pacs.unacked") == 0, timeout_s=WAIT_S)


#: How many messages our worker may hold, two threads with one each, and where it takes them from.
INSPECT = """\
import json
from worker.app import app

inspected = app.control.inspect(destination=["worker@courier"], timeout=10)
stats = inspected.stats()["worker@courier"]
queues = sorted(queue["name"] for queue in inspected.active_queues()["worker@courier"])
print(json.dumps({"prefetch": stats["prefetch_count"], "queues": queues}))
"""
