"""The token logs of a node: what steps write, what plans keep."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pinfer.core.agreement import digest
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.orders import Covered, KeptInputs, TokenLog
from p2pinfer.core.planner import make_plan
from p2pinfer.core.token_log import HASH_EVERY, TokenLogs
from p2pinfer.core.units import Slice
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_REQUESTS
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.messages import FinalToken, Slot, Step
from tests.plan_bench import MODEL, member

FENCE = Fence(3, 5)
PARAMS = SamplingParams(seed=7)


def first(tokens: tuple[int, ...], request_id: int = 1, start: int = 0) -> Slot:
    """The first slot of a request in a fence: the prompt has two tokens."""
    return Slot(
        request_id=request_id,
        start=start,
        tokens=tokens,
        capacity=64,
        params=PARAMS,
        prompt_tokens=2,
    )


def more(start: int, *tokens: int, request_id: int = 1) -> Slot:
    """A further slot of a request."""
    return Slot(request_id=request_id, start=start, tokens=tokens)


def log(tokens: tuple[int, ...], request_id: int = 1, term: int = 3) -> TokenLog:
    """What is told of a request."""
    return TokenLog(request_id=request_id, term=term, prompt_tokens=2, params=PARAMS, tokens=tokens)


UNITS = frozenset(KvUnit(Slice(0, 4), unit) for unit in (1, 2))
"""The head units that this node computes."""


def logs_of(*slots: Slot) -> TokenLogs:
    """Logs to which these slots were written, and computed."""
    logs = TokenLogs()
    logs.coverage.hold(computed=UNITS, fed=frozenset())
    for slot in slots:
        logs.write(FENCE, slot)
        logs.finish((slot,))
    return logs


def test_steps_write_the_log() -> None:
    """A log has the tokens, the prompt's length, the parameters and the term of who wrote it."""
    logs = logs_of(first((10, 11)), more(2, 12), more(3, 13))
    assert logs.snapshot() == (log((10, 11, 12, 13)),)
    assert 1 in logs
    assert (len(logs), logs.params(1), list(logs.tokens(1))) == (1, PARAMS, [10, 11, 12, 13])


def test_only_finished_steps_cover() -> None:
    """A position that was written and not computed has no KV."""
    logs = logs_of(first((10, 11)))
    logs.write(FENCE, more(2, 12))
    assert logs.coverage.least(1) == 2
    logs.finish((more(2, 12),))
    assert logs.coverage.least(1) == 3
    logs.finish((more(2, 12), more(0, 1, request_id=9)))
    assert (logs.coverage.least(1), logs.coverage.least(9)) == (3, 0)


def test_computing_again_keeps_the_tokens_that_follow() -> None:
    """Known tokens run again from a position: KV from there on is void, the log is as it was."""
    logs = logs_of(first((10, 11)), more(2, 12, 13, 14))
    logs.write(Fence(4, 6), first((11, 12), start=1))
    assert logs.coverage.least(1) == 1
    assert logs.snapshot() == (log((10, 11, 12, 13, 14), term=4),)
    logs.finish((first((11, 12), start=1),))
    assert logs.coverage.least(1) == 3


def test_a_step_may_go_over_the_end() -> None:
    """The known part stays, the rest is appended."""
    logs = logs_of(first((10, 11)))
    logs.write(FENCE, more(1, 11, 12))
    assert list(logs.tokens(1)) == [10, 11, 12]


def test_another_token_cuts_the_log() -> None:
    """What followed a token that is no longer said is forgotten."""
    logs = logs_of(first((10, 11)), more(2, 12, 13, 14))
    logs.write(FENCE, more(2, 12, 99))
    assert list(logs.tokens(1)) == [10, 11, 12, 99]
    assert logs.coverage.least(1) == 2


def test_coverage_without_the_positions_before_counts_nothing() -> None:
    """A node that had lost its KV covers nothing by computing at the end."""
    logs = logs_of(first((10, 11)))
    logs.coverage.lose(UNITS)
    logs.write(FENCE, more(2, 12))
    logs.finish((more(2, 12),))
    assert logs.coverage.least(1) == 0


def test_a_report_of_coverage_goes_by_the_stages_of_a_plan() -> None:
    """Of each log the units that have the same are told together; other layers are left out."""
    plan = make_plan(
        members=[member(1), member(2)],
        model=replace(MODEL, num_layers=8),
        layout="layers",
        fence=FENCE,
        cluster_id="c" * 16,
        leader_id=member(1).node_id,
    )
    logs = logs_of(first((10, 11)), more(2, 12), first((5, 6), request_id=7))
    logs.coverage.forget(7)
    here = Covered(request_id=1, stage=0, units=(1, 2), positions=3)
    assert logs.covered(plan) == (here,)
    logs.coverage.join(1, *kept(logs, Slice(4, 8)), 0, 2)
    there = Covered(request_id=1, stage=1, units=(0,), positions=2)
    assert logs.covered(plan) == (here, there)
    kept(logs, Slice(2, 6))
    logs.coverage.join(1, KvUnit(Slice(2, 6), 0), 0, 2)
    assert logs.covered(plan) == (here,)
    logs.forget((1,))
    assert logs.covered(plan) == ()


def kept(logs: TokenLogs, span: Slice) -> tuple[KvUnit]:
    """From now on head unit 0 of those layers is kept for another node, besides the own ones."""
    logs.coverage.hold(computed=UNITS, fed={KvUnit(span, 0)})
    return (KvUnit(span, 0),)


