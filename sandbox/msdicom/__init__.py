"""MSDICOM, as a sandbox: Microsoft's DICOM server in its API versions 1 and 2 (the ``archived`` branch of its code).

Routes, answers and codes of that server, over real HTTP and a real store. What it accepts is in ``rules.py``,
its searches are in ``query.py``; how bytes travel and what a fault does to a connection, in ``web.py``. What is
left out is listed in ``docs/sandbox.md``.
"""

from __future__ import annotations

import asyncio
import io
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from sandbox.datasets import Header, JsonStyle, NotDicomFile, elements, read_header, whole
from sandbox.faults import InjectedFault
from sandbox.msdicom import query as queries
from sandbox.msdicom import rules as rules
from sandbox.msdicom.feed import FeedError, FeedWindow, read_window
from sandbox.pictures import NoPicture, render
from sandbox.pixels import (
    EXPLICIT_LE,
    JPEG_2000,
    TRANSCODABLE,
    NoPixels,
    NoSuchFrame,
    frame_bytes,
    frame_chunks,
    frame_count,
    transcode,
)
from sandbox.store import Duplicate, InstanceRow, NewInstance, SearchHit, Spool, Store, latest_wins
from sandbox.web import (
    DICOM_JSON,
    FAULT,
    BrokenMultipart,
    Site,
    Streamed,
    TooLarge,
    dicom_json,
    door,
    file_chunks,
    multipart,
    once,
    operation,
    read_parts,
    spool_body,
)

BASE_PATH = "/v2"
VERSIONS = {"v1.0-prerelease": 1, "v1": 1, "v1.0": 1, "v2": 2, "v2.0": 2}
MAX_BODY_BYTES = 2_147_483_647
#: Larger files are neither transcoded nor rendered.
MAX_DECODED_BYTES = 104_857_600
#: Deleted instances' bytes stay this long.
DELETE_DELAY_S = 3 * 86_400.0
#: A health report is made this often and served until the next one.
HEALTH_PERIOD_S = 30.0
#: The frames endpoint remembers instances this long, deleted or not.
FRAME_CACHE_S = 300.0
FRAME_CACHE_ROWS = 1000
#: The full-text index of names lags behind by this much.
FUZZY_LAG_S = 1.0

_CREATED = "pending_until_s IS NULL"
_STYLE = JsonStyle(numbers=True, bulk=lambda _path: None)
_CLASS_OF = {"study": "StudyInstanceUID", "series": "SeriesInstanceUID", "instance": "SOPInstanceUID"}


def open_store(folder: Path) -> Store:
    return Store(folder, fold=queries.fold, merge=latest_wins)


def application(site: Site) -> web.Application:
    return MsDicomServer(site).application()


