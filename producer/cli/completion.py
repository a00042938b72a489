"""Shell completion that loads no command: the words of the command line are in ``words.json``, which is generated.

``python -m producer.cli.completion`` writes that file anew when commands or options have changed; a test compares. What
is known only when it is asked for (servers, open jobs, batches, dead letters) is read here, a bounded part of it, and
without a word where it cannot be read: a prompt is no place for an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import click
from click.shell_completion import CompletionItem

from producer.cli import demo

WORDS: Final = Path(__file__).with_name("words.json")
#: How long Redis may take to answer, and how many ids of open jobs, batches or dead letters are looked at.
_ANSWER_S: Final = 0.2
_LOOKED_AT: Final = 1000
_SHOWN: Final = 50
#: The values of these parameters are looked up.
_LOOKED_UP: Final = {
    "server": "server",
    "servers": "server",
    "from_server": "server",
    "to_server": "server",
    "mode": "mode",
    "job_id": "job",
    "job_ids": "job",
    "batch_id": "batch",
}
#: These too, where they are arguments.
_ARGUMENTS_LOOKED_UP: Final = {"name": "server", "plan": "batch"}


# --- the words ------------------------------------------------------------------------------------------------------


def described(command: click.Command, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A command with its options and sub-commands, as ``words.json`` has it."""
    found: dict[str, Any] = {
        "help": command.get_short_help_str(100),
        "params": [_param(one, path) for one in command.params],
    }
    if isinstance(command, click.Group):
        load = getattr(command, "load", command.commands.__getitem__)
        found["commands"] = {name: described(load(name), (*path, name)) for name in sorted(command.commands)}
    return found


def _param(param: click.Parameter, path: tuple[str, ...]) -> dict[str, Any]:
    is_argument = isinstance(param, click.Argument)
    values = _LOOKED_UP.get(str(param.name)) or (_ARGUMENTS_LOOKED_UP.get(str(param.name)) if is_argument else None)
    if values == "job" and path[:1] == ("dead",):
        values = "dead"
    told: dict[str, Any] = {
        "opts": [str(param.name)] if is_argument else list(param.opts),
        "argument": is_argument,
        "help": getattr(param, "help", None),
        "flag": bool(getattr(param, "is_flag", False)),
        "multiple": param.multiple,
        "nargs": param.nargs,
        "choices": list(param.type.choices) if isinstance(param.type, click.Choice) else _kinds(param),
        "values": "file" if isinstance(param.type, click.Path) else values,
    }
    return {name: value for name, value in told.items() if value not in (None, False, [])}


def _kinds(param: click.Parameter) -> list[str]:
    if param.name != "kind":
        return []
    from producer.cli.jobs import KINDS  # noqa: PLC0415  # when the words are written, not when they are asked for

    return list(KINDS)


def stand_in(name: str, words: Mapping[str, Any]) -> click.Command:
    """A command that completes as the one that ``words`` describe, and does nothing."""
    params = [_stand_in_param(one) for one in words["params"]]
    if "commands" not in words:
        return click.Command(name, params=params, short_help=words["help"])
    commands = {called: stand_in(called, one) for called, one in words["commands"].items()}
    return click.Group(name, commands=commands, params=params, short_help=words["help"])


def _stand_in_param(words: Mapping[str, Any]) -> click.Parameter:
    complete = _completion(words.get("values"), words.get("choices", []))
    if words.get("argument"):
        return click.Argument(words["opts"], required=False, nargs=words["nargs"], shell_complete=complete)
    return click.Option(
        words["opts"],
        help=words.get("help"),
        is_flag=words.get("flag", False),
        multiple=words.get("multiple", False),
        shell_complete=complete,
    )


def _completion(values: str | None, choices: list[str]) -> Callable[..., list[Any]]:
    if values == "file":
        return _files
    look_up: Callable[[str], list[str]] = LOOKED_UP.get(str(values)) or (lambda _: choices)
    return lambda _ctx, _param, incomplete: [one for one in look_up(incomplete) if one.startswith(incomplete)][:_SHOWN]


def _files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    """That the shell shall complete the name of a file."""
    return [CompletionItem(incomplete, type="file")]


def light_commands() -> dict[str, click.Command]:
    """All commands of ``pacs`` as completion needs them."""
    main = stand_in("pacs", json.loads(WORDS.read_text(encoding="utf-8")))
    return dict(cast(click.Group, main).commands)


# --- what is looked up ------------------------------------------------------------------------------------------------


def server_names(_: str = "") -> list[str]:
    """The servers of the settings, in their order."""
    servers = _settings().get("servers")
    found = servers if isinstance(servers, list) else []
    return [str(one["name"]) for one in found if isinstance(one, dict) and "name" in one]


def _modes(_: str) -> list[str]:
    return ["either", "both", *server_names()]


def _open_jobs(beginning: str) -> list[str]:
    return _listed("due", beginning, states=("queued", "running", "waiting"))


def _batches(beginning: str) -> list[str]:
    return _listed("batches", beginning, newest_first=True)


def _dead(beginning: str) -> list[str]:
    return _listed("dead", beginning, newest_first=True)


LOOKED_UP: Final[Mapping[str, Callable[[str], list[str]]]] = {
    "server": server_names,
    "mode": _modes,
    "job": _open_jobs,
    "batch": _batches,
    "dead": _dead,
}


def _settings() -> dict[str, Any]:
    """What is set, unchecked; {} where it cannot be read."""
    from courier.setting_files import SettingsError, read  # noqa: PLC0415  # completing an option needs none of it

    environ = dict(os.environ)
    demos = demo.running_demos() if demo.is_wanted(environ) else []
    if len(demos) == 1:
        environ["PACS_CONFIG"] = str(demos[0])
    try:
        return read(environ)
    except SettingsError:
        return {}


def _listed(key: str, beginning: str, *, newest_first: bool = False, states: Iterable[str] = ()) -> list[str]:
    """The ids in a list of the ledger that begin so; of jobs, those in one of ``states``."""
    import redis  # noqa: PLC0415  # as above

    queue = _settings().get("queue")
    given = queue if isinstance(queue, dict) else {}
    url, prefix = str(given.get("ledger_url", "redis://localhost:6379/2")), given.get("key_prefix", "courier:")
    times = {"socket_timeout": _ANSWER_S, "socket_connect_timeout": _ANSWER_S}
    try:
        with redis.Redis.from_url(url, decode_responses=True, **times) as client:
            ids = cast(list[str], client.zrange(f"{prefix}{key}", 0, _LOOKED_AT - 1, desc=newest_first))
            ids = [one for one in ids if one.startswith(beginning) and one.isprintable()]
            if not states:
                return ids
            with client.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hget(f"{prefix}job:{job_id}", "state")
                return [job_id for job_id, state in zip(ids, pipe.execute(), strict=True) if state in states]
    except (redis.RedisError, OSError, ValueError):
        return []


def write() -> None:
    from producer.cli import main  # noqa: PLC0415

    WORDS.write_text(json.dumps(described(main), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
