"""How a job ended, in one line: for Flower's list of tasks, events and the worker's log.

No metadata, no patient and no sentence of a server stands here: what is shown are outcomes, counts, names of servers,
the study and the link to the viewer. `facts_in` reads the last two out of a line again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from courier.redaction import printable
from courier.urls import NOT_IN_URL

#: Between the parts of a line.
SEPARATOR: Final = " · "
#: So many servers of a result are named.
_SERVERS_SHOWN: Final = 10
_LENGTH: Final = 1000
_STUDY: Final = re.compile(r"(?:^| · )study ([0-9.]{1,64})(?= · |$)")
_LINK: Final = re.compile(r"(?:^| · )(https?://\S+)(?= · |$)")
#: What is said of the servers that answered so; any other status follows the server's name.
_ON: Final[Mapping[str, str]] = {
    "found": "found on {}",
    "deleted": "deleted on {}",
    "hidden": "hidden on {}",
    "would_delete": "would delete on {}",
    "would_hide": "would hide on {}",
    "not_there": "not on {}",
    "refused": "refused by {}",
    "unavailable": "no answer from {}",
    "not_asked": "not asked: {}",
}
#: What an item of a batch has become when all went well.
_DONE: Final[Mapping[str, str]] = {
    "upload": "stored",
    "delete": "deleted",
    "download": "downloaded",
    "migrate": "copied",
}

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a page shows of a result beside its line. ``links`` are viewer links by the server that they lead to."""

    servers: Sequence[str] = ()
    study_uid: str = ""
    links: Sequence[tuple[str, str]] = ()


def shown_result(result: Result) -> str:
    """How the job with this result ended, such as ``stored on msdicom · study 1.2.3 · https://viewer…``."""
    say = _SAYINGS.get(str(result.get("operation")), _servers)
    facts = facts_of(result)
    parts = (
        say(result),
        _not_asked(result),
        f"study {facts.study_uid}" if facts.study_uid else "",
        facts.links[0][1] if facts.links else "",
    )
    return printable(SEPARATOR.join(part for part in parts if part), limit=_LENGTH)


def shown_failure(error: Mapping[str, Any], *, refused: bool) -> str:
    """The same of a job that failed with this error (`CourierError.payload`), refused or a dead letter."""
    code, server = str(error.get("code") or "error"), error.get("server_name")
    ended = "cancelled" if code == "cancelled" else f"refused ({code})" if refused else f"dead letter ({code})"
    where = f" on {server}" if server else ""
    return printable(f"{ended}{where}: {error.get('message') or 'no reason was given'}", limit=_LENGTH)


def facts_of(result: Result) -> Facts:
    """Servers, study and viewer links of a result; only links of http and https, without user and password."""
    places = [result, *_rows(result, "servers")]
    servers = dict.fromkeys(str(one["server_name"]) for one in places if one.get("server_name"))
    study = next((str(one["study_uid"]) for one in places if one.get("study_uid")), "")
    links = {
        url: str(one.get("server_name") or "") for one in places if (url := web_link(str(one.get("viewer_url") or "")))
    }
    return Facts(tuple(servers), study, tuple((server, url) for url, server in links.items()))


def web_link(url: str) -> str:
    """``url`` without user and password, if a page may link to it: of http or https, and nothing that hides in it."""
    if NOT_IN_URL.search(url) or re.search(r"\s", url) or not url.isprintable():
        return ""
    try:
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            return ""
    except ValueError:
        return ""
    return split._replace(netloc=split.netloc.rpartition("@")[2]).geturl()


def facts_in(line: str) -> Facts:
    """Study and viewer link that a line of `shown_result` says, for a reader who has no more than the line."""
    study, link = _STUDY.search(line), _LINK.search(line)
    url = web_link(link[1]) if link else ""
    return Facts(study_uid=study[1] if study else "", links=(("", url),) if url else ())


def shortened(line: str) -> str:
    """A line for a narrow column: without the link, and only the ends of a long UID."""
    line = _LINK.sub("", line)
    return _STUDY.sub(lambda found: found[0].replace(found[1], _short_uid(found[1])), line)


def ending(line: str) -> str:
    """A line without its study and link, for a page that shows these apart."""
    return _STUDY.sub("", _LINK.sub("", line))


def _short_uid(uid: str) -> str:
    return uid if len(uid) <= 20 else f"{uid[:8]}…{uid[-8:]}"


# --- what each operation says -------------------------------------------------------------------------------------


