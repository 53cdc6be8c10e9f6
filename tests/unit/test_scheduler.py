"""The scheduler: what each step computes, and when a reply ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from p2pinfer.core.blocks import BlockPool
from p2pinfer.core.scheduler import EndedReply, Scheduler
from p2pinfer.errors import ClusterError, LocalProtocolError
from p2pinfer.limits import MAX_REQUESTS, MAX_STEP_SLOTS, MAX_STEP_TOKENS
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import DrawnToken, Slot

EOS = 2
FIVE = SamplingParams(max_tokens=5)


def scheduler(
    *, blocks: int = 100, max_positions: int = 1000, tokens: int = 8, slots: int = 4
) -> Scheduler:
    """A scheduler of small steps."""
    return Scheduler(
        pool=BlockPool(blocks),
        max_positions=max_positions,
        eos_token_ids=frozenset({EOS}),
        max_step_tokens=tokens,
        max_slots=slots,
    )


def prompt(length: int) -> tuple[int, ...]:
    """Token ids 100, 101, ..."""
    return tuple(range(100, 100 + length))


def shape(slots: Sequence[Slot]) -> list[tuple[int, int, int, bool]]:
    """(request, start, tokens, sample) of each slot."""
    return [(s.request_id, s.start, len(s.tokens), s.sample) for s in slots]


def step(
    work: Scheduler, drawn: Mapping[int, int], now: float = 0.0
) -> list[DrawnToken | EndedReply]:
    """One whole step."""
    return work.finish_step(work.next_slots(), drawn, now)


def test_nothing_to_do() -> None:
    """Without requests there are no slots and nothing to free."""
    work = scheduler()
    assert work.next_slots() == ()
    assert work.ended_since_last() == ()
    assert (work.running, work.waiting) == (0, 0)


def test_one_request_from_prompt_to_length() -> None:
    """The prompt is one slot with capacity and parameters; then one token at a time to the end."""
    work = scheduler()
    params = SamplingParams(max_tokens=2)
    assert work.add(7, prompt(3), (), params, 10.0) is None
    assert (work.running, work.waiting) == (0, 1)
    slots = work.next_slots()
    assert slots == (
        Slot(request_id=7, start=0, tokens=prompt(3), sample=True, capacity=5, params=params),
    )
    assert work.running == 1
    assert work.finish_step(slots, {7: 50}, 10.5) == [DrawnToken(request_id=7, index=0, token=50)]
    slots = work.next_slots()
    assert slots == (Slot(request_id=7, start=3, tokens=(50,), sample=True),)
    assert work.finish_step(slots, {7: 51}, 10.75) == [
        DrawnToken(request_id=7, index=1, token=51),
        EndedReply(request_id=7, reason="length", total_tokens=2, ttft_s=0.5, tokens_per_s=4.0),
    ]
    assert (work.running, work.waiting) == (0, 0)
    assert work.ended_since_last() == (7,)
    assert work.ended_since_last() == ()


def test_eos_ends_a_reply_with_stop() -> None:
    """The EOS token is drawn and counted; without a second token there is no rate."""
    work = scheduler()
    work.add(1, prompt(1), (), FIVE, 0.0)
    assert step(work, {1: EOS}, 1.0) == [
        DrawnToken(request_id=1, index=0, token=EOS),
        EndedReply(request_id=1, reason="stop", total_tokens=1, ttft_s=1.0),
    ]


def test_eos_in_place_of_the_last_token_is_a_stop() -> None:
    """EOS as the last token that there is room for ends with `stop`, not `length`."""
    work = scheduler()
    work.add(1, prompt(1), (), SamplingParams(max_tokens=1), 0.0)
    assert step(work, {1: EOS})[1] == EndedReply(request_id=1, reason="stop", total_tokens=1)


def test_eos_can_be_ignored() -> None:
    """With `ignore_eos` a reply goes on to `max_tokens`."""
    work = scheduler()
    work.add(1, prompt(1), (), SamplingParams(max_tokens=2, ignore_eos=True), 0.0)
    assert len(step(work, {1: EOS})) == 1
    assert step(work, {1: EOS})[1] == EndedReply(request_id=1, reason="length", total_tokens=2)


def test_max_tokens_is_cut_to_the_room_of_the_context() -> None:
    """Prompt and reply together fill the model's positions, then the reply ends with `length`."""
    work = scheduler(max_positions=6)
    work.add(1, prompt(5), (), FIVE, 0.0)
    slots = work.next_slots()
    assert slots[0].capacity == 6
    assert work.finish_step(slots, {1: 9}, 0.0)[1] == EndedReply(
        request_id=1, reason="length", total_tokens=1
    )


