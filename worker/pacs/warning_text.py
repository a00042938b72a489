"""What a ``Warning`` header (RFC 7234 5.5) says, as far as it can be no patient's data.

Archives put the text of an exception there, and an exception may quote a value of the file. So only words of a fixed
vocabulary, names of exceptions, codes and tags pass; all else becomes "…".
"""

from __future__ import annotations

import re

MOST_CHARACTERS = 200
_GAP = "…"
_QUOTED = re.compile(r'"(.*)"', re.DOTALL)
#: What may quote a value: whatever stands in quotes or brackets, but for a tag, a length and a name of an encoding.
_QUOTES = re.compile(
    r"""'[^']*'|"[^"]*"|\[[^\]]*\]|\{[^}]*\}|<[^>]*>|\((?![0-9A-Fa-f]{4},[0-9A-Fa-f]{4}\)|255\))[^)]*\)"""
)
_PIECES = re.compile(
    r"""
    \([0-9A-Fa-f]{4},[0-9A-Fa-f]{4}\)                        # a tag
    | [A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z_$][A-Za-z0-9_$]*)+     # a name of Java
    | [A-Z][A-Za-z]*(?:Exception|Error)\b
    | ARJUNA[0-9]{6} | \(255\) | 0x00\b | UTF-?8
    | [A-Za-z]+ | [.:,;-] | \S
    """,
    re.VERBOSE,
)
_IS_TECHNICAL = re.compile(
    r"""
    \(.*\) | ARJUNA[0-9]+ | 0x00 | UTF-?8 | [A-Z][A-Za-z]*(?:Exception|Error)
    | (?:javax?|jakarta|org\.(?:dcm4chee?3?|postgresql|hibernate|jboss|wildfly))(?:\.[a-z0-9]+)*
      \.[A-Z][A-Za-z]*(?:Exception|Error)
    """,
    re.VERBOSE,
).fullmatch
_VOCABULARY = """
a accessable accessible after already an and arrived as at attribute available batch be before body byte bytes cannot
caused character closed commit configured connection constraint could data database dataset decode delimiter dicom
does duplicate element encoding end entry error exceeded expected failed field file for format found from given group
header in index input invalid is item key left length limit line long media meta missing must negative no not null
object of on or out over parse pixel position premature reached read reason record remaining representation sequence
size space storage store stream string study syntax system systems table tag than the there this threshold to too
transaction transfer truncated type unexpected unique unknown unreadable unsupported value values varying violates vr
was were while with write written zero
"""
_WORDS = frozenset(_VOCABULARY.split())


def warning_text(header: str | None) -> str:
    """The text of ``header``: one printable line of at most 200 characters; "" if nothing of it may be shown."""
    match = _QUOTED.search(header or "")
    if match is None:
        return ""
    told: list[str] = []
    for piece in _PIECES.findall(_QUOTES.sub(f" {_GAP} ", match[1])):
        shown = piece if _may_be_shown(piece) else _GAP
        if shown in ".:,;-" and (not told or told[-1] == _GAP or told[-1] in ".:,;-"):
            continue
        if not (shown == _GAP and told and told[-1] == _GAP):
            told.append(shown)
    text = re.sub(r" ([.:,;])", r"\1", " ".join(told)).strip(" .:,;-")
    return text[:MOST_CHARACTERS] if any(map(str.isalnum, text)) else ""


def _may_be_shown(piece: str) -> bool:
    return piece in ".:,;-" or piece.lower() in _WORDS or bool(_IS_TECHNICAL(piece))
