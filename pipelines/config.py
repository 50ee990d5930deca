"""One frozen, keyword-only dataclass per job -> flags, YAML, `--help`. Precedence: default < YAML < flag.

    source: str = field(metadata={"unit": "URI"})
    \"\"\"Folder of images to read.\"\"\"
    num_workers: int = field(default=4, metadata={"group": "cluster"})
    \"\"\"Upscaling actors, one GPU each.\"\"\"

The text under a field is its help; `unit` is the word after its flag; `group` starts a section of the help, for the
fields that follow too. Ranges are checked in `__post_init__`, with `check`.

pydantic checks, strictly; pydantic-settings makes the flags, and hands over those that were given, to merge with YAML.
tyro merges only into a finished dataclass: required fields get a placeholder, which the checks of `__post_init__` meet.
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import re
import reprlib
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model, with_config
from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings.exceptions import SettingsError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, str_min_length=1)
REMEDIES = {  # by the first word of pydantic's name for the mistake
    "int": "write digits, like 4",
    "float": "write digits, like 0.5",
    "finite": "write digits, like 0.5",
    "bool": "write true or false, without quotes",
    "string": "write text, quoted in YAML",
    "tuple": "write a,b after the flag, [a, b] in YAML",
}


def check(condition: bool, name: str, value: object, rule: str, remedy: str) -> None:
    """Raises ValueError, `steps (0) must be at least 1; use 1 or more`, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} ({_shown(value)}) {rule}; {remedy}")


def parse(config_class: type[T], argv: Sequence[str], *, prog: str, examples: str = "") -> T:
    """The job's settings from its command line. A person's mistake is one line on stderr and SystemExit(2)."""
    source = _source(config_class, prog=prog, examples=examples)
    try:
        words = vars(source.root_parser.parse_args(list(argv)))
        path, print_config = words.pop("config"), words.pop("print_config")
        settings = _load(path) if path is not None else {}
        config = from_mapping(config_class, settings | _given(source, words))
    except ValueError as error:
        print(f"{prog}: error: {error} (see {prog} --help)", file=sys.stderr)
        raise SystemExit(2) from None
    if print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _given(source: "CliSettingsSource[_Parser]", words: dict[str, Any]) -> dict[str, Any]:
    """The settings that the command line gives. Raises ValueError, in our words for a list that cannot be read."""
    try:
        return source(parsed_args=words)()
    except SettingsError as error:
        field = re.search(r'field "field_(\w+)"', str(error))
        name = field[1] if field else "a setting"
        raise ValueError(f"{name} ({_shown(words.get(name))}) must be numbers; {REMEDIES['tuple']}") from None


def from_mapping(config_class: type[T], mapping: Mapping[str, object]) -> T:
    """The settings in a plain mapping (JSON, YAML, a Ray task's argument). Raises ValueError, as `parse` words it."""
    return config_class(**_validated(config_class, mapping).model_dump(by_alias=True, exclude_unset=True))


def to_mapping(config: "DataclassInstance") -> dict[str, Any]:
    """A plain, JSON-ready dict: tuples are lists, and 1 in a float field is 1.0, so that equal settings hash alike."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return _validated(type(config), values).model_dump(mode="json", by_alias=True)


def to_yaml(config: "DataclassInstance") -> str:
    """Every setting, one a line, in the order of the help; `--config` reads it back to an equal config."""
    return yaml.dump(to_mapping(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


def fingerprint(mapping: Mapping[str, object]) -> str:
    """blake2b-128, 32 hex digits, of the canonical JSON: sorted keys, no spaces, ASCII. 1 and 1.0 differ; no NaN."""
    canonical = json.dumps(mapping, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


@functools.cache
def _model(config_class: type) -> type[BaseModel]:
    """The dataclass as a strict pydantic model; an alias each, because `register` and `copy` are a model's own."""
    texts: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):  # pydantic reads one class's texts
        schema = TypeAdapter(with_config(ConfigDict(use_attribute_docstrings=True))(owner)).json_schema()
        described = {name: entry.get("description") for name, entry in schema["properties"].items()}
        texts |= {name: text for name, text in described.items() if text}
    hints, fields = get_type_hints(config_class), dict[str, Any]()
    own = inspect.get_annotations(config_class)
    # Settings that several jobs share come from a base class, and after the job's own.
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own):
        if field.name.startswith("no_"):
            raise TypeError(f"{field.name}: argparse would take its flag for a negation; name what is on")
        default = ... if field.default is dataclasses.MISSING else field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default  # the default is only for help
        entry = Field(shown, alias=field.name, description=texts.get(field.name))
        fields[f"field_{field.name}"] = (hints[field.name], entry)
    return create_model(config_class.__name__, __config__=STRICT, **fields)


