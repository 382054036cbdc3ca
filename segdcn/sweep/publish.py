"""Results of a sweep as files in its folder and as a table in the terminal."""

from __future__ import annotations

import sys

from segdcn.drawing import console
from segdcn.runs.files import shown, write_bytes, write_json, write_text
from segdcn.sweep.plot import plot
from segdcn.sweep.results import Results
from segdcn.sweep.tables import as_csv, as_json, as_markdown, as_rich

KINDS = ("csv", "json", "md", "png")


def publish(results: Results) -> bool:
    """Write and print them; returns whether every run that was not pruned has a figure."""
    write(results)
    console.show(as_rich(results))
    print(f"{results.stem}.{{{','.join(KINDS)}}} in {shown(results.folder)}", flush=True)
    if results.incomplete:
        lacking, planned = len(results.incomplete), len(results.runs)
        print(f"incomplete: {lacking} of {planned} runs have no figure", file=sys.stderr)
    return not results.incomplete


def write(results: Results) -> None:
    """A file of each of ``KINDS`` in the sweep's folder, whole or not at all.

    Same runs, same bytes: no time stamps.
    """
    picture = plot(results)  # whatever can go wrong does before a file is replaced
    csv, markdown, plain = as_csv(results), as_markdown(results), as_json(results)
    path = results.folder / results.stem
    write_text(path.with_name(f"{path.name}.csv"), csv)
    write_json(path.with_name(f"{path.name}.json"), plain)
    write_text(path.with_name(f"{path.name}.md"), markdown)
    write_bytes(path.with_name(f"{path.name}.png"), picture)
