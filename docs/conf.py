"""The site of the documentation: ``sphinx-build -W -n docs build/docs`` makes it, offline and without a warning."""

import re
from typing import Any

project = "segdcn"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

highlight_language = "text"

html_theme = "furo"
html_title = "segdcn"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 3  # as GitHub's, so that a link works in either place
suppress_warnings = ["myst.header"]  # a page made of parts may begin with a smaller heading

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False  # what a class of torch's or Lightning's says is in their documentation
nitpick_ignore_regex = [("py:.*", r"(?!segdcn\.).*")]  # of other packages: nothing is fetched to find them

# pages that lie above docs/, where GitHub looks for them
ABOVE = {f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
FIELD = re.compile(r"^(\w+(?:, \w+)*): (?=\S)")


def link_from_above(link: re.Match[str]) -> str:
    """A link of README.md or its neighbours, as seen from docs/."""
    path = link[1]
    return ABOVE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}")


def link_to_above(link: re.Match[str]) -> str:
    """A link of a page of docs/, where it leads to one of README.md's neighbours."""
    return ABOVE.get(link[1].removeprefix("../"), link[1])


def plain_text(lines: list[str]) -> None:
    """A docstring is plain text: a star is a star, an indented line goes on with the one before, a table stays one."""
    made: list[str] = []
    for line in lines:
        if line.startswith("|"):
            made += [*([] if made[-1].startswith(" ") else ["::", ""]), f"    {line}"]
            continue
        goes_on = made and made[-1].strip() and not made[-1].startswith(" ") and not made[-1].endswith(":")
        text = line.strip() if goes_on and line.startswith(" ") else line
        parts = text.split("``")  # every second one is code
        made.append("``".join(re.sub(r"\*", r"\\\g<0>", part) if n % 2 == 0 else part for n, part in enumerate(parts)))
    lines[:] = made


def fields_as_list(lines: list[str]) -> None:
    """Lines such as ``loss: logits, label → scalar.`` below a docstring's first become points of a list."""
    made: list[str] = lines[:1]
    within = False
    for line in lines[1:]:
        field = FIELD.match(line)
        within = bool(field) or (within and bool(line.strip()) and not line.startswith(":"))
        if field:
            made += ["", f"* **{field[1]}**: {line[field.end() :]}"]
        else:
            made.append(f"  {line.strip()}" if within else line)
    lines[:] = made


def setup(app: Any) -> None:
    """Called by Sphinx."""

    def included(app: Any, path: Any, docname: str, content: list[str]) -> None:
        content[0] = LINK.sub(link_from_above, content[0])

    def read(app: Any, docname: str, content: list[str]) -> None:
        content[0] = LINK.sub(link_to_above, content[0])

    def skip(app: Any, what: str, name: str, member: Any, skipped: bool, options: Any) -> bool | None:
        return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None

    app.connect("autodoc-skip-member", skip)  # the fields of a tuple, which its own docstring tells
    app.connect("include-read", included)
    app.connect("source-read", read)
    app.connect(
        "autodoc-process-docstring", lambda *arguments: plain_text(arguments[-1]), priority=400
    )  # napoleon: 500
    app.connect("autodoc-process-docstring", lambda *arguments: fields_as_list(arguments[-1]), priority=600)
