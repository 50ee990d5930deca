"""Which keys of a listing are meant: shell patterns over a million names at once.

`*` is any run of characters, `?` one, `[a-z]` one of a set and `[!a-z]` one outside it. A pattern without a slash is
for the name, one with a slash for the whole key, and `*` then crosses slashes. The case counts.
"""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

_NOTHING = r"[^\x{0}-\x{10FFFF}]"


def select(listing: pa.Table, *, include: Sequence[str], exclude: Sequence[str]) -> pa.Table:
    """Return the rows whose key matches a pattern of `include` (all without any) and none of `exclude`.

    Raises ValueError for an empty pattern.
    """
    for flag, patterns in (("include", include), ("exclude", exclude)):
        if "" in patterns:
            raise ValueError(f"{flag} ('') must not be empty; leave it out, or write '*' for all")
    if include:
        listing = listing.filter(matches(listing["key"], include))
    if exclude:
        listing = listing.filter(pc.invert(matches(listing["key"], exclude)))
    return listing


def matches(keys: pa.ChunkedArray, patterns: Sequence[str]) -> pa.ChunkedArray:
    """Return for each key (bool) whether at least one of the patterns matches it."""
    paths = [pattern for pattern in patterns if "/" in pattern]
    names = [pattern for pattern in patterns if "/" not in pattern]
    found = pa.chunked_array([pa.repeat(False, len(keys))])
    if paths:
        found = pc.or_(found, pc.match_substring_regex(keys, _regex(paths)))
    if names:
        last = pc.replace_substring_regex(keys, r"(?s)\A.*/", "")
        found = pc.or_(found, pc.match_substring_regex(last, _regex(names)))
    return found


def _regex(patterns: Sequence[str]) -> str:
    """Return one expression for all patterns, in the language of RE2, whose time grows with the text alone."""
    return rf"(?s)\A(?:{'|'.join(map(_translate, patterns))})\z"


def _translate(pattern: str) -> str:
    parts: list[str] = []
    place = 0
    while place < len(pattern):
        char = pattern[place]
        place += 1
        if char == "*":
            if not (parts and parts[-1] == ".*"):
                parts.append(".*")
        elif char == "?":
            parts.append(".")
        elif char == "[" and (end := _end_of_set(pattern, place)):
            parts.append(_set(pattern[place:end]))
            place = end + 1
        else:
            parts.append(_literal(char))
    return "".join(parts)


def _end_of_set(pattern: str, start: int) -> int:
    """Return where the set that begins at `start` closes, 0 where it does not: its bracket is then a plain one."""
    first = start + (pattern[start : start + 1] == "!")  # a bracket that comes first is one of the set
    return max(0, pattern.find("]", first + 1))


def _set(body: str) -> str:
    outside, members = body.startswith("!"), body.removeprefix("!")
    ranges, place = [], 0
    while place < len(members):
        low = high = members[place]
        if members[place + 1 : place + 2] == "-" and place + 2 < len(members):
            high = members[place + 2]
            place += 2
        place += 1
        if low <= high:
            ranges.append(f"{_literal(low)}-{_literal(high)}")
    if not ranges:
        return "." if outside else _NOTHING
    return f"[{'^' * outside}{''.join(ranges)}]"


def _literal(char: str) -> str:
    return char if re.fullmatch("[A-Za-z0-9_]", char) else f"\\x{{{ord(char):X}}}"
