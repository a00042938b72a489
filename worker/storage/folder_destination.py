"""Downloads into folders of the worker's machine: ``file:///folder/study.zip``, only below a folder of the settings.

A file is written under a temporary name beside its place, and linked to its name when it is whole. Every folder on the
way is opened by name without following links, so nobody can lead a download elsewhere while it runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from courier.errors import CourierError, SourceUnreachable
from courier.settings import DownloadSettings
from courier.urls import without_query_marks
from worker.storage.study_marks import (
    CHUNK_BYTES,
    MANIFEST,
    PROBE,
    UNREADABLE,
    StudyFingerprint,
    occupied,
    refusal,
    unpacked,
)

_FILE_URL = re.compile(r"file:/", re.IGNORECASE).match
_TO_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TO_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TO_WRITE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
#: Names of what is not whole yet. The job that finds them again goes on with them or writes them anew.
_UNFINISHED = ".unfinished"
_REASONS = {
    errno.ENOSPC: ("full", "the disk is full; make room"),
    errno.EDQUOT: ("full", "the quota is used up; make room"),
    errno.EFBIG: ("full", "the file system does not hold files of that size"),
    errno.EACCES: ("denied", "the worker may not write there; give it the permission"),
    errno.EPERM: ("denied", "the worker may not write there; give it the permission"),
    errno.EROFS: ("denied", "the file system is read-only"),
    errno.ENOENT: ("missing", "the folder of the settings is not there"),
    errno.ENOTDIR: ("not_allowed", "the way there leads through a link or something that is no folder"),
    errno.ELOOP: ("not_allowed", "the way there leads through a link"),
    errno.ENAMETOOLONG: ("not_allowed", "the name is too long"),
    errno.EISDIR: ("exists", "there is a folder of that name"),
}


class FolderDestinations:
    def __init__(self, settings: DownloadSettings) -> None:
        self._folders = tuple(Path(os.path.realpath(folder)) for folder in settings.folders)

    def archive(self, url: str) -> FolderArchive:
        return FolderArchive(*self._place(url))

    def files(self, url: str) -> FolderFiles:
        return FolderFiles(*self._place(url))

    def probe(self, place: str) -> bool:
        """Whether the file system promises that no file is replaced, tried with a file that is removed at once.

        Raises
        ------
        InvalidRequest, SourceUnreachable
            It cannot be written.
        """
        _, probe = self._place(f"{place}{PROBE}{uuid4().hex}")
        with _translated(place), probe.opened(create=False) as folder:
            try:
                return _write(folder, probe.name, iter([b"a probe, removed at once"]), place)[1]
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(probe.name, dir_fd=folder)

    def _place(self, url: str) -> tuple[str, _FolderPlace]:
        path = path_of(url)
        real = Path(os.path.realpath(path.parent)) / path.name
        folder = next((folder for folder in self._folders if real.is_relative_to(folder)), None)
        if folder is None or real == folder or path.name in ("", ".", ".."):
            sentence = "The destination is in none of the folders that downloads.folders names; put it into one."
            raise refusal(sentence, "not_allowed")
        return path.as_uri(), _FolderPlace(folder, real.relative_to(folder).parts)


def path_of(url: str) -> Path:
    """The absolute path that a file URL names (RFC 8089); ``?`` and ``#`` belong to it, as they are or encoded."""
    parts = urlsplit(without_query_marks(url))
    path = unquote(parts.path)
    local = bool(_FILE_URL(url)) and parts.netloc.lower() in ("", "localhost")
    if not local or not path.startswith("/") or "\0" in path:
        raise refusal("A file destination has to name an absolute path: file:///folder/study.zip.", "not_allowed")
    return Path(os.path.normpath(path))