class Problem(Exception):
    """An error answer: a sentence of plain text, or nothing."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@web.middleware
async def _problems(request: web.Request, handler: Any) -> web.StreamResponse:
    """Errors as this server words them, the check of query strings, and the header every versioned answer bears."""
    try:
        if re.search("<|%3c", request.rel_url.raw_query_string, re.IGNORECASE):
            raise Problem(400, "The query string contains a character that is not allowed.")
        response: web.StreamResponse = await handler(request)
    except Problem as problem:
        response = web.Response(status=problem.status, text=problem.text or None)
    if "version" in request.match_info and not response.prepared:
        response.headers["api-supported-versions"] = "1.0-prerelease, 1, 2"
    return response


@dataclass(frozen=True)
class _PublishedReport:
    """A published health report. ``changes`` are those of the faults it was made under."""

    at_s: float
    changes: tuple[int, int]
    database_down: bool
    storage_down: bool


class MsDicomServer:
    """One server: its handlers and the little it keeps in memory."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._store = site.store
        self._report = _PublishedReport(float("-inf"), (0, 0), database_down=False, storage_down=False)
        self._frame_rows: dict[tuple[str, str, str], tuple[float, InstanceRow]] = {}

    def application(self) -> web.Application:
        app = web.Application(middlewares=[door(self._site), _problems], client_max_size=MAX_BODY_BYTES)
        study = "/{version:v[^/]+}/studies/{study}"
        series, instance = study + "/series/{series}", study + "/series/{series}/instances/{instance}"
        root = "/{version:v[^/]+}"
        routes = [web.get("/health/check", self.health), web.post(root + "/studies/$bulkUpdate", self.left_out)]
        for path in (root + "/studies", study):
            routes.append(web.post(path, self.stow))
        searches = {
            "studies": root + "/studies",
            "series": root + "/series",
            "instances": root + "/instances",
            "studies/series": study + "/series",
            "studies/instances": study + "/instances",
            "studies/series/instances": series + "/instances",
        }
        for name, path in searches.items():
            search = operation("query")(partial(self.search, queries.RESOURCES[name]))
            routes.append(web.get(path, search, allow_head=False))
        for path in (study, series, instance):
            routes.append(web.get(path, self.retrieve, allow_head=False))
            routes.append(web.get(path + "/metadata", self.metadata, allow_head=False))
            routes.append(web.delete(path, self.delete))
        routes += [
            web.get(instance + "/frames/{frames}", self.frames, allow_head=False),
            web.get(instance + "/rendered", self.rendered, allow_head=False),
            web.get(instance + "/frames/{frames}/rendered", self.rendered, allow_head=False),
            web.get(root + "/changefeed", self.change_feed, allow_head=False),
            web.get(root + "/changefeed/latest", self.change_feed_latest, allow_head=False),
            web.get(root + "/partitions", self.partitions, allow_head=False),
            web.route("*", root + "/partitions/{rest:.*}", self.partitions),
            *(
                web.route("*", root + path, self.left_out)
                for path in ("/export", "/workitems{rest:.*}", "/extendedquerytags{rest:.*}", "/operations/{rest:.*}")
            ),
        ]
        app.add_routes(routes)
        return app

    # -- store --------------------------------------------------------------------------------------------------------

    @operation("store")
    async def stow(self, request: web.Request) -> web.StreamResponse:
        version = _version(request)
        content = _store_content(request)
        if not rules.accepts_dicom_json(request.headers.getall("Accept", [])):
            raise Problem(406)
        study = _uids(request).get("study")
        if (request.content_length or 0) > MAX_BODY_BYTES:
            raise Problem(413, "The request body is too large.")
        spools = await self._receive(request, content)
        if request[FAULT].lose_last_part and spools:
            spools.pop().discard()
        return self._process(request, spools, version, study)

    async def _receive(self, request: web.Request, content: rules.MediaType) -> list[Spool]:
        """Spool the whole body before anything is judged, as the server does."""
        if content.name == "application/dicom":
            try:
                return [await spool_body(request, self._store, max_bytes=MAX_BODY_BYTES)]
            except TooLarge:
                raise Problem(413, "The request body is too large.") from None
        spools: list[Spool] = []
        try:
            async for part in read_parts(
                request, content.parameters["boundary"], self._store, max_bytes=MAX_BODY_BYTES
            ):
                spools.append(part.spool)
                _check_part(part.headers.get("content-type"), content, first=len(spools) == 1)
        except (Problem, TooLarge, BrokenMultipart, ConnectionError) as error:
            if _tail_is_dropped(error):
                return spools
            for spool in spools:
                spool.discard()
            raise _as_problem(error) from error
        return spools

    def _process(
        self, request: web.Request, spools: Sequence[Spool], version: int, study: str | None
    ) -> web.StreamResponse:
        """Store part after part, in order, each for itself; the answer names them all."""
        stored: list[dict[str, Any]] = []
        failed: list[dict[str, Any]] = []
        headers: dict[str, str] = {}
        for spool in spools:
            item, ok, several = self._store_one(request, spool, version, study)
            (stored if ok else failed).append(item)
            if several:
                headers["Warning"] = f'299 {request.host}: "An indexed attribute has several values; the first counts."'
        if not stored and not failed:
            return web.Response(status=204)
        answer: dict[str, Any] = {}
        if study is not None and stored:
            answer["00081190"] = _ur(f"{_root(request)}/studies/{study}")
        if failed:
            answer["00081198"] = {"vr": "SQ", "Value": failed}
        if stored:
            answer["00081199"] = {"vr": "SQ", "Value": stored}
        warned = version == 2 and any("00081196" in item for item in stored)
        status = 409 if not stored else 202 if failed or warned else 200
        return dicom_json(answer, status=status, headers=headers)

    def _store_one(
        self, request: web.Request, spool: Spool, version: int, study: str | None
    ) -> tuple[dict[str, Any], bool, bool]:
        """The item of one part, whether it is stored, and whether an indexed attribute had several values."""
        spool.close()
        try:
            header = read_header(spool.source)
        except NotDicomFile:
            spool.discard()
            return {"00081197": _us(rules.FAILED)}, False, False
        item = _identity(header)
        verdict = rules.check_file(header, version, study)
        reason = rules.FAILED if verdict.errors else self._keep(header, verdict, spool, request[FAULT])
        if reason is not None:
            spool.discard()
            item["00081197"] = _us(reason)
            if verdict.errors:
                item["00741048"] = _comments(verdict.errors)
            return item, False, False
        uids = [rules.bare_uid(header.text(tag) or "") for tag in rules.TRIPLE]
        item["00081190"] = _ur(f"{_root(request)}/studies/{uids[0]}/series/{uids[1]}/instances/{uids[2]}")
        if header.implicit_vr or verdict.warnings:
            item["00081196"] = _us(rules.IMPLICIT_VR if header.implicit_vr else rules.INVALID_ATTRIBUTE)
        if version == 2:
            item["00741048"] = _comments(verdict.warnings)
        return item, True, any("\\" in (header.text(tag) or "") for tag in rules.SEARCHABLE)

    def _keep(self, header: Header, verdict: rules.FileCheck, spool: Spool, fault: InjectedFault) -> int | None:
        """Put the file into the store; the failure reason if that could not be."""
        if fault.disk_full == "A700":
            return rules.OUT_OF_RESOURCES
        if fault.disk_full or fault.transient_272 or fault.database_down or fault.storage_down:
            return rules.TROUBLE
        if fault.failure_reason is not None:
            return fault.failure_reason
        now_s = self._site.clock.now_s()
        uids = [rules.bare_uid(header.text(tag) or "") for tag in rules.TRIPLE]
        self._settle()
        pending_until_s = None
        if fault.pending_45071 is not None:
            pending_until_s = 1e12 if isinstance(fault.pending_45071, str) else now_s + fault.pending_45071
        new = _new_instance(header, verdict, uids, now_s, pending_until_s)
        try:
            with self._store.transaction():
                row = self._store.add(new, spool)
                if pending_until_s is None:
                    self._publish("Create", row, now_s)
        except Duplicate as duplicate:
            return rules.DUPLICATE if duplicate.row.pending_until_s is None else rules.PENDING
        return None if pending_until_s is None else rules.PENDING

    def _settle(self) -> None:
        """End the pending state of whatever is due."""
        now_s = self._site.clock.now_s()
        for row in self._store.due(now_s):
            with self._store.transaction():
                self._store.complete([row.key])
                self._publish("Create", row, now_s)

    def _publish(self, action: str, row: InstanceRow, now_s: float) -> None:
        entry = {
            "action": action,
            "studyInstanceUid": row.study_instance_uid,
            "seriesInstanceUid": row.series_instance_uid,
            "sopInstanceUid": row.sop_instance_uid,
            "watermark": row.key,
        }
        self._store.note(entry, at_s=now_s)

    # -- search -------------------------------------------------------------------------------------------------------

    async def search(self, resource: queries.Resource, request: web.Request) -> web.StreamResponse:
        version = _version(request)
        if not rules.accepts_dicom_json(request.headers.getall("Accept", [])):
            raise Problem(406)
        uids = _uids(request)
        path = {
            tag: uids[name] for name, tag in (("study", rules.STUDY_UID), ("series", rules.SERIES_UID)) if name in uids
        }
        try:
            query = queries.parse(resource, version, request.query.items(), path)
        except queries.BadQuery as error:
            raise Problem(400, str(error)) from None
        self._check_outage(request[FAULT], needs_files=version == 1 or not query.plain or query.level == "instance")
        self._settle()
        found = self._store.search(query.level, query.conditions, view=_CREATED, limit=query.limit, offset=query.offset)
        if query.fuzzy:
            ripe_s = self._site.clock.now_s() - FUZZY_LAG_S
            found = [hit for hit in found if hit.changed_at_s <= ripe_s]
        if version == 2 and query.plain and query.level != "instance":
            found.reverse()  # the order within a page is not promised; see docs/pacs-oddities.md
        if not found:
            return web.Response(status=204)
        return dicom_json([self._hit(hit, query) for hit in found])

    def _hit(self, found: SearchHit, query: queries.MsDicomQuery) -> dict[str, Any]:
        known: dict[str, Any] = queries.indexed(found)
        missing = [tag for tag in query.tags if tag not in queries.KEPT and tag not in queries.COMPUTED]
        if missing:
            known |= self._from_newest_file(found, missing)
        answer = {f"{tag:08X}": known[f"{tag:08X}"] for tag in sorted(query.tags) if f"{tag:08X}" in known}
        return dict(sorted({**answer, **self._computed(found, query.tags)}.items()))

    def _from_newest_file(self, found: SearchHit, tags: Sequence[int]) -> dict[str, Any]:
        rows = self._store.instances(
            study_instance_uid=found.study_instance_uid,
            series_instance_uid=found.series_instance_uid,
            sop_instance_uid=found.sop_instance_uid,
            view=_CREATED,
        )
        dropped = {path[0] for path in _dropped(rows[-1]) if len(path) == 1}
        return elements(read_header(rows[-1].path), [tag for tag in tags if tag not in dropped], _STYLE)

    def _computed(self, found: SearchHit, tags: frozenset[int]) -> dict[str, Any]:
        wanted = tags & queries.COMPUTED
        if not wanted:
            return {}
        answer: dict[str, Any] = {}
        # Counts have no filter on the state: instances that are still being created count.
        study = self._store.tally(found.study_instance_uid)
        if queries.MODALITIES_IN_STUDY in wanted:
            answer["00080061"] = {"vr": "CS", "Value": list(study.modalities)}
        if queries.STUDY_INSTANCES in wanted:
            answer["00201208"] = {"vr": "IS", "Value": [study.instances]}
        if queries.SERIES_INSTANCES in wanted and found.series_instance_uid is not None:
            series = self._store.tally(found.study_instance_uid, found.series_instance_uid)
            answer["00201209"] = {"vr": "IS", "Value": [series.instances]}
        return answer

    # -- retrieve -----------------------------------------------------------------------------------------------------

    @operation("retrieve")
    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        _version(request)
        single, syntax = _retrieve_choice(request)
        rows = self._rows(request)
        self._check_outage(request[FAULT], needs_files=True)
        if syntax == "*" or (all(row.transfer_syntax_uid == syntax for row in rows[:1]) and len(rows) == 1):
            bodies = [(row.transfer_syntax_uid, file_chunks(row.path)) for row in rows]
        elif len(rows) > 1:
            raise Problem(406, "Several instances can only be retrieved with transfer-syntax=*.")
        else:
            bodies = [(syntax, once(await _transcoded(rows[0], syntax)))]
        if single:
            return Streamed(bodies[0][1], headers={"Content-Type": _typed("application/dicom", bodies[0][0])})
        parts = [({"Content-Type": _typed("application/dicom", uid)}, chunks) for uid, chunks in bodies]
        return _multipart_answer(parts)

    def _rows(self, request: web.Request) -> list[InstanceRow]:
        """The instances a URL names; 404 says which level is missing."""
        uids = _uids(request)
        fault: InjectedFault = request[FAULT]
        if fault.database_down:
            raise Problem(503, "The data store operation failed.")
        self._settle()
        rows = self._store.instances(
            study_instance_uid=uids["study"],
            series_instance_uid=uids.get("series"),
            sop_instance_uid=uids.get("instance"),
            view=_CREATED,
        )
        if not rows:
            raise Problem(404, f"The specified {'instance' if 'instance' in uids else list(uids)[-1]} cannot be found.")
        return rows

    def _check_outage(self, fault: InjectedFault, *, needs_files: bool) -> None:
        """Default searches of version 2 are pure SQL; everything else also reads blobs."""
        if fault.database_down or (fault.storage_down and needs_files):
            raise Problem(503, "The data store operation failed.")

    @operation("metadata")
    async def metadata(self, request: web.Request) -> web.StreamResponse:
        _version(request)
        if not rules.accepts_dicom_json(request.headers.getall("Accept", [])):
            raise Problem(406)
        rows = self._rows(request)
        tag = str(rows[0].key) if "instance" in request.match_info else f"{rows[-1].key}-{len(rows)}"
        if request.headers.get("If-None-Match", "").lower() == tag:
            return web.Response(status=304)
        self._check_outage(request[FAULT], needs_files=True)
        # The file's own header decides, so nothing of it is kept twice.
        headers = {"Content-Type": DICOM_JSON, "ETag": tag}
        return Streamed(_metadata_chunks(rows), headers=headers)

    @operation("retrieve")
    async def frames(self, request: web.Request) -> web.StreamResponse:
        _version(request)
        single, media, syntax = _frames_choice(request)
        numbers = _frame_numbers(request.match_info["frames"])
        if single and len(numbers) > 1:
            raise Problem(400, "Several frames cannot be returned as a single part.")
        row = self._frame_row(request)
        self._check_outage(request[FAULT], needs_files=True)
        try:
            parts = [frame_chunks(row.path, read_header(row.path), number) for number in numbers]
            if syntax not in ("*", row.transfer_syntax_uid):
                content = await _transcoded(row, syntax)
                parts = [once(frame) for frame in self._frames_of(content, numbers)]
        except NoPixels:
            raise Problem(404, "The instance has no pixel data.") from None
        except NoSuchFrame:
            raise Problem(404, "The specified frame cannot be found.") from None
        headers = {"Content-Type": _typed(media, row.transfer_syntax_uid if syntax == "*" else syntax)}
        if single:
            return Streamed(parts[0], headers=headers)
        return _multipart_answer([(headers, part) for part in parts])

    def _frames_of(self, content: bytes, numbers: Sequence[int]) -> list[bytes]:
        """Frames of a file that was transcoded in memory."""
        spool = self._store.spool()
        try:
            spool.write(content)
            spool.close()
            header = read_header(spool.path)
            return [frame_bytes(spool.path, header, number) for number in numbers]
        finally:
            spool.discard()

    def _frame_row(self, request: web.Request) -> InstanceRow:
        """The instance, from a cache that no deletion clears."""
        uids = _uids(request)
        now_s = self._site.clock.now_s()
        key = (uids["study"], uids["series"], uids["instance"])
        kept = self._frame_rows.get(key)
        if kept is not None and now_s - kept[0] < FRAME_CACHE_S and kept[1].path.exists():
            return kept[1]
        row = self._rows(request)[0]
        if len(self._frame_rows) >= FRAME_CACHE_ROWS:
            self._frame_rows.pop(next(iter(self._frame_rows)))
        self._frame_rows[key] = (now_s, row)
        return row

    @operation("retrieve")
    async def rendered(self, request: web.Request) -> web.StreamResponse:
        _version(request)
        media = _rendered_choice(request)
        quality = request.query.get("quality", "100")
        if not quality.isdigit() or not 1 <= int(quality) <= 100:
            raise Problem(400, "The quality has to be a whole number from 1 to 100.")
        number = _frame_numbers(request.match_info["frames"])[0] if "frames" in request.match_info else 1
        row = self._rows(request)[0]
        self._check_outage(request[FAULT], needs_files=True)
        if row.size_bytes > MAX_DECODED_BYTES:
            raise Problem(406, "The file is too large to be rendered.")
        try:
            header = read_header(row.path)
            if number > frame_count(header):
                raise NoSuchFrame
            picture = await asyncio.to_thread(_picture, row.path, number, media, int(quality))
        except NoPixels:
            raise Problem(404, "The instance has no pixel data.") from None
        except NoSuchFrame:
            raise Problem(404, "The specified frame cannot be found.") from None
        except NoPicture as error:
            raise Problem(406, str(error)) from error
        return web.Response(body=picture, content_type=media)

    # -- delete -------------------------------------------------------------------------------------------------------

    @operation("delete")
    async def delete(self, request: web.Request) -> web.StreamResponse:
        _version(request)
        uids = _uids(request)
        if request[FAULT].database_down:
            raise Problem(503, "The data store operation failed.")
        now_s = self._site.clock.now_s()
        self._settle()
        rows = self._store.instances(
            study_instance_uid=uids["study"],
            series_instance_uid=uids.get("series"),
            sop_instance_uid=uids.get("instance"),
        )
        if not rows:
            raise Problem(404, f"The specified {list(uids)[-1]} cannot be found.")
        with self._store.transaction():
            self._store.delete(rows, free_at_s=now_s + DELETE_DELAY_S)
            for row in rows:
                self._publish("Delete", row, now_s)
        return web.Response(status=204)

    # -- change feed --------------------------------------------------------------------------------------------------

    @operation("query")
    async def change_feed(self, request: web.Request) -> web.StreamResponse:
        version = _version(request)
        try:
            window = read_window(request.query, version)
        except FeedError as error:
            raise Problem(400, str(error)) from None
        self._check_outage(request[FAULT], needs_files=window.with_metadata)
        self._settle()
        entries = [self._entry(entry, window) for entry in window.choose(self._store.journal())]
        return web.json_response(entries)

    @operation("query")
    async def change_feed_latest(self, request: web.Request) -> web.StreamResponse:
        version = _version(request)
        try:
            window = read_window(request.query, version, latest=True)
        except FeedError as error:
            raise Problem(400, str(error)) from None
        self._check_outage(request[FAULT], needs_files=window.with_metadata)
        self._settle()
        last = self._store.last_note()
        return web.Response(status=204) if last is None else web.json_response(self._entry(last, window))

    def _entry(self, noted: tuple[int, float, dict[str, Any]], window: FeedWindow) -> dict[str, Any]:
        sequence, at_s, entry = noted
        rows = self._store.instances(
            study_instance_uid=entry["studyInstanceUid"],
            series_instance_uid=entry["seriesInstanceUid"],
            sop_instance_uid=entry["sopInstanceUid"],
            view=_CREATED,
        )
        state = "Deleted" if not rows else "Current" if rows[0].key == entry["watermark"] else "Replaced"
        if rows and entry["action"] == "Delete":
            state = "Replaced"
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s)
        shown = {
            "sequence": sequence,
            "partitionName": "Microsoft.Default",
            **{name: entry[name] for name in ("studyInstanceUid", "seriesInstanceUid", "sopInstanceUid", "action")},
            "timestamp": moment.isoformat(),
            "state": state,
        }
        if window.with_metadata and rows:
            shown["metadata"] = whole(read_header(rows[0].path), _STYLE, _dropped(rows[0]))
        return shown

    # -- the rest -----------------------------------------------------------------------------------------------------

    @operation("health")
    async def health(self, request: web.Request) -> web.StreamResponse:
        """The last published report, which lags behind what it reports by up to `HEALTH_PERIOD_S`.

        So that a test need not wait, a fault of this very operation, or the end of all faults, publishes a new one.
        """
        now_s = self._site.clock.now_s()
        changes = self._site.faults.changes("msdicom", "health")
        if not 0 <= now_s - self._report.at_s < HEALTH_PERIOD_S or changes != self._report.changes:
            fault: InjectedFault = request[FAULT]
            self._report = _PublishedReport(now_s, changes, fault.database_down, fault.storage_down)
        down = {"DataStoreHealthCheck": self._report.database_down}
        for name in ("DcmHealthCheck", "MetadataHealthCheck", "WorkitemHealthCheck"):
            down[name] = self._report.storage_down
        details = [
            {
                "name": name,
                "status": "Unhealthy" if is_down else "Healthy",
                "description": "Failed to connect." if is_down else "Successfully connected.",
            }
            for name, is_down in down.items()
        ]
        healthy = not any(down.values())
        answer = {"overallStatus": "Healthy" if healthy else "Unhealthy", "details": details}
        return web.json_response(answer, status=200 if healthy else 503)

    @operation("query")
    async def partitions(self, request: web.Request) -> web.StreamResponse:
        _version(request)
        raise Problem(400, "Data partitions are not enabled.")

    @operation("query")
    async def left_out(self, request: web.Request) -> web.StreamResponse:
        """Bulk update (in version 1 really absent), export, work items, query tags: see docs/sandbox.md."""
        _version(request)
        raise Problem(404, "This sandbox does not have this resource.")


