"""Which log wins, from where members lack it, and where computing begins again."""

from __future__ import annotations

from hashlib import sha256

from msgspec.structs import replace

from p2pinfer.core.agreement import (
    RERUN_POSITIONS,
    Choice,
    Prefixes,
    Restart,
    choose,
    digest,
    reported,
    restart,
    rung,
    same_bits,
    summary,
    tail_start,
)
from p2pinfer.core.events import TokenLog
from p2pinfer.core.planner import make_plan
from p2pinfer.limits import MAX_REQUESTS
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.messages import Ack, CoverageRun, InputsRun, LogDigest
from tests.plan_bench import MODEL, log, member

TERM = 5


def plan_of(count: int, *, layout: str = "heads", **values: object) -> Plan:
    """A plan of nodes 1 to `count`, of which node 1 leads in `TERM`."""
    return make_plan(
        members=[member(n + 1, **values) for n in range(count)],
        model=MODEL,
        layout=layout,
        fence=Fence(TERM, 7),
        cluster_id="c" * 16,
        leader_id=member(1).node_id,
    )


def ack(number: int, *logs: TokenLog, covered: int | None = None, plan: Plan | None = None) -> Ack:
    """What node `number` says of its logs; it covers `covered` positions of what it owns."""
    runs = []
    if plan is not None and covered is not None:
        for stage, part in enumerate(plan.stages):
            owned = tuple(u for u, o in enumerate(part.head_owners) if o == number - 1)
            runs += [
                CoverageRun(request_id=each.request_id, stage=stage, units=owned, positions=covered)
                for each in logs
            ]
    return Ack(
        fence=Fence(TERM, 7),
        node_id=member(number).node_id,
        logs=tuple(map(summary, logs)),
        coverage=tuple(runs),
    )


def by_id(*acks: Ack) -> dict[str, Ack]:
    """ACKs by their senders."""
    return {each.node_id: each for each in acks}


def winner(*acks: Ack) -> tuple[int, int, int]:
    """Number of the member whose log of request 1 wins, its term and its length."""
    best = choose(plan_of(3), by_id(*acks))[1]
    return int(best.holder, 16), best.log.term, best.log.length


def test_a_digest_is_the_sha256_of_four_bytes_each() -> None:
    """Tokens are hashed as unsigned 32-bit integers, little-endian, one after the other."""
    assert digest((1, 0x01020304)) == sha256(b"\x01\0\0\0\x04\x03\x02\x01").hexdigest()
    assert digest(()) == sha256(b"").hexdigest()


def test_the_later_term_wins_over_the_longer_log() -> None:
    """A log that a later leader wrote is right, even if an earlier one's is longer."""
    assert winner(ack(2, log("abcd", term=3)), ack(3, log("ab", term=4))) == (3, 4, 2)


def test_the_longer_log_of_one_term_wins() -> None:
    """Within a term one leader wrote all logs, so that the longest holds all others."""
    assert winner(ack(1, log("ab")), ack(2, log("abc")), ack(3, log("a"))) == (2, 4, 3)


def test_the_leader_knows_best_what_it_wrote() -> None:
    """Of the leader's own term its log is taken, though another member has a longer one."""
    ours = ack(1, log("ax", term=TERM))
    assert winner(ack(2, log("abc", term=TERM)), ours) == (1, TERM, 2)
    assert winner(ours, ack(2, log("abc", term=TERM))) == (1, TERM, 2)


def test_of_equal_logs_the_leaders_is_taken() -> None:
    """The leader need not ask for tokens that it has."""
    assert winner(ack(3, log("ab")), ack(1, log("ab")), ack(2, log("ab")))[0] == 1


def test_the_choice_does_not_depend_on_the_order_of_acks() -> None:
    """Equal ranks are told apart by content and holder, not by who came first."""
    one, two = ack(2, log("ab")), ack(3, log("ax"))
    assert winner(one, two) == winner(two, one)


def test_empty_logs_count_for_nothing() -> None:
    """A log without a token is as good as none."""
    assert choose(plan_of(3), by_id(ack(2, log("")))) == {}


def test_no_more_logs_are_kept_than_a_cluster_may_serve() -> None:
    """Of too many requests those of the latest terms are kept, then the lowest ids."""
    old = [log("a", request_id=n, term=1) for n in range(MAX_REQUESTS)]
    new = log("b", request_id=MAX_REQUESTS + 9, term=2)
    kept = choose(plan_of(3), by_id(ack(2, *old), ack(3, new)))
    assert len(kept) == MAX_REQUESTS
    assert MAX_REQUESTS + 9 in kept
    assert MAX_REQUESTS - 1 not in kept


def test_beginnings_are_told_by_length_and_digest() -> None:
    """A member's log is a beginning of the agreed one if its digest is that of the beginning."""
    agreed = Prefixes(log("abcd").tokens)
    assert summary(log("ab")) in agreed
    assert summary(log("ab")) in agreed
    assert summary(log("abcd")) in agreed
    assert summary(log("ax")) not in agreed
    assert summary(log("abcde")) not in agreed


