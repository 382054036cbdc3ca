"""segdcn-report's page: runs → one HTML file that opens from disk and asks no server for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from segdcn.report.tables import PAPER_DILATIONS, SIZES, percent, signed

# What would end a script element, open a comment in it, or end a line of JavaScript, wherever it stands in JSON
_ESCAPED = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}

# what page.html knows, and what it is without it
OPTIONAL: Mapping[str, Any] = {
    **dict.fromkeys(("subtitle", "tiles", "comparison", "viewer", "gallery", "classes", "confusion")),
    **dict.fromkeys(("class_comparison", "dilations", "charts")),
    **dict.fromkeys(("sections", "notes", "epoch_tables", "provenance"), ()),
}


def render(contents: Mapping[str, Any]) -> str:
    """The page of ``contents``: "title", "kind", and what there is of ``OPTIONAL``, texts as they are."""
    files = resources.files("segdcn.report")
    template, style, script = (
        (files / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "viewer.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    values = {**OPTIONAL, **contents}
    if values["viewer"]:
        values["viewer"] = {**values["viewer"], "json": json_for_script(values["viewer"]["data"])}
    return environment.from_string(template).render(
        **values,
        style=Markup(style),
        script=Markup(script),
        script_hash=Markup(script_hash(script)),
        sizes=SIZES,
        paper_dilations=PAPER_DILATIONS,
        percent=percent,
        signed=signed,
    )


def json_for_script(values: Any) -> Markup:
    """JSON that can stand within a script element, whatever its texts hold."""
    return Markup(json.dumps(values, allow_nan=False, separators=(",", ":")).translate(_ESCAPED))


def script_hash(script: str) -> str:
    """How a Content-Security-Policy names the one script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}"