# -- requests ---------------------------------------------------------------------------------------------------------


def _version(request: web.Request) -> int:
    """1 or 2; any other version of the API is a 400."""
    version = VERSIONS.get(request.match_info["version"].lower())
    if version is None:
        raise Problem(400, "The requested API version is not supported.")
    return version


def _uids(request: web.Request) -> dict[str, str]:
    """The UIDs of the URL, without padding, top level first; a bad one is a 400."""
    named = {name: request.match_info[name] for name in ("study", "series", "instance") if name in request.match_info}
    for name, uid in named.items():
        if not rules.is_uid(uid):
            raise Problem(400, f"The {_CLASS_OF[name]} of the request is not a valid UID.")
    return {name: rules.bare_uid(uid) for name, uid in named.items()}


def _root(request: web.Request) -> str:
    """From the Host header, as the server does: behind a proxy that rewrites it, wrong."""
    return f"{request.scheme}://{request.host}/{request.match_info['version']}"


def _store_content(request: web.Request) -> rules.MediaType:
    """The request's Content-Type, if it is one of the two that can be stored."""
    text = request.headers.get("Content-Type", "")
    if text.strip().lower() == "application/dicom":
        return rules.MediaType("application/dicom", {})
    content = rules.strict_media_type(text)
    if content is None or content.name != "multipart/related":
        raise Problem(415)
    if not content.parameters.get("boundary"):
        raise Problem(415, "The boundary of the multipart body is missing.")
    if "start" in content.parameters:
        raise Problem(400, "The start parameter is not supported.")
    return content