def test_a_tail_begins_where_a_right_beginning_ends() -> None:
    """Who has a beginning gets the rest; who has other tokens, more of them or none gets all."""
    agreed = Prefixes(log("abcd").tokens)
    starts = [
        tail_start(None if text is None else summary(log(text)), agreed)
        for text in ("abcd", "ab", "ax", "abcde", None)
    ]
    assert starts == [4, 2, 0, 0, 0]


def test_a_member_may_have_no_log_of_a_request() -> None:
    """What a member did not report it does not have."""
    assert reported(ack(1, log("ab")), 1) == summary(log("ab"))
    assert reported(ack(1, log("ab")), 2) is None


def restarted(*acks: Ack, agreed: str = "abcd", layout: str = "heads", count: int = 2) -> int:
    """Where request 1 restarts, nothing being made of inputs."""
    plan = plan_of(count, layout=layout)
    found = restart(plan, 1, Prefixes(log(agreed).tokens), by_id(*acks))
    assert found.recompute == 0
    return found.position


def test_a_request_restarts_at_the_least_coverage_of_any_owner() -> None:
    """All head units must have the KV of all positions before the first that is computed."""
    plan = plan_of(2)
    acks = (ack(1, log("abcd"), covered=3, plan=plan), ack(2, log("abc"), covered=2, plan=plan))
    assert restarted(*acks) == 2


def test_the_last_known_token_is_computed_again() -> None:
    """The next token is drawn from what comes of the last one, so that is never skipped."""
    plan = plan_of(2)
    acks = [ack(n, log("abcd"), covered=4, plan=plan) for n in (1, 2)]
    assert restarted(*acks) == 3
    assert restarted(*[ack(n, log("a"), covered=1, plan=plan) for n in (1, 2)], agreed="a") == 0


def test_coverage_of_other_tokens_is_of_no_use() -> None:
    """An owner whose own log is no beginning of the agreed one covers nothing."""
    plan = plan_of(2)
    ours = ack(1, log("abcd"), covered=3, plan=plan)
    assert restarted(ours, ack(2, log("axcd"), covered=3, plan=plan)) == 0
    assert restarted(ours, ack(2, log("abcde"), covered=3, plan=plan)) == 0


def test_an_owner_without_log_or_ack_covers_nothing() -> None:
    """What nobody reported is not there."""
    plan = plan_of(2)
    ours = ack(1, log("abcd"), covered=3, plan=plan)
    assert restarted(ours) == 0
    assert restarted(ours, ack(2)) == 0
    assert restarted(ours, ack(2, log("abcd"))) == 0


def test_coverage_counts_no_further_than_the_owners_own_log() -> None:
    """KV beyond the tokens that a member knows cannot be KV of this log."""
    plan = plan_of(2)
    ours = ack(1, log("abcd"), covered=3, plan=plan)
    assert restarted(ours, ack(2, log("ab"), covered=9, plan=plan)) == 2


def test_coverage_of_units_that_a_member_does_not_own_is_ignored() -> None:
    """A run counts for the stage and the units that its sender owns, and for its request."""
    plan = plan_of(2)
    ours = ack(1, log("abcd"), covered=3, plan=plan)
    whole = ack(2, log("abcd"), covered=3, plan=plan)
    (run,) = whole.coverage
    for wrong in (
        replace(run, units=(0,)),
        replace(run, stage=1),
        replace(run, request_id=2),
        replace(run, units=run.units[:1]),
    ):
        assert restarted(ours, replace(whole, coverage=(wrong,))) == 0
    parts = tuple(replace(run, units=(unit,)) for unit in run.units)
    assert restarted(ours, replace(whole, coverage=parts)) == 3


def test_all_stages_must_be_covered() -> None:
    """A stage whose owner lacks KV holds back the others."""
    plan = plan_of(2, layout="layers")
    acks = (ack(1, log("abcd"), covered=3, plan=plan), ack(2, log("abcd"), covered=1, plan=plan))
    assert restarted(*acks, layout="layers") == 1


def test_the_rung_says_where_the_kv_was() -> None:
    """Computed again where there is none; a replica's where any head unit has another owner."""
    two, three, layers = plan_of(2), plan_of(3), plan_of(2, layout="layers")
    assert {rung(each, two, Restart(0, 0)) for each in (two, three, None)} == {"replay"}
    assert {rung(each, two, Restart(3, 0)) for each in (two, None)} == {"none"}
    assert {rung(two, each, Restart(3, 0)) for each in (three, layers)} == {"replica"}
    assert {rung(two, each, Restart(3, 1)) for each in (two, three)} == {"recompute"}


LONG = "abcdefghijklmnopqrstuvwxyz"


