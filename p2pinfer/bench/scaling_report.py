"""The result of `bench scaling` as tables, Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from p2pinfer.bench.tables import Cells, figure, markdown_table, rich_table, write_files

VALUES = {"nodes": "nodes", "contexts": "context", "requests": "requests"}
"""By axis, the field that it changes."""

TITLES = {"nodes": "Nodes", "contexts": "Context, tokens", "requests": "Requests at once"}
FIGURES = (
    ("decode_tokens_per_s", "decode, 1/s"),
    ("prefill_tokens_per_s", "prefill, 1/s"),
    ("inter_token_ms", "per token, ms"),
)


def tables(result: dict[str, Any]) -> RenderableType:
    """What a terminal shows."""
    shown = [
        rich_table(TITLES[axis], header(axis), cells(axis, rows))
        for axis, rows in result["axes"].items()
    ]
    return Group(title(result), *shown, note(result))


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write `scaling.md`, `scaling.json` and `scaling.png`; return the Markdown file."""
    page = ["# Scaling", "", title(result), ""]
    for axis, rows in result["axes"].items():
        page += [f"## {TITLES[axis]}", "", *markdown_table(header(axis), cells(axis, rows)), ""]
    page += [note(result), "", "![speed along each axis](scaling.png)"]
    return write_files(result, folder, "scaling", page, lambda path: _plot(result, path))


def title(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    base = ", ".join(f"{name} {value}" for name, value in result["base"].items())
    return (
        f"{result['shape']} {result['dtype']}, quant {result['quant']}, {result['cores']} cores, "
        f"{result['runs']} run(s); the base is {base}"
    )


def note(result: dict[str, Any]) -> str:
    """How threads are shared out, and what is meant by the figures."""
    points = [row for rows in result["axes"].values() for row in rows]
    shared = sorted({(row["nodes"], row["threads_per_node"]) for row in points})
    threads = ", ".join(f"{nodes} x {each}" for nodes, each in shared)
    more = any(nodes * each > result["cores"] for nodes, each in shared)
    crowded = " More threads than cores share these." if more else ""
    return (
        f"Nodes x threads: {threads}.{crowded} Medians of tokens per second and of the time "
        "between two tokens of a reply, with the least and the greatest; ratios are to the base, "
        "run by run. Requests at once are measured while all of them decode."
    )


def header(axis: str) -> Cells:
    """The value of the axis, then each figure with its ratio."""
    return (VALUES[axis], *(name for _, each in FIGURES for name in (each, "ratio")))


def cells(axis: str, rows: Sequence[dict[str, Any]]) -> list[Cells]:
    """One row for each value of an axis."""
    return [
        (
            str(row[VALUES[axis]]),
            *(
                text
                for name, _ in FIGURES
                for text in (figure(row, name), f"{row[f'{name}_ratio']:.2f}")
            ),
        )
        for row in rows
    ]


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = result["axes"]
    picture, grid = pyplot.subplots(
        len(FIGURES), max(1, len(axes)), figsize=(4.5 * max(1, len(axes)), 9), squeeze=False
    )
    for column, (axis, rows) in enumerate(axes.items()):
        values = [row[VALUES[axis]] for row in rows]
        places = range(len(values))
        for line, (name, label) in enumerate(FIGURES):
            place = grid[line][column]
            middle = [row[name] for row in rows]
            below = [row[name] - row[f"{name}_min"] for row in rows]
            above = [row[f"{name}_max"] - row[name] for row in rows]
            place.errorbar(places, middle, yerr=[below, above], marker="o", capsize=5)
            for at, row in zip(places, rows, strict=True):
                ratio = f" x{row[f'{name}_ratio']:.2f}"
                place.annotate(ratio, (at, row[name]), xytext=(4, 6), textcoords="offset points")
            place.set_xticks(places, [str(value) for value in values])
            place.set_ylim(bottom=0)
            place.set_xlim(-0.3, len(values) - 0.3)
            place.set_ylabel(label)
            place.set_xlabel(TITLES[axis])
    picture.suptitle(title(result), fontsize=10)
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    pyplot.close(picture)
