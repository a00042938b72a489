"""``python -m worker.flower``: Flower on this machine alone, and on a network only behind a password.

What it shows of jobs is redacted, but from its pages and its API workers can be stopped and jobs sent. Everything
beside the address and the pages that ``flowerconfig.py`` adds is Flower's own: its options, and its ``FLOWER_…``
variables.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

#: The file that Flower executes at its start: our pages, rows and templates.
CONFIG: Final = Path(__file__).with_name("flowerconfig.py")
#: What its list of tasks shows: the redacted job and its result too, of which Flower's default leaves the job out.
COLUMNS: Final = "name,state,result,received,runtime,kwargs,worker,uuid"
_ADVICE: Final = (
    "set FLOWER_BASIC_AUTH to user:password (several with commas between), or FLOWER_AUTH_PROVIDER and in FLOWER_AUTH "
    "whom it lets in, or leave the address out"
)


def refusal(address: str, environ: Mapping[str, str]) -> str | None:
    """Why Flower may not listen on ``address``; None if it may."""
    given = environ.get("FLOWER_BASIC_AUTH", "")
    halves = [login.partition(":") for login in given.split(",")]
    if given and not all(user.strip() and password for user, _, password in halves):
        return "FLOWER_BASIC_AUTH is not user:password"
    if _is_loopback(address):
        return None
    # Without FLOWER_AUTH Flower takes everybody for logged in, whatever provider is named.
    if not given and not (environ.get("FLOWER_AUTH_PROVIDER") and environ.get("FLOWER_AUTH")):
        return f"{address or 'every address'} is not loopback, and Flower would ask nobody for a password: {_ADVICE}"
    if environ.get("FLOWER_UNAUTHENTICATED_API", "").lower() in ("1", "true", "yes", "on", "y", "t"):
        return f"{address} is not loopback: leave FLOWER_UNAUTHENTICATED_API out"
    return None


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.flower", allow_abbrev=False)
    parser.add_argument("--address", default=environ.get("FLOWER_ADDRESS", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(environ.get("FLOWER_PORT") or 5555))
    asked, rest = parser.parse_known_args(arguments)
    # On a command line every user of the machine reads it, and Flower would take it instead of the variable.
    if any(option.partition("=")[0].replace("_", "-").lstrip("-") in ("basic-auth", "auth", "conf") for option in rest):
        raise SystemExit("pacs-courier: name the password in FLOWER_BASIC_AUTH, not in an option or a file of options")
    reason = refusal(asked.address, environ)
    if reason:
        raise SystemExit(f"pacs-courier: {reason}")
    from worker.app import app  # noqa: PLC0415  # reads the settings, which no refusal needs

    options = [f"--address={asked.address}", f"--port={asked.port}", f"--conf={CONFIG}"]
    if "FLOWER_TASKS_COLUMNS" not in environ:
        options.append(f"--tasks-columns={COLUMNS}")
    app.start(["flower", *options, *rest])
