"""The scheduler: what each step computes, and when a reply ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from p2pinfer.core.blocks import BlockPool
from p2pinfer.core.scheduler import EndedReply, Piece, Scheduler, Work
from p2pinfer.errors import ClusterError, LocalProtocolError
from p2pinfer.limits import MAX_REQUESTS, MAX_STEP_SLOTS, MAX_STEP_TOKENS
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import DrawnToken, FinalToken, Slot

EOS = 2
FIVE = SamplingParams(max_tokens=5)
STEP_S = 0.1
"""All steps here take as long, whatever they compute."""


def scheduler(
    *,
    blocks: int = 100,
    max_positions: int = 1000,
    tokens: int = 8,
    slots: int = 4,
    logged: Sequence[int] = (),
) -> Scheduler:
    """A scheduler of small steps."""
    return Scheduler(
        pool=BlockPool(blocks),
        max_positions=max_positions,
        eos_token_ids=frozenset({EOS}),
        logged=logged,
        max_step_tokens=tokens,
        max_slots=slots,
    )


def prompt(length: int) -> tuple[int, ...]:
    """Token ids 100, 101, ..."""
    return tuple(range(100, 100 + length))


def shape(slots: Sequence[Slot]) -> list[tuple[int, int, int, bool]]:
    """(request, start, tokens, sample) of each slot."""
    return [(s.request_id, s.start, len(s.tokens), s.sample) for s in slots]


def slots_of(work: Scheduler) -> tuple[Slot, ...]:
    """The slots of the next step, which there is."""
    made = work.next_step()
    assert made is not None
    return made.slots


def news_of(work: Scheduler) -> list[Piece]:
    """What the next step, which is begun by this, commits."""
    made = work.next_step()
    assert made is not None
    return list(made.news)


def step(work: Scheduler, drawn: Mapping[int, int]) -> list[Piece]:
    """One whole step; returns what it drew, as the next one tells it (which is begun)."""
    work.finish_step(slots_of(work), drawn, STEP_S)
    return news_of(work)


def test_nothing_to_do() -> None:
    """Without requests there is no step."""
    work = scheduler()
    assert work.next_step() is None
    assert (work.running, work.waiting) == (0, 0)


def test_one_request_from_prompt_to_length() -> None:
    """The prompt is one slot with all that is to be known; then one token at a time to the end.

    The last one is never computed, and the request is forgotten when that is committed.
    """
    work = scheduler()
    params = SamplingParams(max_tokens=2)
    work.add(7, prompt(3), (), params)
    assert (work.running, work.waiting) == (0, 1)
    first = work.next_step()
    slot = Slot(
        request_id=7,
        start=0,
        tokens=prompt(3),
        sample=True,
        capacity=5,
        params=params,
        prompt_tokens=3,
    )
    assert first == Work(slots=(slot,))
    assert work.running == 1
    work.finish_step(first.slots, {7: 50}, STEP_S)
    second = work.next_step()
    slot = Slot(request_id=7, start=3, tokens=(50,), sample=True)
    assert second == Work(slots=(slot,), news=(DrawnToken(request_id=7, index=0, token=50),))
    work.finish_step(second.slots, {7: 51}, STEP_S)
    assert (work.running, work.waiting, 7 in work) == (0, 0, True)
    assert work.next_step() == Work(
        finals=(FinalToken(request_id=7, position=4, token=51),),
        news=(
            DrawnToken(request_id=7, index=1, token=51),
            EndedReply(request_id=7, reason="length", total_tokens=2),
        ),
    )
    assert work.next_step() is None
    work.committed(7)
    assert 7 not in work
    assert work.next_step() == Work(ended=(7,))
    assert work.next_step() is None
    work.committed(7)
    assert work.next_step() is None


def test_blocks_are_free_when_the_end_is_committed() -> None:
    """Until then a failure may need the request's KV again."""
    work = scheduler(blocks=1)
    for request in (1, 2):
        work.add(request, prompt(1), (), SamplingParams(max_tokens=1))
    work.finish_step(slots_of(work), {1: 5}, STEP_S)
    assert slots_of(work) == ()
    work.committed(1)
    made = work.next_step()
    assert made is not None
    assert made.ended == (1,)
    assert shape(made.slots) == [(2, 0, 1, True)]


def test_eos_ends_a_reply_with_stop() -> None:
    """The EOS token is drawn and counted."""
    work = scheduler()
    work.add(1, prompt(1), (), FIVE)
    assert step(work, {1: EOS}) == [
        DrawnToken(request_id=1, index=0, token=EOS),
        EndedReply(request_id=1, reason="stop", total_tokens=1),
    ]


