"""A cluster's status as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

STATE_COLOURS = {"alive": "green", "suspect": "yellow", "dead": "red", "left": "dim"}
GONE = ("dead", "left")
MIB = 1 << 20


def runs(numbers: Iterable[int]) -> str:
    """Numbers as ranges: `0-3,5`; a dash for none."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "-"


def owned_runs(member: Mapping[str, Any], kind: str) -> str:
    """The units of `kind` (`head_units`, ...) that a member owns; by stage if it has several."""
    return " | ".join(runs(stage[kind]) for stage in member["owned"]) or "-"


def kept_runs(member: Mapping[str, Any], kind: str, *, staged: bool) -> str:
    """The units of `kind` that a member keeps replicas of; in a plan of several stages (`staged`)
    with their layers."""
    kept = member.get("standby", ())
    return (
        " | ".join(
            f"{runs(stage[kind])} of layers {_layers(stage)}" if staged else runs(stage[kind])
            for stage in kept
        )
        or "-"
    )


def spans(member: Mapping[str, Any]) -> str:
    """The layers of the stages a member takes part in."""
    return " | ".join(_layers(stage) for stage in member["owned"]) or "-"


def stages_of(members: Iterable[Mapping[str, Any]]) -> int:
    """How many stages the members hold together."""
    return len({tuple(stage["span"]) for member in members for stage in member["owned"]})


def _layers(stage: Mapping[str, Any]) -> str:
    start, end = stage["span"]
    return f"{start}-{end - 1}"


def header(status: Mapping[str, Any]) -> Text:
    """One line: the model, who leads, which plan, and whether prompts are answered."""
    model = (status.get("model") or {}).get("name") or "no model"
    ready = bool(status.get("ready"))
    return Text.assemble(
        (str(model), "bold"),
        f"   leader {status.get('leader') or '-'}   term {status.get('term', 0)}"
        f"   epoch {status.get('epoch', 0)}   ",
        ("ready", "green") if ready else ("not ready", "yellow"),
    )


def prospects(status: Mapping[str, Any]) -> Text:
    """One line: what a cluster that is not ready waits for; of one that is, who votes, and whose
    death it survives."""
    if not status.get("ready"):
        return Text(f"waiting: {status.get('waiting') or 'the plan to be adopted'}", style="yellow")
    tolerated = status.get("tolerates") or []
    return Text.assemble(
        f"voters {', '.join(status.get('voters') or []) or '-'}   survives the death of ",
        "any of " if len(tolerated) > 1 else "",
        (", ".join(tolerated) or "nobody", "green" if tolerated else "yellow"),
    )


def condition(member: Mapping[str, Any]) -> Text:
    """A member's state in one word: what is wrong with it wins over what is right."""
    state = str(member["state"])
    if state == "alive":
        signs = ("hung", "red"), ("draining", "yellow"), ("paused", "yellow"), ("witness", "green")
        for sign, colour in signs:
            if member.get(sign):
                return Text(sign, style=colour)
        if member.get("numeric_class") == "":
            return Text("starting", style="yellow")
    return Text(state, style=STATE_COLOURS.get(state, ""))


def holdings_table(members: Sequence[Mapping[str, Any]]) -> Table:
    """Who holds which units."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("node", style="bold")
    for title in ("layers", "heads", "MLP units", "vocabulary units"):
        table.add_column(title)
    for member in members:
        kinds = (owned_runs(member, kind) for kind in ("head_units", "mlp_units", "vocab_units"))
        table.add_row(member["name"], spans(member), *kinds)
    return table


def members_table(members: Sequence[Mapping[str, Any]]) -> Table:
    """All that `status` knows of each member; `keeps` are the heads that it keeps replicas of.

    Of a plan of one stage the layers are left out: all have all of them.
    """
    staged = stages_of(members) > 1
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("name", style="bold", no_wrap=True)
    parts = ("layers",) if staged else ()
    for title in ("state", "address", *parts, "heads", "keeps", "MLP"):
        table.add_column(title, no_wrap=title not in ("heads", "keeps"))
    for title in ("rtt ms", "tokens/s", "KV MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for member in members:
        there = member["state"] not in GONE
        table.add_row(
            member["name"],
            condition(member),
            member["address"].removeprefix("tcp://"),
            *((spans(member),) if parts else ()),
            owned_runs(member, "head_units"),
            _kept(member, staged=staged),
            owned_runs(member, "mlp_units"),
            _figure(member.get("rtt_ms") if there else None),
            _figure(member.get("tokens_per_s") if there else None),
            _kv(member) if there and not member.get("witness") else "-",
        )
    return table


def status_view(status: Mapping[str, Any]) -> RenderableType:
    """Two lines about the whole and a table of members, as `p2pinfer status` shows them."""
    return Group(header(status), prospects(status), members_table(status["members"]))


def _kept(member: Mapping[str, Any], *, staged: bool) -> Text:
    """The heads that a member keeps replicas of, and why these are not ready."""
    state = member.get("standby_state") or {}
    text = Text(kept_runs(member, "head_units", staged=staged))
    if state.get("error"):
        text.append(f" ({state['error']})", style="red")
    elif state.get("units_ready", 0) < state.get("units", 0):
        text.append(f" (loading {state['units_ready']}/{state['units']})", style="yellow")
    elif state.get("units_warm"):
        text.append(" (warm)")
    return text


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _kv(member: Mapping[str, Any]) -> str:
    kv = member.get("kv") or {}
    return f"{kv.get('used_bytes', 0) / MIB:.0f}/{kv.get('limit_bytes', 0) / MIB:.0f}"
