"""HTML in which every text is escaped, and JSON that is safe inside of it. Run names and messages are not trusted."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent / "static"
#: The live page's: its look, and the library that draws both.
_PAGE = Path(__file__).parent.parent / "agent" / "static"
_PLACE = re.compile(r"\{\{(\w+)\}\}")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def el(tag: str, *children: str | None, **attributes: str | int | None) -> Markup:
    """An element; `class_` is the attribute class, and an attribute that is None is left out."""
    said = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = join(*children)
    return Markup(f"<{tag}{said}>{inside}</{tag}>")


def join(*children: str | None) -> Markup:
    """Children one after the other; None is nothing."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(_seen(c)) for c in children if c is not None))


def _seen(text: str) -> str:
    """Without characters that turn the direction of what follows, or that no screen shows."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def code_words(text: str) -> Markup:
    """What stands between backticks as code."""
    parts = text.split("`")
    return join(*(el("code", part) if i % 2 else part for i, part in enumerate(parts)))


def to_json(value: Any) -> Markup:
    """JSON for a script element: NaN and Inf are null, and nothing in it can end the element."""
    said = json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        said = said.replace(character, f"\\u{ord(character):04x}")
    return Markup(said)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


def page(title: str, main: Markup, data: Mapping[str, Any]) -> str:
    """A page in one file: looks, scripts and data inlined, and forbidden to ask anybody for anything.

    Args:
        title: of the window.
        main: what stands inside <main>.
        data: for the charts: `charts`, `marks`.
    """
    own = (_PAGE / "shared.js").read_text("utf-8") + (_HERE / "charts.js").read_text("utf-8")
    scripts = [(_PAGE / "uPlot.iife.min.js").read_text("utf-8"), own]
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    icon = base64.b64encode((_PAGE / "favicon.svg").read_bytes()).decode()
    parts = {
        "title": html.escape(_seen(title)),
        "policy": f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:",
        "icon": f"data:image/svg+xml;base64,{icon}",
        "styles": "\n".join(
            path.read_text("utf-8") for path in (_PAGE / "uPlot.min.css", _PAGE / "page.css", _HERE / "report.css")
        ),
        "main": main,
        "data": to_json(data),
        "licence": (_PAGE / "uPlot.LICENSE").read_text("utf-8").replace("--", "- -"),
        "library": scripts[0],
        "script": scripts[1],
    }
    template = (_HERE / "template.html").read_text("utf-8")
    return _PLACE.sub(lambda match: parts[match[1]], template)  # in one pass: what is put in is not looked through
