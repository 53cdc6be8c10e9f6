"""A plan as a table for a terminal, and what would become of it without a node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2pinfer.cli.status_view import MIB, kept_runs, owned_runs, runs, spans, stages_of

KINDS = {"head": "heads", "mlp": "MLP units", "vocab": "vocabulary units"}


def plan_view(found: Mapping[str, Any]) -> RenderableType:
    """The object of `plan --json`, or of `plan --without NAME --json`, for people."""
    if "without" not in found:
        return Group(_header(found), _room(found), _speed(found), _table(found))
    parts: list[RenderableType] = [_verdict(found)]
    if found["moved"] is not None:
        parts.append(Text(f"other nodes would take over: {_moved(found['moved'])}"))
    if found["exact"] is False:
        parts.append(Text("some of it in another numeric class: tokens may differ", style="yellow"))
    if found["plan"] is not None:
        parts += [_room(found["plan"]), _speed(found["plan"]), _table(found["plan"])]
    return Group(*parts)


def _header(plan: Mapping[str, Any]) -> Text:
    return Text.assemble(
        (str(plan["model"]), "bold"),
        f"   {plan['layout']}   leader {plan['leader']}   term {plan['term']}"
        f"   epoch {plan['epoch']}",
        ("   quorum last-man", "yellow") if plan.get("quorum") == "last-man" else "",
    )


def _room(plan: Mapping[str, Any]) -> Text:
    return Text(f"room for {plan['kv_positions']} positions of KV, over all requests")


def _speed(plan: Mapping[str, Any]) -> Text:
    """`2 of 4 nodes: 31 tok/s predicted; 4: 27, 1: 19`, and who is left out."""
    found = plan["prediction"]
    nodes = f"{found['nodes']} of {found['of']} node{'' if found['of'] == 1 else 's'}"
    if found["tokens_per_s"] is None:
        lacks = f"the speed of {', '.join(found['unknown'])}" if found["unknown"] else "round trips"
        return Text(f"{nodes}: no speed predicted, {lacks} unknown", style="dim")
    others = ", ".join(f"{o['nodes']}: {o['tokens_per_s']:.3g}" for o in found["alternatives"])
    text = f"{nodes}: {found['tokens_per_s']:.3g} tok/s predicted{'; ' if others else ''}{others}"
    if found["left_out"]:
        text += f"   (owning nothing: {', '.join(found['left_out'])})"
    return Text(text)


def _verdict(found: Mapping[str, Any]) -> Text:
    name = found["without"]
    if found["survives"]:
        return Text(f"without {name} the cluster goes on", style="green")
    return Text(f"without {name} the cluster stands still: {found['why']}", style="yellow")


def _moved(units: Mapping[str, list[int]]) -> str:
    some = (f"{KINDS[kind]} {runs(numbers)}" for kind, numbers in units.items() if numbers)
    return ", ".join(some) or "nothing"


def _table(plan: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("node", style="bold", no_wrap=True)
    for title in ("votes", "layers", "heads", "keeps", "MLP", "vocab"):
        table.add_column(title)
    for title in ("weights MiB", "offered MiB", "KV MiB", "GB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    staged = stages_of(plan["members"]) > 1
    for member in plan["members"]:
        sizes = (
            member["weight_bytes"] + member["standby_bytes"],
            member["memory_bytes"],
            member["kv_room_bytes"],
        )
        table.add_row(
            member["name"] + (" (paused)" if member.get("paused") else ""),
            "yes" if member["voter"] else "no",
            spans(member),
            owned_runs(member, "head_units"),
            kept_runs(member, "head_units", staged=staged),
            owned_runs(member, "mlp_units"),
            owned_runs(member, "vocab_units"),
            *("-" if member["witness"] else _mib(size) for size in sizes),
            "-" if member["product_gb_s"] is None else f"{member['product_gb_s']:.3g}",
        )
    return table


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / MIB:.0f}"