def _check_part(content_type: str | None, content: rules.MediaType, *, first: bool) -> None:
    if content_type is None and first:
        content_type = content.parameters.get("type")
    if (content_type or "").lower() != "application/dicom":
        raise Problem(415, "A part has to have the content type application/dicom, without parameters.")


def _tail_is_dropped(error: Exception) -> bool:
    """Whether the reader takes the error for the end of the body: what arrived whole before is stored."""
    return isinstance(error, ConnectionError) or (isinstance(error, BrokenMultipart) and error.inside_part)


def _as_problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, TooLarge):
        return Problem(413, "The request body is too large.")
    return Problem(400, "The multipart body is not valid.")


# -- store's answer ---------------------------------------------------------------------------------------------------


def _new_instance(
    header: Header, verdict: rules.FileCheck, uids: Sequence[str], now_s: float, pending_until_s: float | None
) -> NewInstance:
    dropped = {path[0] for path in verdict.warnings if len(path) == 1}

    def kept(level: Any) -> dict[str, Any]:
        return elements(header, [tag for tag in queries.INDEXED[level] if tag not in dropped], _STYLE)

    return NewInstance(
        study_instance_uid=uids[0],
        series_instance_uid=uids[1],
        sop_instance_uid=uids[2],
        sop_class_uid=rules.bare_uid(header.text(rules.CLASS_UID) or ""),
        transfer_syntax_uid=header.transfer_syntax_uid,
        study=kept("study"),
        series=kept("series"),
        instance=kept("instance"),
        received_at_s=now_s,
        pending_until_s=pending_until_s,
        notes={"dropped": [list(path) for path in verdict.warnings]} if verdict.warnings else {},
    )