def test_received_tokens_are_forced() -> None:
    """A resumed reply computes what the client has, and draws from there with the next index."""
    work = scheduler()
    work.add(1, prompt(2), (60, 61), FIVE, 0.0)
    slots = work.next_slots()
    assert slots[0].tokens == (100, 101, 60, 61)
    assert slots[0].sample
    assert work.finish_step(slots, {1: 62}, 0.0) == [DrawnToken(request_id=1, index=2, token=62)]


@pytest.mark.parametrize(
    ("received", "reason", "total"),
    [((60, 61, 62, 63, 64), "length", 5), ((60, EOS), "stop", 2), ((EOS, 61), "stop", 1)],
)
def test_a_reply_received_whole_ends_at_once(
    received: tuple[int, ...], reason: str, total: int
) -> None:
    """Nothing is computed for a client that only missed the last message."""
    work = scheduler()
    assert work.add(1, prompt(2), received, FIVE, 3.0) == EndedReply(1, reason, total)
    assert (work.running, work.waiting) == (0, 0)


def test_long_prompts_are_cut_in_chunks_beside_decoding() -> None:
    """Each request that decodes gets its token in every step; the prompts get the rest in order."""
    work = scheduler(tokens=8)
    work.add(1, prompt(2), (), FIVE, 0.0)
    step(work, {1: 50})
    work.add(2, prompt(10), (), FIVE, 0.0)
    work.add(3, prompt(6), (), FIVE, 0.0)
    slots = work.next_slots()
    assert shape(slots) == [(1, 2, 1, True), (2, 0, 7, False)]
    work.finish_step(slots, {1: 51}, 0.0)
    slots = work.next_slots()
    assert shape(slots) == [(1, 3, 1, True), (2, 7, 3, True), (3, 0, 4, False)]
    assert [bool(s.params) for s in slots] == [False, False, True]
    work.finish_step(slots, {1: 52, 2: 50}, 0.0)
    assert shape(work.next_slots()) == [(1, 4, 1, True), (2, 10, 1, True), (3, 4, 2, True)]


def test_who_comes_first_is_served_first() -> None:
    """A request whose blocks do not fit waits, and a small one behind it waits too."""
    work = scheduler(blocks=2, tokens=64)
    work.add(1, prompt(64), (), SamplingParams(max_tokens=1), 0.0)
    work.add(2, prompt(60), (), FIVE, 0.0)
    work.add(3, prompt(1), (), FIVE, 0.0)
    assert [s.request_id for s in work.next_slots()] == [1]
    assert (work.running, work.waiting) == (1, 2)
    work.cancel(1)
    assert [s.request_id for s in work.next_slots()] == [2]
    work.cancel(2)
    assert [s.request_id for s in work.next_slots()] == [3]


def test_a_step_has_a_limited_number_of_slots() -> None:
    """No more requests run than a step has slots or tokens, so that none of them starves."""
    for tokens, slots in ((8, 2), (2, 8)):
        work = scheduler(tokens=tokens, slots=slots)
        for request in range(4):
            work.add(request, prompt(1), (), FIVE, 0.0)
        assert len(work.next_slots()) == 2
        assert (work.running, work.waiting) == (2, 2)


def test_adding_a_request_twice_changes_nothing() -> None:
    """A repeated submission is ignored, waiting or running."""
    work = scheduler()
    work.add(1, prompt(2), (), FIVE, 0.0)
    assert work.add(1, prompt(9), (), FIVE, 0.0) is None
    assert shape(work.next_slots()) == [(1, 0, 2, True)]
    assert work.add(1, prompt(9), (), FIVE, 0.0) is None
    assert (work.running, work.waiting) == (1, 0)


def test_cancelling() -> None:
    """A waiting request just goes; a running one frees its blocks, and its KV where it has any."""
    work = scheduler(slots=1)
    work.add(1, prompt(2), (), FIVE, 0.0)
    work.add(2, prompt(2), (), FIVE, 0.0)
    slots = work.next_slots()
    assert work.cancel(2)
    assert work.cancel(1)
    assert not work.cancel(1)
    assert (work.running, work.waiting) == (0, 0)
    assert work.finish_step(slots, {1: 50}, 0.0) == []
    assert work.ended_since_last() == (1,)


def test_an_id_may_be_used_again_while_its_last_step_is_in_flight() -> None:
    """A slot of a cancelled request says nothing of a new request with its id."""
    work = scheduler()
    work.add(1, prompt(2), (), FIVE, 0.0)
    slots = work.next_slots()
    work.cancel(1)
    work.add(1, prompt(3), (), FIVE, 0.0)
    assert work.finish_step(slots, {1: 50}, 0.0) == []
    assert work.ended_since_last() == (1,)
    assert shape(work.next_slots()) == [(1, 0, 3, True)]


