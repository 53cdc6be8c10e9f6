"""`p2pinfer bench net`: what the links between the nodes can do, and what steps make of them.

Echoes go over the very sockets that steps use, from worker to worker. What they give, and what the
plan says is exchanged, is what the network should cost; the nodes' own counters are what it does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from p2pinfer.bench.budget import Budget, token_budget
from p2pinfer.bench.inputs import Inputs, Tell, local_cluster, open_model, prompt_of, spread
from p2pinfer.bench.settling import settle
from p2pinfer.bench.traffic import (
    Link,
    expected_step_ms,
    largest_frame,
    plan_of,
    step_traffic,
)
from p2pinfer.client import Client
from p2pinfer.errors import ClusterError, UsageError
from p2pinfer.limits import MAX_ECHO_BYTES, MAX_ECHO_RUN_BYTES, MAX_ECHOES
from p2pinfer.types import Plan

TRIES = 3
"""A plan that changes while its steps are timed is timed anew so often, all in all."""

BULK_ECHOES = 8
"""Echoes of the full size in one round, one way each."""

AGAIN_S = 0.02
"""A node that cannot measure a link now is asked again after so long,"""

PATIENCE_S = 30.0
"""for so long."""


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """What to measure: the cluster at `to`, or one of `nodes` local nodes. `echoes` of each kind go
    over every link in each of `rounds`; then replies of `max_tokens` tokens to `prompt_tokens`."""

    to: tuple[str, ...] = ()
    echoes: int = 32
    rounds: int = 3
    prompt_tokens: int = 128
    max_tokens: int = 32

    def check(self) -> None:
        """Raise `UsageError` for what cannot be measured, too."""
        if self.to:
            return
        if self.nodes < 2:
            raise UsageError("--nodes 1: one node has no links; give 2 or more")
        super().check()


@dataclass
class _Samples:
    """Round trips in milliseconds over one link, by what they carried."""

    small: list[float] = field(default_factory=list)
    frame: list[float] = field(default_factory=list)
    bulk: list[float] = field(default_factory=list)
    disturbed: int = 0
    lost: int = 0


def measure(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Everything that `bench net --json` prints. Raises `ClusterError` where no echo comes back."""
    with _addresses(settings, tell) as addresses:
        plan = plan_of(Client(addresses).status())
        if len(plan.members) < 2:
            raise UsageError("the cluster has one node, which has no links")
        frame = min(max(1, largest_frame(plan, 1)), MAX_ECHO_BYTES)
        busy = _busy(plan)
        samples = _measure_links(settings, plan, frame, tell)
        busy = busy or _busy(plan)
        tell("requests are running: what steps take is not timed" if busy else "what steps take")
        names = [member.name for member in plan.members]
        plan, budget = _measure_steps(settings, addresses, names, busy=busy)
    links = _links(samples, frame)
    result = _about(settings, plan) | {
        "busy": busy,
        "frame_bytes": frame,
        "bulk_bytes": MAX_ECHO_BYTES,
        "links": [_row(names, pair, each) for pair, each in samples.items()],
    }
    for name, rows in (("decode", 1), ("prefill", settings.prompt_tokens)):
        expected = expected_step_ms(plan, rows, links) if links else None
        result[name] = {"rows": rows, "expected": expected} | _sent(plan, rows)
        result[name]["measured"] = getattr(budget, name) if budget else None
    return result


@contextmanager
def _addresses(settings: Settings, tell: Tell) -> Iterator[Sequence[str]]:
    if settings.to:
        yield settings.to
        return
    folder, _ = open_model(settings, tell)
    with local_cluster(settings, folder, tell) as cluster:
        settle(cluster, tell)
        yield [node.address for node in cluster.nodes]


def _measure_steps(
    settings: Settings, addresses: Sequence[str], names: Sequence[str], *, busy: bool
) -> tuple[Plan, Budget | None]:
    """The plan in force, and what its steps take; nothing of that where requests are running.

    A plan that another one followed meanwhile is measured anew. Raises `ClusterError` where that
    happens again and again, or where other nodes are there than had their links measured.
    """
    client = Client(addresses)
    for _ in range(TRIES):
        plan = plan_of(client.status())
        if [member.name for member in plan.members] != names:
            break
        if busy:
            return plan, None
        members = [member.address for member in plan.members]
        prompt = prompt_of(plan.model.vocab_size, settings.prompt_tokens, 0)
        budget = token_budget(members, Client(members, retry_for=0), prompt, settings.max_tokens)
        if plan_of(client.status()).fence == plan.fence:
            return plan, budget
    raise ClusterError("internal", "the cluster changed while it was measured: measure it again")


