"""What a sandbox server holds: one SQLite index (WAL) and one file per instance. One `Store` per dialect.

No HTTP, no dialect, no parsing of DICOM: a dialect hands in DICOM JSON (tag -> {"vr", "Value"}) per level and a spooled
file, and gets rows back. Everything here is called from the event loop's thread and never awaits, so each call is
atomic towards all other requests. A killed process loses nothing that was answered: SQLite's WAL and the kernel's
page cache outlive it (a power cut is another matter; this is a tool for development).

In short::

    spool = store.spool(); spool.write(chunk) ...           # streams to disk, hashes on the way
    row = store.add(NewInstance(...), spool)                # Duplicate if the triple is there (see `Duplicate.row`)
    store.instances(study_instance_uid=..., view=...)       # newest last; .path is the file
    store.by_sop(sop_instance_uid)                          # by SOP Instance UID alone
    store.search("study", [Condition(...)], view=..., ...)  # QIDO; newest first
    store.tally(study_instance_uid, ..., view=...)          # series, instances, bytes, modalities below it
    store.reject(keys, "113039^DCM"); store.complete(keys)  # per-instance state
    store.delete(keys, free_at_s=...); store.purge(now_s)   # index rows at once, bytes when due
    store.notes(key) / NewInstance.notes                    # whatever else a dialect wants to remember of an instance

A *view* is which instances a caller may see, written as a condition on the columns of `instances` (a constant of the
dialect's code, never user input): ``"rejection IS NULL"``, ``"pending_until_s IS NULL"`` ... A study or series is seen
when one of its instances is.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

Attributes = dict[str, Any]
Level = Literal["study", "series", "instance"]
EVERYTHING = "1"
#: A file up to this size is not put on disk before it is certain to be kept.
_HELD_BYTES = 256 * 1024

#: The searchable columns of each level and the tag that fills them.
COLUMNS: dict[Level, dict[str, str]] = {
    "study": {
        "study_instance_uid": "0020000D",
        "patient_id": "00100020",
        "patient_name": "00100010",
        "patient_birth_date": "00100030",
        "patient_sex": "00100040",
        "accession_number": "00080050",
        "referring_physician_name": "00080090",
        "study_date": "00080020",
        "study_time": "00080030",
        "study_description": "00081030",
        "study_id": "00200010",
    },
    "series": {
        "series_instance_uid": "0020000E",
        "modality": "00080060",
        "series_number": "00200011",
        "series_description": "0008103E",
        "manufacturer_model_name": "00081090",
        "performed_procedure_step_start_date": "00400244",
    },
    "instance": {
        "sop_instance_uid": "00080018",
        "sop_class_uid": "00080016",
        "instance_number": "00200013",
    },
}
#: Columns that a caller looks things up by; the others are scanned, which 100,000 studies bear.
_INDEXED = ("patient_id", "accession_number", "study_date", "patient_name", "series_instance_uid", "modality")

_UIDS = ("study_instance_uid", "series_instance_uid", "sop_instance_uid")


def _searchable(level: Level) -> str:
    """The columns of one level's table that are not part of its key."""
    return ", ".join(f"{name} TEXT" for name in COLUMNS[level] if name not in _UIDS)