def with_inputs(answer: Ack, positions: int, *, stage: int = 0, request_id: int = 1) -> Ack:
    """The same, of a member that keeps inputs."""
    run = InputsRun(request_id=request_id, stage=stage, positions=positions)
    return replace(answer, inputs=(*answer.inputs, run))


def made(*acks: Ack, layout: str = "heads") -> Restart:
    """Where request 1 restarts, with the KV that is made of inputs."""
    return restart(plan_of(2, layout=layout), 1, Prefixes(log(LONG).tokens), by_id(*acks))


def test_what_lacks_is_made_of_inputs() -> None:
    """An owner's positions are those that it covers or keeps the inputs of, whichever is more."""
    plan = plan_of(2)
    ours = ack(1, log(LONG), covered=25, plan=plan)
    theirs = ack(2, log(LONG), covered=3, plan=plan)
    assert made(ours, theirs) == Restart(3, 0)
    assert made(ours, with_inputs(theirs, 24)) == Restart(24, 21)
    assert made(ours, with_inputs(theirs, 26)) == Restart(25, 22)
    assert made(with_inputs(ours, 2), with_inputs(theirs, 24)) == Restart(24, 21)
    assert made(with_inputs(ours, 24), theirs) == Restart(3, 0)
    lost = ack(1, log(LONG)), ack(2, log(LONG))
    assert made(*(with_inputs(each, 20) for each in lost)) == Restart(20, 20)


def test_a_few_positions_are_run_again_instead() -> None:
    """A small step is as good as that."""
    plan = plan_of(2)
    ours = ack(1, log(LONG), covered=25, plan=plan)
    theirs = ack(2, log(LONG), covered=10, plan=plan)
    most = 10 + RERUN_POSITIONS
    assert made(ours, with_inputs(theirs, most)) == Restart(10, 0)
    assert made(ours, with_inputs(theirs, most + 1)) == Restart(most + 1, RERUN_POSITIONS + 1)


def test_inputs_count_for_their_request_stage_and_log_alone() -> None:
    """As coverage does, and only those of an owner."""
    plan = plan_of(2)
    ours = ack(1, log(LONG), covered=25, plan=plan)
    theirs = ack(2, log(LONG))
    assert made(ours, with_inputs(theirs, 20, request_id=2)) == Restart(0, 0)
    assert made(ours, with_inputs(theirs, 20, stage=1)) == Restart(0, 0)
    assert made(ours, with_inputs(ack(2, log("x" + LONG[1:])), 20)) == Restart(0, 0)
    assert made(ours, with_inputs(ack(2), 20)) == made(ours) == Restart(0, 0)
    assert made(ours, with_inputs(ack(2, log(LONG[:15])), 20)) == Restart(15, 15)
    layers = plan_of(2, layout="layers")
    first = ack(1, log(LONG), covered=25, plan=layers)
    assert made(first, with_inputs(theirs, 20, stage=1), layout="layers") == Restart(20, 20)
    assert made(first, with_inputs(theirs, 20, stage=0), layout="layers") == Restart(0, 0)


def test_a_member_keeps_its_units_under_another_index() -> None:
    """Owners are told by who they are, not by their place in the plan."""
    before = plan_of(2)
    stage = before.stages[0]
    turned = {
        kind: tuple(1 - i for i in getattr(stage, kind))
        for kind in ("head_owners", "mlp_owners", "vocab_owners")
    }
    after = replace(before, members=before.members[::-1], stages=(replace(stage, **turned),))
    assert rung(before, after, Restart(3, 0)) == "none"
    moved = replace(before, stages=(replace(stage, mlp_owners=(0,) * len(stage.mlp_owners)),))
    assert rung(before, moved, Restart(3, 0)) == "none"


def test_bits_stay_the_same_where_each_unit_stays_in_its_class() -> None:
    """A unit's numeric class decides its bits, the leader's those of the draw."""
    before = plan_of(3)
    other = [replace(m, numeric_class="o") for m in before.members]
    assert same_bits(before, plan_of(2))
    assert not same_bits(before, plan_of(2, numeric_class="o"))
    only_last = replace(before, members=(*before.members[:2], other[2]))
    assert same_bits(only_last, only_last)
    assert not same_bits(before, only_last)
    assert not same_bits(before, replace(before, members=(other[0], *before.members[1:])))


def test_bits_of_another_layout_are_the_same_in_one_class_only() -> None:
    """Where the layers are cut otherwise, all owners must be of one class."""
    heads, layers = plan_of(2), plan_of(2, layout="layers")
    mixed = (layers.members[0], replace(layers.members[1], numeric_class="o"))
    assert same_bits(heads, layers)
    assert not same_bits(heads, replace(layers, members=mixed))


def test_a_choice_names_holder_and_log() -> None:
    """The agreed log comes with who can be asked for its tokens."""
    best = choose(plan_of(3), by_id(ack(2, log("ab"))))
    assert best == {1: Choice(member(2).node_id, summary(log("ab")))}
    assert isinstance(best[1].log, LogDigest)