def _identity(header: Header) -> dict[str, Any]:
    """SOP class and instance, as sent, however wrong; absent ones are left out."""
    found = {"00081150": header.text(rules.CLASS_UID), "00081155": header.text(rules.SOP_UID)}
    return {tag: {"vr": "UI", "Value": [text.rstrip("\0")]} for tag, text in found.items() if text}


def _us(value: int) -> dict[str, Any]:
    return {"vr": "US", "Value": [value]}


def _ur(url: str) -> dict[str, Any]:
    return {"vr": "UR", "Value": [url]}


def _comments(complaints: dict[tuple[int, ...], str]) -> dict[str, Any]:
    """FailedAttributesSequence; without complaints an empty sequence."""
    items = [{"00000902": {"vr": "LO", "Value": [text]}} for text in rules.comments(complaints)]
    return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}


def _dropped(row: InstanceRow) -> set[tuple[int, ...]]:
    """The attributes that were invalid when the instance was stored, and so are not in its metadata."""
    return {tuple(path) for path in row.notes.get("dropped", ())}


# -- retrieve's choices -----------------------------------------------------------------------------------------------


def _retrieve_choice(request: web.Request) -> tuple[bool, str]:
    """(single part?, transfer syntax or ``*``) by the Accept header; 406 if nothing fits."""
    for media in rules.lenient_media_types(request.headers.getall("Accept", [])):
        syntax = media.parameters.get("transfer-syntax")
        if media.name == "*/*":
            single, syntax = False, syntax or "*"
        elif media.name == "application/dicom" and "instance" in request.match_info:
            single = True
        elif media.name == "multipart/related" and media.parameters.get("type", "").lower() == "application/dicom":
            single = False
        else:
            continue
        syntax = syntax or EXPLICIT_LE
        if syntax in ("*", EXPLICIT_LE, JPEG_2000):
            return single, syntax
    raise Problem(406)