_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS studies (
    key INTEGER PRIMARY KEY AUTOINCREMENT, study_instance_uid TEXT NOT NULL UNIQUE,
    {_searchable("study")}, attributes TEXT NOT NULL, changed_at_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS series (
    key INTEGER PRIMARY KEY AUTOINCREMENT, study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    {_searchable("series")}, attributes TEXT NOT NULL, changed_at_s REAL NOT NULL,
    UNIQUE (study_instance_uid, series_instance_uid));
CREATE TABLE IF NOT EXISTS instances (
    key INTEGER PRIMARY KEY AUTOINCREMENT, study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    sop_instance_uid TEXT NOT NULL, {_searchable("instance")}, attributes TEXT NOT NULL,
    transfer_syntax_uid TEXT NOT NULL, path TEXT NOT NULL, size_bytes INTEGER NOT NULL, sha256 TEXT NOT NULL,
    received_at_s REAL NOT NULL, rejection TEXT, pending_until_s REAL, notes TEXT NOT NULL,
    UNIQUE (study_instance_uid, series_instance_uid, sop_instance_uid));
CREATE INDEX IF NOT EXISTS instances_by_sop ON instances (sop_instance_uid);
CREATE INDEX IF NOT EXISTS instances_pending ON instances (pending_until_s) WHERE pending_until_s IS NOT NULL;
CREATE TABLE IF NOT EXISTS garbage (path TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, free_at_s REAL NOT NULL);
CREATE INDEX IF NOT EXISTS garbage_by_time ON garbage (free_at_s);
CREATE TABLE IF NOT EXISTS journal (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, at_s REAL NOT NULL, entry TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS journal_by_time ON journal (at_s);
""" + "".join(
    f"CREATE INDEX IF NOT EXISTS {table}_by_{column} ON {table} ({column});\n"
    for table, level in (("studies", "study"), ("series", "series"))
    for column in COLUMNS[level]  # type: ignore[index]  # mypy widens the literal in a comprehension
    if column in _INDEXED
)


@dataclass(frozen=True)
class NewInstance:
    """One instance as a dialect wants it indexed; the UIDs are keys, the attributes are what QIDO may return."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    study: Attributes
    series: Attributes
    instance: Attributes
    received_at_s: float
    pending_until_s: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InstanceRow:
    """One stored instance. ``key`` grows with every store, so it orders instances by arrival.

    ``rejection`` and ``pending_until_s`` are None for an ordinary instance; what they mean is the dialect's business.
    """

    key: int
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: Path
    size_bytes: int
    sha256: str
    received_at_s: float
    rejection: str | None
    pending_until_s: float | None
    attributes: Attributes
    notes: dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """One filter of a search: ``column`` is a name of `COLUMNS` (of the level searched or one above).

    ``operator``: ``=``, ``<=``, ``>=``, ``GLOB`` (SQLite's ``*`` and ``?``), ``IN`` (then ``value`` is a tuple), or
    ``WORDS`` (the words of ``value`` follow each other in the column; the last may be the start of a longer one).
    The column ``modalities_in_study`` compares with the Modality of each of the study's series.
    """

    column: str
    operator: Literal["=", "<=", ">=", "GLOB", "IN", "WORDS"]
    value: str | tuple[str, ...]


@dataclass(frozen=True)
class SearchHit:
    """One hit of a search, with the UIDs and attributes of its level and of every level above it."""

    key: int
    study_instance_uid: str
    series_instance_uid: str | None
    sop_instance_uid: str | None
    study: Attributes
    series: Attributes
    instance: Attributes
    changed_at_s: float


@dataclass(frozen=True)
class Tally:
    """What lies below a study, a series, or in the whole store (``studies`` counts there)."""

    studies: int
    series: int
    instances: int
    size_bytes: int
    modalities: tuple[str, ...]


class Duplicate(Exception):
    """The triple of UIDs is taken, by ``row``."""

    def __init__(self, row: InstanceRow) -> None:
        super().__init__(row.sop_instance_uid)
        self.row = row


def latest_wins(_old: Attributes, new: Attributes) -> Attributes:
    """A study or series shows what its newest instance says; an empty value never replaces one."""
    return {**_old, **{tag: element for tag, element in new.items() if element.get("Value") or tag not in _old}}


def first_wins(old: Attributes, new: Attributes) -> Attributes:
    """A study or series keeps what it was opened with; later instances only fill what was empty."""
    return {**new, **{tag: element for tag, element in old.items() if element.get("Value") or tag not in new}}


def first_value(element: Mapping[str, Any] | None) -> str | None:
    """The first value of a DICOM JSON element as text, or None when it has none."""
    values = (element or {}).get("Value")
    if not values or values[0] is None:
        return None
    value = values[0]
    return str(value.get("Alphabetic", "")) if isinstance(value, dict) else str(value)


class Spool:
    """A file on its way in: written in chunks, hashed as it passes, kept by `Store.add` or thrown away.

    Small ones stay in memory until `Store.add` or somebody who asks for ``path`` needs them on disk; ``source`` is
    whichever there is, for who only wants to read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._held: list[bytes] = []
        self._file: BinaryIO | None = None
        self._on_disk = False
        self.size_bytes = 0

    def write(self, chunk: bytes | memoryview) -> None:
        self._digest.update(chunk)
        self.size_bytes += len(chunk)
        if self._on_disk:
            assert self._file is not None
            self._file.write(chunk)
            return
        self._held.append(bytes(chunk))
        if self.size_bytes > _HELD_BYTES:
            self._put_on_disk(self._path)

    def _put_on_disk(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._on_disk = True
        self._file.write(b"".join(self._held))
        self._held = []

    @property
    def path(self) -> Path:
        if not self._on_disk:
            self._put_on_disk(self._path)
        return self._path

    @property
    def source(self) -> Path | bytes:
        if self._on_disk:
            return self._path
        self._held = [b"".join(self._held)]
        return self._held[0]

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def keep_as(self, path: Path) -> None:
        """Come to rest at ``path``. One that is cut short by a kill is on no index."""
        if self._on_disk:
            self.close()
            self._path.rename(path)
        else:
            self._put_on_disk(path)
            self.close()

    def rest(self, *, in_memory: bool) -> None:
        """Nothing more will be written; hold no open file, and no bytes either unless ``in_memory``."""
        if not in_memory and not self._on_disk:
            self._put_on_disk(self._path)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def discard(self) -> None:
        self._held = []
        self.close()
        if self._on_disk:
            self._path.unlink(missing_ok=True)


class Store:
    """One dialect's index and files below ``folder``.

    ``fold`` makes the text that filters are compared with, from a tag and its first value (upper case, no accents ...);
    ``merge`` says what a study or series looks like after one more instance.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fold: Callable[[str, str], str] = lambda _tag, text: text.strip(),
        merge: Callable[[Attributes, Attributes], Attributes] = latest_wins,
    ) -> None:
        self.folder = folder
        self.fold = fold
        self._merge = merge
        self._spools = folder / "spool"
        self._files = folder / "files"
        self._spools.mkdir(parents=True, exist_ok=True)
        self._files.mkdir(exist_ok=True)
        self._folders: set[str] = set()
        for left_behind in self._spools.iterdir():
            left_behind.unlink()
        #: What a dialect knows beside the instances, until the store is emptied.
        self.memory: dict[Any, Any] = {}
        self.database = sqlite3.connect(folder / "index.sqlite", isolation_level=None, cached_statements=256)
        self.database.row_factory = sqlite3.Row
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA synchronous = NORMAL")
        self.database.execute("PRAGMA cache_size = -16000")
        # Checkpoints wait for the disk; fewer, larger ones cost a burst of stores less.
        self.database.execute("PRAGMA wal_autocheckpoint = 8000")
        self.database.create_function("words", 1, _words, deterministic=True)
        self.database.executescript(_SCHEMA)

    def close(self) -> None:
        self.database.close()

    # -- in -------------------------------------------------------------------------------------------------------

    def spool(self) -> Spool:
        """A new file for bytes that are just arriving."""
        return Spool(self._spools / uuid.uuid4().hex)

    def add(self, new: NewInstance, spool: Spool) -> InstanceRow:
        """Keep ``spool`` as ``new``: visible to every later call when this returns.

        Raises
        ------
        Duplicate
            Study, series and SOP Instance UID are taken together already; ``spool`` is still the caller's to discard.
        """
        taken = self._get(new.study_instance_uid, new.series_instance_uid, new.sop_instance_uid)
        if taken is not None:
            raise Duplicate(taken)
        name = uuid.uuid4().hex
        path = f"{name[:2]}/{name}"
        if path[:2] not in self._folders:
            (self._files / path[:2]).mkdir(exist_ok=True)
            self._folders.add(path[:2])
        spool.keep_as(self._files / path)
        with self.transaction():
            self._upsert("study", (new.study_instance_uid,), new.study, new.received_at_s)
            self._upsert("series", (new.study_instance_uid, new.series_instance_uid), new.series, new.received_at_s)
            key = self._insert_instance(new, spool, path)
        return InstanceRow(
            key=key,
            study_instance_uid=new.study_instance_uid,
            series_instance_uid=new.series_instance_uid,
            sop_instance_uid=new.sop_instance_uid,
            sop_class_uid=new.sop_class_uid,
            transfer_syntax_uid=new.transfer_syntax_uid,
            path=self._files / path,
            size_bytes=spool.size_bytes,
            sha256=spool.sha256,
            received_at_s=new.received_at_s,
            rejection=None,
            pending_until_s=new.pending_until_s,
            attributes=new.instance,
            notes=dict(new.notes),
        )

    def _insert_instance(self, new: NewInstance, spool: Spool, path: str) -> int:
        values = {
            "study_instance_uid": new.study_instance_uid,
            "series_instance_uid": new.series_instance_uid,
            "sop_instance_uid": new.sop_instance_uid,
            "sop_class_uid": new.sop_class_uid,
            "instance_number": self._folded("00200013", new.instance),
            "attributes": json.dumps(new.instance),
            "transfer_syntax_uid": new.transfer_syntax_uid,
            "path": path,
            "size_bytes": spool.size_bytes,
            "sha256": spool.sha256,
            "received_at_s": new.received_at_s,
            "pending_until_s": new.pending_until_s,
            "notes": json.dumps(dict(new.notes)),
        }
        key = self.database.execute(_insert("instances", values), values).lastrowid
        assert key is not None
        return key

    def _upsert(self, level: Level, uids: tuple[str, ...], attributes: Attributes, at_s: float) -> None:
        table = "studies" if level == "study" else "series"
        identity = dict(zip(_UIDS, uids, strict=False))
        where = " AND ".join(f"{name} = :{name}" for name in identity)
        old = self.database.execute(f"SELECT key, attributes FROM {table} WHERE {where}", identity).fetchone()
        merged = self._merge(json.loads(old["attributes"]), attributes) if old else attributes
        text = json.dumps(merged)
        if old and text == old["attributes"]:
            return
        values: dict[str, Any] = {**identity, "attributes": text, "changed_at_s": at_s}
        for column, tag in COLUMNS[level].items():
            values.setdefault(column, self._folded(tag, merged))
        if old is None:
            self.database.execute(_insert(table, values), values)
        else:
            assignments = ", ".join(f"{name} = :{name}" for name in values)
            self.database.execute(f"UPDATE {table} SET {assignments} WHERE key = :key", {**values, "key": old["key"]})

    def _folded(self, tag: str, attributes: Attributes) -> str | None:
        text = first_value(attributes.get(tag))
        return None if text is None else self.fold(tag, text)

    # -- look up --------------------------------------------------------------------------------------------------

    def _get(self, study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str) -> InstanceRow | None:
        found = self.instances(
            study_instance_uid=study_instance_uid,
            series_instance_uid=series_instance_uid,
            sop_instance_uid=sop_instance_uid,
        )
        return found[0] if found else None

    def instances(
        self,
        *,
        study_instance_uid: str | None = None,
        series_instance_uid: str | None = None,
        sop_instance_uid: str | None = None,
        view: str = EVERYTHING,
    ) -> list[InstanceRow]:
        """The instances below what is named, oldest first."""
        uids = zip(_UIDS, (study_instance_uid, series_instance_uid, sop_instance_uid), strict=True)
        named = {name: uid for name, uid in uids if uid is not None}
        where = " AND ".join([f"({view})", *(f"{name} = :{name}" for name in named)])
        return [
            self._row(row)
            for row in self.database.execute(f"SELECT * FROM instances WHERE {where} ORDER BY key", named)
        ]

    def by_sop(self, sop_instance_uid: str, view: str = EVERYTHING) -> list[InstanceRow]:
        """Every instance of that SOP Instance UID, in whatever study; oldest first."""
        return self.instances(sop_instance_uid=sop_instance_uid, view=view)

    def due(self, now_s: float) -> list[InstanceRow]:
        """The pending instances whose time has come; by their own index, since this is asked before every search."""
        sql = "SELECT * FROM instances INDEXED BY instances_pending WHERE pending_until_s <= ?"
        return [self._row(row) for row in self.database.execute(sql, (now_s,))]

    def _row(self, row: sqlite3.Row) -> InstanceRow:
        return InstanceRow(
            key=row["key"],
            study_instance_uid=row["study_instance_uid"],
            series_instance_uid=row["series_instance_uid"],
            sop_instance_uid=row["sop_instance_uid"],
            sop_class_uid=row["sop_class_uid"],
            transfer_syntax_uid=row["transfer_syntax_uid"],
            path=self._files / row["path"],
            size_bytes=row["size_bytes"],
            sha256=row["sha256"],
            received_at_s=row["received_at_s"],
            rejection=row["rejection"],
            pending_until_s=row["pending_until_s"],
            attributes=json.loads(row["attributes"]),
            notes=json.loads(row["notes"]),
        )

    def search(
        self,
        level: Level,
        conditions: Sequence[Condition] = (),
        *,
        view: str = EVERYTHING,
        limit: int = -1,
        offset: int = 0,
        ascending: bool = False,
    ) -> list[SearchHit]:
        """The objects of ``level`` that fulfil all ``conditions``, newest first (oldest first if ``ascending``)."""
        clauses, parameters = _clauses(conditions)
        clauses.append(_seen(level, view))
        direction = "ASC" if ascending else "DESC"
        sql = (
            f"SELECT {_SELECTED[level]} FROM {_JOINED[level]} WHERE {' AND '.join(clauses)} "
            f"ORDER BY {_LETTER[level]}.key {direction} LIMIT ? OFFSET ?"
        )
        return [_found(row) for row in self.database.execute(sql, [*parameters, limit, offset])]

    def count(self, level: Level, conditions: Sequence[Condition] = (), *, view: str = EVERYTHING) -> int:
        """How many objects `search` would find without a limit."""
        clauses, parameters = _clauses(conditions)
        clauses.append(_seen(level, view))
        sql = f"SELECT count(*) FROM {_JOINED[level]} WHERE {' AND '.join(clauses)}"
        return int(self.database.execute(sql, parameters).fetchone()[0])

    def tally(
        self,
        study_instance_uid: str | None = None,
        series_instance_uid: str | None = None,
        *,
        view: str = EVERYTHING,
    ) -> Tally:
        """Counts below a study or series; without a UID, of the whole store."""
        named = {"study_instance_uid": study_instance_uid, "series_instance_uid": series_instance_uid}
        named = {name: uid for name, uid in named.items() if uid is not None}
        where = " AND ".join([f"({view})", *(f"{name} = :{name}" for name in named)])
        row = self.database.execute(
            "SELECT count(DISTINCT study_instance_uid), "
            "count(DISTINCT study_instance_uid || '/' || series_instance_uid), "
            f"count(*), coalesce(sum(size_bytes), 0) FROM instances WHERE {where}",
            named,
        ).fetchone()
        return Tally(row[0], row[1], row[2], row[3], self._modalities(named, view) if named else ())

    def _modalities(self, named: Mapping[str, str | None], view: str) -> tuple[str, ...]:
        where = " AND ".join([_seen("series", view), *(f"e.{name} = :{name}" for name in named)])
        found: dict[str, None] = {}
        for row in self.database.execute(f"SELECT attributes FROM series e WHERE {where} ORDER BY key", named):
            modality = first_value(json.loads(row["attributes"]).get("00080060"))
            if modality:
                found[modality] = None
        return tuple(found)

    # -- change ---------------------------------------------------------------------------------------------------

    def reject(self, keys: Sequence[int], code: str | None) -> None:
        """Mark instances as rejected with ``code`` (as the dialect writes it); None takes it back."""
        with self.transaction():
            self.database.executemany("UPDATE instances SET rejection = ? WHERE key = ?", [(code, key) for key in keys])

    def complete(self, keys: Sequence[int]) -> None:
        """End the pending state of instances."""
        with self.transaction():
            self.database.executemany(
                "UPDATE instances SET pending_until_s = NULL WHERE key = ?", [(key,) for key in keys]
            )

    def annotate(self, key: int, notes: Mapping[str, Any]) -> None:
        """Replace what a dialect remembers of one instance."""
        self.database.execute("UPDATE instances SET notes = ? WHERE key = ?", (json.dumps(dict(notes)), key))

    def delete(self, rows: Sequence[InstanceRow], *, free_at_s: float) -> None:
        """Forget instances at once, and series and studies that are empty then; bytes wait until ``free_at_s``."""
        with self.transaction():
            for row in rows:
                self.database.execute("DELETE FROM instances WHERE key = ?", (row.key,))
                self.database.execute(
                    "INSERT INTO garbage VALUES (?, ?, ?)",
                    (str(row.path.relative_to(self._files)), row.size_bytes, free_at_s),
                )
            for study, series in {(row.study_instance_uid, row.series_instance_uid) for row in rows}:
                self._drop_empty(study, series)

    def _drop_empty(self, study: str, series: str) -> None:
        below = "SELECT 1 FROM instances i WHERE i.study_instance_uid = ?1"
        self.database.execute(
            "DELETE FROM series WHERE study_instance_uid = ?1 AND series_instance_uid = ?2 "
            f"AND NOT EXISTS ({below} AND i.series_instance_uid = ?2)",
            (study, series),
        )
        self.database.execute(f"DELETE FROM studies WHERE study_instance_uid = ?1 AND NOT EXISTS ({below})", (study,))

    def purge(self, now_s: float) -> int:
        """Remove the files whose time has come; the bytes that were freed."""
        due = self.database.execute("SELECT * FROM garbage WHERE free_at_s <= ?", (now_s,)).fetchall()
        for row in due:
            (self._files / row["path"]).unlink(missing_ok=True)
            self.database.execute("DELETE FROM garbage WHERE path = ?", (row["path"],))
        return sum(row["size_bytes"] for row in due)

    def waiting_bytes(self) -> int:
        """Bytes of deleted instances that still lie on disk."""
        return int(self.database.execute("SELECT coalesce(sum(size_bytes), 0) FROM garbage").fetchone()[0])

    def reset(self) -> None:
        """Empty: no index row, no file, no journal, and nothing remembered."""
        self.memory.clear()
        paths = [row[0] for row in self.database.execute("SELECT path FROM instances UNION SELECT path FROM garbage")]
        with self.transaction():
            for table in ("studies", "series", "instances", "garbage", "journal"):
                self.database.execute(f"DELETE FROM {table}")
            self.database.execute("DELETE FROM sqlite_sequence")
        for path in paths:
            (self._files / path).unlink(missing_ok=True)

    # -- the journal: one line per thing that happened, for a dialect that publishes them -----

    def note(self, entry: Mapping[str, Any], *, at_s: float) -> int:
        """Append to the journal, by the microsecond; its sequence number."""
        cursor = self.database.execute(
            "INSERT INTO journal (at_s, entry) VALUES (?, ?)", (round(at_s, 6), json.dumps(dict(entry)))
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def last_note(self) -> tuple[int, float, dict[str, Any]] | None:
        """The newest entry of the journal."""
        row = self.database.execute("SELECT * FROM journal ORDER BY sequence DESC LIMIT 1").fetchone()
        return None if row is None else (row["sequence"], row["at_s"], json.loads(row["entry"]))

    def journal(self) -> Iterator[tuple[int, float, dict[str, Any]]]:
        """(sequence, time, entry), oldest first."""
        for row in self.database.execute("SELECT * FROM journal ORDER BY sequence"):
            yield row["sequence"], row["at_s"], json.loads(row["entry"])

    def transaction(self) -> _Transaction:
        """Several changes as one: all of them survive a kill, or none."""
        return _Transaction(self.database)


class _Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK; one inside another joins it."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._outermost = False

    def __enter__(self) -> None:
        self._outermost = not self._database.in_transaction
        if self._outermost:
            self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._outermost:
            self._database.execute("COMMIT" if kind is None else "ROLLBACK")


def _insert(table: str, values: Mapping[str, Any]) -> str:
    return f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})"