def test_a_restart_computes_all_known_tokens_again() -> None:
    """After a new fence each request starts at position 0 with its drawn tokens forced."""
    work = scheduler()
    work.add(1, prompt(2), (), FIVE, 0.0)
    step(work, {1: 50})
    lost = work.next_slots()
    work.restart()
    assert work.finish_step(lost, {1: 51}, 0.0) == []
    slots = work.next_slots()
    assert slots == (
        Slot(request_id=1, start=0, tokens=(100, 101, 50), sample=True, capacity=7, params=FIVE),
    )
    assert work.finish_step(slots, {1: 51}, 0.0) == [DrawnToken(request_id=1, index=1, token=51)]


def test_a_restart_with_less_room_keeps_the_order() -> None:
    """Under a smaller pool the first go on, the others wait with the tokens that they have."""
    work = scheduler(tokens=64)
    for request in (1, 2):
        work.add(request, prompt(2), (), FIVE, 0.0)
    step(work, {1: 50, 2: 60})
    work.add(3, prompt(2), (), FIVE, 0.0)
    pool = BlockPool(1)
    assert work.restart(pool) == ()
    assert [(s.request_id, s.start, s.tokens[-1]) for s in work.next_slots()] == [(1, 0, 50)]
    assert (pool.used, work.running, work.waiting) == (1, 1, 2)
    work.cancel(1)
    assert [(s.request_id, s.start, s.tokens[-1]) for s in work.next_slots()] == [(2, 0, 60)]
    work.cancel(2)
    assert work.ended_since_last() == (1, 2)
    assert [s.request_id for s in work.next_slots()] == [3]


def test_a_restart_names_the_requests_that_no_longer_fit() -> None:
    """What the new pool can never hold is gone, and nodes are told where they may hold KV of it."""
    work = scheduler(tokens=200, slots=2)
    for request, length in ((1, 100), (2, 2), (3, 100)):
        work.add(request, prompt(length), (), FIVE, 0.0)
    work.next_slots()
    assert work.restart(BlockPool(1)) == (1, 3)
    assert work.ended_since_last() == (1,)
    assert shape(work.next_slots()) == [(2, 0, 2, True)]
    assert not work.cancel(1)


def test_a_request_cancelled_after_a_restart_is_still_told() -> None:
    """Nodes may hold KV from before the restart; those that never had a slot are not told of."""
    work = scheduler(tokens=2)
    work.add(1, prompt(5), (), FIVE, 0.0)
    work.add(2, prompt(5), (), FIVE, 0.0)
    work.next_slots()
    work.restart()
    assert work.cancel(1)
    assert work.cancel(2)
    assert work.ended_since_last() == (1,)


def test_a_missing_token_is_a_defect() -> None:
    """A slot with `sample` has its token, or the worker is wrong."""
    work = scheduler()
    work.add(0xAB, prompt(2), (), FIVE, 0.0)
    with pytest.raises(LocalProtocolError, match="0xab"):
        step(work, {})


@pytest.mark.parametrize(
    ("length", "params", "code", "message"),
    [
        (0, FIVE, "empty_prompt", "no tokens"),
        (1000, FIVE, "prompt_too_long", "has 1000 tokens.* room for 999"),
        (60, FIVE, "prompt_too_long", r"65 positions.*holds 64 \(1 blocks, 2 needed\)"),
        (1, SamplingParams(top_p=2.0), "invalid_request", "top_p"),
    ],
)
def test_impossible_requests_are_refused(
    length: int, params: SamplingParams, code: str, message: str
) -> None:
    """What can never be served is refused when it comes, with the limit that it breaks."""
    work = scheduler(blocks=1)
    with pytest.raises(ClusterError, match=message) as caught:
        work.add(1, prompt(length), (), params, 0.0)
    assert (caught.value.code, caught.value.retryable) == (code, False)
    assert (work.running, work.waiting) == (0, 0)


def test_too_many_requests_are_refused_for_now() -> None:
    """One request more than the limit is `overloaded`, and may be tried again."""
    work = scheduler()
    for request in range(MAX_REQUESTS):
        work.add(request, prompt(1), (), FIVE, 0.0)
    work.next_slots()
    with pytest.raises(ClusterError, match="try again") as caught:
        work.add(999, prompt(1), (), FIVE, 0.0)
    assert (caught.value.code, caught.value.retryable) == ("overloaded", True)


@pytest.mark.parametrize(
    ("tokens", "slots"), [(0, 1), (1, 0), (MAX_STEP_TOKENS + 1, 1), (1, MAX_STEP_SLOTS + 1)]
)
def test_steps_beyond_the_wire_are_refused(tokens: int, slots: int) -> None:
    """A step must fit into its message, and have room for something."""
    with pytest.raises(ValueError, match="a step has"):
        scheduler(tokens=tokens, slots=slots)
