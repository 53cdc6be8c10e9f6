"""Where the time of one token goes, from the counters that every node keeps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from p2pinfer.bench.asking import ask
from p2pinfer.client import Client
from p2pinfer.errors import ClusterError

PARTS = ("products_ms", "attention_ms", "other_ms", "exchange_ms", "wait_ms", "python_ms")
"""What a token's time is divided into: products with weights; attention; the rest of computing
(norms, rotary embedding, sums of a node's own units, and calling all this); packing, sending,
checking and adding what is exchanged; waiting for others; scheduling, drawing and bookkeeping."""

COUNTED = ("compute", "products", "attention", "exchange", "python")
COUNTERS_S = 10.0
"""How long nodes may take to agree on how many steps are over."""

TRIES = 3
"""Times that a budget is measured: a new plan in between begins the counters anew."""

REPORTED_S = 0.5
"""A worker reports its counters several times in that time."""

Row = dict[str, float]


@dataclass(frozen=True)
class Budget:
    """Figures by node: of one decoded token, and of reading the whole prompt once."""

    decode_by_node: list[Row]
    prefill_by_node: list[Row]

    @property
    def decode(self) -> Row:
        """The mean over nodes, of one token."""
        return mean(self.decode_by_node)

    @property
    def prefill(self) -> Row:
        """The mean over nodes, of the prompt."""
        return mean(self.prefill_by_node)


def mean(rows: Sequence[Row]) -> Row:
    """Figure by figure."""
    return {name: round(statistics.mean(row[name] for row in rows), 4) for name in rows[0]}


def percentages(row: Mapping[str, float]) -> Row:
    """The share of each of `PARTS` in their sum, by name without the unit."""
    whole = sum(row[part] for part in PARTS) or 1.0
    return {part.removesuffix("_ms"): round(100 * row[part] / whole, 2) for part in PARTS}


class Counters(NamedTuple):
    """Of each node, counted since the plan of this term and epoch is in force."""

    plan: tuple[int, int]
    by_node: list[dict[str, Any]]


def counters(addresses: Sequence[str]) -> Counters:
    """Each node's counters, once all have done the same steps and none does more."""
    deadline = time.monotonic() + COUNTERS_S
    before: tuple[set[tuple[int, int]], set[int]] | None = None
    while True:
        said = [Client([address]).status() for address in addresses]
        plans = {(each["term"], each["epoch"]) for each in said}
        steps = {each["counters"]["steps"] for each in said}
        if len(plans) == len(steps) == 1 and before == (plans, steps):
            return Counters(plans.pop(), [each["counters"] for each in said])
        if time.monotonic() > deadline:
            raise ClusterError("internal", f"nodes report different steps: {sorted(steps)}")
        before = plans, steps
        time.sleep(REPORTED_S)


def token_budget(
    addresses: Sequence[str], client: Client, prompt: Sequence[int], tokens: int
) -> Budget:
    """What a reply of one token took, and what each of `tokens` more did.

    The prefill's share of the longer reply is taken out by the counters of the short one. Raises
    `ClusterError` where a new plan came into force each time.
    """
    for _ in range(TRIES):
        start = counters(addresses)
        short = ask(client, prompt, 1)
        first = counters(addresses)
        timing = ask(client, prompt, tokens + 1)
        last = counters(addresses)
        if start.plan == first.plan == last.plan:
            return _budget(start, first, last, short.ttft_s, timing.arrivals)
    raise ClusterError("internal", f"{TRIES} times a new plan came into force while it was counted")


def _budget(
    start: Counters, first: Counters, last: Counters, ttft_s: float, arrivals: Sequence[float]
) -> Budget:
    tokens = len(arrivals) - 1
    wall_ms = 1000 * (arrivals[-1] - arrivals[0]) / tokens
    decode, prefill = [], []
    for a, b, c in zip(start.by_node, first.by_node, last.by_node, strict=True):
        once = {name: b[name] - a[name] for name in a if isinstance(a[name], int | float)}
        more = {name: (c[name] - b[name] - once[name]) / tokens for name in once}
        prefill.append(_row(once, 1000 * ttft_s))
        decode.append(_row(more, wall_ms))
    return Budget(decode, prefill)


def _row(spent: Mapping[str, float], wall_ms: float) -> Row:
    """One node's figures, from the seconds, messages and bytes that it counted meanwhile."""
    parts = {f"{name}_ms": 1000 * spent[f"{name}_s"] for name in COUNTED}
    known = parts["compute_ms"] + parts["exchange_ms"] + parts["python_ms"]
    parts["other_ms"] = parts["compute_ms"] - parts["products_ms"] - parts["attention_ms"]
    # What is neither is waiting: for peers within a step, or for the leader's next step.
    parts["wait_ms"] = max(0.0, wall_ms - known)
    return {
        **{name: round(value, 4) for name, value in parts.items()},
        "messages": round(spent["messages_sent"], 3),
        "bytes": round(spent["bytes_sent"], 1),
    }
