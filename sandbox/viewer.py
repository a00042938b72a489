"""The sandbox's own viewer: a page that shows a study's images, rendered from their pixels, and its attributes.

For a developer's eyes on a loopback port; not for diagnosis, and says so. Pictures come from ``pictures.py``.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from urllib.parse import quote

from aiohttp import web
from pydicom import Dataset, dcmread
from pydicom.datadict import keyword_for_tag
from pydicom.uid import UID

from sandbox import ohif, pictures
from sandbox.dcm4chee.aets import APPLICATION_ENTITIES
from sandbox.store import Attributes, Condition, InstanceRow, SearchHit, Store, first_value

#: What a client of each dialect sees: neither what is hidden nor what is not complete yet.
VIEWS = {"msdicom": "pending_until_s IS NULL", "dcm4chee": APPLICATION_ENTITIES["DCM4CHEE"].view}
NAMES = {"msdicom": "MSDICOM", "dcm4chee": "DCM4CHEE"}
#: A page shows so many images of a series and so many frames of an image, and says how many there are.
IMAGES_SHOWN = 60
FRAMES_SHOWN = 6
THUMBNAIL_PIXELS = 320
LARGE_PIXELS = 1400
_STUDY_FACTS = "00100010 00100020 00100030 00100040 00080020 00080030 00081030 00080050 00080090 00200010 0020000D"

_STYLE = """
:root { color-scheme: dark; --ink: #e8edf2; --quiet: #93a1b0; --line: #2a333d; --card: #161c23; --accent: #6cc4ff; }
* { box-sizing: border-box; }
body { margin: 0; background: #0d1116; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
a { color: var(--accent); text-decoration: none; }
header { padding: 1.4rem 2rem 1.2rem; border-bottom: 1px solid var(--line); background: #11161c; }
h1 { margin: .5rem 0 .1rem; font-size: 1.5rem; font-weight: 600; }
h2 { margin: 0; font-size: 1.05rem; font-weight: 600; }
.label { display: inline-block; padding: .1rem .6rem; border-radius: 99px; font-size: .78rem; background: #3b2f12;
  color: #ffd479; } .server { background: #12304a; color: var(--accent); margin-right: .4rem; }
.quiet { color: var(--quiet); font-size: .86rem; overflow-wrap: anywhere; }
main { padding: 1.4rem 2rem 3rem; max-width: 100rem; margin: auto; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .7rem 1.5rem; margin: 1rem 0 0; }
dt { color: var(--quiet); font-size: .76rem; } dd { margin: 0; overflow-wrap: anywhere; }
section { margin: 0 0 2rem; padding: 1.1rem 1.2rem 1.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: 1rem; margin-top: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 9px; overflow: hidden; background: #0a0d11; }
figure:hover { border-color: var(--accent); }
.frame { display: grid; place-items: center; height: 13.5rem; background: #000; }
.frame img { max-width: 100%; max-height: 13.5rem; width: 100%; height: 100%; object-fit: contain; display: block; }
.frame.none { padding: 1.2rem; text-align: center; color: var(--quiet); font-size: .9rem;
  background: repeating-linear-gradient(135deg, #12171d 0 12px, #151b22 12px 24px); }
figcaption { padding: .5rem .7rem .6rem; font-size: .82rem; } figcaption b { color: var(--ink); font-weight: 600; }
.large { display: flex; flex-wrap: wrap; gap: 1rem; }
.large img { width: min(100%, 36rem); background: #000; border-radius: 9px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; margin-top: 1rem; }
td { padding: .22rem .8rem .22rem 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { font-family: ui-monospace, monospace; white-space: nowrap; color: var(--quiet); }
td:nth-child(2) { color: var(--quiet); } td:last-child { width: 55%; }
"""


class Viewer:
    """The pages and pictures of both stores."""

    def __init__(self, stores: Mapping[str, Store], *, ohif: bool = False) -> None:
        self._stores = stores
        self._ohif = ohif

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/viewer/{dialect}", self.open),
            web.get("/viewer/{dialect}/study", self.study_page),
            web.get("/viewer/{dialect}/instances/{key:[0-9]+}", self.instance_page),
            web.get("/viewer/{dialect}/instances/{key:[0-9]+}/{frame:[0-9]+}.png", self.picture),
        ]

    async def open(self, request: web.Request) -> web.Response:
        """A viewer link: to OHIF where that is served, else to the page here."""
        dialect, _store = self._store(request)
        if not self._ohif:
            return await self.study_page(request)
        raise web.HTTPFound(ohif.link(dialect, ",".join(request.query.getall("StudyInstanceUIDs", []))))

    async def study_page(self, request: web.Request) -> web.Response:
        """``?StudyInstanceUIDs=UID[,UID…]``, as OHIF has it."""
        dialect, store = self._store(request)
        uids = [uid for given in request.query.getall("StudyInstanceUIDs", []) for uid in given.split(",") if uid]
        if not uids:
            return _page(_heading(dialect, "No study was named", "Add ?StudyInstanceUIDs=UID to the address."), 400)
        found = [study for uid in uids for study in store.search("study", [_is_study(uid)], view=VIEWS[dialect])]
        if not found:
            return _page(_heading(dialect, "Not on this server", f"There is no study {', '.join(uids)} here."), 404)
        return _page("".join(_study(dialect, store, study) for study in found))

    async def instance_page(self, request: web.Request) -> web.Response:
        """One image, large, and every attribute of it."""
        dialect, row = self._row(request)
        ds = await asyncio.to_thread(dcmread, row.path, stop_before_pixels=True, defer_size=4096)
        back = f"/viewer/{dialect}/study?StudyInstanceUIDs={quote(row.study_instance_uid)}"
        title = f"{UID(row.sop_class_uid).name}"
        heading = _heading(dialect, title, row.sop_instance_uid, f'<a href="{back}">← the whole study</a>')
        problem = _why_no_picture(row)
        numbers = range(1, min(_frame_count(row), FRAMES_SHOWN) + 1)
        images = _none(problem) if problem else "".join(_large(dialect, row, number) for number in numbers)
        table = "".join(_lines(ds))
        meta = "".join(_lines(ds.file_meta))
        return _page(
            f'{heading}<main><section><div class="large">{images}</div></section>'
            f"<section><h2>Attributes</h2><table>{meta}{table}</table></section></main>"
        )

    async def picture(self, request: web.Request) -> web.Response:
        """A frame as PNG; where it cannot be rendered, a drawing that says so."""
        _dialect, row = self._row(request)
        edge = min(int(request.query.get("edge", THUMBNAIL_PIXELS)), LARGE_PIXELS)
        try:
            content = await asyncio.to_thread(_png, row, int(request.match_info["frame"]), edge)
        except pictures.NoPicture as error:
            return web.Response(text=_drawing(str(error)), content_type="image/svg+xml")
        return web.Response(body=content, content_type="image/png", headers={"Cache-Control": "max-age=60"})

    def _store(self, request: web.Request) -> tuple[str, Store]:
        dialect = request.match_info["dialect"]
        if dialect not in self._stores:
            raise web.HTTPNotFound(text=f"There is no server {dialect}; there are {', '.join(self._stores)}.")
        return dialect, self._stores[dialect]

    def _row(self, request: web.Request) -> tuple[str, InstanceRow]:
        dialect, store = self._store(request)
        rows = store.instances(view=f"key = {int(request.match_info['key'])} AND ({VIEWS[dialect]})")
        if not rows:
            raise web.HTTPNotFound(text="This image is not on this server, or is hidden.")
        return dialect, rows[0]


def _large(dialect: str, row: InstanceRow, frame: int) -> str:
    source = f"/viewer/{dialect}/instances/{row.key}/{frame}.png?edge={LARGE_PIXELS}"
    return f'<img src="{source}" alt="frame {frame}">'


def _is_study(study_instance_uid: str) -> Condition:
    return Condition("study_instance_uid", "=", study_instance_uid)


def _png(row: InstanceRow, frame: int, edge: int) -> bytes:
    content = io.BytesIO()
    pictures.render(row.path, frame=frame, longest_edge=edge).save(content, "PNG")
    return content.getvalue()


# -- the study's page -------------------------------------------------------------------------------------------------


def _study(dialect: str, store: Store, study: SearchHit) -> str:
    tally = store.tally(study.study_instance_uid, view=VIEWS[dialect])
    counts = (
        f"{_count(tally.instances, 'object')} in {_count(tally.series, 'series', 'series')} · {_size(tally.size_bytes)}"
    )
    name = first_value(study.study.get("00100010")) or "No name"
    facts = "".join(_fact(tag, study.study) for tag in _STUDY_FACTS.split())
    below = [_is_study(study.study_instance_uid)]
    series = store.search("series", below, view=VIEWS[dialect], ascending=True)
    return (
        _heading(dialect, name.replace("^", " "), counts, f"<dl>{facts}</dl>")
        + f"<main>{''.join(_series(dialect, store, one) for one in series)}</main>"
    )


def _fact(tag: str, attributes: Attributes) -> str:
    value = first_value(attributes.get(tag))
    return f"<div><dt>{keyword_for_tag(tag)}</dt><dd>{escape(value)}</dd></div>" if value else ""


def _series(dialect: str, store: Store, series: SearchHit) -> str:
    rows = store.instances(
        study_instance_uid=series.study_instance_uid,
        series_instance_uid=series.series_instance_uid,
        view=VIEWS[dialect],
    )
    rows.sort(key=_instance_number)
    modality = first_value(series.series.get("00080060")) or "?"
    description = first_value(series.series.get("0008103E")) or "no description"
    more = f", the first {IMAGES_SHOWN} shown" if len(rows) > IMAGES_SHOWN else ""
    tiles = "".join(_tiles(dialect, rows[:IMAGES_SHOWN]))
    return (
        f"<section><h2>{escape(modality)} · {escape(description)}</h2>"
        f'<div class="quiet">{_count(len(rows), "object")}{more} · {escape(series.series_instance_uid or "")}</div>'
        f'<div class="grid">{tiles}</div></section>'
    )


def _instance_number(row: InstanceRow) -> tuple[int, int]:
    text = first_value(row.attributes.get("00200013")) or ""
    return (int(text) if text.lstrip("-").isdigit() else 1 << 31, row.key)


def _tiles(dialect: str, rows: Iterable[InstanceRow]) -> Iterator[str]:
    for row in rows:
        problem = _why_no_picture(row)
        frames = _frame_count(row)
        page = f"/viewer/{dialect}/instances/{row.key}"
        for number in range(1, 2 if problem else min(frames, FRAMES_SHOWN) + 1):
            picture = (
                _none(problem)
                if problem
                else f'<div class="frame"><img loading="lazy" src="{page}/{number}.png" alt="frame {number}"></div>'
            )
            caption = _caption(row, number, frames)
            yield f'<figure><a href="{page}">{picture}</a><figcaption>{caption}</figcaption></figure>'


def _caption(row: InstanceRow, frame: int, frames: int) -> str:
    number = first_value(row.attributes.get("00200013")) or "–"
    which = f" · frame {frame} of {frames}" if frames > 1 else ""
    columns, rows = (first_value(row.attributes.get(tag)) for tag in ("00280011", "00280010"))
    edges = f" · {columns} × {rows}" if columns else ""
    return (
        f"<b>No. {escape(number)}</b>{which}{edges}"
        f'<div class="quiet">{escape(UID(row.transfer_syntax_uid).name)} · {_size(row.size_bytes)}</div>'
    )


def _frame_count(row: InstanceRow) -> int:
    text = first_value(row.attributes.get("00280008")) or "1"
    return max(int(text), 1) if text.isdigit() else 1


def _why_no_picture(row: InstanceRow) -> str | None:
    """What a tile says instead of showing a picture; None when there is one."""
    if not row.attributes.get("00280010", {}).get("Value"):
        return f"{UID(row.sop_class_uid).name} has no pixels."
    if not pictures.can_decode(row.transfer_syntax_uid):
        return f"There is no decoder here for {UID(row.transfer_syntax_uid).name}."
    return None


def _none(problem: str) -> str:
    return f'<div class="frame none">{escape(problem)}</div>'


# -- pieces -----------------------------------------------------------------------------------------------------------


def _heading(dialect: str, title: str, below: str, more: str = "") -> str:
    return (
        f'<header><span class="label server">{NAMES.get(dialect, dialect)} (sandbox)</span>'
        '<span class="label">a tool for development, not for diagnosis</span>'
        f'<h1>{escape(title)}</h1><div class="quiet">{escape(below)}</div>{more}</header>'
    )


def _page(content: str, status: int = 200) -> web.Response:
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>PACS Courier sandbox</title><style>{_STYLE}</style><body>{content}</body></html>"
    )
    return web.Response(text=text, content_type="text/html", status=status)


def _lines(ds: Dataset, depth: int = 0) -> Iterator[str]:
    indent = "&gt;" * depth
    for element in ds:
        value = f"{len(element.value)} item(s)" if element.VR == "SQ" else element.repval.strip("'")
        yield (
            f"<tr><td>{indent}{escape(str(element.tag))}</td><td>{element.VR}</td><td>{escape(element.name)}</td>"
            f"<td>{escape(value[:400])}</td></tr>"
        )
        if element.VR == "SQ":
            for item in element.value:
                yield from _lines(item, depth + 1)


def _drawing(sentence: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 320"><rect width="320" height="320" fill="#151b22"/>'
        f'<foreignObject x="24" y="110" width="272" height="120"><p xmlns="http://www.w3.org/1999/xhtml" style="color:'
        f'#93a1b0;font:15px sans-serif;text-align:center">{escape(sentence)}</p></foreignObject></svg>'
    )


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"
