"""Owners and standbys of delta KV, and the frames between them."""

from __future__ import annotations

from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.replication import (
    Feed,
    Piece,
    Replicas,
    computed_units,
    fed_units,
)
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.units import Slice, kv_bytes_per_position
from p2pinfer.types import Fence, Plan, SamplingParams, Stage
from p2pinfer.wire.messages import Credit, KvDelta, KvRequest, Slot
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.plan_bench import CLUSTER, MODEL, member

FENCE = Fence(3, 5)
ROW = kv_bytes_per_position(MODEL, MODEL.num_layers)
WINDOW, FRAME, MORE = 32, 8, 4
"""In rows."""

SPAN = Slice(0, MODEL.num_layers)
UNITS = [KvUnit(SPAN, unit) for unit in range(4)]

PLAN = Plan(
    fence=FENCE,
    cluster_id=CLUSTER,
    leader=0,
    members=tuple(member(n) for n in range(1, 5)),
    voters=(0,),
    model=MODEL,
    stages=(
        Stage(
            start=0,
            end=MODEL.num_layers,
            head_owners=(0, 0, 1, 2),
            mlp_owners=(0, 1),
            vocab_owners=(0, 1),
            head_standbys=((1,), (2, 1), (0,), ()),
        ),
    ),
)
"""Member 0 owns units 0 and 1, of which member 1 keeps both, and member 2 the latter; 1 owns unit
2, of which 0 keeps a replica; 2 owns unit 3, of which there is none, and 3 nothing."""


def slot(start: int, end: int, request_id: int = 1) -> Slot:
    """Positions of a request, whose tokens are their positions."""
    return Slot(
        request_id=request_id,
        start=start,
        tokens=tuple(range(start, end)),
        params=SamplingParams(),
    )


def holding(me: int, plan: Plan = PLAN) -> TokenLogs:
    """The logs of a member that holds what the plan gives it."""
    logs = TokenLogs()
    logs.coverage.hold(computed_units(plan, me).keys(), fed_units(plan, me).keys())
    return logs


def computed(logs: TokenLogs, *slots: Slot) -> None:
    """Steps of these slots are written and finished."""
    for each in slots:
        logs.write(FENCE, each)
        logs.finish((each,))


def feed_of(me: int = 0, *, credit: int = WINDOW) -> tuple[Feed, TokenLogs]:
    """A member's feed, to which all its standbys have granted so many rows, and its logs."""
    logs = holding(me)
    feed = Feed(PLAN, me, logs)
    for standby in feed.standbys:
        feed.grant(standby, Credit(fence=FENCE, bytes=credit * ROW))
    return feed, logs


def replicas_of(me: int = 1) -> tuple[Replicas, TokenLogs]:
    """A standby and its logs."""
    logs = holding(me)
    return Replicas(PLAN, me, logs), logs


def question(start: int, end: int, unit: int = 0, **values: int) -> KvRequest:
    """What a standby may ask for."""
    fields = {"request_id": 1, "stage": 0, "credit": (end - start) * ROW, **values}
    return KvRequest(fence=FENCE, unit=unit, start=start, end=end, **fields)


def frame(logs: TokenLogs, start: int, end: int, unit: int = 0, **values: object) -> KvDelta:
    """A frame of rows for someone who has these logs."""
    shape = (MODEL.num_layers, 2, end - start, MODEL.head_dim)
    fields: dict[str, object] = {
        "fence": FENCE,
        "step": 0,
        "link_seq": 0,
        "sender": 0,
        "request_id": 1,
        "stage": 0,
        "unit": unit,
        "start": start,
        "log_digest": logs.digest(1, end) or "0" * 64,
        "tensor": Tensor(WireDType.FLOAT32, shape, bytes(ROW * (end - start))),
        **values,
    }
    return KvDelta(**fields)  # type: ignore[arg-type]


def runs(found: list[Piece]) -> list[tuple[int, int, int, int]]:
    """(standby, unit, start, end) of pieces of request 1."""
    assert all(piece.request_id == 1 for piece in found)
    return [(piece.member, piece.unit.unit, piece.start, piece.end) for piece in found]


def take(replicas: Replicas, got: KvDelta, now: float, sender: int = 0) -> bool:
    """A standby gets a frame; whether it wrote it."""
    unit = replicas.unit_of(sender, got)
    joins = replicas.joins(unit, got)
    if joins:
        replicas.wrote(unit, got, now)
    return joins


def asked(replicas: Replicas, now: float) -> list[tuple[int, int, int, int]]:
    """(owner, unit, start, end) of what a standby asks now."""
    return [(owner, q.unit, q.start, q.end) for owner, q in replicas.asks(now)]
