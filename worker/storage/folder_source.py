"""Images in folders of this machine: ``file:///folder/image.dcm``, and only below a folder that the settings name.

Nothing outside of these folders is opened, whatever symbolic links say and whoever swaps them meanwhile.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote_to_bytes, urlsplit

from courier.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTruncated,
    SourceUnreachable,
)
from courier.redaction import redact_url
from courier.settings import SourceSettings
from courier.urls import without_query_marks
from worker.storage.listing import ListedObject, listed_object, paged
from worker.storage.spool import CHUNK_BYTES, Fetched, Limits, spool

_ABSOLUTE = re.compile(r"file:/", re.IGNORECASE).match
_TO_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: How many folders deep is looked; each takes an open file.
MAX_DEPTH = 64
# Not blocking, because opening a FIFO would otherwise wait for somebody to write into it.
_TO_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class FolderSource:
    def __init__(self, settings: SourceSettings) -> None:
        self._folders = tuple(Path(os.path.realpath(folder)) for folder in settings.folders)

    def fetch(self, url: str, limits: Limits) -> Fetched:
        path = path_of(url)
        source = redact_url(url)
        try:
            with self._open(path) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                fetched = spool(_chunks(file), source=source, limits=limits, announced_bytes=size_bytes)
        except OSError as error:
            raise _read_error(error, source) from error
        return fetched

    def pages(self, url: str) -> Iterator[list[ListedObject]]:
        """The files below ``file:///folder/``, in the order in which the folders hold them."""
        path = path_of(url)
        try:
            yield from paged(self._below(path))
        except OSError as error:
            raise _read_error(error, redact_url(url)) from error

    def _below(self, path: Path) -> Iterator[ListedObject]:
        real, folder = self._allowed(path)
        yield from _walk(_to_folder(folder, real.relative_to(folder).parts), path.as_posix().rstrip("/"))

    def _allowed(self, path: Path) -> tuple[Path, Path]:
        """Where ``path`` leads, and the folder of the settings that it is below."""
        real = Path(os.path.realpath(path))
        folder = next((folder for folder in self._folders if real.is_relative_to(folder)), None)
        if folder is None:
            raise SourceNotAllowed("The file is in none of the folders that sources.folders names; put it into one.")
        return real, folder

    def close(self) -> None:
        """Nothing is kept open between fetches."""

    def _open(self, path: Path) -> BinaryIO:
        real, folder = self._allowed(path)
        if real == folder:
            raise SourceNotAllowed("The URL names a folder and no file; name a file.")
        descriptor = _descend(folder, real.relative_to(folder).parts)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise SourceNotAllowed("The URL names a folder or a device and no file; name a file.")
        return os.fdopen(descriptor, "rb")


def path_of(url: str) -> Path:
    """The absolute path that a file URL names (RFC 8089); ``?`` and ``#`` belong to it, written as they are or encoded.

    Raises
    ------
    SourceNotAllowed
        It is relative, or of another host.
    """
    try:
        parts = urlsplit(without_query_marks(url))
    except ValueError:
        raise SourceNotAllowed("The file URL is malformed; write file:///folder/image.dcm.") from None
    path = os.fsdecode(unquote_to_bytes(parts.path))  # a name that is not UTF-8 as well
    if not _ABSOLUTE(url) or parts.netloc.lower() not in ("", "localhost") or "\0" in path:
        raise SourceNotAllowed("A file URL has to name an absolute path on the worker: file:///folder/image.dcm.")
    return Path(path)


def _descend(folder: Path, parts: tuple[str, ...]) -> int:
    """Open a file name by name: ``parts`` held no symbolic link when they were resolved and may hold none now."""
    descriptor = os.open(folder, _TO_FOLDER)
    for position, part in enumerate(parts, start=1):
        try:
            following = os.open(part, _TO_FILE if position == len(parts) else _TO_FOLDER, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = following
    return descriptor


def _to_folder(folder: Path, parts: tuple[str, ...]) -> int:
    """As above, to a folder that can be read."""
    descriptor = os.open(folder, _READ_FOLDER)
    for part in parts:
        try:
            following = os.open(part, _READ_FOLDER, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = following
    return descriptor


def _walk(descriptor: int, path: str, depth: int = 0) -> Iterator[ListedObject]:
    """What is below the open folder, which is closed at the end. Links to folders are not followed."""
    try:
        with os.scandir(descriptor) as found:
            for one in found:
                below = f"{path}/{one.name}"
                if one.is_dir(follow_symlinks=False):
                    if depth >= MAX_DEPTH:
                        yield listed_object(_url(below), below, unreadable=f"below more than {MAX_DEPTH} folders")
                    else:
                        yield from _walk(os.open(one.name, _READ_FOLDER, dir_fd=descriptor), below, depth + 1)
                else:
                    yield _file(one, below)
    finally:
        os.close(descriptor)


def _file(one: os.DirEntry[str], path: str) -> ListedObject:
    url = _url(path)
    try:
        status = one.stat()  # of what it leads to; whether that may be read is for the fetch to say
    except OSError:
        return listed_object(url, path, unreadable="a link that leads nowhere, or a file that has gone")
    if not stat.S_ISREG(status.st_mode):
        return listed_object(url, path, unreadable="a link to a folder, or a device")
    return listed_object(url, path, status.st_size)


def _url(path: str) -> str:
    return f"file://{quote(os.fsencode(path))}"


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _read_error(error: OSError, source: str) -> CourierError:
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
        return SourceNotFound(f"{source} is not there; check the URL.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return SourceDenied(f"{source} may not be read by the worker; give it the permission.")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
        return SourceNotAllowed(f"{source} leads through something that is no folder; name the file itself.")
    if error.errno == errno.EIO:
        return SourceTruncated(f"{source} cannot be read to its end; it is tried again.")
    return SourceUnreachable(f"{source} cannot be read at present ({error.strerror}); it is tried again.")
