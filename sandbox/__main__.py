"""``python -m sandbox``: both stand-in PACS and their control server in one process. A tool for development.

Only wiring: which port serves what, where the data lies, and how the process ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import pydicom.config
from aiohttp import web

from sandbox import dcm4chee, msdicom
from sandbox.control import Control
from sandbox.faults import Clock, FaultError, Faults, InjectedFault, parse
from sandbox.ohif import Ohif, is_site
from sandbox.tokens import LIFETIME_S, Standing, Tokens, entra, keycloak, refusal
from sandbox.viewer import Viewer
from sandbox.web import FAULT, Listener, Site, door, operation

#: How often deleted files whose time has come are removed.
PURGE_EVERY_S = 5.0

Endpoint = Callable[[web.Request, Tokens, float], Awaitable[web.Response]]


def _latency(_context: click.Context, _parameter: click.Parameter, text: str | None) -> InjectedFault:
    if text is None:
        return InjectedFault()
    try:
        numbers = [float(number) for number in text.split("-")]
        return parse({"latency_ms": numbers if len(numbers) == 2 else numbers[0]})[0]
    except (ValueError, FaultError):
        raise click.BadParameter("give milliseconds, as 100 or 50-300") from None


class Sandbox:
    """The three listeners and what they share."""

    def __init__(self, data: Path, usual: InjectedFault, *, host: str, ohif: Path | None = None) -> None:
        self.faults = Faults(Clock(), usual)
        self.tokens = Tokens(self.faults.clock)
        self.stores = {
            "msdicom": msdicom.open_store(data / "msdicom"),
            "dcm4chee": dcm4chee.open_store(data / "dcm4chee"),
        }
        sites = {name: self._site(name) for name in self.stores}
        applications = {
            name: module.application(sites[name]) for name, module in (("msdicom", msdicom), ("dcm4chee", dcm4chee))
        }
        self.control = Control(self.stores, self.faults, {name: site.load for name, site in sites.items()})
        self.listeners = {name: Listener(application, host=host) for name, application in applications.items()}
        self.listeners["control"] = Listener(self._control_application(ohif), host=host)

    def _site(self, dialect: str) -> Site:
        def authorize(request: web.Request, operation: str, fault: InjectedFault) -> web.Response | None:
            # Health for a load balancer is open; DCM4CHEE's /ctrl and /queue are not.
            if not fault.bearer or operation == "token" or request.path.startswith("/health"):
                return None
            standing = self.tokens.standing(request.headers.get("Authorization"))
            if dialect == "msdicom" and standing is Standing.NO_ROLE and operation in ("store", "delete"):
                return web.Response(status=403)  # a reader
            return refusal(dialect, standing)

        return Site(dialect, self.stores[dialect], self.faults, authorize, self.tokens.issued_at_s)

    def _control_application(self, ohif: Path | None) -> web.Application:
        """The control server, with the viewers and both token endpoints, each under the faults of its dialect."""
        app = self.control.application()
        app.add_routes(Viewer(self.stores, ohif=ohif is not None).routes())
        for dialect, prefix, path, endpoint in (
            ("msdicom", "/entra", "/{tenant}/oauth2/v2.0/token", entra),
            ("dcm4chee", "/keycloak", "/realms/{realm}/protocol/openid-connect/token", keycloak),
        ):
            provider = web.Application(middlewares=[door(self._site(dialect))])
            provider.add_routes([web.post(path, self._issuing(endpoint))])
            app.add_subapp(prefix, provider)
        if ohif is not None:
            Ohif(ohif, lambda: {name: self.listeners[name].origin for name in self.stores}).attach(app)
        return app

    def _issuing(self, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.Response]]:
        @operation("token")
        async def issue(request: web.Request) -> web.Response:
            lifetime_s = request[FAULT].token_lifetime_s
            return await endpoint(request, self.tokens, LIFETIME_S if lifetime_s is None else lifetime_s)

        return issue

    async def start(self, ports: dict[str, int]) -> dict[str, str]:
        """Listen; the three addresses."""
        for name, listener in self.listeners.items():
            await listener.start(ports[name])
        self.control.listeners = {name: self.listeners[name] for name in self.stores}
        return {
            "msdicom": self.listeners["msdicom"].origin + msdicom.BASE_PATH,
            "dcm4chee": self.listeners["dcm4chee"].origin + dcm4chee.BASE_PATH,
            "control": self.listeners["control"].origin,
        }

    async def purge_for_ever(self) -> None:
        while True:
            for store in self.stores.values():
                store.purge(self.faults.clock.now_s())
            await asyncio.sleep(PURGE_EVERY_S)

    async def stop(self) -> None:
        for listener in self.listeners.values():
            await listener.stop()
        for store in self.stores.values():
            store.close()


async def serve(data: Path, ports: dict[str, int], usual: InjectedFault, *, host: str, ohif: Path | None) -> None:
    """Serve until SIGTERM or SIGINT; the one line on standard output says that it is ready."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sandbox = Sandbox(data, usual, host=host, ohif=ohif)
    try:
        addresses = await sandbox.start(ports)
        click.echo(json.dumps(addresses))
        purger = asyncio.create_task(sandbox.purge_for_ever())
        await stop.wait()
        purger.cancel()
    finally:
        await sandbox.stop()


@click.command(help="A laptop-sized MSDICOM and DCM4CHEE with faults on demand. A tool for development, not a PACS.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where both stores live.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind; it has no password.")
@click.option("--msdicom-port", default=0, show_default="a free one")
@click.option("--dcm4chee-port", default=0, show_default="a free one")
@click.option("--control-port", default=0, show_default="a free one")
@click.option("--latency-ms", "usual", callback=_latency, help="Delay of every answer, as 100 or 50-300.")
@click.option("--ohif", type=click.Path(path_type=Path), help="OHIF's built site (`make viewer`), to open studies in.")
def main(  # noqa: PLR0913, PLR0917  # one per option
    data: Path,
    host: str,
    msdicom_port: int,
    dcm4chee_port: int,
    control_port: int,
    usual: InjectedFault,
    ohif: Path | None,
) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # Files with wrong values are the sandbox's daily bread, not worth a line each.
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    if ohif is not None and not is_site(ohif):
        raise click.BadParameter(f"{ohif} holds no index.html", param_hint="--ohif")
    ports = {"msdicom": msdicom_port, "dcm4chee": dcm4chee_port, "control": control_port}
    asyncio.run(serve(data, ports, usual, host=host, ohif=ohif))


if __name__ == "__main__":
    main()
