"""The laws of pipelines.config, on a small job with a field of every type."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pipelines.config import check, fingerprint, from_mapping, parse, to_mapping, to_yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """Upscale every image below --source into --output."""

    source: str = field(metadata={"unit": "URI"})
    """Folder of images to read."""
    output: str = field(metadata={"unit": "URI"})
    """Folder to write to."""
    preset: Literal["sr3-16-128", "sr3-64-256", "nano-x4"] = "nano-x4"
    """Named model."""
    scale: Literal[2, 4] = 4
    """Output pixels for each input pixel and axis."""
    steps: int = field(default=50, metadata={"group": "sampling"})
    """Network calls per image; 100 % more take
    twice the time."""
    eta: float = 0.5
    """Share of fresh noise in a step."""
    num_workers: int = field(default=4, metadata={"group": "cluster"})
    """Actors, one GPU each."""
    max_bytes: int | None = None
    """Larger files become dead letters."""
    timeout_s: float | None = 1.5
    """Time for one file."""
    register: str | None = None
    """Name of the model in the registry."""
    baselines: tuple[str, ...] = ("bicubic",)
    """Compared with."""
    dry_run: bool = False
    """Plan, and write nothing."""

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", self.steps, "must be at least 1", "use 1 or more")


NEEDED = ("--source", "s3://a", "--output", "s3://b")
NEEDED_YAML = "source: s3://a\noutput: s3://b\n"
CONFIG = ExampleConfig(source="s3://a", output="s3://b")


def run(*argv: str) -> ExampleConfig:
    return parse(ExampleConfig, argv, prog="upscale.py", examples="upscale.py --source s3://a --output s3://b")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refuse(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert err.startswith("upscale.py: error: ") and err.endswith(" (see upscale.py --help)\n")
        assert err.count("\n") == 1 and "Traceback" not in err
        return err

    return refuse


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str | bytes], str]:
    def write(text: str | bytes) -> str:
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# Flags.


def test_defaults_hold_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "9")  # settings come from no environment
    assert run(*NEEDED) == CONFIG


def test_every_type_has_its_flag() -> None:
    words = "--preset sr3-16-128 --scale 2 --steps 7 --eta 1e-3 --num-workers 2 --max-bytes 1024 --timeout-s 2"
    config = run(*NEEDED, *words.split(), "--register", "night", "--baselines", "bicubic,regression", "--dry-run")
    assert config == dataclasses.replace(
        CONFIG, preset="sr3-16-128", scale=2, steps=7, eta=1e-3, num_workers=2, max_bytes=1024, timeout_s=2.0,
        register="night", baselines=("bicubic", "regression"), dry_run=True,
    )  # fmt: skip
    assert type(config.timeout_s) is float


def test_the_word_none_an_empty_list_and_a_leading_dash() -> None:
    config = run(*NEEDED, "--timeout-s", "none", "--register=none", "--baselines", "[]", "--eta=-1e-4")
    assert (config.timeout_s, config.register, config.baselines, config.eta) == (None, None, (), -1e-4)


@pytest.mark.parametrize("text", ["2026", "on", "1e-4", "null", "a,b", "[1]", '{"a": 1}', "a: b", "ü"])
def test_text_stays_text(text: str) -> None:
    assert run(*NEEDED, "--source", text, "--register", text).source == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "zero"], "steps ('zero') must be a valid integer; write digits, like 4"),
        (["--steps", "0"], "steps (0) must be at least 1; use 1 or more"),
        (["--eta", "nan"], "eta (nan) must be a finite number; write digits, like 0.5"),
        (["--eta", "1e999"], "eta (inf) must be a finite number"),
        (["--eta", "-inf"], "argument --eta: expected one argument; use a flag that --help lists, and --name=value"),
        (["--preset", "sr3-16-182"], "preset ('sr3-16-182') must be 'sr3-16-128', 'sr3-64-256' or 'nano-x4'"),
        (["--scale", "3"], "scale ('3') must be 2 or 4; use one of these"),
        (["--source="], "source ('') must have at least 1 character; write text"),
        (["--source", "none"], "source (None) must be a valid string; write text"),
        (["--steps", "--dry-run"], "argument --steps: expected one argument"),
        (["--dry-run=true"], "argument --dry-run/--no-dry-run: ignored explicit argument 'true'"),
        (["--stepps", "4"], "unrecognized arguments: --stepps 4"),
        (["--num-work", "4"], "unrecognized arguments: --num-work 4"),
    ],
)
def test_a_wrong_flag_is_one_line_with_name_value_rule_and_remedy(
    refused: Callable[..., str], words: list[str], message: str
) -> None:
    assert message in refused(*NEEDED, *words)


# YAML.


def test_a_flag_wins_over_yaml_and_yaml_over_the_default(job: Callable[[str], str]) -> None:
    path = job(NEEDED_YAML + "steps: 9\nnum_workers: 7\ndry_run: true\n")
    config = run("--num-workers", "8", "--config", path, "--no-dry-run")
    assert (config.steps, config.num_workers, config.dry_run, config.eta) == (9, 8, False, 0.5)


def test_yaml_takes_lists_null_and_bare_exponents(job: Callable[[str], str]) -> None:
    settings = "timeout_s: null\neta: 1e-4\nbaselines: [bicubic, regression]\nscale: 2\nregister: 'on'\n"
    config = run("--config", job(NEEDED_YAML + settings))
    assert (config.timeout_s, config.eta, config.scale, config.register) == (None, 1e-4, 2, "on")
    assert config.baselines == ("bicubic", "regression")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_workers: '4'", "num_workers ('4') must be a valid integer; write digits, like 4"),
        ("num_workers: 4.0", "num_workers (4.0) must be a valid integer"),
        ("num_workers: " + "9" * 9000, "must be a file of plain YAML: Exceeds the limit"),
        ("eta: .nan", "eta (nan) must be a finite number"),
        ("eta: '0.5'", "eta ('0.5') must be a valid number"),
        ("register: 2026", "register (2026) must be a valid string; write text, quoted in YAML"),
        ("register: 2026-01-01", "register (datetime.date(2026, 1, 1)) must be a valid string"),
        ("register: ''", "register ('') must have at least 1 character"),
        ("dry_run: 1", "dry_run (1) must be a valid boolean; write true or false, without quotes"),
        ("scale: '4'", "scale ('4') must be 2 or 4"),
        ("baselines: bicubic", "baselines ('bicubic') must be a valid tuple; write a,b after the flag, [a, b] in YAML"),
        ("baselines: [bicubic, 1]", "baselines (1) must be a valid string"),
        ("steps: 0", "steps (0) must be at least 1; use 1 or more"),
        ("num_worker: 4", "num_worker (4) is not a setting of ExampleConfig; did you mean num_workers?"),
        ("zzz: 4", "zzz (4) is not a setting of ExampleConfig; use one of source, output, preset,"),
        ("7: 4", "7 (4) is not a setting of ExampleConfig"),
        ('"\\e[31m\\n": 4', "'\\x1b[31m\\n' (4) is not a setting of ExampleConfig"),
        ("steps: [", "must be a file of plain YAML: while parsing a flow node"),
        (
            "steps: !!python/object/apply:os.getcwd []",
            "must be a file of plain YAML: could not determine a constructor",
        ),
        ("steps: " + "[" * 600 + "]" * 600, "must be a file of plain YAML: maximum recursion depth exceeded"),
    ],
)
def test_wrong_yaml_is_one_line_with_name_value_rule_and_remedy(
    refused: Callable[..., str], job: Callable[[str], str], text: str, message: str
) -> None:
    assert message in refused("--config", job(NEEDED_YAML + text))


def test_a_file_that_cannot_be_read_is_refused(
    refused: Callable[..., str], job: Callable[[str | bytes], str], tmp_path: Path
) -> None:
    assert run(*NEEDED, "--config", job("# nothing yet\n")) == CONFIG
    assert "source (missing) must be given; use --source or a line in the YAML" in refused("--config", job(b""))
    assert "--config (['source']) must hold a mapping; write `name: value` lines" in refused(
        "--config", job("- source")
    )
    assert "must be a file of plain YAML: unacceptable character" in refused("--config", job(b"source: \xff\xfe"))
    absent = str(tmp_path / "none.yaml")
    assert f"--config ({absent!r}) must be a file of plain YAML: No such file" in refused("--config", absent)
    assert "must be a file of plain YAML: Is a directory" in refused("--config", str(tmp_path))


def test_aliases_that_multiply_cost_nothing(refused: Callable[..., str], job: Callable[[str], str]) -> None:
    lines = [f"  - &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    text = "\n".join(["preset:", "  - &a0 [x]", *lines])
    assert len(refused("--config", job(NEEDED_YAML + text))) < 800


# --print-config and --help.


def test_print_config_feeds_back_to_the_same_config(
    job: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--eta", "1e-5", "--baselines", "bicubic,regression", "--register", "on", "--max-bytes", "7", "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        run(*NEEDED, *words, "--print-config")
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert run("--config", job(out)) == run(*NEEDED, *words)
    assert [line.partition(":")[0] for line in out.splitlines() if line[0] != "-"] == list(to_mapping(CONFIG))


@dataclass(frozen=True, kw_only=True)
class InheritingConfig(ExampleConfig):
    """A job that adds a field."""

    patch: int = field(default=256, metadata={"unit": "PIXELS"})
    """Side of a crop."""


def test_help_has_every_field_with_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(InheritingConfig, ["--help"], prog="pairs.py", examples="pairs.py --source s3://a")
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    text = " ".join(out.split())
    for expected in (
        "A job that adds a field.",
        "settings: --patch PIXELS Side of a crop. (default: 256) --source URI Folder of images to read. (required)",
        "--scale {2,4} Output pixels for each input pixel and axis. (default: 4)",
        "sampling: --steps int Network calls per image; 100 % more take twice the time. (default: 50) --eta float",
        "cluster: --num-workers int Actors, one GPU each. (default: 4)",
        "--max-bytes int Larger files become dead letters. (default: none)",
        "--baselines A,B Compared with. (default: bicubic)",
        "--dry-run, --no-dry-run Plan, and write nothing. (default: False)",
        "--config FILE",
        "examples: pairs.py --source s3://a",
    ):
        assert expected in text


def test_what_jobs_share_comes_after_the_jobs_own_in_help_and_yaml_even_through_two_classes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class SharedConfig:
        tile: int = field(default=64, metadata={"group": "shared"})
        halo: int = 8

    @dataclass(frozen=True, kw_only=True)
    class JobConfig(SharedConfig):
        source: str = "a"
        halo: int = field(default=4, metadata={"group": "running"})

    @dataclass(frozen=True, kw_only=True)
    class NightlyConfig(JobConfig):
        night: int = 1

    for config, order in (
        (JobConfig, ["halo", "source", "tile"]),
        (NightlyConfig, ["night", "tile", "halo", "source"]),
    ):
        with pytest.raises(SystemExit):
            parse(config, ["--help"], prog="a.py")
        shown = capsys.readouterr().out
        assert sorted(order, key=lambda name: shown.index(f"\n  --{name}")) == order
        assert [line.partition(":")[0] for line in to_yaml(config()).splitlines()] == order
        assert set(order) == set(to_mapping(config()))
    assert to_mapping(NightlyConfig()) == {"night": 1, "tile": 64, "halo": 4, "source": "a"}


def test_a_switch_that_argparse_would_negate_is_our_mistake() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WrongConfig:
        no_cache: bool = False

    with pytest.raises(TypeError, match="no_cache"):
        parse(WrongConfig, [], prog="wrong.py")


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([*NEEDED, "--print-config"], 0), (["--steps", "x"], 2)])
def test_a_process_of_its_own_ends_the_same_way(words: list[str], code: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0) and bool(done.stderr) == (code == 2)


# Mappings and fingerprints.


@pytest.mark.parametrize("text", ["on", "1e-4", "1.5e4", "010", "null", "~", "1:30", "ü", "x" * 500, "a\nb", "=", "<<"])
def test_any_text_survives_print_config_and_json(text: str, job: Callable[[str], str]) -> None:
    config = dataclasses.replace(CONFIG, source=text, baselines=(text, "b"), eta=1e-30, max_bytes=-(2**63))
    assert run("--config", job(to_yaml(config))) == config
    assert from_mapping(ExampleConfig, json.loads(json.dumps(to_mapping(config)))) == config


def test_a_mapping_is_checked_like_a_file() -> None:
    for wrong, message in (
        ({"eta": float("nan")}, r"^eta \(nan\) must be a finite number"),
        ({"scale": True}, r"^scale \(True\) must be 2 or 4"),
        ({"source": b"a"}, r"^source \(b'a'\) must be a valid string"),
        ({"steps": 0}, r"^steps \(0\) must be at least 1; use 1 or more$"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mapping(ExampleConfig, {"source": "a", "output": "b", **wrong})


def test_check_names_value_rule_and_remedy() -> None:
    check(True, "steps", 1, "must be at least 1", "use 1 or more")
    with pytest.raises(ValueError) as error:
        check(False, "steps", 0, "must be at least 1", "use 1 or more")
    assert str(error.value) == "steps (0) must be at least 1; use 1 or more"


def test_the_fingerprint_is_blake2b_of_canonical_json() -> None:
    expected = hashlib.blake2b(b'{"a":[1,"\\u00fc"],"b":{"c":null,"d":0.5}}', digest_size=16).hexdigest()
    assert fingerprint({"b": {"d": 0.5, "c": None}, "a": (1, "ü")}) == expected
    assert len(expected) == 32


def test_the_fingerprint_sees_values_and_not_order() -> None:
    mapping = to_mapping(CONFIG)
    assert fingerprint(dict(reversed(mapping.items()))) == fingerprint(mapping)
    assert fingerprint(mapping) != fingerprint({**mapping, "steps": 51})
    assert fingerprint(to_mapping(dataclasses.replace(CONFIG, eta=1))) == fingerprint({**mapping, "eta": 1.0})
    with pytest.raises(ValueError):
        fingerprint({"eta": float("nan")})


if __name__ == "__main__":
    run(*sys.argv[1:])
