"""The DCM4CHEE dialect. Placeholder: only the wiring that ``__main__`` needs."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from sandbox.store import Store, first_wins
from sandbox.web import Site, door

BASE_PATH = "/dcm4chee-arc/aets/DCM4CHEE/rs"


def open_store(folder: Path) -> Store:
    return Store(folder, merge=first_wins)


def application(site: Site) -> web.Application:
    return web.Application(middlewares=[door(site)])