def test_eos_in_place_of_the_last_token_is_a_stop() -> None:
    """EOS as the last token that there is room for ends with `stop`, not `length`."""
    work = scheduler()
    work.add(1, prompt(1), (), SamplingParams(max_tokens=1))
    assert step(work, {1: EOS})[1] == EndedReply(request_id=1, reason="stop", total_tokens=1)


def test_eos_can_be_ignored() -> None:
    """With `ignore_eos` a reply goes on to `max_tokens`."""
    work = scheduler()
    work.add(1, prompt(1), (), SamplingParams(max_tokens=2, ignore_eos=True))
    work.finish_step(slots_of(work), {1: EOS}, STEP_S)
    assert step(work, {1: EOS})[1] == EndedReply(request_id=1, reason="length", total_tokens=2)


def test_max_tokens_is_cut_to_the_room_of_the_context() -> None:
    """Prompt and reply together fill the model's positions, then the reply ends with `length`."""
    work = scheduler(max_positions=6)
    work.add(1, prompt(5), (), FIVE)
    slots = slots_of(work)
    assert slots[0].capacity == 6
    work.finish_step(slots, {1: 9}, STEP_S)
    assert news_of(work)[1] == EndedReply(request_id=1, reason="length", total_tokens=1)


def test_received_tokens_are_forced() -> None:
    """A resumed reply computes what the client has, and draws from there with the next index."""
    work = scheduler()
    work.add(1, prompt(2), (60, 61), FIVE)
    slots = slots_of(work)
    assert slots[0].tokens == (100, 101, 60, 61)
    assert (slots[0].sample, slots[0].prompt_tokens) == (True, 2)
    work.finish_step(slots, {1: 62}, STEP_S)
    assert news_of(work) == [DrawnToken(request_id=1, index=2, token=62)]


@pytest.mark.parametrize(
    ("received", "reason", "total"),
    [((60, 61, 62, 63, 64), "length", 5), ((60, EOS), "stop", 2), ((EOS, 61), "stop", 1)],
)
@pytest.mark.parametrize("logged", [False, True])
def test_a_reply_received_whole_only_ends(
    received: tuple[int, ...], reason: str, total: int, logged: bool
) -> None:
    """Nothing is computed; its end is told like any other, and whoever has its log forgets it."""
    work = scheduler(logged=(1,) if logged else ())
    work.add(1, prompt(2), received, FIVE, 6)
    assert (work.running, work.waiting) == (0, 0)
    assert work.next_step() == Work(news=(EndedReply(1, reason, total),))
    work.committed(1)
    assert work.next_step() == (Work(ended=(1,)) if logged else None)


def test_long_prompts_are_cut_in_chunks_beside_decoding() -> None:
    """Each request that decodes gets its token in every step; the prompts get the rest in order."""
    work = scheduler(tokens=8)
    work.add(1, prompt(2), (), FIVE)
    step(work, {1: 50})
    work.add(2, prompt(10), (), FIVE)
    work.add(3, prompt(6), (), FIVE)
    work.finish_step(plain_step(work), {1: 51}, STEP_S)
    slots = slots_of(work)
    assert shape(slots) == [(1, 3, 1, True), (2, 0, 7, False)]
    work.finish_step(slots, {1: 52}, STEP_S)
    slots = slots_of(work)
    assert shape(slots) == [(1, 4, 1, True), (2, 7, 3, True), (3, 0, 4, False)]
    assert [bool(s.params) for s in slots] == [False, False, True]
    work.finish_step(slots, {1: 53, 2: 50}, STEP_S)
    assert shape(slots_of(work)) == [(1, 5, 1, True), (2, 10, 1, True)]


def plain_step(work: Scheduler) -> tuple[Slot, ...]:
    """The slots of the next step, which gives replies their tokens and computes nothing else."""
    slots = slots_of(work)
    assert all(len(slot.tokens) == 1 and slot.sample for slot in slots)
    return slots


def test_the_first_step_of_replies_that_decode_is_a_measure() -> None:
    """While nobody decodes, prompts get all of a step; then one step without them is measured."""
    work = scheduler(tokens=64)
    for request in (1, 2):
        work.add(request, prompt(60), (), FIVE)
    slots = slots_of(work)
    assert shape(slots) == [(1, 0, 60, True), (2, 0, 4, False)]
    work.finish_step(slots, {1: 50}, STEP_S)
    slots = plain_step(work)
    assert shape(slots) == [(1, 60, 1, True)]
    work.finish_step(slots, {1: 51}, STEP_S)
    assert shape(slots_of(work)) == [(1, 61, 1, True), (2, 4, 8, False)]


