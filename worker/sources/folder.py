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
from urllib.parse import unquote, urlsplit

from worker.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTruncated,
    SourceUnreachable,
)
from worker.logs import shown_url
from worker.settings import SourceSettings
from worker.sources.spool import CHUNK_BYTES, Fetched, Limits, spool

_ABSOLUTE = re.compile(r"file:/", re.IGNORECASE).match
_TO_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not blocking, because opening a FIFO would otherwise wait for somebody to write into it.
_TO_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class FolderSource:
    def __init__(self, settings: SourceSettings) -> None:
        self._folders = tuple(Path(os.path.realpath(folder)) for folder in settings.folders)

    def fetch(self, url: str, limits: Limits) -> Fetched:
        path = path_of(url)
        source = shown_url(url)
        try:
            with self._open(path) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                fetched = spool(_chunks(file), source=source, limits=limits, announced_bytes=size_bytes)
        except OSError as error:
            raise _judge(error, source) from error
        return fetched

    def close(self) -> None:
        """Nothing is kept open between fetches."""

    def _open(self, path: Path) -> BinaryIO:
        real = Path(os.path.realpath(path))
        folder = next((folder for folder in self._folders if real.is_relative_to(folder)), None)
        if folder is None or real == folder:
            raise SourceNotAllowed("The file is in none of the folders that sources.folders names; put it into one.")
        descriptor = _descend(folder, real.relative_to(folder).parts)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise SourceNotAllowed("The URL names a folder or a device and no file; name a file.")
        return os.fdopen(descriptor, "rb")


def path_of(url: str) -> Path:
    """The absolute path that a file URL names (RFC 8089).

    Raises
    ------
    SourceNotAllowed
        It is relative, of another host, or has a query.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise SourceNotAllowed("The file URL is malformed; write file:///folder/image.dcm.") from None
    path = unquote(parts.path)
    if not _ABSOLUTE(url) or parts.netloc.lower() not in ("", "localhost") or "\0" in path:
        raise SourceNotAllowed("A file URL has to name an absolute path on the worker: file:///folder/image.dcm.")
    if "?" in url or "#" in url:
        raise SourceNotAllowed("A file URL has no query; write ? as %3F and # as %23 where a name has them.")
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


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _judge(error: OSError, source: str) -> CourierError:
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
        return SourceNotFound(f"{source} is not there; check the URL.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return SourceDenied(f"{source} may not be read by the worker; give it the permission.")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
        return SourceNotAllowed(f"{source} leads through something that is no folder; name the file itself.")
    if error.errno == errno.EIO:
        return SourceTruncated(f"{source} cannot be read to its end; it is tried again.")
    return SourceUnreachable(f"{source} cannot be read at present ({error.strerror}); it is tried again.")
