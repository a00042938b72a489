"""The DCM4CHEE dialect: dcm4chee-arc-light as its sources describe it, default configuration.

Only the map of URLs and the door that turns refusals into answers; each service has a room of its own beside this one.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web

from sandbox.dcm4chee import admin, frames, iocm, qido, stow, wado
from sandbox.dcm4chee.archive import ArchiveState, Refusal, Service
from sandbox.store import Store, first_wins
from sandbox.web import Handler, Site, Streamed, door, operation

BASE_PATH = "/dcm4chee-arc/aets/DCM4CHEE/rs"
_CONTEXT = "/dcm4chee-arc"
#: Far more often than the archive's five minutes, so that they are soon done when the sandbox's clock is moved.
SCHEDULERS_EVERY_S = 0.5
_RS = _CONTEXT + "/aets/{aet}/rs"
_STUDY = _RS + "/studies/{study}"
_SERIES = _STUDY + "/series/{series}"
_INSTANCE = _SERIES + "/instances/{instance}"

_ROUTES: list[tuple[str, str, Service]] = [
    ("POST", _RS + "/studies", stow.stow),
    ("POST", _STUDY, stow.stow),
    *[
        ("GET", path + suffix, service)
        for path in (
            _RS + "/studies",
            _RS + "/series",
            _RS + "/instances",
            _STUDY + "/series",
            _STUDY + "/instances",
            _SERIES + "/instances",
        )
        for suffix, service in (("", qido.search), ("/count", qido.count))
    ],
    ("GET", _RS + "/studies/size", qido.size),
    *[
        ("GET", path + suffix, service)
        for path in (_STUDY, _SERIES, _INSTANCE)
        for suffix, service in (("", wado.retrieve), ("/metadata", wado.metadata))
    ],
    ("GET", _INSTANCE + "/frames/{frames}", frames.frames),
    ("GET", _INSTANCE + "/bulkdata/{path:.+}", frames.bulk_data),
    *[
        ("GET", path + suffix, frames.rendered)
        for path in (_INSTANCE, _INSTANCE + "/frames/{frame:[1-9][0-9]*}")
        for suffix in ("/rendered", "/thumbnail")
    ],
    *[("POST", path + "/reject/{code}", iocm.reject) for path in (_STUDY, _SERIES, _INSTANCE)],
    ("DELETE", _STUDY, iocm.delete_study),
    ("DELETE", _CONTEXT + "/reject/{code}", iocm.delete_rejected),
    ("GET", _CONTEXT + "/reject", admin.rejection_codes),
    ("GET", _CONTEXT + "/ctrl/status", admin.status),
    ("POST", _CONTEXT + "/ctrl/{verb:start|stop|reload}", admin.control),
    ("GET", _CONTEXT + "/monitor/serverTime", admin.server_time),
    ("GET", _CONTEXT + "/monitor/serverTimeZone", admin.time_zone),
    ("GET", _CONTEXT + "/monitor/associations", admin.associations),
    ("GET", _CONTEXT + "/storage", admin.storage),
    ("GET", _CONTEXT + "/queue", admin.queues),
    ("GET", _CONTEXT + "/queue/{queue}", admin.tasks),
    ("GET", _CONTEXT + "/queue/{queue}/count", admin.count_tasks),
    ("GET", _CONTEXT + "/metrics", admin.metrics),
    ("GET", _CONTEXT + "/metrics/{name}", admin.metric),
    ("GET", _CONTEXT + "/aets", admin.application_entities),
    ("GET", _CONTEXT + "/webapps", admin.web_applications),
    ("GET", _CONTEXT + "/devices", admin.devices),
    ("GET", _CONTEXT + "/devicename", admin.device_name),
    ("GET", _CONTEXT + "/export", admin.exporters),
    # The management interface has a port of its own (9990) on the real server.
    ("GET", "/health", admin.wildfly_health),
    ("GET", "/health/{which:live|ready|started}", admin.wildfly_health),
]


def open_store(folder: Path) -> Store:
    """Patient, study and series attributes are those of the first instance (update policy SUPPLEMENT)."""
    return Store(folder, fold=_fold, merge=first_wins)


def _fold(tag: str, text: str) -> str:
    """Names in capitals, for queries in capitals; everything else as written."""
    text = text.strip()
    return text.upper() if tag in qido.NAMES else text


def application(site: Site) -> web.Application:
    archive = ArchiveState(site)
    app = web.Application(middlewares=[_no_raw_caret, door(site), _cors, _gzip], client_max_size=0)
    # Fixed paths come before those with a placeholder in the same place: /studies/count is no study.
    app.cleanup_ctx.append(_schedulers(archive))
    for method, path, service in sorted(_ROUTES, key=lambda route: ("{study}" in route[1], route[1].count("{"))):
        app.router.add_route(method, path, _handler(archive, service))
    return app


def _schedulers(archive: ArchiveState) -> Callable[[web.Application], AsyncIterator[None]]:
    async def run(_app: web.Application) -> AsyncIterator[None]:
        async def for_ever() -> None:
            while True:
                iocm.run_schedulers(archive)
                await asyncio.sleep(SCHEDULERS_EVERY_S)

        task = asyncio.create_task(for_ever())
        yield
        task.cancel()

    return run


def _handler(archive: ArchiveState, service: Service) -> Handler:
    @operation(getattr(service, "operation"))  # noqa: B009  # a function's own attribute
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await service(archive, request)
        except Refusal as refusal:
            return refusal.response

    return handle


@web.middleware
async def _no_raw_caret(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Undertow refuses a request line with characters that a URL cannot have, before any application code."""
    if set('^"<>\\`{|}') & set(request.raw_path):
        return web.Response(status=400)
    return await handler(request)


@web.middleware
async def _gzip(request: web.Request, handler: Handler) -> web.StreamResponse:
    """WildFly's filter: lists and metadata are compressed for whoever accepts that."""
    response = await handler(request)
    ends = request.path.endswith(("/studies", "/series", "/instances", "/metadata"))
    if not ends or request.method != "GET" or "gzip" not in request.headers.get("Accept-Encoding", ""):
        return response
    if isinstance(response, Streamed):
        response.chunks = _compressed(response.chunks)
    elif isinstance(response, web.Response) and isinstance(response.body, bytes) and response.body:
        response.body = gzip.compress(response.body, compresslevel=1)
    else:
        return response
    response.headers["Content-Encoding"] = "gzip"
    return response


async def _compressed(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    packer = zlib.compressobj(level=1, wbits=31)
    async for chunk in chunks:
        yield packer.compress(chunk) + packer.flush(zlib.Z_SYNC_FLUSH)
    yield packer.flush()


@web.middleware
async def _cors(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    response.headers["Access-Control-Allow-Origin"] = request.headers.get("Origin", "*")
    response.headers["Access-Control-Allow-Credentials"] = "true"
    return response