def _validated(config_class: type, mapping: Mapping[str, object]) -> BaseModel:
    values = {str(key): tuple(value) if isinstance(value, list) else value for key, value in mapping.items()}
    try:
        return _model(config_class).model_validate(values)
    except ValidationError as error:
        mistake = error.errors()[0]
    name, kind, shown = str(mistake["loc"][0]), mistake["type"], _shown(mistake["input"])
    rule = re.sub(r"^\w+ should", "must", mistake["msg"])
    remedy = REMEDIES.get(kind.partition("_")[0], "use one of these")
    if kind == "missing":
        shown, rule, remedy = "missing", "must be given", f"use --{name.replace('_', '-')} or a line in the YAML"
    elif kind == "extra_forbidden":
        names = [field.name for field in dataclasses.fields(config_class)]
        close = difflib.get_close_matches(name, names, n=1)
        rule = f"is not a setting of {config_class.__name__}"
        remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(names)}"
    raise ValueError(f"{name if name.isprintable() else repr(name)} ({shown}) {rule}; {remedy}")


def _shown(value: object) -> str:
    """One bounded line, whatever a hostile file holds."""
    return (repr(value) if isinstance(value, str) else reprlib.repr(value))[:200]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        raise ValueError(
            f"{message}; use a flag that --help lists, and --name=value where the value starts with a dash"
        )


def _source(config_class: type, *, prog: str, examples: str) -> CliSettingsSource[_Parser]:
    epilog = "examples:\n" + textwrap.indent(inspect.cleandoc(examples), "  ") if examples else None
    parser = _Parser(
        prog=prog, usage="%(prog)s [options]", description=inspect.getdoc(config_class), epilog=epilog,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; a flag wins over it")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML, and stop")
    fields, sections = {field.name: field for field in dataclasses.fields(config_class)}, dict[str, Any]()

    def add_argument(_: _Parser, *flags: str, **options: Any) -> None:
        metadata, default = fields[options["dest"]].metadata, fields[options["dest"]].default
        title = metadata.get("group") or next(reversed(sections), "settings")
        if unit := metadata.get("unit") or ("A,B" if isinstance(default, tuple) else None):
            options["metavar"] = unit
        sections[title] = sections.get(title) or parser.add_argument_group(title)
        sections[title].add_argument(*flags, **options)

    return CliSettingsSource(
        type(config_class.__name__, (_model(config_class), BaseSettings), {}), root_parser=parser,
        add_argument_method=add_argument, cli_kebab_case=True, cli_implicit_flags=True, cli_parse_none_str="none",
        cli_hide_none_type=True, cli_avoid_json=True,
    )  # fmt: skip


def _load(path: str) -> dict[Any, Any]:
    """The settings in a local file; none for an empty one. Raises ValueError for what is not plain YAML."""
    try:
        document = yaml.load(Path(path).read_bytes(), Loader=_Loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(getattr(error, "strerror", error)).split())
        raise ValueError(f"--config ({path!r}) must be a file of plain YAML: {why}; correct it") from None
    document = {} if document is None else document
    check(isinstance(document, dict), "--config", document, "must hold a mapping", "write `name: value` lines")
    return document


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")  # text in YAML 1.1, a number in 1.2
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
