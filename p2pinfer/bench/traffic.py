"""What one step of a plan sends, by the plan alone, and what that should take on measured links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from p2pinfer.core.step_checks import SUM_DTYPES
from p2pinfer.core.topology import Role, Topology, topology
from p2pinfer.core.units import unit_count
from p2pinfer.errors import ClusterError
from p2pinfer.types import Fence, Member, ModelSpec, Plan, Stage, UnitKind
from p2pinfer.wire.tensors import ITEM_BYTES, WireDType

HALVES = 2
HIDDEN_ITEM_BYTES = ITEM_BYTES[WireDType.FLOAT32]
"""Of one number of a hidden state."""


@dataclass(frozen=True)
class Link:
    """What was measured from one node to another: half a round trip of a small frame and of one of
    `frame_bytes` (milliseconds), and megabytes (1e6) per second."""

    small_ms: float
    frame_bytes: int
    frame_ms: float
    mb_s: float

    def transfer_ms(self, nbytes: int) -> float:
        """How much longer than a small frame one of so many bytes takes."""
        if nbytes <= self.frame_bytes:
            return max(0.0, self.frame_ms - self.small_ms) * nbytes / max(1, self.frame_bytes)
        return nbytes / self.mb_s / 1000


Links = Mapping[tuple[int, int], Link]
"""By sender and receiver, as indices into the plan's members."""


def plan_of(status: Mapping[str, Any]) -> Plan:
    """The plan in force, as far as it matters to steps, from the object of `status --json`.

    Raises `ClusterError` where the cluster is not ready.
    """
    if not status["ready"]:
        waiting = status.get("waiting") or "a plan"
        raise ClusterError(
            "not_ready", f"the cluster is not ready: it waits for {waiting}", retryable=True
        )
    rows = [row for row in status["members"] if row["state"] not in ("dead", "left")]
    model = msgspec.convert(
        {name: status["model"][name] for name in ModelSpec.__struct_fields__}, ModelSpec
    )
    members = tuple(
        Member(
            node_id=row["node_id"],
            boot_id=row["boot_id"],
            name=row["name"],
            address=row["address"],
            witness=row["witness"],
        )
        for row in rows
    )
    spans = sorted({tuple(part["span"]) for row in rows for part in row["owned"]})
    return Plan(
        fence=Fence(status["term"], status["epoch"]),
        cluster_id=status["cluster_id"],
        leader=[member.name for member in members].index(status["leader"]),
        members=members,
        voters=(),
        model=model,
        stages=tuple(_stage(span, rows, model) for span in spans),
        layout=status["layout"],
    )


def _stage(span: Sequence[int], rows: Sequence[Mapping[str, Any]], model: ModelSpec) -> Stage:
    owners: dict[str, dict[int, int]] = {"head": {}, "mlp": {}, "vocab": {}}
    for index, row in enumerate(rows):
        for part in row["owned"]:
            if tuple(part["span"]) == tuple(span):
                for kind, units in owners.items():
                    units.update(dict.fromkeys(part[f"{kind}_units"], index))

    def in_order(kind: UnitKind) -> tuple[int, ...]:
        units = owners[kind.value]
        return tuple(units[unit] for unit in range(unit_count(model, kind)) if unit in units)

    return Stage(
        start=span[0],
        end=span[1],
        head_owners=in_order(UnitKind.HEAD),
        mlp_owners=in_order(UnitKind.MLP),
        vocab_owners=in_order(UnitKind.VOCAB),
    )


def topologies(plan: Plan) -> tuple[Topology, ...]:
    """Every member's part in the steps of a plan."""
    return tuple(topology(plan, index) for index in range(len(plan.members)))


Frames = Sequence[tuple[int, int]]
"""To whom frames go, one after the other, and how many bytes of tensors each has."""


