"""What becomes of a frame on a step link."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from p2pinfer.core.step_checks import StepMessage
from p2pinfer.core.step_gate import MAX_STRANGERS, Drop, File, Gap, Hold, StepGate
from p2pinfer.core.topology import topology
from p2pinfer.errors import LocalProtocolError
from p2pinfer.limits import MAX_HELD_BYTES
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.messages import Heartbeat, LinkOpen, Partial, Slot, Step, StepAck
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.model_specs import SIX_LAYERS
from tests.step_plans import plan_of

ROUTE, OTHER = b"r1", b"r2"
NEW = Fence(2, 2)
FIRST = plan_of(2)
SECOND = msgspec.structs.replace(FIRST, fence=NEW)
STEP = Slot(request_id=1, start=0, tokens=(1,))


def life(index: int) -> tuple[str, str]:
    """Identity of a member."""
    return (f"{index:016x}", f"{index:016x}")


def opening(index: int, fence: Fence = FIRST.fence, boot: str = "") -> LinkOpen:
    """A member's first message on a link."""
    node_id, boot_id = life(index)
    return LinkOpen(node_id=node_id, boot_id=boot or boot_id, fence=fence)


def step(number: int = 0, *, at: int = 1, fence: Fence = FIRST.fence, start: int = 0) -> Step:
    """A step of the leader; `number` on its link."""
    slot = Slot(request_id=1, start=start, tokens=(1,))
    return Step(fence=fence, step=at, link_seq=number, slots=(slot,))


def partial(number: int, sender: int, **changes: Any) -> Partial:
    """What member 0 sends to member 1 in the first half layer."""
    parts = topology(FIRST, 1).roles[0].parts[0][0]
    tensor = Tensor(
        WireDType.FLOAT32,
        (len(parts), 1, SIX_LAYERS.hidden_size),
        bytes(4 * len(parts) * SIX_LAYERS.hidden_size),
    )
    made = Partial(
        fence=FIRST.fence,
        step=1,
        link_seq=number,
        sender=sender,
        stage=0,
        layer=0,
        half=0,
        parts=parts,
        tensor=tensor,
    )
    return msgspec.structs.replace(made, **changes)


def gate(plan: Plan = FIRST, *, me: int = 1, active: bool = True) -> StepGate:
    """Member `me`'s gate, where the leader (member 0) has opened its link."""
    made = StepGate(life(me))
    made.load(plan)
    made.opened(ROUTE, opening(0, plan.fence))
    if active:
        assert made.activate(topology(plan, me)) == []
    return made


def test_frames_in_order_are_filed() -> None:
    """Numbers begin at 0 and grow by one."""
    work = gate()
    assert work.arrived(ROUTE, 10, step(0)) == File(0)
    assert work.arrived(ROUTE, 10, partial(1, 0)) == File(0)
    assert work.active is not None
    assert work.active.plan == FIRST


def test_a_frame_that_was_due_may_be_taken_without_being_judged() -> None:
    """Its number counts as any other; of links within this machine it is known whose they are as
    soon as a frame of the plan has come on them."""
    work = gate()
    work.opened(OTHER, opening(0), local=True)
    assert work.local_route(0) is None
    assert work.arrived(OTHER, 10, step(0)) == File(0)
    assert (work.local_route(0), work.local_route(1)) == (OTHER, None)
    assert work.due(0) == 1
    work.took(0)
    assert work.due(0) == 2
    assert work.arrived(OTHER, 10, partial(2, 0)) == File(0)
    assert work.lost(OTHER) == 0
    assert work.local_route(0) is None


@pytest.mark.parametrize("number", [2, 0, 7])
def test_a_gap_or_a_repetition_is_a_lost_frame(number: int) -> None:
    """Both say who is at fault, and what was due."""
    work = gate()
    work.arrived(ROUTE, 10, step(0))
    verdict = work.arrived(ROUTE, 10, step(number))
    assert verdict == Gap(0, life(0)[0], f"frame {number} came where 1 was due")


