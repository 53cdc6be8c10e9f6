"""The result of `bench net` as tables, Markdown, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from p2pinfer.bench.tables import Cells, figure, markdown_table, rich_table, write_files

LINKS_HEADER = ("link", "round trip, ms", "of a partial", "MB/s", "echoes", "met steps")
STEPS_HEADER = ("step", "messages", "tensor bytes", "should cost, ms", "exchange", "wait")


def tables(result: dict[str, Any]) -> RenderableType:
    """What a terminal shows."""
    return Group(
        rich_table(_title(result), LINKS_HEADER, link_rows(result)),
        rich_table("What steps make of them", STEPS_HEADER, step_rows(result)),
        *_notes(result),
    )


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write `net.md`, `net.json` and `net.png` into `folder`; return the Markdown file."""
    page = ["# Network", "", _title(result), "", *markdown_table(LINKS_HEADER, link_rows(result))]
    page += ["", *markdown_table(STEPS_HEADER, step_rows(result)), "", *_notes(result), ""]
    page.append("![round trips and bandwidth between nodes](net.png)")
    return write_files(result, folder, "net", page, lambda path: _plot(result, path))


def _title(result: dict[str, Any]) -> str:
    return (
        f"{result['model']} {result['dtype']}, {result['layout']}, {len(result['nodes'])} nodes; "
        f"a partial of a decoded token has {result['frame_bytes']} bytes"
    )


def link_rows(result: dict[str, Any]) -> list[Cells]:
    """One row per directed link."""
    return [
        (
            f"{row['from']} to {row['to']}",
            figure(row, "round_trip_ms"),
            figure(row, "frame_round_trip_ms"),
            figure(row, "mb_s"),
            str(row["echoes"]),
            f"{row['disturbed']}, {row['lost']} lost" if row["lost"] else str(row["disturbed"]),
        )
        for row in result["links"]
    ]


def step_rows(result: dict[str, Any]) -> list[Cells]:
    """Decode and prefill: what a node sends, what that should cost, and what it does."""
    rows: list[Cells] = []
    for name in ("decode", "prefill"):
        row = result[name]
        expected, measured = row["expected"], row["measured"]
        rows.append(
            (
                f"{name}, rows: {row['rows']}",
                _range(row["messages"]),
                _range(row["tensor_bytes"]),
                f"{expected['expected_ms']:.3f}" if expected else "-",
                f"{measured['exchange_ms']:.3f}" if measured else "-",
                f"{measured['wait_ms']:.3f}" if measured else "-",
            )
        )
    return rows


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [
        "In brackets the least and the greatest. Should cost: by latency and bandwidth of these "
        "links, for what the plan exchanges. Exchange: packing, sending, checking and adding, in "
        "the nodes' own time. Wait: for frames on their way, and for nodes that compute longer."
    ]
    if result["busy"]:
        notes.append("Requests were running: echoes met steps, and steps were not timed.")
    return notes


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, places = pyplot.subplots(1, 4, figsize=(17, 4.5), width_ratios=(3, 3, 1.6, 1.6))
    _heat_map(result, places[0], "frame_round_trip_ms", "round trip of a partial, ms")
    _heat_map(result, places[1], "mb_s", "bandwidth, MB/s")
    for name, place in zip(("decode", "prefill"), places[2:], strict=True):
        _plot_step(result[name], name, place)
    if places[3].patches:
        places[3].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    picture.suptitle(_title(result))
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    pyplot.close(picture)


def _heat_map(result: dict[str, Any], place: Any, key: str, title: str) -> None:
    """One figure of every link, the senders from above to below."""
    names = result["nodes"]
    grid = [[math.nan] * len(names) for _ in names]
    for row in result["links"]:
        if row[key] is not None:
            grid[names.index(row["from"])][names.index(row["to"])] = row[key]
    place.imshow(grid, cmap="viridis")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if not math.isnan(value):
                box = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round"}
                place.text(x, y, f"{value:.3g}", ha="center", va="center", bbox=box)
    place.set_xticks(range(len(names)), names)
    place.set_yticks(range(len(names)), names)
    place.set_xlabel("to")
    place.set_ylabel("from")
    place.set_title(title)


def _plot_step(row: dict[str, Any], name: str, place: Any) -> None:
    """What the network should cost beside what steps take for it."""
    expected, measured = row["expected"], row["measured"]
    if expected:
        place.bar(0, expected["expected_ms"], color="tab:blue", label="should cost")
    if measured:
        exchange, wait = measured["exchange_ms"], measured["wait_ms"]
        place.bar(1, exchange, color="tab:orange", label="exchange")
        place.bar(1, wait, bottom=exchange, color="tab:gray", label="wait")
    place.set_xticks((0, 1), ("should", "does"))
    place.set_ylabel("ms per step")
    place.set_title(f"{name}, rows: {row['rows']}")
