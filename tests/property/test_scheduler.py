"""The scheduler with a toy model, under any mix of requests, cancels and restarts."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from p2pinfer.core.blocks import BlockPool
from p2pinfer.core.scheduler import EndedReply, Scheduler
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import DrawnToken, Slot

EOS = 3
MAX_POSITIONS = 150


def has_work(work: Scheduler) -> bool:
    """Whether a step would compute anything."""
    return bool(work.running or work.waiting)


def next_token(tokens: Sequence[int]) -> int:
    """A toy model: the next token depends on all tokens before it, and now and then is EOS."""
    state = 1
    for token in tokens:
        state = (state * 31 + token + 7) % 1_000_003
    return state % 23


def reply_of(job: Job) -> tuple[list[int], str]:
    """What the toy model says alone."""
    tokens = [*job.prompt, *job.received]
    limit = min(len(job.prompt) + job.params.max_tokens, MAX_POSITIONS)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not job.params.ignore_eos:
            return tokens[len(job.prompt) :], "stop"
        if len(tokens) == limit:
            return tokens[len(job.prompt) :], "length"


class Job(Struct, frozen=True):
    """A request; `received` are the first tokens of its true reply."""

    prompt: tuple[int, ...]
    params: SamplingParams
    received: tuple[int, ...] = ()


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Any request that fits, sometimes one resumed in the midst of its reply."""
    job = Job(
        tuple(draw(st.lists(st.integers(0, 22), min_size=1, max_size=100))),
        SamplingParams(max_tokens=draw(st.integers(1, 200)), ignore_eos=draw(st.booleans())),
    )
    reply, _ = reply_of(job)
    return Job(job.prompt, job.params, tuple(reply[: draw(st.integers(0, len(reply) - 1))]))


class ToyNode:
    """Keeps the tokens whose KV it has, by position, and checks every slot against them."""

    def __init__(self) -> None:
        self.kv: dict[int, list[int]] = {}
        self.known: set[int] = set()
        self.capacity: dict[int, int] = {}

    def new_fence(self) -> None:
        """Under a new fence capacity and parameters must be told again."""
        self.known.clear()

    def compute(self, slots: Sequence[Slot], ended: Sequence[int]) -> dict[int, int]:
        """Free what ended, compute the slots, and draw."""
        for request in ended:
            del self.kv[request]
            self.known.discard(request)
        drawn = {}
        for slot in slots:
            request = slot.request_id
            if request in self.known:
                assert slot.params is None
                assert slot.capacity == 0
                assert slot.start == len(self.kv[request]), "each position once, in order"
            else:
                assert slot.params is not None
                assert slot.start == 0
                self.known.add(request)
                self.capacity[request] = slot.capacity
                self.kv[request] = []
            self.kv[request] += slot.tokens
            assert len(self.kv[request]) <= self.capacity[request]
            if slot.sample:
                drawn[request] = next_token(self.kv[request])
        return drawn


STEP_TOKENS = st.integers(1, 64)
STEP_SLOTS = st.integers(1, 6)
BLOCKS = st.integers(3, 9)


def build(pool: BlockPool, tokens: int, slots: int) -> Scheduler:
    """A scheduler for the toy model."""
    return Scheduler(
        pool=pool,
        max_positions=MAX_POSITIONS,
        eos_token_ids=frozenset({EOS}),
        max_step_tokens=tokens,
        max_slots=slots,
    )


def check_step(slots: Sequence[Slot], work: Scheduler, tokens: int, limit: int) -> None:
    """Limits hold, a request has one slot at most, and no step is empty while there is work."""
    assert len(slots) <= limit
    assert sum(len(slot.tokens) for slot in slots) <= tokens
    assert len({slot.request_id for slot in slots}) == len(slots)
    assert bool(slots) == has_work(work)


@given(st.data(), st.lists(jobs(), min_size=1, max_size=8), BLOCKS, STEP_TOKENS, STEP_SLOTS)
def test_any_mix_gives_each_request_the_reply_it_has_alone(
    data: st.DataObject, todo: list[Job], blocks: int, tokens: int, limit: int
) -> None:
    """Late arrivals, cancels and restarts at any time (a step in flight too) change no token.

    Each position is computed once and in order in every fence; all ends with nothing reserved.
    """
    pool, node = BlockPool(blocks), ToyNode()
    work = build(pool, tokens, limit)
    replies: dict[int, list[int]] = {}
    ends: dict[int, EndedReply] = {}
    cancelled: set[int] = set()
    left, now = list(enumerate(todo)), 0.0
    events = data.draw(st.lists(st.sampled_from(["cancel", "restart", ""]), max_size=12))
    while left or has_work(work):
        for _ in range(data.draw(st.integers(0, len(left))) if has_work(work) else len(left)):
            request, job = left.pop(0)
            replies[request] = list(job.received)
            assert work.add(request, job.prompt, job.received, job.params, now) is None
        slots = work.next_slots()
        check_step(slots, work, tokens, limit)
        drawn = node.compute(slots, work.ended_since_last())
        event = events.pop() if events else ""
        if event == "cancel":
            victim = data.draw(st.integers(0, len(todo) - 1))
            if work.cancel(victim):
                cancelled.add(victim)
        elif event == "restart":
            pool = BlockPool(data.draw(BLOCKS)) if data.draw(st.booleans()) else pool
            assert work.restart(pool) == ()
            node.new_fence()
        now += 1.0
        for news in work.finish_step(slots, drawn, now):
            assert news.request_id not in ends
            assert news.request_id not in cancelled
            if isinstance(news, DrawnToken):
                assert news.index == len(replies[news.request_id])
                replies[news.request_id].append(news.token)
            else:
                ends[news.request_id] = news
    for request, job in enumerate(todo):
        tokens_alone, reason = reply_of(job)
        if request in cancelled:
            assert replies[request] == tokens_alone[: len(replies[request])]
        else:
            assert replies[request] == tokens_alone
            assert (ends[request].reason, ends[request].total_tokens) == (reason, len(tokens_alone))
    assert set(ends) | cancelled == set(range(len(todo)))
    node.compute((), work.ended_since_last())
    assert node.kv == {}
    assert (pool.used, work.running, work.waiting) == (0, 0, 0)


@given(st.lists(jobs(), min_size=1, max_size=6), STEP_TOKENS, STEP_SLOTS)
def test_decoding_never_waits_for_a_prompt(todo: list[Job], tokens: int, limit: int) -> None:
    """A request that has drawn a token draws one in every step until its reply ends."""
    work, node = build(BlockPool(100), tokens, limit), ToyNode()
    for request, job in enumerate(todo):
        work.add(request, job.prompt, job.received, job.params, 0.0)
    decoding: set[int] = set()
    while has_work(work):
        slots = work.next_slots()
        drawn = node.compute(slots, work.ended_since_last())
        assert decoding <= drawn.keys()
        news = work.finish_step(slots, drawn, 0.0)
        decoding |= drawn.keys()
        decoding -= {end.request_id for end in news if isinstance(end, EndedReply)}
