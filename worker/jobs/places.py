"""Whether this worker can use the S3, Azure and folder places that its settings name: its credentials and mounts count.

A place of sources is listed, and the first byte of an image in it read; one of downloads gets a probe that is removed
at once. Each is tried on a thread of its own, because a mount whose server is gone never answers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial

from courier.errors import CourierError, SourceDenied, TryAgain
from courier.results import PlaceEntry
from worker.jobs.services import Services

#: How long a place may take, all at the same time. Less than ``pacs doctor`` waits for.
TRY_S = 12.0

_TryPlace = Callable[[], PlaceEntry]


def tried_places(services: Services, *, wait_s: float = TRY_S) -> list[PlaceEntry]:
    """One entry per place, in the order of the settings; patterns of buckets name none that could be tried."""
    sources = [
        _trial(services, "source", place, partial(_try_source, services, place)) for place in services.sources.places
    ]
    downloads = [
        _trial(services, "download", place, partial(_try_download, services, place))
        for place in services.destinations.places
    ]
    until_s = time.monotonic() + wait_s
    return [trial.entry_at(until_s) for trial in (*sources, *downloads)]


class _Trial(threading.Thread):
    """One place being tried. At most one thread hangs at a place, however often it is asked for."""

    def __init__(self, unknown: PlaceEntry, attempt: _TryPlace) -> None:
        super().__init__(name=f"try {unknown.place}", daemon=True)
        self._unknown = unknown
        self._attempt = attempt
        self._context = copy_context()  # its lines in the log are those of the job
        self._entry: PlaceEntry | None = None

    def run(self) -> None:
        self._entry = self._context.run(self._attempt)

    def entry_at(self, until_s: float) -> PlaceEntry:
        self.join(max(0.0, until_s - time.monotonic()))
        if self._entry is not None:
            return self._entry
        if self.is_alive():
            words = f"did not answer within {TRY_S:.0f} s"
            return self._unknown.model_copy(update={"state": "silent", "message": f"{self._unknown.place} {words}."})
        return self._unknown.model_copy(update={"message": "The worker failed while it tried the place; see its log."})


_lock = threading.Lock()
_trials: dict[tuple[int, str, str], _Trial] = {}


def _trial(services: Services, use: str, place: str, attempt: _TryPlace) -> _Trial:
    """A trial of the place that is under way; begun now if there is none."""
    key = (id(services.sources), use, place)
    with _lock:
        for ended in [one for one, trial in _trials.items() if not trial.is_alive()]:
            del _trials[ended]
        if key not in _trials:
            unknown = PlaceEntry.model_validate({"place": place, "use": use, "state": "unknown", "host": _host()})
            trial = _Trial(unknown, attempt)
            trial.start()
            _trials[key] = trial
        return _trials[key]


def _host() -> str:
    return socket.gethostname()


def _try_source(services: Services, place: str) -> PlaceEntry:
    entry = PlaceEntry(place=place, use="source", state="usable", host=_host())
    try:
        first = services.sources.first_listed(place)
    except SourceDenied as error:  # what may not be listed may be readable all the same
        more = "Batches cannot list it; whether single images can be read is not known."
        return entry.model_copy(update={"state": "unknown", "message": f"{error.message} {more}"})
    except CourierError as error:
        return _failed(entry, error)
    if first is None:
        return entry.model_copy(update={"state": "empty"})
    try:
        services.sources.try_reading(first)
    except CourierError as error:
        return _failed(entry, error, error.message.replace(first, f"the first image in {place}"))
    return entry


def _try_download(services: Services, place: str) -> PlaceEntry:
    entry = PlaceEntry(place=place, use="download", state="usable", host=_host())
    try:
        prevented = services.destinations.probe(place)
    except CourierError as error:
        return _failed(entry, error)
    return entry.model_copy(update={"overwrites": "prevented" if prevented else "not_prevented"})


def _failed(entry: PlaceEntry, error: CourierError, message: str = "") -> PlaceEntry:
    state = "silent" if isinstance(error, TryAgain) else "refused"
    return entry.model_copy(update={"state": state, "message": message or error.message})