_LETTER: dict[Level, str] = {"study": "s", "series": "e", "instance": "i"}
_JOINED: dict[Level, str] = {
    "study": "studies s",
    "series": "series e JOIN studies s USING (study_instance_uid)",
    "instance": "instances i JOIN series e USING (study_instance_uid, series_instance_uid) "
    "JOIN studies s USING (study_instance_uid)",
}
_SELECTED: dict[Level, str] = {
    "study": "s.key AS key, s.study_instance_uid AS study_instance_uid, NULL AS series_instance_uid, "
    "NULL AS sop_instance_uid, s.attributes AS study, '{}' AS series, '{}' AS instance, s.changed_at_s AS changed_at_s",
    "series": "e.key AS key, e.study_instance_uid AS study_instance_uid, e.series_instance_uid AS series_instance_uid, "
    "NULL AS sop_instance_uid, s.attributes AS study, e.attributes AS series, '{}' AS instance, "
    "e.changed_at_s AS changed_at_s",
    "instance": "i.key AS key, i.study_instance_uid AS study_instance_uid, "
    "i.series_instance_uid AS series_instance_uid, i.sop_instance_uid AS sop_instance_uid, s.attributes AS study, "
    "e.attributes AS series, i.attributes AS instance, i.received_at_s AS changed_at_s",
}
_OWNER: dict[str, str] = {
    column: _LETTER[level] for level in ("instance", "series", "study") for column in COLUMNS[level]
}