@dataclass(frozen=True)
class _FolderPlace:
    """A name below a folder of the settings."""

    folder: Path
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.parts[-1]

    @contextmanager
    def opened(self, *below: str, create: bool) -> Iterator[int]:
        """The descriptor of the folder that holds the name, or of ``below`` in it."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in (*self.parts[:-1], *below):
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                following = os.open(part, _TO_FOLDER, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = following
            yield descriptor
        finally:
            os.close(descriptor)


class FolderArchive:
    def __init__(self, shown: str, place: _FolderPlace) -> None:
        self.shown = shown
        self.overwrites_prevented = True
        self._place = place

    def read_fingerprint(self) -> StudyFingerprint | None:
        with _translated(self.shown):
            try:
                with self._place.opened(create=False) as folder:
                    descriptor = os.open(self._place.name, _TO_READ, dir_fd=folder)
            except FileNotFoundError:
                return None
            with os.fdopen(descriptor, "rb") as file:
                return _fingerprint_of_archive(file, self.shown)

    def write(self, chunks: Iterator[bytes], fingerprint: StudyFingerprint) -> int:  # noqa: ARG002 - it stands in the archive's manifest
        with _translated(self.shown), self._place.opened(create=True) as folder:
            size_bytes, self.overwrites_prevented = _write(folder, self._place.name, chunks, self.shown)
            return size_bytes

    def read(self) -> Iterator[bytes]:
        with _translated(self.shown):
            with self._place.opened(create=False) as folder:
                descriptor = os.open(self._place.name, _TO_READ, dir_fd=folder)
            yield from _chunks(descriptor)


class FolderFiles:
    """Files gather in ``NAME.unfinished``, which becomes ``NAME`` when the manifest is in it."""

    overwrites_prevented = True  # the folder itself gets its name by a rename, which replaces an empty folder at most

    def __init__(self, shown: str, place: _FolderPlace) -> None:
        self.shown = shown
        self._place = place
        self._unfinished = place.name + _UNFINISHED

    def read_fingerprint(self) -> StudyFingerprint | None:
        with _translated(self.shown):
            try:
                with self._place.opened(self._place.name, create=False) as folder:
                    if not os.listdir(folder):
                        return None
                    manifest = b"".join(_chunks(os.open(MANIFEST, _TO_READ, dir_fd=folder)))
            except FileNotFoundError:
                if self._exists():
                    raise occupied(self.shown) from None
                return None
            except NotADirectoryError:
                raise occupied(self.shown) from None
        fingerprint = StudyFingerprint.of_manifest(manifest)
        if fingerprint is None:
            raise occupied(self.shown)
        return fingerprint

    def names(self) -> set[str]:
        found = set()
        opened = self._place.opened(self._unfinished, create=False)
        with _translated(self.shown), suppress(FileNotFoundError), opened as folder:
            for below, _, names, _ in os.fwalk(".", dir_fd=folder):
                found |= {os.path.normpath(f"{below}/{name}") for name in names if not name.endswith(_UNFINISHED)}
        return found

    def read(self, name: str) -> Iterator[bytes]:
        *below, last = name.split("/")
        with _translated(self.shown):
            with self._place.opened(self._unfinished, *below, create=False) as folder:
                descriptor = os.open(last, _TO_READ, dir_fd=folder)
            yield from _chunks(descriptor)

    def write(self, name: str, chunks: Iterator[bytes]) -> int:
        *below, last = name.split("/")
        with _translated(self.shown), self._place.opened(self._unfinished, *below, create=True) as folder:
            with suppress(FileNotFoundError):
                os.unlink(last, dir_fd=folder)  # left there by an attempt that did not come to its end
            return _write(folder, last, chunks, self.shown)[0]

    def finish(self, manifest: bytes) -> None:
        self.write(MANIFEST, iter([manifest]))
        with _translated(self.shown), self._place.opened(create=False) as folder:
            try:
                os.rename(self._unfinished, self._place.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise occupied(self.shown) from error
                raise
            os.fsync(folder)

    def _exists(self) -> bool:
        with suppress(FileNotFoundError), self._place.opened(create=False) as folder:
            os.stat(self._place.name, dir_fd=folder, follow_symlinks=False)
            return True
        return False


def _fingerprint_of_archive(file: BinaryIO, shown: str) -> StudyFingerprint:
    try:
        with unpacked(file) as archive:
            fingerprint = StudyFingerprint.of_manifest(archive.read(MANIFEST))
    except UNREADABLE:
        fingerprint = None
    if fingerprint is None:
        raise occupied(shown)
    return fingerprint


def _write(folder: int, name: str, chunks: Iterator[bytes], shown: str) -> tuple[int, bool]:
    """Write beside ``name``, then give the file its name, unless another program has taken that meanwhile.

    Returns the size in bytes, and whether the file system has promised that no file was replaced.
    """
    temporary = f".{name}{_UNFINISHED}"
    size_bytes = 0
    with os.fdopen(_begun(folder, temporary, shown), "wb", buffering=0) as file:
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
                size_bytes += len(chunk)
            os.fsync(file.fileno())
            prevented = _publish(folder, temporary, name)
        except FileExistsError:
            raise occupied(shown) from None
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
    return size_bytes, prevented


def _begun(folder: int, temporary: str, shown: str) -> int:
    """The temporary file, empty and locked: what a killed attempt has left is written anew, what another attempt is
    writing is left alone.

    Raises
    ------
    SourceUnreachable
        Another attempt is writing there.
    """
    while True:
        descriptor = os.open(temporary, _TO_WRITE, 0o666, dir_fd=folder)
        try:
            if _is_ours_alone(descriptor, folder, temporary):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            sentence = f"{shown} is written by another attempt at the same time; it is tried again."
            raise SourceUnreachable(sentence) from error
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_ours_alone(descriptor: int, folder: int, temporary: str) -> bool:
    """Lock the file, unless the file system has no locks. False if the name has to be opened anew."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    opened = os.fstat(descriptor)
    try:
        named = os.stat(temporary, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if opened.st_nlink > 1:  # an attempt was killed after it had given the file its name: it is a finished download
        os.unlink(temporary, dir_fd=folder)
        return False
    return os.path.samestat(opened, named)


def _publish(folder: int, temporary: str, name: str) -> bool:
    """A link, unlike a rename, never replaces anything; on file systems that have none, False is returned."""
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            return False
        raise FileExistsError(name) from error
    return True


def _chunks(descriptor: int) -> Iterator[bytes]:
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


@contextmanager
def _translated(shown: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(error, shown) from error


def _write_error(error: OSError, shown: str) -> CourierError:
    reason, words = _REASONS.get(error.errno or 0, ("", ""))
    if reason:
        return refusal(f"{shown} cannot be written: {words}.", reason)
    return SourceUnreachable(f"{shown} cannot be written at present ({error.strerror}); it is tried again.")
