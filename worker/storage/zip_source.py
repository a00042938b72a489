"""ZIP files as sources: ``zip+https://host/images.zip!/folder/image.dcm`` is one entry of the archive at that URL.

The archive is fetched by its own URL, under that URL's policy, once per process, and kept while its entries are asked
for; nothing is unpacked but the entry that is read, and no name of an entry ever becomes a path. So any worker can do
any entry, at any attempt. An archive may lie about itself: what it says is bounded before it is believed.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

from courier.errors import NotDicom, SourceNotAllowed, SourceNotFound, SourceTooLarge
from courier.redaction import redact_url
from courier.urls import ENTRY, ZIP, bare, entry_of
from worker.runtime.scratch import no_room
from worker.storage.listing import ListedObject, listed_object, paged
from worker.storage.spool import CHUNK_BYTES, Fetched, Limits, spool

#: An archive's directory is held in memory while it is open: some 80 MB for as many entries.
MAX_ENTRIES = 100_000
MAX_DIRECTORY_BYTES = 16 * 1_048_576
#: How much may come out of an archive: so many times its own size, or this where that is more.
MAX_GROWTH, GROWTH_BYTES = 200, 1_073_741_824
#: How many archives are kept, and how long after their last use.
KEPT, KEEP_S = 2, 60.0
_PACKED_AS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LOCAL_HEADER_BYTES = 30

FetchWhole = Callable[[str, Limits], Fetched]


def is_archive(url: str) -> bool:
    """Whether ``url`` names an archive to be listed, by its scheme or by its name."""
    return is_entry(url) or bare(url).lower().endswith(".zip")


def is_entry(url: str) -> bool:
    return url[: len(ZIP)].lower() == ZIP


class Archives:
    """Archives that ``fetch`` brings; shared by all threads."""

    def __init__(self, fetch: FetchWhole, limits: Callable[[], Limits]) -> None:
        self._fetch = fetch
        self._limits = limits
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._timer: threading.Timer | None = None

    def pages(self, url: str) -> Iterator[list[ListedObject]]:
        """Every entry of the archive at ``url`` (with or without ``zip+``), in the archive's order."""
        outer = url[len(ZIP) :] if is_entry(url) else url
        if is_entry(url) and ENTRY in outer:
            raise SourceNotAllowed("An entry of an archive cannot be listed; name the archive.")
        with self._opened(outer, self._limits()) as archive:
            if not any(True for _ in archive.entries()):
                raise SourceNotFound(f"{redact_url(outer)} is empty: the archive holds no file.")
            yield from paged(archive.entries())

    def fetch(self, url: str, limits: Limits) -> Fetched:
        outer, name = _taken_apart(url)
        with self._opened(outer, limits) as archive:
            return archive.read(name, limits)

    def close(self) -> None:
        with self._lock:
            kept = [one for one in self._kept.values() if not one.users]  # the others are closed by who is at them
            self._kept = {}
        for one in kept:
            one.drop()

    @contextmanager
    def _opened(self, url: str, limits: Limits) -> Iterator[_CheckedZip]:
        """The archive, fetched by whoever comes first while the others wait for it."""
        with self._lock:
            kept = self._kept.setdefault(url, _Kept())
            kept.users += 1
        try:
            if not kept.fetching.acquire(timeout=max(limits.deadline_s - time.monotonic(), 0)):
                raise limits.too_slow(redact_url(url))
            try:
                if kept.archive is None:
                    kept.archive = _CheckedZip(self._fetch(url, limits), url)
            finally:
                kept.fetching.release()
            yield kept.archive
        finally:
            if kept.archive is None:
                self._forget(url, kept)
            self._release(kept)

    def _forget(self, url: str, kept: _Kept) -> None:
        """Whoever comes next fetches anew."""
        with self._lock:
            if self._kept.get(url) is kept:
                del self._kept[url]

    def _release(self, kept: _Kept) -> None:
        with self._lock:
            kept.users -= 1
            kept.used_s = time.monotonic()
            idle = sorted((one.used_s, url) for url, one in self._kept.items() if not one.users)
            dropped = [self._kept.pop(url) for _, url in idle[: max(len(idle) - KEPT, 0)]]
            if not kept.users and kept not in self._kept.values():
                dropped.append(kept)
            self._start_timer()
        for one in dropped:
            one.drop()

    def _start_timer(self) -> None:
        """Have one timer running while there is anything to be let go."""
        if self._kept and self._timer is None:
            self._timer = threading.Timer(KEEP_S, self._drop_idle)
            self._timer.daemon = True
            self._timer.start()

    def _drop_idle(self) -> None:
        with self._lock:
            self._timer = None
            old = time.monotonic() - KEEP_S
            gone = [url for url, one in self._kept.items() if not one.users and one.used_s <= old]
            dropped = [self._kept.pop(url) for url in gone]
            self._start_timer()
        for one in dropped:
            one.drop()


@dataclass(eq=False)
class _Kept:
    """An archive that is there or on its way, and how many are at it."""

    fetching: threading.Lock = field(default_factory=threading.Lock)
    archive: _CheckedZip | None = None
    users: int = 0
    used_s: float = 0.0

    def drop(self) -> None:
        if self.archive is not None:
            self.archive.close()


