"""Results of benchmarks as tables for people, and what reports are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Cells = Sequence[str]


def figure(row: Mapping[str, Any], name: str) -> str:
    """A median, with its least and greatest value in brackets; a dash where there is none.

    So many digits that the median has three, as far as it has a whole part of fewer.
    """
    value = row.get(name)
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    low, high = row[f"{name}_min"], row[f"{name}_max"]
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def rich_table(title: str, header: Cells, rows: Sequence[Cells]) -> Table:
    """For a terminal; the first column is a name, the others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Cells, rows: Sequence[Cells]) -> list[str]:
    """The same for a report."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def write_files(
    result: Mapping[str, Any],
    folder: Path,
    name: str,
    page: Sequence[str],
    plot: Callable[[Path], None],
) -> Path:
    """Write `NAME.json`, `NAME.png` by `plot`, and `NAME.md` into `folder`; return the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(folder / f"{name}.png")
    written = folder / f"{name}.md"
    written.write_text("\n".join(page) + "\n", encoding="utf-8")
    return written
