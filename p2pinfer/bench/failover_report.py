"""The result of `bench failover` as lines, Markdown, HTML, and pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PHASES = (("detect_s", "noticed"), ("agree_s", "agreed"), ("restore_s", "restored"))
"""A key of a rung's figures, and what has been reached by the end of it."""

COLUMNS = (
    ("detect_s", "detection, s"),
    ("agree_s", "agreement, s"),
    ("restore_s", "restoring, s"),
    ("stall_s", "pause at the client, s"),
    ("step_s", "a token before, s"),
    ("recomputed_positions", "positions computed again"),
    ("moved_bytes", "bytes moved"),
    ("step_bytes", "bytes of steps"),
    ("memory_bytes", "bytes of memory"),
)
WINDOW_S = 0.25
"""At least so much before and after the kill is drawn."""

Row = tuple[str, ...]


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write `failover.md`, `.html`, `.json` and two pictures into `folder`; return the Markdown
    file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failover.json").write_text(json.dumps(result, indent=2) + "\n")
    plot_tokens(result, folder / "failover-tokens.png")
    plot_phases(result, folder / "failover-phases.png")
    (folder / "failover.html").write_text("\n".join(html_page(result)) + "\n", encoding="utf-8")
    page = folder / "failover.md"
    page.write_text("\n".join(markdown_page(result)) + "\n", encoding="utf-8")
    return page


def title(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    victims = sorted({name for row in result["rungs"].values() for name in row["victims"]})
    return (
        f"{result['shape']} {result['dtype']}, {result['nodes']} nodes of "
        f"{result['threads_per_node']} thread(s), context {result['context']}, "
        f"{result['runs']} run(s) each: {', '.join(victims)} killed"
    )


def summary(result: dict[str, Any]) -> str:
    """What a terminal shows."""
    return "\n".join(summary_lines(result))


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The result in a few lines for people."""
    lines = [title(result)]
    for rung, row in result["rungs"].items():
        phases = ", ".join(f"{name} {row[key]:.3f} s" for key, name in PHASES)
        equal = "same tokens" if row["tokens_equal"] else "OTHER TOKENS than without the kill"
        lines.append(
            f"  {rung:10} pause {row['stall_s']:.3f} s ({row['stall_s_min']:.3f} to "
            f"{row['stall_s_max']:.3f}): {phases}; {equal}"
        )
    if row := result.get("protection"):
        lines.append(f"  {protection_line(row)}")
    return lines


def protection_line(row: dict[str, Any]) -> str:
    """What replicas cost, in one line."""
    return (
        f"replication costs {_cost(row, 'cost')} of decode: "
        f"{row['decode_tokens_per_s_with']} tokens/s with it, "
        f"{row['decode_tokens_per_s_without']} without, {row['pairs']} pairs; "
        f"{_cost(row, 'cost_whole')} by whole halves instead of their median tokens"
    )


def _cost(row: dict[str, Any], name: str) -> str:
    edges = row[f"{name}_95"]
    return f"{row[name]:.2%}" + (f" (95 %: {edges[0]:.2%} to {edges[1]:.2%})" if edges else "")


def table(result: dict[str, Any]) -> list[Row]:
    """The header and a row for each rung: medians, with the least and the greatest."""
    rows: list[Row] = [("rung", *(name for _, name in COLUMNS), "tokens")]
    for rung, row in result["rungs"].items():
        equal = "the same" if row["tokens_equal"] else "OTHERS"
        rows.append((rung, *(shown(row, key) for key, _ in COLUMNS), equal))
    return rows


def shown(row: dict[str, Any], key: str) -> str:
    """A figure with its spread."""
    values = (row[key], row[key + "_min"], row[key + "_max"])
    if key.endswith("_s"):
        middle, low, high = (f"{value:.3f}" for value in values)
    else:
        middle, low, high = (f"{value:,.0f}" for value in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def markdown_page(result: dict[str, Any]) -> list[str]:
    """The page's lines."""
    header, *rows = table(result)
    lines = ["# Failover", "", title(result), "", "Medians, with the least and the greatest.", ""]
    lines += [_markdown_row(header), "|---" * len(header) + "|", *map(_markdown_row, rows), ""]
    if row := result.get("protection"):
        lines += [protection_line(row)[0].upper() + protection_line(row)[1:] + ".", ""]
    lines += ["![time between tokens around the kill](failover-tokens.png)", ""]
    return [*lines, "![the phases of each rung](failover-phases.png)"]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def html_page(result: dict[str, Any]) -> list[str]:
    """The same as one page to open in a browser."""
    header, *rows = table(result)
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Failover</title>',
        "<style>body { font-family: sans-serif; margin: 2em } td, th { padding: 0.3em 0.8em; "
        "border-bottom: 1px solid #ccc; text-align: right } img { max-width: 100% }</style>",
        f"</head><body><h1>Failover</h1><p>{html.escape(title(result))}</p>",
        "<table>",
        _html_row("th", header),
        *(_html_row("td", row) for row in rows),
        "</table>",
    ]
    if row := result.get("protection"):
        lines.append(f"<p>{html.escape(protection_line(row))}</p>")
    for name, what in (
        ("failover-tokens.png", "time between tokens around the kill"),
        ("failover-phases.png", "the phases of each rung"),
    ):
        lines.append(f'<p><img src="{name}" alt="{what}"></p>')
    return [*lines, "</body></html>"]


def _html_row(tag: str, cells: Sequence[str]) -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


# --- pictures -------------------------------------------------------------------------------------


def plot_tokens(result: dict[str, Any], path: Path) -> None:
    """How long each token took around the kill, a line for each rung."""
    from matplotlib import pyplot, ticker

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(10, 4))
    longest = max((row["stall_s"] for row in result["rungs"].values()), default=0.0)
    window = max(WINDOW_S, 1.5 * longest)
    for rung, row in result["rungs"].items():
        near = [(at, gap) for at, gap in row["gaps"] if -window <= at <= 2 * window]
        if near:
            axes.plot(*zip(*near, strict=True), marker="o", markersize=3, label=rung)
    axes.axvline(0.0, linestyle="--", color="grey")
    axes.text(0.0, longest, " kill", va="top")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("when the token came, s after the kill")
    axes.set_ylabel("time since the token before, s")
    axes.legend()
    figure.suptitle(title(result))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_phases(result: dict[str, Any], path: Path) -> None:
    """The phases of each rung, one upon the other, and the pause that the client saw."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(8, 4))
    rungs = list(result["rungs"])
    rows = [result["rungs"][rung] for rung in rungs]
    bottom = [0.0] * len(rungs)
    for key, name in PHASES:
        values = [row[key] for row in rows]
        axes.bar(rungs, values, bottom=bottom, label=name, width=0.5)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    middle = [row["stall_s"] for row in rows]
    spread = [
        [row["stall_s"] - row["stall_s_min"] for row in rows],
        [row["stall_s_max"] - row["stall_s"] for row in rows],
    ]
    axes.errorbar(
        rungs, middle, yerr=spread, fmt="_", color="black", capsize=8, label="pause at the client"
    )
    axes.set_ylabel("s (medians; the pause from least to greatest)")
    axes.legend()
    figure.suptitle(title(result))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