def _about(settings: Settings, plan: Plan) -> dict[str, Any]:
    """What was measured, in the terms of the other benchmarks."""
    return {
        "model": plan.model.name,
        "dtype": plan.model.dtype.value,
        "quant": plan.model.quant,
        "layout": plan.layout,
        "nodes": [member.name for member in plan.members],
        "leader": plan.members[plan.leader].name,
        "local": not settings.to,
        "rounds": settings.rounds,
    }


def _busy(plan: Plan) -> bool:
    """Whether requests are running: then echoes meet steps, and steps share their time."""
    leader = Client([plan.members[plan.leader].address])
    counters = leader.status()["counters"]
    return bool(counters["running"] or counters["waiting"])


# --- links ----------------------------------------------------------------------------------------


def _measure_links(
    settings: Settings, plan: Plan, frame: int, tell: Tell
) -> dict[tuple[int, int], _Samples]:
    everybody = range(len(plan.members))
    samples = {(a, b): _Samples() for a in everybody for b in everybody if a != b}
    for number in range(settings.rounds):  # in turn: networks and machines drift
        for (a, b), found in samples.items():
            names = plan.members[a].name, plan.members[b].name
            tell(f"{names[0]} to {names[1]}, round {number + 1} of {settings.rounds}")
            client = Client([plan.members[a].address])
            count = min(settings.echoes, MAX_ECHOES)
            fitting = max(1, min(count, MAX_ECHO_RUN_BYTES // (2 * frame)))
            found.small += _echoes(client, names[1], found, there=0, back=0, count=count)
            found.frame += _echoes(client, names[1], found, there=frame, back=frame, count=fitting)
            found.bulk += _echoes(
                client, names[1], found, there=MAX_ECHO_BYTES, back=0, count=BULK_ECHOES
            )
    return samples


def _echoes(
    client: Client, name: str, found: _Samples, *, there: int, back: int, count: int
) -> list[float]:
    """Round trips in milliseconds; a node that must pause between two runs is waited for, and one
    that has no plan for the moment."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = client.measure_link(name, there=there, back=back, count=count)
            break
        except ClusterError as error:
            if not error.retryable or time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)
    found.disturbed += answer["disturbed"]
    found.lost += answer["lost"]
    trips: list[float] = answer["round_trips_ms"]
    return trips


def _bandwidths(each: _Samples) -> list[float]:
    """Megabytes (1e6) per second of each full echo, but for what an empty one takes at least."""
    empty = min(each.small)
    return [MAX_ECHO_BYTES / 1000 / max(trip - empty, trip / 2) for trip in each.bulk]


def _links(
    samples: dict[tuple[int, int], _Samples], frame: int
) -> dict[tuple[int, int], Link] | None:
    """Medians, one way; None where steps left no echo undisturbed on some link."""
    if not all(each.small and each.frame and each.bulk for each in samples.values()):
        return None
    return {
        pair: Link(
            small_ms=statistics.median(each.small) / 2,
            frame_bytes=frame,
            frame_ms=statistics.median(each.frame) / 2,
            mb_s=statistics.median(_bandwidths(each)),
        )
        for pair, each in samples.items()
    }


def _row(names: Sequence[str], pair: tuple[int, int], each: _Samples) -> dict[str, Any]:
    row: dict[str, Any] = {"from": names[pair[0]], "to": names[pair[1]]}
    figures = (
        ("round_trip_ms", each.small),
        ("frame_round_trip_ms", each.frame),
        ("mb_s", _bandwidths(each) if each.small else []),
    )
    for name, values in figures:
        row |= spread(name, values, 3) if values else {name: None}
    return (
        row
        | {"echoes": len(each.small + each.frame + each.bulk)}
        | {
            "disturbed": each.disturbed,
            "lost": each.lost,
        }
    )


def _sent(plan: Plan, rows: int) -> dict[str, Any]:
    """What each node sends in a step, by the plan; in the order of `nodes`."""
    each = [step_traffic(plan, index, rows) for index in range(len(plan.members))]
    return {name: [row[name] for row in each] for name in ("messages", "tensor_bytes")}
