"""What a plan lets a member send within a step, and which steps follow from those before."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from p2pinfer.core.replication import computed_units
from p2pinfer.core.step_checks import StepMessage, check_frame, write_down
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.messages import (
    Candidates,
    FinalToken,
    Hidden,
    Logits,
    LogitsRequest,
    Partial,
    Slot,
    Step,
    StepAck,
)
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.model_specs import SIX_LAYERS
from tests.step_plans import inherited, plan_of

FRAME: dict[str, Any] = {"fence": Fence(1, 1), "step": 1, "link_seq": 0}
HEADS = plan_of(2)
STAGES = plan_of(2, "layers")


def floats(*shape: int, dtype: WireDType = WireDType.FLOAT32) -> Tensor:
    """Zeros of a shape."""
    size = 4 if dtype in (WireDType.FLOAT32, WireDType.INT32) else 2
    for n in shape:
        size *= n
    return Tensor(dtype, shape, bytes(size))


def step(*slots: Slot) -> Step:
    """A step of these slots."""
    return Step(**FRAME, slots=slots)


def partial(**changes: Any) -> Partial:
    """What member 1 of two sends in the first half layer."""
    parts = topology(HEADS, 0).roles[0].parts[0][1]
    fields: dict[str, Any] = {
        "sender": 1,
        "stage": 0,
        "layer": 0,
        "half": 0,
        "parts": parts,
        "tensor": floats(len(parts), 3, SIX_LAYERS.hidden_size),
    }
    return Partial(**FRAME, **(fields | changes))


def accepts(plan: Any, me: int, sender: int, message: StepMessage) -> bool:
    """Whether `me` takes that from `sender`."""
    try:
        check_frame(topology(plan, me), sender, message)
    except RemoteProtocolError:
        return False
    return True


GOOD = Slot(request_id=1, start=10, tokens=(1, 2), capacity=12)


@pytest.mark.parametrize(
    ("slot", "taken"),
    [
        (GOOD, True),
        (msgspec.structs.replace(GOOD, tokens=(1, SIX_LAYERS.vocab_size)), False),
        (msgspec.structs.replace(GOOD, capacity=11), False),
        (msgspec.structs.replace(GOOD, start=SIX_LAYERS.max_positions - 1, capacity=0), False),
        (msgspec.structs.replace(GOOD, start=0, tokens=(0,) * 500, capacity=0), True),
    ],
)
def test_a_step_has_positions_and_tokens_of_the_model(slot: Slot, taken: bool) -> None:
    """Only the leader's steps, of ids, positions and capacities that exist, are taken."""
    assert accepts(HEADS, 1, 0, step(slot)) == taken
    assert not accepts(HEADS, 0, 1, step(slot))


def test_a_step_has_no_more_rows_than_the_limit() -> None:
    """Three slots of 500 positions are too many for one step."""
    slots = [Slot(request_id=i, start=0, tokens=(0,) * 500) for i in range(3)]
    assert accepts(HEADS, 1, 0, step(*slots[:2]))
    assert not accepts(HEADS, 1, 0, step(*slots))


def test_last_tokens_are_of_the_model() -> None:
    """Their ids and positions exist in it."""
    last, words = SIX_LAYERS.max_positions - 1, SIX_LAYERS.vocab_size
    for position, token, taken in (
        (last, words - 1, True),
        (last + 1, 0, False),
        (0, words, False),
    ):
        final = FinalToken(request_id=1, position=position, token=token)
        assert accepts(HEADS, 1, 0, Step(**FRAME, slots=(), finals=(final,))) == taken


def test_only_the_leader_is_told_that_tokens_are_written() -> None:
    """An acknowledgement to anybody else is refused."""
    assert accepts(HEADS, 0, 1, StepAck(**FRAME))
    assert not accepts(HEADS, 1, 0, StepAck(**FRAME))


def test_a_partial_has_the_parts_that_the_plan_says() -> None:
    """Other parts, widths, types, layers and senders are refused."""
    assert accepts(HEADS, 0, 1, partial())
    for changes in (
        {"parts": (0,)},
        {"tensor": floats(1, 3, 16)},
        {"tensor": floats(1, 1025, SIX_LAYERS.hidden_size)},
        {"tensor": floats(1, 3, SIX_LAYERS.hidden_size, dtype=WireDType.BFLOAT16)},
        {"layer": SIX_LAYERS.num_layers},
    ):
        assert not accepts(HEADS, 0, 1, partial(**changes)), changes
    assert not accepts(STAGES, 0, 1, partial())


