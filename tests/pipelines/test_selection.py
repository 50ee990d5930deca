"""Laws of pipelines.selection: shell patterns mean what Python's fnmatch says, over a million names in a second."""

import random
import time
from fnmatch import fnmatchcase

import pyarrow as pa
import pytest

from pipelines.selection import matches, select

KEYS = ["a.jpg", "A.JPG", "b/a.jpg", "b/c/a.png", "b/.hidden.png", "line\nbreak.png", "b/line\nbreak.jpg", "Füße.png"]
KEYS += [
    "図/🦆.png",
    "図🦆",
    "e\u0301.png",
    "\u00e9.png",
    "[x].png",
    "a]b",
    "a-b",
    "!a",
    "^a",
    "a\\b.png",
    "a.b*c?.png",
]
KEYS += ["/lead.png", "b//a.jpg", "", ".", "b/", "(a|b)+$.png", "x" * 1000 + ".png", "\\udcff.png", "nul\0.png"]


def picked(*patterns, keys=KEYS):
    flags = matches(pa.chunked_array([keys[:7], keys[7:]], pa.string()), patterns).to_pylist()
    return [key for key, flag in zip(keys, flags, strict=True) if flag]


def oracle(pattern, key):
    return fnmatchcase(key if "/" in pattern else key.rpartition("/")[2], pattern)


PATTERNS = ["*", "?", "*.jpg", "a.*", "b/*", "*/a.jpg", "b/*.jpg", "*\n*", "*ü*", "[ab]*", "[!ab]*", "*[x]*", "[]a]*"]
PATTERNS += ["[!]a]*", "[a-c]*", "[c-a]*", "[!c-a]*", "[", "[a", "a[]", "[[]x].png", "a[-]b", "[a-]*", "[-a]*", "[^a]*"]
PATTERNS += [
    "\\*",
    "a\\b.png",
    "(a|b)+$.png",
    "**",
    "**/a.jpg",
    "/*",
    "//",
    "b//*",
    "?.png",
    "??",
    ".",
    "{a,b}",
    "*.b[*]*",
]
PATTERNS += ["[\\]*", "[a\\]*", "*[/]*", "[!/]*/*", "[+-9]*", "é.png", "*\0*", "\\udcff.png", "x*x.png", "[🐀-🦿]*"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_fnmatch_says_of_the_name_or_of_the_whole_key(pattern):
    assert picked(pattern) == [key for key in KEYS if oracle(pattern, key)]


def test_random_patterns_mean_what_fnmatch_says():
    generator = random.Random(1)
    letters = "ab/.*?[]!-^\\\n🦆"
    keys = ["".join(generator.choices("ab/.-!]\\\n🦆", k=generator.randrange(8))) for _ in range(300)]
    matched = 0
    for _ in range(1500):
        pattern = "".join(generator.choices(letters, k=generator.randrange(1, 8)))
        expected = [key for key in keys if oracle(pattern, key)]
        assert picked(pattern, keys=keys) == expected, pattern
        matched += len(expected)
    assert matched > 5000


def test_several_patterns_are_a_union_and_exclude_wins():
    listing = pa.table({"key": KEYS})
    assert select(listing, include=(), exclude=()) is listing
    both = select(listing, include=("*.jpg", "図/*"), exclude=())["key"].to_pylist()
    assert both == ["a.jpg", "b/a.jpg", "b/line\nbreak.jpg", "図/🦆.png", "b//a.jpg"]
    assert select(listing, include=("*.jpg", "図/*"), exclude=("b/*", "🦆*"))["key"].to_pylist() == ["a.jpg"]
    assert select(listing, include=(), exclude=("*",)).num_rows == 0


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_an_empty_pattern_is_refused_by_name(flag):
    with pytest.raises(ValueError, match=rf"{flag} \(''\) must not be empty"):
        select(pa.table({"key": KEYS}), **{"include": (), "exclude": (), flag: ("a", "")})


def test_a_million_keys_are_judged_in_two_seconds_whatever_the_pattern():
    keys = pa.array([f"archive/2026/{i // 1000:05d}/IMG_{i:09d}.jpg" for i in range(1_000_000)])
    listing = pa.table({"key": pa.chunked_array([keys])})
    started = time.process_time()
    found = select(listing, include=("archive/*/*.jpg", "*a*a*a*a*a*b"), exclude=("*7.jpg", "*/00001/*"))
    assert found.num_rows == 900_000 - 900 and time.process_time() - started < 2
