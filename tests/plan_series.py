"""Plans that follow one another, of nodes with numbers: for tests of what moves, and of copies."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from p2pinfer.core.holdings import Units, owners_of, validate
from p2pinfer.core.replan import next_plan
from p2pinfer.types import DType, Fence, Member, ModelSpec, Plan

MODEL = ModelSpec(
    name="m",
    model_id="",
    num_layers=4,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    intermediate_size=1024,
    vocab_size=2048,
    max_positions=16,
    dtype=DType.FLOAT32,
    kv_dtype=DType.FLOAT32,
)
HEAD_BYTES = 4 * (4 * 16 * 64 * 4 + 2 * 16 * 4 * 16)
MLP_BYTES = 4 * 3 * 128 * 64 * 4
VOCAB_BYTES = 64 * 64 * 4


def member(number: int, boot: int = 1, **changes: Any) -> Member:
    """Node `number` in its boot of that number."""
    return Member(
        **{
            "node_id": f"{number:016x}",
            "boot_id": f"{boot:016x}",
            "name": f"node{number:02}",
            "address": "tcp://host:7720",
            **changes,
        }
    )


def nodes(count: int, **changes: Any) -> list[Member]:
    """Equal nodes 0 to `count` - 1."""
    return [member(i, **changes) for i in range(count)]


def after(
    previous: Plan | None,
    members: Sequence[Member],
    *,
    able: Collection[int] | None = None,
    layout: str = "heads",
    model: ModelSpec = MODEL,
    **more: Any,
) -> Plan:
    """The next plan, led by the first member; it must be valid."""
    there = [int(m.node_id, 16) for m in members]
    plan = next_plan(
        previous=previous,
        members=members,
        able=frozenset(f"{i:016x}" for i in (there if able is None else able)),
        model=model,
        layout=layout,
        fence=Fence(1, previous.fence.epoch + 1 if previous else 1),
        cluster_id="c" * 16,
        leader_id=members[0].node_id,
        voters=[members[0].node_id],
        **more,
    )
    validate(plan)
    return plan


def owners(plan: Plan, kind: int = 0, stage: int = 0) -> Units:
    """Node numbers by unit of one kind."""
    each = owners_of(plan.stages[stage])[kind]
    return tuple(int(plan.members[i].node_id, 16) for i in each)


def moves(before: Plan, plan: Plan) -> list[tuple[int, int]]:
    """From whom to whom units of all kinds and stages went."""
    return [
        (old, new)
        for stage in range(len(plan.stages))
        for kind in range(3)
        for old, new in zip(owners(before, kind, stage), owners(plan, kind, stage), strict=True)
        if old != new
    ]