def test_prompts_get_as_many_positions_as_measured_time_allows() -> None:
    """Beside a reply the chunks grow while steps are quick, and shrink when one takes too long."""
    work = scheduler(tokens=256)
    work.add(1, prompt(1), (), SamplingParams(max_tokens=100))
    work.finish_step(slots_of(work), {1: 50}, STEP_S)
    work.finish_step(plain_step(work), {1: 50}, STEP_S)
    work.add(2, prompt(900), (), FIVE)
    chunks = []
    for _ in range(20):
        slots = slots_of(work)
        chunks.append(len(slots[1].tokens))
        work.finish_step(slots, {1: 50}, STEP_S * (1 + chunks[-1] / 32))
    assert chunks[0] == 8
    assert chunks == sorted(chunks)
    assert 26 <= chunks[-1] <= 29


def test_a_replay_has_whole_steps_while_nobody_decodes() -> None:
    """Replies that a failover interrupted are no faster for it that others wait with them."""
    work = scheduler(tokens=64, logged=(1, 2))
    for request in (1, 2):
        work.add(request, prompt(50), (60,) * 20, SamplingParams(max_tokens=100), 0)
    slots = slots_of(work)
    assert shape(slots) == [(1, 0, 64, False)]
    work.finish_step(slots, {}, STEP_S)
    assert shape(slots_of(work)) == [(1, 64, 6, True), (2, 0, 58, False)]


def test_the_last_token_of_a_prompt_is_no_reply() -> None:
    """It holds nobody's prompt up."""
    work = scheduler(tokens=64)
    for request in (1, 2):
        work.add(request, prompt(1 if request == 1 else 63), (), FIVE)
    assert shape(slots_of(work)) == [(1, 0, 1, True), (2, 0, 63, True)]


def test_who_comes_first_is_served_first() -> None:
    """A request whose blocks do not fit waits, and a small one behind it waits too."""
    work = scheduler(blocks=2, tokens=64)
    work.add(1, prompt(64), (), SamplingParams(max_tokens=1))
    work.add(2, prompt(60), (), FIVE)
    work.add(3, prompt(1), (), FIVE)
    assert [s.request_id for s in slots_of(work)] == [1]
    assert (work.running, work.waiting) == (1, 2)
    work.cancel(1)
    assert [s.request_id for s in slots_of(work)] == [2]
    work.cancel(2)
    assert [s.request_id for s in slots_of(work)] == [3]


def test_a_step_has_a_limited_number_of_slots() -> None:
    """No more requests run than a step has slots or tokens, so that none of them starves."""
    for tokens, slots in ((8, 2), (2, 8)):
        work = scheduler(tokens=tokens, slots=slots)
        for request in range(4):
            work.add(request, prompt(1), (), FIVE)
        assert len(slots_of(work)) == 2
        assert (work.running, work.waiting) == (2, 2)


def test_adding_a_request_twice_changes_nothing() -> None:
    """A repeated submission is ignored: waiting, running or waiting for its commit."""
    work = scheduler()
    work.add(1, prompt(2), (), SamplingParams(max_tokens=1))
    work.add(1, prompt(9), (), FIVE)
    slots = slots_of(work)
    assert shape(slots) == [(1, 0, 2, True)]
    work.add(1, prompt(9), (), FIVE)
    assert (work.running, work.waiting) == (1, 0)
    work.finish_step(slots, {1: 7}, STEP_S)
    work.add(1, prompt(9), (), FIVE)
    assert (work.running, work.waiting) == (0, 0)


def test_cancelling() -> None:
    """A waiting request just goes; a running one frees its blocks, and what nodes have of it."""
    work = scheduler(slots=1)
    work.add(1, prompt(2), (), FIVE)
    work.add(2, prompt(2), (), FIVE)
    slots = slots_of(work)
    assert work.cancel(2)
    assert work.cancel(1)
    assert not work.cancel(1)
    assert (work.running, work.waiting) == (0, 0)
    work.finish_step(slots, {1: 50}, STEP_S)
    assert work.next_step() == Work(ended=(1,))


def test_what_a_cancelled_request_drew_is_not_told() -> None:
    """Neither a token that no step carried, nor the end; what others drew is."""
    work = scheduler()
    for request in (1, 2):
        work.add(request, prompt(1), (), SamplingParams(max_tokens=request))
    work.finish_step(slots_of(work), {1: 50, 2: 60}, STEP_S)
    assert work.cancel(1)
    made = work.next_step()
    assert made is not None
    assert (made.ended, made.finals) == ((1,), ())
    assert made.news == (DrawnToken(request_id=2, index=0, token=60),)