def _clauses(conditions: Sequence[Condition]) -> tuple[list[str], list[Any]]:
    """SQL and parameters; only names of `COLUMNS` and fixed operators ever become SQL."""
    clauses: list[str] = []
    parameters: list[Any] = []
    for condition in conditions:
        if condition.column == "modalities_in_study":
            clause, values = _comparison("m.modality", condition)
            same = "m.study_instance_uid = s.study_instance_uid"
            clause = f"EXISTS (SELECT 1 FROM series m WHERE {same} AND {clause})"
        else:
            clause, values = _comparison(f"{_OWNER[condition.column]}.{condition.column}", condition)
        clauses.append(clause)
        parameters += values
    return clauses, parameters


def _comparison(column: str, condition: Condition) -> tuple[str, list[Any]]:
    if condition.operator == "IN":
        return f"{column} IN ({', '.join('?' * len(condition.value))})", list(condition.value)
    if condition.operator == "WORDS":
        return f"instr(words({column}), ?) > 0", [_words(str(condition.value)).rstrip(" ")]
    return f"{column} {condition.operator} ?", [condition.value]


def _words(text: str | None) -> str:
    """A person's name as words, each with a blank before it."""
    return "".join(f" {word}" for word in (text or "").replace("^", " ").replace("=", " ").split())


def _seen(level: Level, view: str) -> str:
    """A study or series is seen when one of its instances is."""
    if level == "instance":
        return f"({view})"
    letter = _LETTER[level]
    same = f"i.study_instance_uid = {letter}.study_instance_uid"
    if level == "series":
        same += f" AND i.series_instance_uid = {letter}.series_instance_uid"
    return f"EXISTS (SELECT 1 FROM instances i WHERE {same} AND ({view}))"


def _found(row: sqlite3.Row) -> SearchHit:
    return SearchHit(
        key=row["key"],
        study_instance_uid=row["study_instance_uid"],
        series_instance_uid=row["series_instance_uid"],
        sop_instance_uid=row["sop_instance_uid"],
        study=json.loads(row["study"]),
        series=json.loads(row["series"]),
        instance=json.loads(row["instance"]),
        changed_at_s=row["changed_at_s"],
    )
