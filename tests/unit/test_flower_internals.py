"""The parts of Flower that its manual does not name are what ``worker/runtime/flower_internals.py`` takes them for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import flower.app
import flower.command
import pytest
from celery.events.state import State
from flower import urls
from flower.api import control
from flower.options import options
from flower.utils import template
from flower.views import BaseHandler
from flower.views.tasks import TasksDataTable, TaskView
from tornado.template import DictLoader
from tornado.web import RequestHandler

import worker.flower.pages
from worker.flower import pages
from worker.runtime import flower_internals
from worker.runtime.flower_internals import FlowerChanged, Page, extend, route, templates

OWN = Path(worker.flower.pages.__file__).with_name("templates")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "handlers", list(urls.handlers))
    monkeypatch.setattr(urls, "settings", dict(urls.settings))


def patterns() -> list[str]:
    return [flower_internals._pattern(handler) for handler in urls.handlers]


def test_extend_depends_on_flowers_lists_and_on_its_last_address_answering_whatever_is_left() -> None:
    assert flower.app.default_handlers is not None
    assert "settings" in vars(flower.command)
    assert flower_internals._pattern(urls.handlers[-1]) == ".*"
    source = inspect.getsource(flower.app.Flower.__init__)
    assert "handlers = default_handlers" in source
    assert "**settings" in inspect.getsource(flower.command.flower.callback)
    assert "template_loader" in inspect.getsource(RequestHandler.create_template_loader)
    assert "xsrf_cookie_kwargs" in inspect.getsource(RequestHandler.xsrf_token.fget)  # type: ignore[attr-defined]


def test_pages_are_added_once_before_the_last_address_and_some_of_flowers_own_are_replaced() -> None:
    pages.add()
    pages.add()
    found = patterns()
    assert found[-1] == ".*"
    assert all(found.count(own) == 1 for own in ("/pacs", "/batches", "/dead-letters", "/task/(.+)"))
    names = [getattr(handler, "name", None) for handler in urls.handlers]
    assert {"pacs", "batches", "batch_report", "dead_letters", "courier_static", "task"} <= set(names)
    classes = {flower_internals._pattern(one): getattr(one, "handler_class", None) for one in urls.handlers}
    assert classes["/task/(.+)"].__name__ == "JobPage"
    assert classes["/api/task/revoke/(.+)"].__name__ == "CancelJob"


def test_an_address_that_this_flower_does_not_have_is_said() -> None:
    with pytest.raises(FlowerChanged, match="no address /job"):
        extend([], {"/job": Page}, DictLoader({}))


def test_the_addresses_behind_a_prefix_keep_their_names_and_options() -> None:
    moved = flower.app.rewrite_handler(route("/courier/(.*)", Page, name="x", path="/y"), "a/b")
    assert (moved.regex.pattern, moved.name, moved.kwargs) == ("/a/b/courier/(.*)$", "x", {"path": "/y"})


def test_templates_depends_on_the_places_in_flowers_own_that_our_parts_are_put_in() -> None:
    loader = templates(OWN)
    texts: dict[str, str] = loader.dict
    assert 'include "courier_navbar.html"' in texts["navbar.html"].split(">Broker</a>")[1][:80]
    assert texts["task.html"].count("courier_task") == 2
    assert 'data-task-state="WAITING"' in texts["tasks.html"]
    assert texts["base.html"] == (Path(urls.settings["template_path"]) / "base.html").read_text()
    for name in texts:
        loader.load(name)


@pytest.mark.parametrize("name", ["navbar.html", "task.html", "tasks.html"])
def test_a_template_of_flower_without_such_a_place_is_said_at_the_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in Path(urls.settings["template_path"]).glob("*.html"):
        (tmp_path / path.name).write_text("changed" if path.name == name else path.read_text())
    monkeypatch.setitem(urls.settings, "template_path", str(tmp_path))
    with pytest.raises(FlowerChanged, match=name):
        templates(OWN)


def test_page_depends_on_these_methods_and_on_flower_asking_for_a_token_with_oauth_alone() -> None:
    assert issubclass(BaseHandler, RequestHandler)
    source = inspect.getsource(BaseHandler.check_xsrf_cookie)
    assert "if not options.auth:\n            return" in source
    assert "Access-Control-Allow-Origin" in inspect.getsource(BaseHandler.set_default_headers)
    assert all(name in vars(BaseHandler) for name in ("render", "get_current_user", "unauthenticated_api"))
    assert {"basic_auth", "auth", "read_only", "url_prefix", "format_task", "tasks_columns", "conf"} <= set(options)


def test_our_templates_depend_on_these_functions_of_flower() -> None:
    assert template.format_value(None) == '<span class="value-missing">&mdash;</span>'
    assert template.format_value("<b>") == "&lt;b&gt;"


def test_job_page_and_cancel_job_depend_on_what_flower_calls_and_says() -> None:
    assert list(inspect.signature(TaskView.get).parameters) == ["self", "task_id"]
    assert list(inspect.signature(control.TaskRevoke.post).parameters) == ["self", "taskid"]
    assert issubclass(control.TaskRevoke, BaseHandler)
    assert "copy.copy(args)" in inspect.getsource(TasksDataTable.format_task), "a row is changed in a copy"


def test_the_button_of_ours_depends_on_the_script_that_sends_flowers_revoke() -> None:
    script = (Path(urls.settings["static_path"]) / "js" / "flower.js").read_text()
    assert "$('#task-revoke').on('click'" in script
    assert "'/api/task/revoke/' + taskid" in script
    assert "setRequestHeader('X-XSRFToken'" in script


def test_event_of_depends_on_where_flower_keeps_tasks() -> None:
    state = State()
    state.event({"type": "task-sent", "uuid": "j1", "hostname": "h", "clock": 1, "timestamp": 1, "local_received": 1})

    class Application:
        events = type("Events", (), {"state": state})

    class Asked:
        application = Application

    page: Any = Asked()
    assert flower_internals.event_of(page, "j1").uuid == "j1"
    assert flower_internals.event_of(page, "j2") is None