def test_a_digest_is_of_any_beginning_of_a_log() -> None:
    """It is that of the same tokens elsewhere, in whichever order it is asked for, and after the
    log was cut and has gone on with other tokens."""
    long = 2 * HASH_EVERY + 3
    logs = logs_of(first(tuple(range(long))))
    lengths = (long, 1, HASH_EVERY, HASH_EVERY - 1, HASH_EVERY + 1, 2 * HASH_EVERY, 0)
    for length in lengths:
        assert logs.digest(1, length) == digest(range(length))
    assert logs.digest(1, long + 1) is None
    assert logs.digest(2, 1) is None
    for cut in (2 * HASH_EVERY, HASH_EVERY + 1, HASH_EVERY - 1):
        tokens = (*range(cut), *range(9000, 9000 + HASH_EVERY))
        logs.write(FENCE, more(cut, *tokens[cut:]))
        assert logs.digest(1, len(tokens)) == digest(tokens)
        assert logs.digest(1, cut + 1) == digest(tokens[: cut + 1])


def test_a_hole_is_refused() -> None:
    """A slot behind the end, and one of an unknown request, leave all as it was."""
    logs = logs_of(first((10, 11)))
    with pytest.raises(RemoteProtocolError, match="positions 2 to 3"):
        logs.write(FENCE, more(3, 13))
    with pytest.raises(RemoteProtocolError, match="never introduced"):
        logs.write(FENCE, Slot(request_id=2, start=0, tokens=(1,)))
    with pytest.raises(RemoteProtocolError, match="positions 0 to 1"):
        logs.write(FENCE, first((1,), request_id=2, start=1))
    assert (list(logs.tokens(1)), len(logs)) == ([10, 11], 1)


def test_an_ack_can_tell_of_all_logs() -> None:
    """One request more than the limit is refused."""
    logs = logs_of(*(first((1, 2), request_id=i) for i in range(MAX_REQUESTS)))
    with pytest.raises(RemoteProtocolError, match="more than"):
        logs.write(FENCE, first((1, 2), request_id=MAX_REQUESTS))


def test_a_last_token_follows_the_others() -> None:
    """It is written at the end of a known log, and nowhere else."""
    logs = logs_of(first((10, 11)))
    logs.final(Fence(4, 1), FinalToken(request_id=1, position=2, token=2))
    assert logs.snapshot() == (log((10, 11, 2), term=4),)
    assert logs.coverage.least(1) == 2
    for final in (
        FinalToken(request_id=1, position=2, token=2),
        FinalToken(request_id=1, position=4, token=2),
        FinalToken(request_id=8, position=0, token=2),
    ):
        with pytest.raises(RemoteProtocolError, match="last token"):
            logs.final(FENCE, final)


def test_a_step_forgets_before_it_writes() -> None:
    """The id of a request that ended may be used again in the same step."""
    logs = logs_of(first((10, 11)), first((5, 6), request_id=2))
    step = Step(
        fence=FENCE,
        step=9,
        link_seq=0,
        slots=(first((20, 21)),),
        ended=(1, 77),
        finals=(FinalToken(request_id=2, position=2, token=2),),
    )
    logs.take(step)
    assert list(logs.tokens(1)) == [20, 21]
    assert list(logs.tokens(2)) == [5, 6, 2]
    assert (logs.coverage.least(1), logs.coverage.least(2)) == (0, 2)


@pytest.mark.parametrize(
    ("agreed", "covered"),
    [
        ((10, 11, 12, 13), 4),
        ((10, 11, 12), 3),
        ((10, 11, 12, 13, 14, 15), 4),
        ((10, 11, 99, 13, 14), 2),
        ((9,), 0),
    ],
)
def test_kv_stays_as_far_as_the_agreed_tokens_are_the_same(
    agreed: tuple[int, ...], covered: int
) -> None:
    """Logs are cut and extended to what was agreed; KV of other tokens is of no use."""
    logs = logs_of(first((10, 11)), more(2, 12, 13))
    assert logs.adopt((log(agreed, term=8),)) == ()
    assert logs.snapshot() == (log(agreed, term=8),)
    assert logs.coverage.least(1) == covered


def test_logs_that_nobody_agreed_on_are_gone() -> None:
    """Their requests are named, so that their KV is freed; new ones begin without KV."""
    logs = logs_of(*(first((1, 2), request_id=i) for i in (5, 4, 3)))
    assert logs.adopt((log((1, 2, 3), request_id=4), log((7, 8), request_id=6))) == (3, 5)
    assert [told.request_id for told in logs.snapshot()] == [4, 6]
    assert [logs.coverage.least(request_id) for request_id in (3, 4, 5, 6)] == [0, 2, 0, 0]


def test_inputs_are_told_and_cut_with_the_log() -> None:
    """By the stages of a plan, of logs that are here; cut by steps, plans, and the end."""
    plan = make_plan(
        members=[member(1)],
        model=replace(MODEL, num_layers=4),
        layout="heads",
        fence=FENCE,
        cluster_id="c" * 16,
        leader_id=member(1).node_id,
    )
    logs = TokenLogs()
    logs.inputs.hold({Slice(0, 4), Slice(4, 8)})
    for slot in (first((10, 11, 12)), first((5, 6), request_id=7)):
        logs.write(FENCE, slot)
    assert logs.kept_inputs(plan) == ()
    logs.finish((first((10, 11, 12)), first((5, 6), request_id=7)))
    other = KeptInputs(request_id=7, stage=0, positions=2)
    assert logs.kept_inputs(plan) == (KeptInputs(request_id=1, stage=0, positions=3), other)
    logs.write(FENCE, more(2, 99))
    assert logs.inputs.of(1, Slice(0, 4)) == 2
    logs.adopt((log((10, 12)),))
    assert logs.kept_inputs(plan) == (KeptInputs(request_id=1, stage=0, positions=1),)
    logs.forget((1,))
    assert logs.inputs.of(1, Slice(0, 4)) == 0
