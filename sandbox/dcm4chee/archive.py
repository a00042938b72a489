"""What every room of the DCM4CHEE stand-in stands on: its state, its forms of error, how it reads a query string.

No service here; see ``stow.py``, ``_qido``, ``_wado``, ``_iocm`` and ``_admin``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

from aiohttp import web
from pydicom.datadict import keyword_for_tag, tag_for_keyword

from sandbox.dcm4chee.aets import APPLICATION_ENTITIES, ApplicationEntity
from sandbox.dcm4chee.objects import Attributes, patient_merged
from sandbox.store import Store, first_value
from sandbox.web import FAULT, Site

DEVICE = "dcm4chee-arc"
#: Files of deleted instances lie on disk until the purge that runs every five minutes.
PURGE_INTERVAL_S = 300.0

#: Query names that every parsing service tolerates, whether they mean anything there or not.
_RESERVED = "access_token batchID charset count delete priority test workitem queue scheduledTime accept"
RESERVED = frozenset(_RESERVED.split())


class Refusal(Exception):
    """An answer that ends the request; the dialect's door sends ``response``."""

    def __init__(self, response: web.Response) -> None:
        super().__init__(response.status)
        self.response = response


def refuse(status: int, message: str) -> Refusal:
    """An application error: text/plain that looks like JSON and isn't always, because nothing escapes quotes."""
    text = '{"errorMessage":"' + message + '"}'
    return Refusal(web.Response(status=status, text=text, content_type="text/plain"))


def crash(exception: str, message: str) -> Refusal:
    """A 500 whose body is a Java stack trace."""
    trace = f"{exception}: {message}\n\tat org.dcm4chee.arc.sandbox.StandIn.invoke(StandIn.java)\n"
    return Refusal(web.Response(status=500, text=trace, content_type="text/plain"))


def database_crash() -> Refusal:
    return crash(
        "jakarta.persistence.PersistenceException", "Unable to acquire JDBC Connection [no connection available]"
    )


def invalid(request: web.Request, message: str, value: str) -> Refusal:
    """A parameter that the validator refuses (RESTEasy's ViolationReport, or text)."""
    headers = {"validation-exception": "true"}
    if "application/json" not in request.headers.get("Accept", ""):
        text = f"[CLASS]\r[{message}]\r[{value}]\r\r"
        return Refusal(web.Response(status=400, text=text, content_type="text/plain", headers=headers))
    violation = {"constraintType": "CLASS", "path": "", "message": message, "value": value}
    report = {
        "exception": None,
        "propertyViolations": [],
        "classViolations": [violation],
        "parameterViolations": [],
        "returnValueViolations": [],
    }
    return Refusal(web.json_response(report, status=400, headers=headers))


def unknown(request: web.Request) -> Refusal:
    """A parameter that the service does not know: the value that is named is the whole URL."""
    return invalid(request, "Invalid Query Parameter", request.raw_path)


@dataclass
class ArchiveState:
    """One archive: where it keeps things and what is under way in it."""

    site: Site
    #: Studies that a DELETE is just removing.
    deleting: set[str] = field(default_factory=set)
    #: Those of them whose DELETE a crash has cut off: it never ends.
    cut_off: set[str] = field(default_factory=set)
    #: When the Patient ID of a study was made up, by the clock of this process.
    made_up_s: dict[str, float] = field(default_factory=dict)
    #: POST /ctrl/stop: REST goes on, DIMSE and schedulers stop.
    stopped: bool = False
    looked_for_expired_at_s: float = 0.0

    @property
    def store(self) -> Store:
        return self.site.store

    def patient(self, study: Attributes) -> Attributes:
        """What is known of the patient of a study from all images of theirs. Patients outlive their studies."""
        known: Attributes = self.store.memory.get(identity(study), {})
        return known

    def learn(self, study: Attributes) -> None:
        """An image has come with these attributes of its patient."""
        self.store.memory[identity(study)] = patient_merged(self.patient(study), study)

    def now_s(self) -> float:
        return self.site.clock.now_s()