def test_frames_of_a_link_that_nobody_opened_are_dropped() -> None:
    """So is what is no message of a step."""
    work = gate()
    beat = Heartbeat(
        node_id=life(0)[0], boot_id=life(0)[1], incarnation=0, term=1, fence=FIRST.fence
    )
    assert isinstance(work.arrived(OTHER, 10, step(0)), Drop)
    assert isinstance(work.arrived(ROUTE, 10, beat), Drop)


def test_frames_of_a_foreign_fence_are_dropped() -> None:
    """Of an old one, of one to come, and all when no plan is obeyed."""
    work = gate()
    assert work.arrived(ROUTE, 10, step(0, fence=NEW)) == Drop("a frame of a foreign fence")
    assert isinstance(work.arrived(ROUTE, 10, step(0, fence=Fence(0, 1))), Drop)
    work.close()
    assert work.active is None
    assert isinstance(work.arrived(ROUTE, 10, step(0)), Drop)


def test_a_node_may_have_a_link_of_each_kind() -> None:
    """Frames count on both, by one row of numbers; only of one kind the last one counts."""
    work = gate()
    for route in (OTHER, b"r3"):
        assert work.opened(route, opening(0), local=True) == (None if route == OTHER else 0)
    assert work.arrived(b"r3", 10, step(0)) == File(0)
    assert work.arrived(ROUTE, 10, partial(1, 0)) == File(0)
    assert isinstance(work.arrived(OTHER, 10, step(2)), Drop)
    assert isinstance(work.arrived(b"r3", 10, step(1)), Gap)
    assert work.lost(b"r3") == 0
    assert work.opened(OTHER, opening(0), local=True) is None
    assert work.arrived(ROUTE, 10, partial(2, 0)) == File(0)


def test_frames_of_strangers_are_dropped() -> None:
    """A node outside the plan may open a link, and another boot of a member is a stranger."""
    work = gate()
    work.opened(OTHER, opening(9))
    assert work.arrived(OTHER, 10, step(0)) == Drop("a frame from a node outside the plan")
    work.opened(OTHER, opening(0, boot="f" * 16))
    assert isinstance(work.arrived(OTHER, 10, step(0)), Drop)


def test_nobody_speaks_for_another() -> None:
    """A data frame names its sender; another name takes no number."""
    work = gate()
    assert work.arrived(ROUTE, 10, partial(0, 1)) == Drop("a frame that names another sender")
    assert work.arrived(ROUTE, 10, step(0)) == File(0)


def test_what_the_plan_does_not_allow_is_dropped() -> None:
    """It counts as the frame of its number all the same."""
    work = gate()
    wrong = partial(0, 0, layer=SIX_LAYERS.num_layers)
    assert isinstance(work.arrived(ROUTE, 10, wrong), Drop)
    assert work.arrived(ROUTE, 10, step(1)) == File(0)


def test_frames_of_steps_that_are_over_are_dropped() -> None:
    """But an acknowledgement is never too late."""
    work = gate()
    work.began(5)
    assert work.arrived(ROUTE, 10, step(0, at=4)) == Drop("a frame of step 4 during step 5")
    assert work.arrived(ROUTE, 10, step(1, at=5)) == File(0)
    leader = StepGate(life(0))
    leader.load(FIRST)
    leader.activate(topology(FIRST, 0))
    leader.opened(ROUTE, opening(1))
    leader.began(5)
    ack = StepAck(fence=FIRST.fence, step=4, link_seq=0)
    assert leader.arrived(ROUTE, 10, ack) == File(1)


def test_frames_of_the_plan_that_is_loaded_are_held() -> None:
    """They are given out in order when it is in force, and judged then."""
    work = gate(active=False)
    frames: list[StepMessage] = [step(0), partial(1, 0), step(3, at=2)]
    assert [work.arrived(ROUTE, 10, frame) for frame in frames] == [Hold()] * 3
    assert work.held_bytes == 3 * 1024
    held = work.activate(topology(FIRST, 1))
    assert held == [(ROUTE, frame) for frame in frames]
    assert work.held_bytes == 0
    verdicts = [work.arrived(route, 0, frame) for route, frame in held]
    assert verdicts[:2] == [File(0), File(0)]
    assert isinstance(verdicts[2], Gap)


