"""HTML pages that need nothing else: where their templates are, and how what they show is made harmless."""

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def pages() -> Environment:
    """Return the templates of pages that need nothing else: what is missing is an error, what is shown is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"png": data_uri, "name": visible}
    return environment


def data_uri(data: bytes) -> str:
    """Return a PNG as the source of an image: no request is made for it."""
    return "data:image/png;base64," + b64encode(data).decode()


def visible(text: object) -> str:
    """Return the text with what cannot be seen (newlines, controls, bidi overrides, lone surrogates) as an escape.

    A name can then neither forge another nor leave text that UTF-8 cannot hold.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
