"""The archive's own state: control, monitor, storage, queues, metrics, configuration, and WildFly's health.

What is asked of the archive answers without its database, except for the queues; that is how the real one behaves.
"""

from __future__ import annotations

import time
import uuid
from datetime import datetime
from typing import Any

from aiohttp import web

from sandbox.dcm4chee.aets import APPLICATION_ENTITIES, REJECTION_CODES, REVOKE
from sandbox.dcm4chee.archive import DEVICE, ArchiveState, need_database, plain_json, refuse
from sandbox.web import FAULT, operation

#: A disk of a size that its own content can be seen on; the machine's real one is other programs' business.
TOTAL_BYTES = 100 * 1024**3
QUEUES = {
    "DiffTasks": "Diff Tasks",
    "Export": "Calculated Storage Commitment",
    "HL7Send": "HL7 Send",
    "IANSCU": "IAN SCU",
    "MPPSSCU": "MPPS SCU",
    "RSClient": "RESTful Client",
    "Rejection": "Rejection",
    "Retrieve": "Retrieve",
    "StgCmtSCP": "Storage Commitment SCP",
    "StgCmtSCU": "Storage Commitment SCU",
    "StgVerTasks": "Storage Verification Tasks",
}
_OTHER_DEVICES = ("keycloak", "storescp", "stowrsd")
_METRICS = {
    "write-to-fs1": "MB/s",
    "read-from-fs1": "MB/s",
    "delete-from-fs1": "objects/s",
    "db-update-on-store": "ms",
    "send-to-STORESCP": "MB/s",
    "receive-from-STORESCU": "MB/s",
}


