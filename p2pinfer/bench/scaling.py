"""`p2pinfer bench scaling`: speed over nodes, over contexts, and over requests at once.

One axis at a time from a base: the first value of each. All nodes together use the machine's
cores, whatever their number, so that what is compared is the splitting and not the machine. Each
number of nodes has a cluster of its own; contexts and requests share the base's, run by run in
turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from p2pinfer.bench.asking import LONGER, Together, ask_together
from p2pinfer.bench.inputs import (
    Inputs,
    Tell,
    check_positions,
    local_cluster,
    open_model,
    prompt_of,
    spread,
)
from p2pinfer.bench.settling import settle
from p2pinfer.cluster import check_ports
from p2pinfer.config import available_cpus
from p2pinfer.errors import UsageError
from p2pinfer.limits import MAX_STEP_SLOTS
from p2pinfer.types import ModelSpec

AXES = ("nodes", "contexts", "requests")


class Point(NamedTuple):
    """What is measured at once: `requests` replies to prompts of `context` tokens, on `nodes`."""

    nodes: int
    context: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """What to measure; the first value of each axis is its base, and one value alone is no axis.
    `threads` is what all nodes together have; 0: the machine's cores."""

    nodes_axis: tuple[int, ...] = (1, 2, 4)
    contexts: tuple[int, ...] = (128, 1024, 8192)
    requests: tuple[int, ...] = (1, 4, 16)
    threads: int = 0
    max_tokens: int = 64
    runs: int = 3

    def check(self) -> None:
        """Raise `UsageError` for what cannot be measured, too."""
        super().check()
        check_ports(self.base_port, max(self.nodes_axis))

    def threads_of(self, nodes: int) -> int:
        """Threads of each of so many nodes: all of them together use the cores, and each has one
        at least."""
        return max(1, (self.threads or available_cpus()) // nodes)


def parse_axis(flag: str, text: str, most: int) -> tuple[int, ...]:
    """Values of an axis from a list like `1,2,4`; raises `UsageError` for one that is not."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= most for word in words):
        raise UsageError(f"{flag} {text}: give numbers from 1 to {most}, like 1,2,4")
    return tuple(dict.fromkeys(int(word) for word in words))


def points_of(settings: Settings, axis: str) -> list[Point]:
    """The points of an axis, the base first."""
    base = base_of(settings)
    match axis:
        case "nodes":
            return [base._replace(nodes=value) for value in settings.nodes_axis]
        case "contexts":
            return [base._replace(context=value) for value in settings.contexts]
        case _:
            return [base._replace(requests=value) for value in settings.requests]


def base_of(settings: Settings) -> Point:
    """The point that all axes have in common."""
    return Point(settings.nodes_axis[0], settings.contexts[0], settings.requests[0])


def measure(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Everything that `bench scaling --json` prints."""
    folder, spec = open_model(settings, tell)
    check_positions(
        spec, max(settings.contexts) + LONGER * settings.max_tokens, "--contexts and --max-tokens"
    )
    wanted = dict.fromkeys(point for axis in AXES for point in points_of(settings, axis))
    runs: dict[Point, list[Together]] = {}
    for nodes in settings.nodes_axis:
        own = [point for point in wanted if point.nodes == nodes]
        runs |= _runs(settings, spec, folder, own, tell)
    base = base_of(settings)
    return {
        "shape": settings.shape,
        "layout": settings.layout,
        "dtype": str(spec.dtype),
        "quant": spec.quant,
        "cores": available_cpus(),
        "max_tokens": settings.max_tokens,
        "runs": settings.runs,
        "base": base._asdict(),
        "axes": {
            axis: [
                row(point, settings.threads_of(point.nodes), runs[point], figures(base, runs[base]))
                for point in points_of(settings, axis)
            ]
            for axis in AXES
            if len(points_of(settings, axis)) > 1
        },
    }


def _runs(
    settings: Settings, spec: ModelSpec, folder: Path, points: Sequence[Point], tell: Tell
) -> dict[Point, list[Together]]:
    """The runs of points of one number of nodes, after a warm-up, in turn: machines drift."""
    nodes = points[0].nodes
    own = replace(settings, nodes=nodes, threads=settings.threads_of(nodes))
    found: dict[Point, list[Together]] = {point: [] for point in points}
    with local_cluster(own, folder, tell) as cluster:
        settle(cluster, tell)
        addresses = [node.address for node in cluster.nodes]
        tell(f"nodes: {nodes}; warming up")
        _ask(settings, spec, addresses, points[0], 0)
        for number in range(1, settings.runs + 1):
            for point in points:
                tell(
                    f"nodes: {nodes}, context: {point.context}, requests at once: "
                    f"{point.requests}; run {number} of {settings.runs}"
                )
                found[point].append(_ask(settings, spec, addresses, point, number))
    return found


def _ask(
    settings: Settings, spec: ModelSpec, addresses: Sequence[str], point: Point, run: int
) -> Together:
    prompts = [
        prompt_of(spec.vocab_size, point.context, run * MAX_STEP_SLOTS + index)
        for index in range(point.requests)
    ]
    return ask_together(addresses, prompts, settings.max_tokens)


def row(
    point: Point, threads: int, runs: Sequence[Together], base: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """One point's figures, and their ratios to the base's `figures`, run by run."""
    found: dict[str, Any] = {**point._asdict(), "threads_per_node": threads}
    for name, values in figures(point, runs).items():
        found |= spread(name, values, 3)
        # On a busy machine tokens may reach a client in bunches, with no time between two.
        ratios = [a / b if b else 0.0 for a, b in zip(values, base[name], strict=True)]
        found |= spread(f"{name}_ratio", ratios)
    return found


def figures(point: Point, runs: Sequence[Together]) -> dict[str, list[float]]:
    """By name, the figure of each run: tokens per second of all requests together, and the median
    time between two tokens of one of them."""
    tokens = point.context * point.requests
    return {
        "decode_tokens_per_s": [run.tokens_per_s for run in runs],
        "prefill_tokens_per_s": [tokens / run.prefill_s for run in runs],
        "inter_token_ms": [1000 * statistics.median(run.gaps_s) for run in runs],
    }
