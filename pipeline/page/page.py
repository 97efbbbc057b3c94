"""A page: one HTML file with its style, its program and its pictures inside, which loads nothing from anywhere."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from cache import write_atomically
from cache.core.files import make_folder

ASSETS = Path(__file__).parent / "assets"
STYLES = "vendor/uPlot.min.css", "page.css"
SCRIPTS = "vendor/uPlot.iife.min.js", "plots.js", "page.js"

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What could hide or turn around a part of a text: control characters, marks of direction, halves of surrogates."""


def render(template: Path, **content) -> str:
    """The page of a template, which extends base.html.

    content: what the template reads; text in it is of others, and escaped wherever it stands.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([template.parent, ASSETS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": True}
    style, script = _joined(*STYLES), _joined(*SCRIPTS)
    own = {"style": Markup(style), "style_hash": _hash(style), "script": Markup(script), "script_hash": _hash(script)}
    return environment.get_template(template.name).render(**own, **content)


def save(path: Path, page: str) -> None:
    """Write a page, whole or not at all; its folder is made where it is not there."""
    make_folder(path.resolve().parent)
    write_atomically(path, page)


def _seen(value):
    """A text with what nobody sees in it spelled out, as \\u202e."""
    if isinstance(value, str) and not hasattr(value, "__html__"):  # Markup, as markupsafe and Jinja tell it
        return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), value)
    return value


@cache
def _joined(*names: str) -> str:
    return "\n".join((ASSETS / name).read_text() for name in names)


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline text; the page then runs it and nothing else."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
