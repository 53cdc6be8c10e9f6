"""The scheduler with a toy model, under any mix of requests, cancels and new fences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from p2pinfer.core.blocks import BlockPool
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.scheduler import EndedReply, Scheduler, Work
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.units import Slice
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.messages import Step

EOS = 3
MAX_POSITIONS = 150


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
    """Keeps a true token log, draws from it, and checks that each slot joins what has its KV."""

    def __init__(self) -> None:
        self.logs = TokenLogs()
        self.logs.coverage.hold(computed={KvUnit(Slice(0, 1), 0)}, fed=frozenset())
        self.known: set[int] = set()
        self.capacity: dict[int, int] = {}
        self._step = 0

    def compute(self, work: Work) -> dict[int, int]:
        """Write a step's tokens, compute its slots, and draw."""
        self._step += 1
        self.known.difference_update(work.ended)
        assert all(request in self.logs for request in work.ended), "told once, and of what is here"
        for slot in work.slots:
            assert (slot.params is None) == (slot.request_id in self.known)
            if slot.params is not None:
                self.known.add(slot.request_id)
                self.capacity[slot.request_id] = slot.capacity
        self.logs.take(
            Step(
                fence=Fence(1, 1),
                step=self._step,
                link_seq=0,
                slots=work.slots,
                ended=work.ended,
                finals=work.finals,
            )
        )
        drawn = {}
        for slot in work.slots:
            request = slot.request_id
            assert self.logs.coverage.least(request) == slot.start, "each position once, in order"
            assert len(self.logs.tokens(request)) <= self.capacity[request]
            if slot.sample:
                drawn[request] = next_token(self.logs.tokens(request))
        self.logs.finish(work.slots)
        return drawn


STEP_TOKENS = st.integers(1, 64)
STEP_SLOTS = st.integers(1, 6)
BLOCKS = st.integers(3, 9)
SECONDS = st.lists(st.floats(0, 10), min_size=1, max_size=6)
"""What steps take, in turn."""


def build(pool: BlockPool, tokens: int, slots: int, logged: Iterable[int] = ()) -> Scheduler:
    """A scheduler for the toy model."""
    return Scheduler(
        pool=pool,
        max_positions=MAX_POSITIONS,
        eos_token_ids=frozenset({EOS}),
        logged=logged,
        max_step_tokens=tokens,
        max_slots=slots,
    )


def check_limits(work: Work, tokens: int, limit: int) -> None:
    """A request has one slot at most, and a step no more than it may have."""
    assert len(work.slots) <= limit
    assert sum(len(slot.tokens) for slot in work.slots) <= tokens
    assert len({slot.request_id for slot in work.slots}) == len(work.slots)


class Story:
    """Requests that go through a scheduler, and what came of them."""

    def __init__(self, todo: list[Job], tokens: int, limit: int) -> None:
        self.todo, self.tokens, self.limit = todo, tokens, limit
        self.node = ToyNode()
        self.replies: dict[int, list[int]] = {}
        self.ends: dict[int, EndedReply] = {}
        self.cancelled: set[int] = set()
        self.new_fence(BlockPool(100))

    def new_fence(self, pool: BlockPool) -> None:
        """A new scheduler, to which all that runs is added anew: some of it with less KV."""
        agreed = self.node.logs.snapshot()
        over = self.cancelled | set(self.ends)
        wanted = tuple(log for log in agreed if log.request_id not in over)
        self.node.logs.adopt(wanted)
        self.node.known.clear()
        self.pool = pool
        logged = {log.request_id: log for log in wanted}
        self.work = build(pool, self.tokens, self.limit, logged)
        for request, reply in self.replies.items():
            if request in over:
                continue
            log, job = logged.get(request), self.todo[request]
            if log is not None and len(log.tokens) > log.prompt_tokens:
                reply[:] = max(reply, list(log.tokens[log.prompt_tokens :]), key=len)
            covered = self.node.logs.coverage.least(request)
            self.work.add(request, job.prompt, reply, job.params, covered - covered // 3)

    def start(self, request: int) -> None:
        """Enter a request."""
        job = self.todo[request]
        self.replies[request] = list(job.received)
        self.work.add(request, job.prompt, job.received, job.params)

    def cancel(self, request: int) -> None:
        """Cancel a request, wherever it is."""
        if self.work.cancel(request):
            self.cancelled.add(request)

    def committed(self, work: Work) -> None:
        """Everybody has a step: its news are true."""
        for news in work.news:
            if news.request_id in self.cancelled:
                continue
            assert news.request_id not in self.ends
            if isinstance(news, EndedReply):
                self.ends[news.request_id] = news
                self.work.committed(news.request_id)
            else:
                reply = self.replies[news.request_id]
                assert news.index == len(reply)
                reply.append(news.token)

    def check(self) -> None:
        """Every reply is what it is alone, or the beginning of that; nothing is left over."""
        for request, job in enumerate(self.todo):
            tokens, reason = reply_of(job)
            if request in self.cancelled:
                assert self.replies[request] == tokens[: len(self.replies[request])]
            else:
                assert self.replies[request] == tokens
                end = self.ends[request]
                assert (end.reason, end.total_tokens) == (reason, len(tokens))
        assert set(self.ends) | self.cancelled == set(range(len(self.todo)))
        assert len(self.node.logs) == 0
        assert (self.pool.used, self.work.running, self.work.waiting) == (0, 0, 0)


@given(st.data(), st.lists(jobs(), min_size=1, max_size=8), STEP_TOKENS, STEP_SLOTS, SECONDS)
def test_any_mix_gives_each_request_the_reply_it_has_alone(
    data: st.DataObject, todo: list[Job], tokens: int, limit: int, seconds: list[float]
) -> None:
    """Late arrivals, cancels and new fences at any time (a step in flight too) change no token.

    Each position that lacks its KV is computed once and in order in every fence; all ends with
    nothing reserved and no log kept.
    """
    story, left, took = Story(todo, tokens, limit), list(range(len(todo))), cycle(seconds)
    events = data.draw(st.lists(st.sampled_from(["cancel", "fence", ""]), max_size=12))
    while True:
        step = story.work.next_step()
        if step is None and not left:
            break
        for _ in range(data.draw(st.integers(0, len(left))) if step else len(left)):
            story.start(left.pop(0))
        if step is None:
            continue
        check_limits(step, tokens, limit)
        drawn = story.node.compute(step)
        event = events.pop() if events else ""
        if event == "cancel":
            story.cancel(data.draw(st.integers(0, len(todo) - 1)))
        elif event == "fence":
            story.new_fence(BlockPool(data.draw(BLOCKS)))
            continue
        story.committed(step)
        story.work.finish_step(step.slots, drawn, next(took))
    story.check()


@given(st.lists(jobs(), min_size=1, max_size=6), STEP_TOKENS, STEP_SLOTS, SECONDS)
def test_decoding_never_waits_for_a_prompt(
    todo: list[Job], tokens: int, limit: int, seconds: list[float]
) -> None:
    """A request that has drawn a token draws one in every step until its reply ends."""
    story, took = Story(todo, tokens, limit), cycle(seconds)
    for request in range(len(todo)):
        story.start(request)
    decoding: set[int] = set()
    while (step := story.work.next_step()) is not None:
        decoding -= {news.request_id for news in step.news if isinstance(news, EndedReply)}
        drawn = story.node.compute(step)
        assert decoding <= drawn.keys()
        story.committed(step)
        story.work.finish_step(step.slots, drawn, next(took))
        decoding |= {request for request in drawn if request not in story.ends}
    story.check()