def identity(attributes: Attributes) -> tuple[str | None, str | None]:
    """Patient ID and issuer."""
    return first_value(attributes.get("00100020")), first_value(attributes.get("00100021"))


Service = Callable[[ArchiveState, web.Request], Awaitable[web.StreamResponse]]


def entity(request: web.Request, service_class: str) -> ApplicationEntity:
    """The AE of the URL, if there is one and it offers the service."""
    title = request.match_info["aet"]
    ae = APPLICATION_ENTITIES.get(title)
    if ae is None:
        raise refuse(404, f"No such Application Entity: {title}")
    if service_class not in ae.services:
        # The archive forgot the blank in all messages but that of STOW.
        blank = " " if service_class == "STOW_RS" else ""
        raise refuse(
            404, f"No Web Application with {service_class}{blank}service class found for Application Entity: {title}"
        )
    return ae


def need_database(request: web.Request) -> None:
    """The crash of a service whose first act is a query, while the database is down."""
    if request[FAULT].database_down:
        raise database_crash()


def services_url(request: web.Request) -> str:
    """``{rs}`` of this request, with the host and scheme the client used."""
    return f"{request.scheme}://{request.host}/dcm4chee-arc/aets/{request.match_info['aet']}/rs"


def warning(request: web.Request, text: str) -> str:
    return f'299 {request.host} "{text}"'


# -- query strings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One name of a query string; ``values`` were split at literal commas before they were decoded."""

    name: str
    values: tuple[str, ...]

    @property
    def value(self) -> str:
        return ",".join(self.values)


def parameters(request: web.Request) -> list[Parameter]:
    """The query string as the archive reads it: ``a=1,2`` are two values, ``a=1%2C2`` is one odd value."""
    found: dict[str, tuple[str, ...]] = {}
    for pair in request.raw_path.partition("?")[2].split("&"):
        name, _, raw = pair.partition("=")
        if name:
            found[name] = found.get(name, ()) + tuple(unquote_plus(value) for value in raw.split(","))
    return [Parameter(name, values) for name, values in found.items()]


def attribute_path(name: str) -> list[str] | None:
    """The 8-hex tags of ``PatientID``, ``00100020`` or ``00400275.00400007``; None for anything else."""
    tags = [_attribute(step) for step in name.split(".")]
    return None if None in tags else [tag for tag in tags if tag is not None]


def _attribute(name: str) -> str | None:
    if len(name) == 8 and all(digit in "0123456789abcdefABCDEF" for digit in name):
        return name.upper()
    if name in PRIVATE:
        return PRIVATE[name][0]
    number = tag_for_keyword(name)
    return None if number is None else f"{number:08X}"


def keyword(tag: str) -> str:
    """The keyword of an 8-hex tag, or the tag itself."""
    for name, (private, _vr) in PRIVATE.items():
        if private == tag:
            return name
    return keyword_for_tag(int(tag, 16)) or tag


CREATOR = "DCM4CHEE Archive 5"
#: The archive's private attributes that this stand-in fills: keyword, tag, VR.
PRIVATE: dict[str, tuple[str, str]] = {
    "StudyReceiveDateTime": ("77771020", "DT"),
    "StudyUpdateDateTime": ("77771021", "DT"),
    "StudyAccessDateTime": ("77771022", "DT"),
    "StudyRejectionState": ("77771024", "CS"),
    "StorageIDsOfStudy": ("77771028", "LO"),
    "StudySizeInKB": ("77771029", "UL"),
    "StudySizeBytes": ("7777102A", "US"),
    "SeriesReceiveDateTime": ("77771030", "DT"),
    "InstanceReceiveDateTime": ("77771040", "DT"),
    "RejectionCodeSequence": ("77771042", "SQ"),
    "StorageID": ("77771050", "LO"),
    "StorageTransferSyntaxUID": ("77771052", "UI"),
    "StorageObjectSize": ("77771053", "UL"),
}


def plain_json(value: object, status: int = 200) -> web.Response:
    """Compact, as the archive's own JSON generator writes it."""
    text = json.dumps(value, separators=(",", ":"))
    return web.Response(status=status, text=text, content_type="application/json")
