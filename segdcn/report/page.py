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


def render(contents: Mapping[str, Any]) -> str:
    """The page of ``contents``: the names that page.html knows, texts unescaped as they are; all are optional."""
    files = resources.files("segdcn.report")
    template, style, script = (
        (files / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "viewer.js")
    )
    known = (
        "title kind subtitle sections notes tiles comparison viewer gallery classes confusion class_comparison"
        " dilations histograms charts epoch_tables provenance"
    ).split()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    values = dict.fromkeys(known) | {"notes": (), "provenance": (), "epoch_tables": (), "histograms": ()} | dict(contents)
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
