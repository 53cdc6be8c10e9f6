"""Plans of some equal members in any layout, for tests of what a plan means for a step."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from p2pinfer.core.planner import make_plan
from p2pinfer.types import Fence, Plan
from tests.lockstep import members
from tests.model_specs import SIX_LAYERS


@dataclass(frozen=True)
class Offer:
    """What a member offers."""

    memory_bytes: int = 0
    kv_bytes: int = 0


def inherited(plan: Plan, gone: int, *heirs: int) -> Plan:
    """The plan in which the units of member `gone` are with the heirs, in turns."""

    def owners(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(heirs[u % len(heirs)] if i == gone else i for u, i in enumerate(units))

    return msgspec.structs.replace(
        plan,
        stages=tuple(
            msgspec.structs.replace(
                stage,
                head_owners=owners(stage.head_owners),
                mlp_owners=owners(stage.mlp_owners),
                vocab_owners=owners(stage.vocab_owners),
            )
            for stage in plan.stages
        ),
    )


def plan_of(nodes: int, layout: str = "heads", offer: Offer | None = None) -> Plan:
    """A plan of `nodes` members that all offer the same."""
    offer = offer or Offer()
    everybody = [
        msgspec.structs.replace(m, memory_bytes=offer.memory_bytes, kv_bytes=offer.kv_bytes)
        for m in members(nodes)
    ]
    return make_plan(
        members=everybody,
        model=SIX_LAYERS,
        layout=layout,
        fence=Fence(1, 1),
        cluster_id="0" * 16,
        leader_id="0" * 16,
    )