def _frames_choice(request: web.Request) -> tuple[bool, str, str]:
    """(single part?, media type of a frame, transfer syntax or ``*``); 406 if nothing fits."""
    for media in rules.lenient_media_types(request.headers.getall("Accept", [])):
        wanted = media.parameters.get("type", "").lower() if media.name == "multipart/related" else media.name
        syntax = media.parameters.get("transfer-syntax")
        single = media.name == "application/octet-stream"
        if wanted == "*/*":
            wanted, syntax = "application/octet-stream", syntax or "*"
        if wanted == "application/octet-stream" and (syntax or EXPLICIT_LE) in ("*", EXPLICIT_LE):
            return single, wanted, syntax or EXPLICIT_LE
        if wanted == "image/jp2" and not single and (syntax or JPEG_2000) == JPEG_2000:
            return False, wanted, JPEG_2000
    raise Problem(406)


def _rendered_choice(request: web.Request) -> str:
    """image/jpeg or image/png; no Accept means JPEG, several media types or a wildcard are a 406."""
    ranges = rules.lenient_media_types(request.headers.getall("Accept", []))
    if not ranges:
        return "image/jpeg"
    if len(ranges) > 1 or ranges[0].name not in ("image/jpeg", "image/png"):
        raise Problem(406)
    return ranges[0].name