def _rows(result: Result, name: str) -> list[Result]:
    listed = result.get(name)
    return [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []


def _names(names: Iterable[object]) -> str:
    listed = [str(name) for name in names if name]
    more = [f"and {len(listed) - _SERVERS_SHOWN} more"] if len(listed) > _SERVERS_SHOWN else []
    return ", ".join([*listed[:_SERVERS_SHOWN], *more])


def _plain_status(status: object) -> str:
    return str(status or "").replace("_", " ")


def _at_one(done: str) -> Callable[[Result], str]:
    return lambda result: f"{_plain_status(result.get('status')) or done} {_WHERE[done]} {result.get('server_name')}"


_WHERE: Final = {"stored": "on", "downloaded": "from"}


def _by_status(result: Result) -> str:
    """Servers by how they answered: ``deleted on msdicom, refused by dcm4chee``."""
    groups: dict[str, list[object]] = {}
    for one in _rows(result, "servers"):
        groups.setdefault(str(one.get("status") or ""), []).append(one.get("server_name"))
    said = (_ON.get(status, f"{_plain_status(status)}: {{}}").format(_names(names)) for status, names in groups.items())
    return ", ".join(said)


def _each(result: Result) -> str:
    """Each server with its status: ``msdicom up, dcm4chee not responding``."""
    named = (f"{one.get('server_name')} {_plain_status(one.get('status'))}" for one in _rows(result, "servers"))
    return _names(named)


def _looked_up(result: Result) -> str:
    what = f"{result.get('level')} " if result.get("operation") == "metadata" and result.get("level") else ""
    return f"{what and 'metadata of the ' + what}{_by_status(result)}"


def _listed(result: Result) -> str:
    count = len(_rows(result, "studies"))
    return SEPARATOR.join(filter(None, (f"listed {count} {'study' if count == 1 else 'studies'}", _each(result))))


def _downloaded(result: Result) -> str:
    count = result.get("instances")
    images = f"{SEPARATOR}{count:,} {'image' if count == 1 else 'images'}" if isinstance(count, int) else ""
    return _at_one("downloaded")(result) + images


def _audited(result: Result) -> str:
    servers = _names(one.get("server_name") for one in _rows(result, "servers"))
    return f"{result.get('split', 0)} of {result.get('studies', 0)} studies split{SEPARATOR}audited {servers}"


def _traced(result: Result) -> str:
    present = result.get("present")
    names = _names(present) if isinstance(present, list) else ""
    return f"traced{SEPARATOR}on {names}" if names else f"traced{SEPARATOR}on no server"


def _batch(result: Result) -> str:
    """``upload batch done · 2 of 3 stored, 1 failed · msdicom``."""
    totals = result.get("totals")
    counts = {str(name): n for name, n in totals.items() if n} if isinstance(totals, Mapping) else {}
    kind = str(result.get("kind") or "")
    done = _DONE.get(kind, "")
    items = result.get("items") or 0
    said = [f"{counts.pop(done, 0)} of {items} {done}"] if done else [f"{items} items"]
    said += [f"{n} {_plain_status(name)}" for name, n in counts.items()]
    title = f"{kind} batch {result.get('state') or ''}".strip()
    return SEPARATOR.join(filter(None, (title, ", ".join(said), _servers(result))))


def _delete_all(result: Result) -> str:
    """``deleted 3 of 5 studies, 2 refused · msdicom``; the rows of servers hold the counts."""
    rows, items = _rows(result, "servers"), result.get("items") or 0
    if result.get("status") == "planned":
        return f"would delete {items} {'study' if items == 1 else 'studies'}{SEPARATOR}{_servers(result)}"
    found = {name: sum(int(row.get(name) or 0) for row in rows) for name in ("deleted", "hidden", "refused", "failed")}
    gone = found.pop("deleted") + found["hidden"]
    others = "".join(f", {n} {name}" for name, n in found.items() if n)
    return f"deleted {gone} of {items} studies{others}{SEPARATOR}{_servers(result)}"


def _chunk(result: Result) -> str:
    return f"piece {result.get('chunk')} of batch {result.get('batch_id')} ({result.get('pass')})"


def _servers(result: Result) -> str:
    listed = _rows(result, "servers") or [result]
    return _names(one.get("server_name") for one in listed)


def _not_asked(result: Result) -> str:
    names = result.get("not_asked")
    return f"not asked: {_names(names)}" if isinstance(names, list) and names else ""


_SAYINGS: Final[Mapping[str, Callable[[Result], str]]] = {
    "upload": _at_one("stored"),
    "download": _downloaded,
    "exists": _looked_up,
    "metadata": _looked_up,
    "delete": _by_status,
    "delete_all": _delete_all,
    "status": _each,
    "storage": _each,
    "database": _each,
    "list_studies": _listed,
    "audit": _audited,
    "trace": _traced,
    "batch": _batch,
    "batch_chunk": _chunk,
}