class _CheckedZip:
    """One archive whose directory has been read and found plausible."""

    def __init__(self, fetched: Fetched, url: str) -> None:
        self._fetched = fetched
        self._url = url
        self._shown = redact_url(url)
        self._lock = threading.Lock()
        try:
            if not fetched.size_bytes:
                raise NotDicom(f"{self._shown} is empty: the file has no bytes; pack it anew.")
            with _translated(self._shown):
                self._zip = zipfile.ZipFile(cast(BinaryIO, _Bytes(fetched, self._shown)))
                _check(self._zip.infolist(), fetched.size_bytes, self._shown)
        except BaseException:
            fetched.drop()
            raise
        names = Counter(info.filename for info in self._zip.infolist())
        self._twice = {name for name, count in names.items() if count > 1}

    def close(self) -> None:
        self._zip.close()
        self._fetched.drop()

    def entries(self) -> Iterator[ListedObject]:
        for info in self._zip.infolist():
            if _is_no_file(info):
                continue
            url = f"{ZIP}{self._url}{ENTRY}{quote(info.filename)}"
            yield listed_object(url, info.filename, info.file_size, unreadable=self._skip_reason(info))

    def read(self, name: str, limits: Limits) -> Fetched:
        source = f"{self._shown}{ENTRY}{quote(name)}"
        info = self._zip.NameToInfo.get(name)
        if info is None or _is_no_file(info):
            raise SourceNotFound(f"{source} is not there: the archive has no such entry.")
        skip_reason = self._skip_reason(info)
        if skip_reason:
            raise SourceNotAllowed(f"{source} cannot be read: {skip_reason}.")
        with _translated(source):
            with self._lock:  # opening counts readers, and not safely among threads
                entry = self._zip.open(info)
            with entry:
                return spool(_chunks(entry), source=source, limits=limits, announced_bytes=info.file_size)

    def _skip_reason(self, info: zipfile.ZipInfo) -> str:
        parts = info.filename.replace("\\", "/").split("/")
        kind = stat.S_IFMT(info.external_attr >> 16)
        reasons = {
            "its name leads out of the archive": ".." in parts or not parts[0] or parts[0].endswith(":"),
            "the archive has two entries of its name": info.filename in self._twice,
            "it is encrypted": bool(info.flag_bits & 1),
            "it is a link or a device": bool(kind) and not stat.S_ISREG(kind),
            "it is packed in a way that is not read here; use deflate": info.compress_type not in _PACKED_AS,
            "an archive within an archive": info.filename.lower().endswith(".zip"),
            "made by macOS, no image": parts[0] == "__MACOSX",
        }
        return next((reason for reason, holds in reasons.items() if holds), "")


def _is_no_file(info: zipfile.ZipInfo) -> bool:
    """A folder, or an entry without a name, which nobody can ask for and `ZipInfo.is_dir` cannot bear."""
    return not info.filename or info.is_dir()


def _taken_apart(url: str) -> tuple[str, str]:
    """The archive's URL, and the entry's name in it."""
    outer, entry = entry_of(url)
    if not entry:
        raise SourceNotAllowed("An entry of an archive is written zip+https://host/images.zip!/folder/image.dcm.")
    if is_entry(outer):
        raise SourceNotAllowed("An archive within an archive is not opened; unpack it.")
    return outer, unquote(entry)


def _check(infos: list[zipfile.ZipInfo], size_bytes: int, shown: str) -> None:
    """Refuse what would come out far larger than it went in, and entries that lie over each other."""
    if len(infos) > MAX_ENTRIES:
        raise SourceTooLarge(f"{shown} has more than {MAX_ENTRIES} entries; split it.")
    if sum(info.file_size for info in infos) > max(MAX_GROWTH * size_bytes, GROWTH_BYTES):
        raise SourceTooLarge(f"{shown} would grow to more than {MAX_GROWTH} times its size; it is not opened.")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise SourceNotAllowed(f"{shown} has entries that lie over each other; it is not opened.")
        end = info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size


def _chunks(entry: Any) -> Iterator[bytes]:
    while chunk := entry.read(CHUNK_BYTES):
        yield chunk


@contextmanager
def _translated(shown: str) -> Iterator[None]:
    """The library's errors end here."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeError, NotImplementedError, RuntimeError) as error:
        raise NotDicom(f"{shown} is no ZIP file, or a damaged one ({type(error).__name__}); pack it anew.") from error


class _BeforeTheBeginning(zipfile.BadZipFile, OSError):
    """A seek to before the beginning. The library takes an OSError for an archive too short to be a ZIP64, if small."""


class _Bytes(io.RawIOBase):
    """The archive's bytes with a position of its own; a read moves nobody else's."""

    def __init__(self, fetched: Fetched, shown: str) -> None:
        try:
            self._descriptor = fetched.stream.fileno()  # on disk from here on, however small
            fetched.stream.flush()
        except OSError as error:
            raise no_room(error) from error
        self._size_bytes = fetched.size_bytes
        self._shown = shown
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise _BeforeTheBeginning
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """``size`` bytes at once: the library asks so for the whole directory, whose size the archive has claimed."""
        left = max(self._size_bytes - self._position, 0)
        wanted = left if size < 0 else min(size, left)
        if wanted > MAX_DIRECTORY_BYTES:
            raise SourceTooLarge(f"{self._shown} has too many entries; split it.")
        pieces = bytearray()
        while len(pieces) < wanted:
            piece = os.pread(self._descriptor, wanted - len(pieces), self._position)
            if not piece:
                break
            pieces += piece
            self._position += len(piece)
        return bytes(pieces)