def exchanges(mine: Topology, role: Role, half: int, rows: int) -> Sequence[Frames]:
    """What a member sends in one half layer: in each of its exchanges, one or two, to each peer."""
    if not role.peers:
        return ()
    model = mine.plan.model
    row = model.hidden_size * ITEM_BYTES[SUM_DTYPES[model.wire_dtype]]
    parts = len(role.parts[half].get(mine.me, ()))
    shares = mine.shares(role, half, rows)
    if not shares:
        return ([(peer, parts * rows * row) for peer in role.peers if parts],)
    widths = {member: share.end - share.start for member, share in shares.items()}
    return (
        [(peer, parts * widths[peer] * row) for peer in role.peers if parts],
        [(peer, widths[mine.me] * row) for peer in role.peers],
    )


def largest_frame(plan: Plan, rows: int) -> int:
    """Bytes of the largest tensor that a step of so many rows sends; 0: it sends none."""
    sizes = [0]
    for mine in topologies(plan):
        for role in mine.roles:
            sizes += [rows * plan.model.hidden_size * HIDDEN_ITEM_BYTES] * len(role.hidden_to)
            for half in range(HALVES):
                sizes += [n for frames in exchanges(mine, role, half, rows) for _, n in frames]
    return max(sizes)


def step_traffic(plan: Plan, me: int, rows: int) -> dict[str, int]:
    """`messages` that a member sends in one step, and `tensor_bytes`: of sums and hidden states,
    all but headers, candidates and token ids."""
    mine = topology(plan, me)
    messages = len(plan.members) - 1 if mine.leads else 1
    if not mine.leads and mine.vocab_units:
        messages += 1
    sent = 0
    for role in mine.roles:
        layers = role.holding.span.end - role.holding.span.start
        for half in range(HALVES):
            frames = [f for some in exchanges(mine, role, half, rows) for f in some]
            messages += layers * len(frames)
            sent += layers * sum(nbytes for _, nbytes in frames)
        messages += len(role.hidden_to)
        sent += len(role.hidden_to) * rows * plan.model.hidden_size * HIDDEN_ITEM_BYTES
    return {"messages": messages, "tensor_bytes": sent}


def expected_step_ms(plan: Plan, rows: int, links: Links) -> dict[str, Any]:
    """What the network should add to a step of so many rows, in milliseconds.

    In an exchange all members of a stage send at once, each to its peers one after the other; it is
    over when the last frame has come. Long sums take two in a half layer. `exchanges` counts them,
    `exchange_ms` is one of them, in the mean. Hidden states then pass from stage to stage; the
    step's announcement and the candidates are small.
    """
    everybody = topologies(plan)
    hidden_bytes = rows * plan.model.hidden_size * HIDDEN_ITEM_BYTES
    count, exchanges_ms, passed_ms = 0, 0.0, 0.0
    for number, stage in enumerate(plan.stages):
        layers = stage.end - stage.start
        roles = {t.me: role for t in everybody if (role := t.role(number)) is not None}
        for half in range(HALVES):
            rounds = zip(
                *(exchanges(everybody[me], role, half, rows) for me, role in roles.items()),
                strict=True,
            )
            for sent in rounds:
                count += layers
                exchanges_ms += layers * max(
                    _sending_ms(me, frames, links) for me, frames in zip(roles, sent, strict=True)
                )
        passing = [
            _sending_ms(me, [(to, hidden_bytes) for to in role.hidden_to], links)
            for me, role in roles.items()
        ]
        passed_ms += max(passing, default=0.0)
    others = [i for i in range(len(plan.members)) if i != plan.leader]
    announced = max((links[plan.leader, i].small_ms for i in others), default=0.0)
    offering = [i for i in everybody[0].vocab if i != plan.leader]
    offered = max((links[i, plan.leader].small_ms for i in offering), default=0.0)
    return {
        "exchanges": count,
        "exchange_ms": round(exchanges_ms / count, 4) if count else 0.0,
        "hidden_ms": round(passed_ms, 4),
        "step_and_candidates_ms": round(announced + offered, 4),
        "expected_ms": round(exchanges_ms + passed_ms + announced + offered, 4),
    }


def _sending_ms(me: int, frames: Frames, links: Links) -> float:
    """Until the last of these frames, sent one after the other, has come."""
    if not frames:
        return 0.0
    return max(links[me, to].small_ms for to, _ in frames) + sum(
        links[me, to].transfer_ms(nbytes) for to, nbytes in frames
    )