def test_sums_have_the_format_of_the_plan() -> None:
    """Where the plan rounds them to bfloat16, that is what is sent, and nothing longer."""
    plan = msgspec.structs.replace(
        HEADS, model=msgspec.structs.replace(HEADS.model, wire_dtype="bfloat16")
    )
    rounded = floats(1, 3, SIX_LAYERS.hidden_size, dtype=WireDType.BFLOAT16)
    assert accepts(plan, 0, 1, partial(tensor=rounded))
    assert not accepts(plan, 0, 1, partial())


def test_hidden_states_come_from_the_stage_before() -> None:
    """Only the sender that the plan names, and only of the model's width."""
    message = Hidden(**FRAME, sender=0, stage=0, tensor=floats(3, SIX_LAYERS.hidden_size))
    assert accepts(STAGES, 1, 0, message)
    assert not accepts(STAGES, 0, 1, message)
    narrow = Hidden(**FRAME, sender=0, stage=0, tensor=floats(3, 8))
    assert not accepts(STAGES, 1, 0, narrow)


def test_frames_of_two_stages_of_one_member_are_told_apart() -> None:
    """Each is taken for its own stage only: layers, parts and senders are those of that stage."""
    plan = inherited(plan_of(3, "layers"), 2, 0)
    for stage, taken in ((0, False), (1, True), (2, False)):
        message = Hidden(**FRAME, sender=1, stage=stage, tensor=floats(3, SIX_LAYERS.hidden_size))
        assert accepts(plan, 0, 1, message) == taken
    shared = inherited(plan_of(4, "2x2"), 1, 2, 3)
    units = topology(shared, 2).roles[0].parts[0][3]
    assert units != topology(shared, 2).roles[1].parts[0][3]
    good = partial(sender=3, parts=units, tensor=floats(len(units), 3, SIX_LAYERS.hidden_size))
    assert accepts(shared, 2, 3, good)
    assert not accepts(shared, 2, 3, msgspec.structs.replace(good, layer=3))
    assert not accepts(shared, 2, 3, msgspec.structs.replace(good, stage=1))
    assert not accepts(shared, 2, 3, msgspec.structs.replace(good, stage=1, layer=3))


def test_only_the_leader_gets_candidates_and_logits() -> None:
    """Of the units that their sender owns, in full width; and only the leader asks for logits."""
    units = topology(HEADS, 0).vocab[1]
    shape = (1, len(units), 1)
    offer = Candidates(
        **FRAME,
        sender=1,
        units=units,
        ids=floats(*shape, dtype=WireDType.INT32),
        logits=floats(*shape),
        lse=floats(1, len(units)),
    )
    assert accepts(HEADS, 0, 1, offer)
    assert not accepts(HEADS, 1, 0, offer)
    width = SIX_LAYERS.vocab_size // 10
    whole = Logits(**FRAME, sender=1, unit=units[0], tensor=floats(1, width))
    assert accepts(HEADS, 0, 1, whole)
    assert not accepts(HEADS, 0, 1, msgspec.structs.replace(whole, unit=0))
    assert not accepts(HEADS, 0, 1, msgspec.structs.replace(whole, tensor=floats(1, 5)))
    asked = LogitsRequest(**FRAME, slots=(0,))
    assert accepts(HEADS, 1, 0, asked)
    assert not accepts(HEADS, 0, 1, asked)


def test_a_step_follows_from_those_before() -> None:
    """It is written once, and begins no slot beyond what was computed here."""
    mine, logs = topology(HEADS, 1), TokenLogs()
    logs.coverage.hold(computed_units(mine.plan, mine.me).keys(), set())
    first = Slot(request_id=1, start=0, tokens=(5, 6), params=SamplingParams(), prompt_tokens=2)
    write_down(mine, logs, 0, step(first))
    assert logs.tokens(1) == [5, 6]
    with pytest.raises(RemoteProtocolError, match="there before"):
        write_down(mine, logs, 1, step(first))
    later = msgspec.structs.replace(step(Slot(request_id=1, start=2, tokens=(7,))), step=2)
    with pytest.raises(RemoteProtocolError, match="beyond the positions"):
        write_down(mine, logs, 1, later)
    logs.finish((first,))
    write_down(mine, logs, 1, later)
    assert logs.tokens(1) == [5, 6, 7]


def test_a_member_without_head_units_needs_no_kv() -> None:
    """It only keeps the logs."""
    spare, logs = topology(plan_of(5, "2x2"), 4), TokenLogs()
    first = Slot(request_id=1, start=0, tokens=(5, 6), params=SamplingParams(), prompt_tokens=2)
    write_down(spare, logs, 0, step(first))
    later = msgspec.structs.replace(step(Slot(request_id=1, start=2, tokens=(7,))), step=2)
    write_down(spare, logs, 1, later)
    assert logs.tokens(1) == [5, 6, 7]