def _frame_numbers(text: str) -> list[int]:
    """One-based frame numbers of the URL; 400 unless all are whole numbers above 0."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text) or 0 in (numbers := [int(one) for one in text.split(",")]):
        raise Problem(400, "Frames are whole numbers from 1 on.")
    return numbers


# -- retrieve's answers -----------------------------------------------------------------------------------------------


def _typed(media: str, transfer_syntax_uid: str) -> str:
    return f"{media}; transfer-syntax={transfer_syntax_uid}"


def _multipart_answer(parts: Sequence[tuple[dict[str, str], AsyncIterator[bytes]]]) -> Streamed:
    """The header names a boundary and no type; only the parts name the syntax."""
    boundary = str(uuid.uuid4())
    return Streamed(multipart(parts, boundary), headers={"Content-Type": f"multipart/related; boundary={boundary}"})


async def _transcoded(row: InstanceRow, transfer_syntax_uid: str) -> bytes:
    """The one instance in another transfer syntax; 406 where the server cannot."""
    if row.transfer_syntax_uid not in TRANSCODABLE or row.size_bytes > MAX_DECODED_BYTES:
        raise Problem(406, "The instance cannot be transcoded to the requested transfer syntax.")
    try:
        return await asyncio.to_thread(transcode, row.path, transfer_syntax_uid)
    except ValueError as error:
        raise Problem(406, f"The instance cannot be transcoded: {error}") from error


def _picture(path: Path, frame: int, media_type: str, quality: int) -> bytes:
    file = io.BytesIO()
    render(path, frame=frame).save(file, media_type.removeprefix("image/"), quality=quality)
    return file.getvalue()


async def _metadata_chunks(rows: Sequence[InstanceRow]) -> AsyncIterator[bytes]:
    opening = b"["
    for row in rows:
        dataset = whole(read_header(row.path), _STYLE, _dropped(row))
        yield opening + dicom_json(dataset).body  # type: ignore[operator]  # made of bytes just here
        opening = b","
        await asyncio.sleep(0)
    yield b"]"
