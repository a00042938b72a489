"""Which class speaks which dialect: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from courier.errors import CourierError
from courier.settings import ServerSettings, ServerType
from worker.pacs import msdicom
from worker.pacs.credentials import credentials
from worker.pacs.dcm4chee import Dcm4chee
from worker.pacs.generic import GenericDicomWeb
from worker.pacs.guard import Guard
from worker.pacs.guarded import GuardedTransport
from worker.pacs.orthanc import Orthanc
from worker.pacs.protocol import Pacs
from worker.pacs.transport import Transport

DIALECTS: Mapping[ServerType, Callable[[Transport], Pacs]] = {
    "msdicom": msdicom.MsDicom,
    "dcm4chee": Dcm4chee,
    "orthanc": Orthanc,
    "dicomweb": GenericDicomWeb,
}
#: Where a dialect reads an HTTP status in its own way.
STATUSES: Mapping[ServerType, Mapping[int, type[CourierError]]] = {"msdicom": msdicom.STATUSES}


def connect(server: ServerSettings, guard: Guard | None = None) -> Pacs:
    """The configured server, ready to be asked, behind ``guard`` if there is one; nothing is sent yet.

    Raises
    ------
    SettingsError
        A secret is not where the settings say.
    """
    account, statuses = credentials(server), STATUSES.get(server.type)
    if guard is None:
        return DIALECTS[server.type](Transport(server, account, statuses=statuses))
    return DIALECTS[server.type](GuardedTransport(server, account, statuses=statuses, guard=guard))
