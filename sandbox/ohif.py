"""OHIF beside the sandbox: its built site, configured for both dialects, and both dialects under the site's origin.

The site comes from the npm package ``@ohif/app`` (``make viewer``); nothing of it is kept here. DICOMweb is passed
through under the paths it has on the dialects' own ports, so that every URL in an answer is right here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlencode

from aiohttp import ClientError, ClientSession, ClientTimeout, web
from multidict import CIMultiDict

BASE = "/ohif"
_SOURCES = {
    "msdicom": ("MSDICOM (sandbox)", "/v2"),
    "dcm4chee": ("DCM4CHEE (sandbox)", "/dcm4chee-arc/aets/DCM4CHEE/rs"),
}
#: First step of a path that belongs to a dialect.
_PREFIXES = {"v1": "msdicom", "v2": "msdicom", "dcm4chee-arc": "dcm4chee"}
_HOP_BY_HOP = ("Connection", "Keep-Alive", "Transfer-Encoding", "TE", "Trailer", "Upgrade")


def is_site(folder: Path) -> bool:
    return (folder / "index.html").is_file()


def link(dialect: str, study_instance_uids: str) -> str:
    """Where OHIF shows studies of a dialect, on the control server."""
    return f"{BASE}/viewer/{dialect}?{urlencode({'StudyInstanceUIDs': study_instance_uids})}"


class Ohif:
    """The handlers; ``origins`` tells each dialect's origin once it listens."""

    def __init__(self, site: Path, origins: Callable[[], Mapping[str, str]]) -> None:
        self._site = site.resolve()
        self._origins = origins
        self._client: ClientSession | None = None

    def attach(self, app: web.Application) -> None:
        """Add everything to the control server; the site's files come last, after all other routes."""
        app.cleanup_ctx.append(self._session)
        app.router.add_get("/app-config.js", self._config)
        app.router.add_get(BASE + "{path:(/.*)?}", self._page)
        app.router.add_route("*", f"/{{prefix:{'|'.join(_PREFIXES)}}}/{{rest:.*}}", self._pass_on)
        app.router.add_get("/{path:.+}", self._file)

    async def _session(self, _app: web.Application):  # type: ignore[no-untyped-def]  # aiohttp's own kind of generator
        self._client = ClientSession(auto_decompress=False, timeout=ClientTimeout(total=None))
        yield
        await self._client.close()

    async def _config(self, _request: web.Request) -> web.Response:
        text = f"window.config = {json.dumps(configuration(), indent=1)};"
        return web.Response(text=text, content_type="application/javascript")

    async def _page(self, _request: web.Request) -> web.FileResponse:
        """One page for every address: the site finds its own way."""
        return web.FileResponse(self._site / "index.html")

    async def _file(self, request: web.Request) -> web.FileResponse:
        path = (self._site / request.match_info["path"]).resolve()
        if not path.is_relative_to(self._site) or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        """A request to a dialect and its answer, as they are, in a stream."""
        assert self._client is not None
        url = self._origins()[_PREFIXES[request.match_info["prefix"]]] + request.raw_path
        headers = _without_hops(request.headers)
        try:
            async with self._client.request(
                request.method, url, headers=headers, data=request.content if request.can_read_body else None
            ) as answer:
                response = web.StreamResponse(status=answer.status, headers=_without_hops(answer.headers))
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except ClientError as error:
            raise web.HTTPBadGateway(text=f"The sandbox's own server did not answer: {error}") from error


def _without_hops(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in _HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def configuration() -> dict[str, object]:
    """OHIF's ``window.config``: one data source per dialect."""
    return {
        "routerBasename": BASE,
        "extensions": [],
        "modes": [],
        "customizationService": {},
        "showStudyList": True,
        "maxNumberOfWebWorkers": 2,
        "showWarningMessageForCrossOrigin": False,
        "showCPUFallbackMessage": True,
        "showLoadingIndicator": True,
        "strictZSpacingForVolumeViewport": True,
        "groupEnabledModesFirst": True,
        "maxNumRequests": {"interaction": 20, "thumbnail": 10, "prefetch": 10},
        "defaultDataSourceName": "msdicom",
        "dataSources": [_source(dialect, *of) for dialect, of in _SOURCES.items()],
    }


def _source(dialect: str, name: str, root: str) -> dict[str, object]:
    return {
        "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
        "sourceName": dialect,
        "configuration": {
            "friendlyName": name,
            "name": dialect,
            "wadoUriRoot": root,
            "qidoRoot": root,
            "wadoRoot": root,
            "qidoSupportsIncludeField": dialect == "dcm4chee",
            "imageRendering": "wadors",
            "thumbnailRendering": "wadors",
            "enableStudyLazyLoad": True,
            "supportsFuzzyMatching": False,
            "supportsWildcard": dialect == "dcm4chee",
            "staticWado": False,
            "omitQuotationForMultipartRequest": False,
            "bulkDataURI": {"enabled": False},
        },
    }
