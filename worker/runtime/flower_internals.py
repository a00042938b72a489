"""The parts of Flower that we extend although its manual does not name them; it has a ceiling.

What its pages show of jobs is not this module's business. ``tests/unit/test_flower_internals.py`` fails when one of the
parts changes. Flower's own templates stay as they are: what we add to them is put in at places that are named here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import flower
from flower import urls
from flower.api.control import TaskRevoke
from flower.utils.tasks import get_task_by_id
from flower.views import BaseHandler
from flower.views.tasks import TaskView
from tornado.routing import URLSpec
from tornado.template import DictLoader
from tornado.web import RequestHandler, url

__all__ = ["FlowerChanged", "Page", "TaskRevoke", "TaskView", "event_of", "extend", "route", "templates"]

#: What stands in front of each change of a template of Flower's, as a regular expression, and what comes behind it.
_CHANGES: Final[Mapping[str, Sequence[tuple[str, str]]]] = {
    "navbar.html": ((r">Broker</a>\s*</li>", '\n        {% include "courier_navbar.html" %}'),),
    "task.html": (
        (r'<dl class="detail-list">', '\n      {% include "courier_task.html" %}'),
        (r'<div class="detail-actions">', '\n      {% include "courier_task_actions.html" %}'),
    ),
    "tasks.html": (
        (
            r'data-task-state="STARTED"[^>]*>Started</button>',
            '\n    <button class="task-state-filter" type="button" data-task-state="WAITING" aria-pressed="false">'
            "Waiting</button>",
        ),
    ),
}
#: Flower's buttons say "Terminate" and "Revoke"; those of our jobs are in ``courier_task_actions.html``.
_REPLACED: Final[Mapping[str, Sequence[tuple[str, str]]]] = {
    "task.html": ((r"\{% if not read_only %\}", "{% if not read_only and not job %}"),),
}
#: What Flower lets pages of other origins read where no login is set up and its API is open.
_CORS: Final = tuple(f"Access-Control-Allow-{name}" for name in ("Origin", "Headers", "Methods"))


class FlowerChanged(RuntimeError):
    """The installed Flower is not one that these pages fit into."""


class Page(BaseHandler):  # type: ignore[misc]  # flower is untyped
    """A page of ours in Flower: with its login, with a token on each form, and in no frame."""

    def set_default_headers(self) -> None:
        super().set_default_headers()
        for name in _CORS:
            self.clear_header(name)
        self.set_header("X-Frame-Options", "DENY")
        self.set_header("Cache-Control", "no-store")

    def check_xsrf_cookie(self) -> None:
        """Flower asks for the token only where OAuth is set up; these pages always do."""
        super().check_xsrf_cookie()
        RequestHandler.check_xsrf_cookie(self)

    @property
    def has_login(self) -> bool:
        """Whether Flower asks for a login at all."""
        options = self.application.options
        return bool(options.basic_auth or options.auth)

    @property
    def is_read_only(self) -> bool:
        return bool(self.application.options.read_only)


def event_of(page: RequestHandler, job_id: str) -> Any:
    """What Flower has heard of a job by events (Celery's `Task`); None if it has heard nothing."""
    return get_task_by_id(page.application.events, job_id)  # type: ignore[attr-defined]


def route(pattern: str, page: type[RequestHandler], *, name: str | None = None, **options: Any) -> URLSpec:
    return url(pattern, page, options, name=name)


def extend(pages: Sequence[URLSpec], instead: Mapping[str, type[RequestHandler]], loader: DictLoader) -> None:
    """Have Flower serve ``pages``, and other classes of ours for some of its own addresses, by their patterns."""
    urls.settings["template_loader"] = loader
    urls.settings["xsrf_cookie_kwargs"] = {"samesite": "Lax"}
    known = {_pattern(page) for page in pages}
    own = [one for one in urls.handlers if _pattern(one) not in known]
    if missing := sorted(set(instead) - {_pattern(one) for one in own}):
        raise FlowerChanged(f"Flower {flower.__version__} has no address {missing[0]}; {_REMEDY}")
    own = [_replaced(one, instead) for one in own]
    urls.handlers[:] = [*own[:-1], *pages, own[-1]]  # the last one answers whatever is left


def _pattern(handler: Any) -> str:
    text = handler.regex.pattern if isinstance(handler, URLSpec) else handler[0]
    return str(text).removesuffix("$")


def _replaced(handler: Any, instead: Mapping[str, type[RequestHandler]]) -> Any:
    page = instead.get(_pattern(handler))
    if page is None:
        return handler
    name = handler.name if isinstance(handler, URLSpec) else None
    return url(_pattern(handler), page, name=name)


_REMEDY: Final = "install one that pyproject.toml names (flower>=2.2,<2.3)"


def templates(folder: Path) -> DictLoader:
    """Flower's templates with our additions, and those in ``folder``."""
    found = _read(Path(urls.settings["template_path"]))
    for name, changes in _CHANGES.items():
        for before, added in changes:
            found[name] = _changed(name, found[name], before, added)
    for name, changes in _REPLACED.items():
        for before, other in changes:
            found[name] = _changed(name, found[name], before, other, keeps=False)
    return DictLoader({**found, **_read(folder)})


def _changed(name: str, text: str, place: str, added: str, *, keeps: bool = True) -> str:
    """A template with ``added`` behind the first ``place``, or in its stead."""
    found = re.search(place, text)
    if found is None:
        raise FlowerChanged(f"{name} of Flower {flower.__version__} is not as expected; {_REMEDY}")
    return text[: found.end() if keeps else found.start()] + added + text[found.end() :]


def _read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}