@operation("health")
async def status(archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    return plain_json({"status": "STOPPED" if archive.stopped else "STARTED"})


@operation("health")
async def control(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    """``POST /ctrl/{start,stop,reload}``: REST goes on working either way."""
    verb = request.match_info["verb"]
    if verb != "reload":
        archive.stopped = verb == "stop"
    return web.Response(status=204)


@operation("health")
async def server_time(archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    now = datetime.fromtimestamp(archive.now_s()).astimezone()
    text = now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}" + now.strftime("%z")
    return web.Response(text=f'{{"serverTimeWithTimezone": "{text}"}}', content_type="application/json")


@operation("health")
async def time_zone(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    local = time.localtime()
    return plain_json({"timeZone": local.tm_zone, "offset": local.tm_gmtoff * 1000})


@operation("health")
async def associations(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    return plain_json([])


@operation("storage")
async def storage(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    """A storage that cannot be opened is left out: an empty list means trouble."""
    wanted = request.query
    ours = wanted.get("uriScheme", "file") == "file" and wanted.get("dicomAETitle", "DCM4CHEE") in APPLICATION_ENTITIES
    usage = wanted.get("usage", "dcmObjectStorageID") == "dcmObjectStorageID"
    if request[FAULT].storage_down or not (ours and usage) or "dcmStorageClusterID" in wanted:
        return plain_json([])
    used = archive.store.tally().size_bytes + archive.store.waiting_bytes()
    usable = 0 if request[FAULT].disk_full == "A700" else max(TOTAL_BYTES - used, 0)
    if usable >= _bytes(wanted.get("usableSpaceBelow")):
        return plain_json([])
    entry = {
        "dcmStorageID": "fs1",
        "dcmURI": "file:///storage/fs1/",
        "dcmDigestAlgorithm": "MD5",
        "dcmProperty": ["checkMountFilePath=NO_MOUNT"],
        "dicomAETitle": [ae.title for ae in APPLICATION_ENTITIES.values() if "WADO_RS" in ae.services],
        "usages": ["dcmObjectStorageID"],
        "usableSpace": usable,
        "totalSpace": TOTAL_BYTES,
    }
    if request[FAULT].disk_full == "272":
        entry |= {"storageThreshold": ["90GB"], "dcmStorageThresholdExceeded": True}
    return plain_json([entry])


def _bytes(text: str | None) -> float:
    if text is None:
        return float("inf")
    try:
        return float(int(text))
    except ValueError as error:
        raise refuse(400, f"Invalid usableSpaceBelow: {text}") from error


# -- queues: the store's journal holds one entry per change of a task -------------------------------------------------


def queue_task(archive: ArchiveState, queue: str, kind: str, batch_id: str | None, uri: str) -> dict[str, Any]:
    """A new task, waiting."""
    now = _timestamp(archive)
    task = {
        "taskID": uuid.uuid4().int % 10**9,
        "dicomDeviceName": DEVICE,
        "queue": queue,
        "type": kind,
        "status": "SCHEDULED",
        **({"batchID": batch_id} if batch_id else {}),
        "createdTime": now,
        "updatedTime": now,
        "scheduledTime": now,
        "RequestURI": uri,
    }
    archive.store.note({"task": task}, at_s=archive.now_s())
    return task


def finish_task(archive: ArchiveState, task: dict[str, Any], status: str, message: str) -> None:
    now = _timestamp(archive)
    said = {"errorMessage" if status == "FAILED" else "outcomeMessage": message}
    times = {"updatedTime": now, "processingStartTime": now, "processingEndTime": now}
    archive.store.note({"task": {**task, "status": status, **times, **said}}, at_s=archive.now_s())


def _timestamp(archive: ArchiveState) -> str:
    return datetime.fromtimestamp(archive.now_s()).astimezone().strftime("%Y-%m-%dT%H:%M:%S.000%z")


def _tasks(archive: ArchiveState, request: web.Request) -> list[dict[str, Any]]:
    """Those the query asks for; the queue's name is only a filter, so an unknown one has none."""
    latest = {entry["task"]["taskID"]: entry["task"] for _n, _at, entry in archive.store.journal() if "task" in entry}
    wanted = {"queue": request.match_info["queue"]}
    wanted |= {name: request.query[name] for name in ("status", "batchID") if name in request.query}
    return [task for task in latest.values() if all(task.get(name) == value for name, value in wanted.items())]


@operation("health")
async def queues(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    return plain_json([{"name": name, "description": text} for name, text in QUEUES.items()])


@operation("health")
async def tasks(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    need_database(request)
    return plain_json(_tasks(archive, request))


@operation("health")
async def count_tasks(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    need_database(request)
    return plain_json({"count": len(_tasks(archive, request))})


# -- configuration and metrics ---------------------------------------------------------------------------------------


@operation("health")
async def metrics(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    return plain_json(
        [
            {"dcmMetricsName": name, "dicomDescription": name, "dcmMetricsRetentionPeriod": 60, "dcmUnit": unit}
            for name, unit in _METRICS.items()
        ]
    )


@operation("health")
async def metric(_archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    if name not in _METRICS:
        raise refuse(404, f"No such Metrics: {name}")
    return plain_json([{} for _ in range(int(request.query.get("limit", 60)))])


@operation("health")
async def application_entities(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    entries = []
    for ae in APPLICATION_ENTITIES.values():
        entry: dict[str, Any] = {"dicomAETitle": ae.title, "dicomDescription": ae.description}
        if ae.hides_not_rejected:
            entry["dcmHideNotRejectedInstances"] = True
        entry |= {"dcmAllowDeletePatient": "WITHOUT_STUDIES", "dcmAllowDeleteStudyPermanently": "REJECTED"}
        entries.append(entry)
    return plain_json(entries)


@operation("health")
async def devices(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    archive = {
        "dicomDeviceName": DEVICE,
        "dicomManufacturer": "dcm4che.org",
        "dicomManufacturerModelName": DEVICE,
        "dicomSoftwareVersion": ["5.35.1", "sandbox"],
        "dicomPrimaryDeviceType": ["ARCHIVE"],
        "dicomInstalled": True,
        "hasArcDevExt": True,
    }
    others = [{"dicomDeviceName": name, "dicomInstalled": True, "hasArcDevExt": False} for name in _OTHER_DEVICES]
    return plain_json([*others, archive])


@operation("health")
async def web_applications(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    return plain_json(
        [
            {
                "dicomDeviceName": DEVICE,
                "dcmWebAppName": ae.title,
                "dicomDescription": ae.description,
                "dcmWebServicePath": f"/dcm4chee-arc/aets/{ae.title}/rs",
                "dcmWebServiceClass": sorted(ae.services),
                "dicomAETitle": ae.title,
            }
            for ae in APPLICATION_ENTITIES.values()
        ]
    )


@operation("health")
async def rejection_codes(_archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    only_revoke = request.query.get("dcmRevokeRejection") == "true"
    codes = [REVOKE] if only_revoke else list(REJECTION_CODES.values())
    return plain_json([code.as_json() for code in codes])


@operation("health")
async def device_name(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    return plain_json({"dicomDeviceName": DEVICE, "UIConfigurationDeviceName": DEVICE})


@operation("health")
async def exporters(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    return plain_json([])


@operation("health")
async def wildfly_health(_archive: ArchiveState, _request: web.Request) -> web.StreamResponse:
    """What WildFly's management port says; it never asks the database."""
    checks: list[dict[str, Any]] = [
        {"name": "server-state", "outcome": True, "data": {"value": "running"}},
        {"name": "suspend-state", "outcome": True, "data": {"value": "RUNNING"}},
        {"name": "boot-errors", "outcome": True},
        {"name": "deployments-status", "outcome": True, "data": {"dcm4chee-arc.ear": "OK"}},
    ]
    return plain_json([*checks, {"outcome": True}])
