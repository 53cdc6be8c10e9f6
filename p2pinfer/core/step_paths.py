"""Which step links a member's steps need, and what it means that one of them may have lost frames.

Nothing of ours sends a frame again, so a step that needs what may be lost is broken. A member that
owns nothing is only told of steps: without it they go on.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from enum import Enum

from p2pinfer.core.commits import owners
from p2pinfer.core.topology import Topology


class Trouble(Enum):
    """What frames that may be lost between me and another member mean."""

    BREAKS = "breaks"
    """The step needs them."""

    DEAF = "deaf"
    """I lead, and the other one is left out until the next plan."""

    NONE = "none"
    """We exchange nothing."""


def needed(mine: Topology) -> frozenset[int]:
    """The members that steps cannot do without my sending to."""
    owning = owners(mine.plan)
    if mine.leads:
        return owning - {mine.me}
    if mine.me in owning:
        return mine.sends_to | {mine.plan.leader}
    return frozenset()


def may_stay_awake(mine: Topology, near: AbstractSet[int], cores: int) -> bool:
    """Whether who waits takes the core from nobody: all others are `near`, that is on this machine,
    and its `cores` are as many as the threads of all of them."""
    if not mine.others or not near >= set(mine.others):
        return False
    return sum(mine.plan.members[i].threads for i in (mine.me, *mine.others)) <= cores


def trouble(mine: Topology, member: int) -> Trouble:
    """What it means that frames to or from `member` may be lost."""
    if mine.leads:
        return Trouble.BREAKS if member in owners(mine.plan) else Trouble.DEAF
    exchanged = mine.sends_to | mine.hears_from | {mine.plan.leader}
    return Trouble.BREAKS if member in exchanged else Trouble.NONE
