"""Viewer links: one template per server, filled with UIDs. No HTTP."""

from __future__ import annotations

from urllib.parse import quote

from courier.settings import ServerSettings


def viewer_url(server: ServerSettings, *, study: str, series: str = "", image: str = "") -> str:
    """The server's ``viewer`` template with ``{study}``, ``{series}`` and ``{image}`` filled; "" without one."""
    filled = server.viewer
    for name, uid in (("study", study), ("series", series), ("image", image)):
        filled = filled.replace(f"{{{name}}}", quote(uid, safe=""))
    return filled
