"""Breaking bytes: a seed and a source of randomness give a case. Knows no format but its usual lengths and brackets."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

MAX_BYTES = 256 * 1024
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
_SIGNS = '@?#%\\:,[{"'
_WORDS = ("://", "/../", "--", "null", "NaN", "1e999", "-0", "\\ud800", "\u2100", "\u0660")
_TOKENS = (
    *(token.encode() for token in (*_SIGNS, *_WORDS)),
    *(b"\0", b"\r\n", b"\r\n\r\n", b"\xff", b"\xed\xa0\x80", b"9" * 400),
    *(b"SQ\0\0\xff\xff\xff\xff", b"UN\0\0\xff\xff\xff\xff"),
    *(b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\xfe\xff\xdd\xe0\0\0\0\0"),
)
_NESTS = ((b"[", b"]"), (b'{"a":', b"}"), (b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b""))

_Mutation = Callable[[bytearray, random.Random], None]


def mutated(seed: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """``seed`` after a few mutations, usually one or two; at most `MAX_BYTES` long."""
    case = bytearray(seed)
    for _ in range(min(1 + int(rng.expovariate(0.7)), 12)):
        if rng.random() < 0.1:
            _splice(case, rng.choice(seeds), rng)
        else:
            rng.choice(_MUTATIONS)(case, rng)
    return bytes(case[:MAX_BYTES])


def _at(case: bytearray, rng: random.Random) -> int:
    """A place, early ones more often: that is where structure is."""
    return min(rng.randrange(len(case) + 1), rng.randrange(len(case) + 1))


def _flip(case: bytearray, rng: random.Random) -> None:
    if case:
        case[min(_at(case, rng), len(case) - 1)] ^= 1 << rng.randrange(8)


def _number(case: bytearray, rng: random.Random) -> None:
    at, width = _at(case, rng), rng.choice((1, 2, 4))
    number = rng.choice((*_NUMBERS, len(case), rng.getrandbits(32))) % 2 ** (8 * width)
    case[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))


def _token(case: bytearray, rng: random.Random) -> None:
    at, token = _at(case, rng), rng.choice(_TOKENS)
    case[at : at + rng.choice((0, len(token)))] = token


def _cut(case: bytearray, rng: random.Random) -> None:
    at = _at(case, rng)
    del case[at : at + int(rng.expovariate(1 / 16)) + 1]


def _truncate(case: bytearray, rng: random.Random) -> None:
    del case[rng.randrange(len(case) + 1) :]


def _repeat(case: bytearray, rng: random.Random) -> None:
    at = _at(case, rng)
    piece = bytes(case[at : at + int(rng.expovariate(1 / 32)) + 1])
    case[at:at] = piece * min(rng.choice((1, 2, 100, 10_000)), MAX_BYTES // (len(piece) + 1))


def _nest(case: bytearray, rng: random.Random) -> None:
    """Something put into very many brackets."""
    begin, end = rng.choice(_NESTS)
    depth, at = rng.choice((2, 100, rng.randrange(850, 1_000), 5_000)), _at(case, rng)
    until = min(at + rng.randrange(32), len(case))
    case[until:until] = end * depth
    case[at:at] = begin * depth


def _splice(case: bytearray, other: bytes, rng: random.Random) -> None:
    case[_at(case, rng) :] = other[rng.randrange(len(other) + 1) :]


_MUTATIONS: tuple[_Mutation, ...] = (_flip, _flip, _number, _number, _token, _token, _cut, _truncate, _repeat, _nest)
