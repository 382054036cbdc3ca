"""The site of the documentation: ``sphinx-build -W -n docs build/docs`` makes it, offline and without a warning."""

import re
from typing import Any

project = "segdcn"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = "segdcn"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 3  # as GitHub's, so that a link works in either place
suppress_warnings = ["myst.header"]  # a page made of parts may begin with a smaller heading

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # what a class of torch's or Lightning's says is in their documentation
nitpick_ignore_regex = [("py:.*", ".*")]  # names of other packages: nothing is fetched to find them

ABOVE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
FIELD = re.compile(r"^(\w[\w, ]*): (?=\S)")


def links_from_docs(app: Any, docname: str, content: list[str]) -> None:
    """README.md and its neighbours are pages of the site too: their links as seen from docs/."""

    def seen(link: re.Match[str]) -> str:
        path = link.group(1)
        return ABOVE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}")

    content[0] = LINK.sub(seen, content[0])


def fields_as_list(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lines such as ``loss: logits, label → scalar.`` of a docstring become points of a list."""
    made: list[str] = []
    for line in lines:
        field = FIELD.match(line)
        if field:
            made += ["", f"* **{field.group(1)}**: {line[field.end() :]}"]
        elif line.strip() and made and made[-1].startswith(("* ", "  ")):
            made.append(f"  {line.strip()}")
        else:
            made.append(line)
    lines[:] = made


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("include-read", lambda app, path, docname, content: links_from_docs(app, docname, content))
    app.connect("autodoc-process-docstring", fields_as_list)
