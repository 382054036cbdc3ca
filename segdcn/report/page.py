"""A page in the making: its parts, and at last one HTML file that opens from disk and asks no server for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from segdcn.drawing.numbers import percent, signed
from segdcn.errors import UserError, one_line
from segdcn.runs.files import shown, write_text

log = logging.getLogger(__name__)

Part = TypeVar("Part")

FILE = "report.html"
# Each part of a page.html: its name, and the section that it begins, if any, as its anchor and its heading
PARTS = {
    "tiles": None,
    "comparison": ("comparison", "Comparison"),
    "viewer": ("viewer", "Viewer"),
    "gallery": ("images", "Images"),
    "classes": ("classes", "Classes"),
    "confusion": None,
    "class_comparison": ("classes", "Classes"),
    "dilations": ("offsets", "Offsets"),
    "charts": ("training", "Training"),
    "epoch_tables": None,
    "provenance": ("provenance", "Provenance"),
}
# What would end a script element, open a comment in it, or end a line of JavaScript, wherever it stands in JSON
_ESCAPED = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


@dataclass
class Page:
    """What a page says.

    kind: of what it is, in words.
    notes: what it does without, in whole sentences.
    parts: by the names of ``PARTS``, those that could be made.
    """

    title: str
    kind: str
    subtitle: str = ""
    notes: list[str] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)

    def add(self, **parts: Callable[[], Any]) -> None:
        """Make parts, each by itself; one that fails is left out, with a note that says why."""
        for name, make in parts.items():
            self.parts[name] = self.attempt(name.replace("_", " "), make)

    def attempt(self, what: str, make: Callable[[], Part]) -> Part | None:
        """What ``make`` gives; None where it fails, with a note that says why."""
        try:
            return make()
        except Exception as error:  # memory that ends, a damaged file, a network or data set of a user's own
            self.notes.append(f"Without {what}: {one_line(error)}.")
            return None

    def html(self) -> str:
        """The file's text, in which the texts of parts stand as they are."""
        files = resources.files("segdcn.report")
        template, style, script = (
            (files / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "viewer.js")
        )
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        parts = {name: self.parts.get(name) for name in PARTS}
        viewer = parts["viewer"]
        return environment.from_string(template).render(
            title=self.title,
            kind=self.kind,
            subtitle=self.subtitle,
            notes=self.notes,
            sections=[section for name, section in PARTS.items() if section and parts[name]],
            **parts,
            viewer_json=json_for_script(viewer["data"]) if viewer else "",
            style=Markup(style),
            script=Markup(script),
            script_hash=Markup(script_hash(script)),
            percent=percent,
            signed=signed,
        )

    def write(self, path: Path) -> Path:
        """Write the file, and what the page does without into the log; returns where it is.

        Raises: UserError where this page, with images, is there, and would have none.
        """
        html = self.html()
        if not self.parts.get("gallery") and path.is_file():
            title, there = re.search("<title>.*?</title>", html), path.read_bytes()
            if title and title[0].encode() in there and b'<section id="images">' in there:
                notes = " ".join(self.notes)
                raise UserError(
                    f"{shown(path)} has images and would have none: {notes} Or --output FILE writes another"
                )
        write_text(path, html)
        for note in self.notes:
            log.info("note     %s", " ".join(note.split()))
        return path


def json_for_script(values: Any) -> Markup:
    """JSON that can stand within a script element, whatever its texts hold."""
    return Markup(json.dumps(values, allow_nan=False, separators=(",", ":")).translate(_ESCAPED))


def script_hash(script: str) -> str:
    """How a Content-Security-Policy names the one script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}"