def test_an_id_may_be_used_again_while_its_last_step_is_in_flight() -> None:
    """A slot of a cancelled request says nothing of a new request with its id."""
    work = scheduler()
    work.add(1, prompt(2), (), FIVE)
    slots = slots_of(work)
    work.cancel(1)
    work.add(1, prompt(3), (), FIVE, 2)
    work.finish_step(slots, {1: 50}, STEP_S)
    made = work.next_step()
    assert made is not None
    assert (made.ended, made.news) == ((1,), ())
    assert shape(made.slots) == [(1, 0, 3, True)]


# --- what every node has from the fences before --------------------------------------------------


def test_a_logged_request_goes_on_where_its_kv_ends() -> None:
    """Known tokens are forced from there; its first slot in this fence introduces it again."""
    work = scheduler(logged=(1,))
    work.add(1, prompt(2), (50, 51), FIVE, 3)
    slots = slots_of(work)
    assert slots == (
        Slot(
            request_id=1,
            start=3,
            tokens=(51,),
            sample=True,
            capacity=7,
            params=FIVE,
            prompt_tokens=2,
        ),
    )
    work.finish_step(slots, {1: 52}, STEP_S)
    assert news_of(work) == [DrawnToken(request_id=1, index=2, token=52)]


def test_the_last_known_token_is_always_computed() -> None:
    """There is nothing to draw from otherwise."""
    work = scheduler(logged=(1,))
    work.add(1, prompt(2), (50,), FIVE, 9)
    assert shape(slots_of(work)) == [(1, 2, 1, True)]


def test_kv_of_a_request_without_a_log_is_not_believed() -> None:
    """It is new, or was forgotten by all in this fence: it begins at position 0."""
    work = scheduler(logged=(1,))
    work.add(2, prompt(3), (), FIVE, 2)
    work.add(1, prompt(3), (), FIVE, 2)
    assert shape(slots_of(work)) == [(2, 0, 3, True), (1, 2, 1, True)]
    work.cancel(1)
    work.add(1, prompt(3), (), FIVE, 2)
    assert shape(slots_of(work)) == [(2, 0, 3, True), (1, 0, 3, True)]


def test_logs_that_nobody_claims_are_forgotten_on_cancel() -> None:
    """Nodes are told, although the request never ran here; and so when it only waited."""
    work = scheduler(logged=(1, 2), slots=1)
    assert work.cancel(1)
    assert not work.cancel(1)
    work.add(3, prompt(1), (), FIVE)
    work.add(2, prompt(1), (), FIVE)
    assert work.cancel(2)
    made = work.next_step()
    assert made is not None
    assert made.ended == (1, 2)


def test_a_reply_that_had_begun_may_have_no_room_any_more() -> None:
    """With fewer nodes: then it is the nodes that are at fault, not the request."""
    work = scheduler(blocks=1, logged=(1,))
    with pytest.raises(ClusterError, match="lack room") as caught:
        work.add(1, prompt(63), (), FIVE)
    assert (caught.value.code, caught.value.retryable) == ("node_lost", True)
    assert work.cancel(1)
    assert work.next_step() == Work(ended=(1,))


def test_a_missing_token_is_a_defect() -> None:
    """A slot with `sample` has its token, or the worker is wrong."""
    work = scheduler()
    work.add(0xAB, prompt(2), (), FIVE)
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
        work.add(1, prompt(length), (), params)
    assert (caught.value.code, caught.value.retryable) == (code, False)
    assert (work.running, work.waiting) == (0, 0)


def test_too_many_requests_are_refused_for_now() -> None:
    """One request more than the limit is `overloaded`, and may be tried again."""
    work = scheduler()
    for request in range(MAX_REQUESTS):
        work.add(request, prompt(1), (), FIVE)
    slots_of(work)
    with pytest.raises(ClusterError, match="try again") as caught:
        work.add(999, prompt(1), (), FIVE)
    assert (caught.value.code, caught.value.retryable) == ("overloaded", True)


@pytest.mark.parametrize(
    ("tokens", "slots"), [(0, 1), (1, 0), (MAX_STEP_TOKENS + 1, 1), (1, MAX_STEP_SLOTS + 1)]
)
def test_steps_beyond_the_wire_are_refused(tokens: int, slots: int) -> None:
    """A step must fit into its message, and have room for something."""
    with pytest.raises(ValueError, match="a step has"):
        scheduler(tokens=tokens, slots=slots)
