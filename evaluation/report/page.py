"""Turns templates into one HTML file that needs nothing beside it and runs no foreign script."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vpt.errors import DataError
from vpt.evaluation.report.pictures import PictureTable
from vpt.files import write_whole
from vpt.view.wording import printable

PAGE_SIZE = 24
MOST_CHARACTERS = 2000
_MINUS, _NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"


def render_page(template: str, pictures: PictureTable, **content: Any) -> str:
    """Fill in a template.

    The page forbids itself all connections, and all scripts and styles but its own, which are
    named by their hashes: text that slipped through the escaping still could not run.

    Args:
        template: name of a file in ``templates``.
        pictures: of the page.
        **content: what the template names.
    """
    style, script = _asset("page.css"), _asset("gallery.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            policy=policy,
            # Both are files of this package, not content.
            style=Markup(style),
            script=Markup(script),
            pictures=pictures.uris,
            page_size=PAGE_SIZE,
            **content,
        )
    )


def save_page(page: str, path: Path) -> Path:
    """Write a page, wholly or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    try:
        write_whole(page, path)
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror or exc}") from exc
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("vpt.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.filters.update(
        number=_number,
        signed=_signed,
        more=_more,
        share=_share,
        count=_count,
        p_value=_p_value,
        cut=_cut,
    )
    return environment


def _harmless(value: Any) -> Any:
    """Make control characters visible in every text put into a page; escaping comes after."""
    return printable(value) if type(value) is str else value


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _signed(value: float | None) -> str:
    if value is None:
        return _NOTHING
    sign = _MINUS if value < 0 else "+" if value > 0 else ""
    return sign + _number(abs(value))


def _more(value: float) -> str:
    return f"{value:+,.0f}".replace("-", _MINUS)


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{100 * value:.1f}%"


def _count(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.0f}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _cut(text: str) -> str:
    """At most `MOST_CHARACTERS`, saying how many more there are."""
    rest = len(text) - MOST_CHARACTERS
    return text if rest <= 0 else f"{text[:MOST_CHARACTERS]} … ({rest:,} more characters)"


@cache
def _asset(name: str) -> str:
    folder = resources.files("vpt.evaluation.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