def test_held_frames_are_checked_against_the_plan() -> None:
    """What it will not allow takes no room."""
    work = gate(active=False)
    wrong = partial(0, 0, layer=SIX_LAYERS.num_layers)
    assert isinstance(work.arrived(ROUTE, 10, wrong), Drop)
    work.opened(OTHER, opening(9))
    assert isinstance(work.arrived(OTHER, 10, step(0)), Drop)
    assert work.held_bytes == 0


def test_a_peer_cannot_fill_the_memory_with_held_frames() -> None:
    """Large ones count by their bytes, small ones for more; a new connection changes nothing."""
    work = gate(active=False)
    assert work.arrived(ROUTE, MAX_HELD_BYTES, step(0)) == Hold()
    full = Drop("more bytes than may be held for a plan")
    assert work.arrived(ROUTE, 1, step(1)) == full
    work.opened(OTHER, opening(0))
    assert work.arrived(OTHER, 1, step(2)) == full
    work.opened(b"r3", opening(1))
    assert work.arrived(b"r3", 1, partial(0, 1)) != full


def test_loading_a_plan_ends_the_one_before() -> None:
    """Its frames are dropped; those held for a plan that never came are forgotten."""
    work = gate()
    work.load(SECOND)
    assert work.active is None
    assert isinstance(work.arrived(ROUTE, 10, step(0)), Drop)
    assert work.arrived(ROUTE, 10, step(0, fence=NEW)) == Hold()
    work.load(FIRST)
    assert work.held_bytes == 0
    assert work.activate(topology(FIRST, 1)) == []


def test_numbers_begin_anew_in_every_fence() -> None:
    """Whatever was counted before."""
    work = gate()
    work.arrived(ROUTE, 10, step(0))
    work.began(9)
    work.load(SECOND)
    work.activate(topology(SECOND, 1))
    assert work.arrived(ROUTE, 10, step(0, fence=NEW)) == File(0)


def test_a_plan_without_this_node_is_not_loaded() -> None:
    """Nor is one that names another boot of it."""
    for identity in (life(7), (life(1)[0], "f" * 16)):
        with pytest.raises(LocalProtocolError):
            StepGate(identity).load(FIRST)


def test_a_link_that_came_back_may_have_lost_frames() -> None:
    """A new route of the same life, opened for the plan in force, names the member."""
    work = gate()
    assert work.opened(ROUTE, opening(0)) is None
    assert work.opened(OTHER, opening(0)) == 0
    assert isinstance(work.arrived(ROUTE, 10, step(0)), Drop)
    assert work.arrived(OTHER, 10, step(0)) == File(0)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (False, opening(0)),
        (True, opening(0, NEW)),
        (True, opening(0, Fence(0, 9))),
        (True, opening(0, boot="f" * 16)),
    ],
)
def test_a_new_link_of_another_plan_or_life_breaks_nothing(active: bool, message: LinkOpen) -> None:
    """It carries nothing of the plan in force, so nothing of that was lost."""
    assert gate(active=active).opened(OTHER, message) is None


def test_a_stranger_whose_link_came_back_breaks_nothing() -> None:
    """Only members of the plan in force do."""
    work = gate()
    work.opened(OTHER, opening(9))
    assert work.opened(b"r3", opening(9)) is None


def test_a_lost_route_names_its_member() -> None:
    """Of the plan in force; what nobody opened, or opened without a plan, is nobody's."""
    work = gate()
    assert work.lost(OTHER) is None
    assert work.lost(ROUTE) == 0
    assert work.lost(ROUTE) is None
    assert work.opened(OTHER, opening(0)) is None
    work.close()
    assert work.lost(OTHER) is None
    work.opened(OTHER, opening(9))


def test_strangers_are_few() -> None:
    """The oldest links of strangers are forgotten; members keep theirs."""
    work = gate()
    for index in range(MAX_STRANGERS + 5):
        work.opened(f"s{index}".encode(), opening(100 + index))
    nobody = Drop("a step frame on a link that nobody opened")
    assert work.arrived(b"s0", 10, step(0)) == nobody
    assert work.arrived(b"s4", 10, step(0)) == nobody
    assert work.arrived(b"s5", 10, step(0)) != nobody
    assert work.arrived(ROUTE, 10, step(0)) == File(0)
