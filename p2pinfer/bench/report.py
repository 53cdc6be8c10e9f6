"""A benchmark's result as Markdown and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from p2pinfer.bench import beside
from p2pinfer.bench.budget import PARTS

COLOURS = ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:gray", "tab:red")
"""Of the parts, in their order."""

LEAST_SHARE = 3.0
"""Percent of a token from which a part has room for its number."""


def summary(result: dict[str, Any]) -> str:
    """What a terminal shows."""
    return "\n".join(summary_lines(result))


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write `decode.md`, `decode.json` and `decode.png` into `folder`; return the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decode.json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(result, folder / "decode.png")
    page = folder / "decode.md"
    page.write_text("\n".join(_page(result)) + "\n")
    return page


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The result in a few lines for people."""
    title = (
        f"{result['shape']} {result['dtype']}, {result['nodes']} nodes of "
        f"{result['threads_per_node']} thread(s), prompt {result['prompt_tokens']}"
    )
    lines = [title]
    for name, unit in (
        ("decode_tokens_per_s", "tokens/s"),
        ("prefill_tokens_per_s", "tokens/s"),
        ("ttft_s", "s"),
    ):
        lines.append(f"  {name:24} {_with_spread(result, name)} {unit}")
    lines.append(
        f"  limit {result['limit_tokens_per_s']} tokens/s at {result['read_bandwidth_gb_s']} GB/s: "
        f"fraction {_with_spread(result, 'fraction_of_limit')}"
    )
    for name, kind in (("a token", "per_token"), ("the prompt", "per_prompt")):
        shares = result[f"{kind}_percent"].items()
        lines.append(f"  {name}: " + ", ".join(f"{part} {share} %" for part, share in shares))
    if result["predicted_tokens_per_s"] is not None:
        lines.append(
            f"  predicted {result['predicted_tokens_per_s']} tokens/s: "
            f"{result['predicted_over_measured']} times what was measured"
        )
    for name, row in result["reference"].items():
        lines.append(
            f"  {name}: decode {_with_spread(row, 'decode_tokens_per_s')} tokens/s, prefill "
            f"{_with_spread(row, 'prefill_tokens_per_s')}; ours over it: decode "
            f"{_with_spread(row, 'decode_ratio')}, prefill {_with_spread(row, 'prefill_ratio')}"
        )
    if "together" in result:
        row = result["together"]
        lines.append(
            f"  {row['requests']} requests at once: {_with_spread(row, 'tokens_per_s')} tokens/s, "
            f"{_with_spread(row, 'times_one')} times one"
        )
    if "beside" in result:
        lines += beside.lines(result["beside"])
    return lines


def _with_spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name]} ({row[name + '_min']} to {row[name + '_max']})"


def _page(result: dict[str, Any]) -> list[str]:
    header = "| node | " + " | ".join((*PARTS, "messages", "bytes")) + " |"
    lines = ["# Decode", "", "```", *summary_lines(result), "```", "", "Per token and node:", ""]
    lines += [header, "|---" * (len(PARTS) + 3) + "|"]
    for number, row in enumerate(result["per_token_by_node"], start=1):
        values = " | ".join(str(row[name]) for name in (*PARTS, "messages", "bytes"))
        lines.append(f"| node{number} | {values} |")
    return [*lines, "", "![speed and the time of one token](decode.png)"]


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, budget) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    bars = [("p2pinfer", result)]
    bars += [(name, row) for name, row in result["reference"].items()]
    for place, (_name, row) in enumerate(bars):
        middle = row["decode_tokens_per_s"]
        low, high = row["decode_tokens_per_s_min"], row["decode_tokens_per_s_max"]
        speed.bar(place, middle, yerr=[[middle - low], [high - middle]], capsize=6)
    speed.axhline(result["limit_tokens_per_s"], linestyle="--", color="grey")
    speed.text(0, result["limit_tokens_per_s"], " limit of the memory", va="bottom")
    speed.set_xticks(range(len(bars)), [name for name, _ in bars])
    speed.set_ylim(0, result["limit_tokens_per_s"] * 1.15)
    speed.set_ylabel("decode, tokens/s (median, least, greatest)")
    names = [f"node{i}" for i in range(1, len(result["per_token_by_node"]) + 1)]
    bottom = [0.0] * len(names)
    wholes = [sum(row[part] for part in PARTS) for row in result["per_token_by_node"]]
    for part, colour in zip(PARTS, COLOURS, strict=True):
        values = [row[part] for row in result["per_token_by_node"]]
        bars_ = budget.bar(
            names, values, bottom=bottom, label=part.removesuffix("_ms"), color=colour
        )
        shares = [100 * value / whole for value, whole in zip(values, wholes, strict=True)]
        texts = [f"{share:.0f} %" if share >= LEAST_SHARE else "" for share in shares]
        budget.bar_label(bars_, texts, label_type="center", fontsize=8, color="white")
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    budget.set_ylabel("one token, ms")
    handles, labels = budget.get_legend_handles_labels()
    budget.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{result['shape']} {result['dtype']}, {result['layout']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
