"""The control server: sets faults, moves the clock, empties the stores, and bears the viewer's pages.

It decides nothing about DICOM; it is never in the way of a request to a dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from json import JSONDecodeError
from typing import Any

from aiohttp import web

from sandbox.faults import FaultError, Faults, parse
from sandbox.store import Store
from sandbox.web import Listener, RequestLoad

_ABOUT = """<!doctype html><title>PACS Courier sandbox</title><h1>PACS Courier sandbox</h1>
<p>A tool for development: two stand-in PACS servers with faults on demand. Not for patients' images.</p>
<ul><li>GET, DELETE /faults; PUT /faults/{dialect}/{operation}</li><li>GET, PUT /clock</li><li>POST /reset</li>
<li>GET, DELETE /load</li><li>GET /healthz</li><li>/viewer/{dialect}?StudyInstanceUIDs=UID</li></ul>"""


class Control:
    """The handlers of the control server; ``listeners`` are filled in once the dialects listen."""

    def __init__(self, stores: Mapping[str, Store], faults: Faults, loads: Mapping[str, RequestLoad]) -> None:
        self._stores = stores
        self._loads = loads
        self._faults = faults
        self.listeners: dict[str, Listener] = {}

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/", self._about),
                web.get("/healthz", self._healthz),
                *self._faults_at("/faults"),
                *self._faults_at("/moods"),  # as version 0.1 named them
                web.get("/clock", self._get_clock),
                web.put("/clock", self._put_clock),
                web.post("/reset", self._reset),
                web.get("/load", self._get_load),
                web.delete("/load", self._forget_load),
            ]
        )
        return app

    def _faults_at(self, path: str) -> list[web.RouteDef]:
        return [
            web.get(path, self._get_faults),
            web.delete(path, self._clear_faults),
            web.put(f"{path}/{{dialect}}/{{operation}}", self._put_fault),
        ]

    async def _about(self, _request: web.Request) -> web.Response:
        return web.Response(text=_ABOUT, content_type="text/html")

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "purpose": "development only"})

    async def _get_faults(self, _request: web.Request) -> web.Response:
        return web.json_response(self._faults.as_json())

    async def _clear_faults(self, _request: web.Request) -> web.Response:
        self._faults.clear()
        await self._open_and_close()
        return web.json_response(self._faults.as_json())

    async def _put_fault(self, request: web.Request) -> web.Response:
        try:
            fault, times = parse(await _object(request))
            self._faults.put(request.match_info["dialect"], request.match_info["operation"], fault, times)
        except FaultError as error:
            return web.json_response({"error": str(error)}, status=400)
        await self._open_and_close()
        return web.json_response(self._faults.as_json())

    async def _open_and_close(self) -> None:
        """A server that refuses everything does not even listen."""
        for dialect, listener in self.listeners.items():
            if self._faults.refuses_all(dialect):
                await listener.close()
            else:
                await listener.open()

    async def _get_clock(self, _request: web.Request) -> web.Response:
        clock = self._faults.clock
        return web.json_response({"now_s": clock.now_s(), "ahead_s": clock.ahead_s})

    async def _put_clock(self, request: web.Request) -> web.Response:
        """``{"advance_s": 60}`` moves it on, ``{"ahead_s": 0}`` sets it."""
        try:
            order = await _object(request)
            clock = self._faults.clock
            clock.ahead_s = float(order.get("ahead_s", clock.ahead_s)) + float(order.get("advance_s", 0))
        except (FaultError, TypeError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return await self._get_clock(request)

    async def _get_load(self, _request: web.Request) -> web.Response:
        return web.json_response({dialect: asdict(load) for dialect, load in self._loads.items()})

    async def _forget_load(self, request: web.Request) -> web.Response:
        for load in self._loads.values():
            load.begin_anew()
        return await self._get_load(request)

    async def _reset(self, _request: web.Request) -> web.Response:
        for store in self._stores.values():
            store.reset()
        self._faults.clock.ahead_s = 0.0
        return web.json_response({dialect: 0 for dialect in self._stores})


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        order = await request.json()
    except JSONDecodeError as error:
        raise FaultError(f"the body is not JSON: {error}") from None
    if not isinstance(order, dict):
        raise FaultError("the body must be a JSON object")
    return order
