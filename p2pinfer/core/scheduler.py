"""Which positions of which requests the next step computes: continuous batching.

Requests join and leave the batch at every step (Orca, Yu et al., OSDI 2022), and long prompts are
cut in chunks that ride along with everybody's next token, so that a long prompt stops nobody
(Sarathi-Serve, Agrawal et al., OSDI 2024); what steps took decides how long the chunks may be.
Admission is first come, first served: a request whose KV does not fit yet waits, and all behind it
wait too, so none starves.

A scheduler lives for one fence: the next one begins empty, and requests are added anew with what
is known of them. The leader's worker calls `next_step` and `finish_step` in turn; requests may be
added or cancelled in between. Tokens that are known already (prompt, tokens received, tokens of the
log that was agreed on) are forced, never drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from p2pinfer.core.blocks import BLOCK_POSITIONS, BlockPool, blocks_for
from p2pinfer.core.prefill_budget import PrefillBudget
from p2pinfer.errors import ClusterError, InvalidRequestError, LocalProtocolError
from p2pinfer.limits import MAX_REQUESTS, MAX_STEP_SLOTS, MAX_STEP_TOKENS
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import DrawnToken, FinalToken, Slot

STOP, LENGTH = "stop", "length"


class EndedReply(Struct, frozen=True):
    """A reply is complete. `reason` is `stop` or `length`; `total_tokens` counts a last EOS too."""

    request_id: int
    reason: str
    total_tokens: int


Piece = DrawnToken | EndedReply
"""What becomes true for a client once it is committed."""


class Work(Struct, frozen=True, kw_only=True):
    """What a step says to all (see `Step`), and the `news` that are committed with it.

    News are the tokens that the step before drew, and the ends of their replies, in order.
    """

    slots: tuple[Slot, ...] = ()
    ended: tuple[int, ...] = ()
    finals: tuple[FinalToken, ...] = ()
    news: tuple[Piece, ...] = ()


def capacity(prompt_tokens: int, params: SamplingParams, max_positions: int) -> int:
    """Positions that a request may come to, its prompt included, with a model of so many."""
    return min(prompt_tokens + params.max_tokens, max_positions)


class _Request:
    """One request: its known tokens, and how many of them have their KV."""

    def __init__(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        max_positions: int,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.tokens = list(prompt_ids)
        self.prompt_tokens = len(prompt_ids)
        self.capacity = capacity(len(prompt_ids), params, max_positions)
        self.computed = 0
        self.placed = False
        """Nodes may hold its log, and KV of it."""
        self.announced = False
        """Its capacity and parameters were sent."""

    @property
    def pending(self) -> int:
        """Known tokens that are still to be computed: at least 1, for the last one drawn."""
        return len(self.tokens) - self.computed

    @property
    def reply_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Its client gets a token by every step, and sees how long one takes."""
        return self.pending == 1 and self.reply_tokens > 0

    def slot(self, count: int) -> Slot:
        """The next `count` positions."""
        end = self.computed + count
        first = not self.announced
        return Slot(
            request_id=self.request_id,
            start=self.computed,
            tokens=tuple(self.tokens[self.computed : end]),
            sample=end == len(self.tokens),
            capacity=self.capacity if first else 0,
            params=self.params if first else None,
            prompt_tokens=self.prompt_tokens if first else 0,
        )

    def append(self, token: int, eos_token_ids: frozenset[int]) -> str:
        """Add a token of the reply; returns why the reply ends with it, or an empty string."""
        self.tokens.append(token)
        if token in eos_token_ids and not self.params.ignore_eos:
            return STOP
        return LENGTH if len(self.tokens) >= self.capacity else ""

    def ended(self, reason: str) -> EndedReply:
        return EndedReply(self.request_id, reason, self.reply_tokens)


class Scheduler:
    """All requests of the leader under one fence: waiting, running, and waiting for their commit.

    A step has at most `max_step_tokens` positions in at most `max_slots` slots, one per request.
    `max_positions` is the model's; `pool` accounts for KV. `logged` are the requests whose logs
    every node has from the fences before: only they may begin in the middle. Raises `ValueError`
    for a step beyond what the wire allows.
    """

    def __init__(
        self,
        *,
        pool: BlockPool,
        max_positions: int,
        eos_token_ids: frozenset[int],
        logged: Iterable[int] = (),
        max_step_tokens: int = 256,
        max_slots: int = MAX_STEP_SLOTS,
    ) -> None:
        if not (1 <= max_step_tokens <= MAX_STEP_TOKENS and 1 <= max_slots <= MAX_STEP_SLOTS):
            raise ValueError(
                f"a step has 1 to {MAX_STEP_TOKENS} tokens in 1 to {MAX_STEP_SLOTS} slots, "
                f"not {max_step_tokens} in {max_slots}"
            )
        self._pool = pool
        self._max_positions = max_positions
        self._eos = eos_token_ids
        self._max_step_tokens = max_step_tokens
        self._budget = PrefillBudget(max_step_tokens)
        self._decoding = 0
        """Replies that get a token by the step in flight."""
        self._max_running = min(max_slots, max_step_tokens)
        self._logged = dict.fromkeys(logged)
        """Those of them that were not added yet."""
        self._waiting: dict[int, _Request] = {}
        self._running: dict[int, _Request] = {}
        self._closing: dict[int, _Request] = {}
        """Replies that are complete, and not known to be committed."""
        self._in_flight: dict[int, _Request] = {}
        self._news: list[Piece] = []
        self._finals: dict[int, FinalToken] = {}
        self._to_free: list[int] = []

    @property
    def running(self) -> int:
        """Requests that have their place in the KV cache and compute."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return any(request_id in held for held in (self._running, self._waiting, self._closing))

    # --- requests come and go ---------------------------------------------------------------------

    def add(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        received: Sequence[int],
        params: SamplingParams,
        computed: int = 0,
    ) -> None:
        """Enter a request at the end of the queue; one that is here already is left as it is.

        `received` tokens of the reply are forced; where they complete it, only its end is told.
        `computed` leading positions have their KV on all nodes; that is believed of `logged`
        requests alone. `max_tokens` is cut to what the context has room for. Raises `ClusterError`:
        `invalid_request`, `empty_prompt`, `prompt_too_long`, `node_lost` (a reply that had begun
        has no room any more) or `overloaded`.
        """
        if request_id in self:
            return
        logged = request_id in self._logged
        params.check()
        self._check_prompt(prompt_ids)
        request = _Request(request_id, prompt_ids, params, self._max_positions)
        if not self._pool.fits(request.capacity):
            raise self._too_long(request, logged)
        if not logged and self._known() >= MAX_REQUESTS:
            raise ClusterError(
                "overloaded",
                f"{MAX_REQUESTS} requests are queued or running already; try again later",
                retryable=True,
            )
        self._logged.pop(request_id, None)
        request.placed = logged
        for token in received:
            if reason := request.append(token, self._eos):
                self._closing[request_id] = request
                self._news.append(request.ended(reason))
                return
        if logged:
            request.computed = min(computed, len(request.tokens) - 1)
        self._waiting[request_id] = request

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise InvalidRequestError("the prompt has no tokens; give some text", "empty_prompt")
        if len(prompt_ids) + 1 > self._max_positions:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_ids)} tokens; with one token of reply the model has "
                f"room for {self._max_positions - 1}: shorten it",
                "prompt_too_long",
            )

    def _too_long(self, request: _Request, logged: bool) -> ClusterError:
        if logged:
            return ClusterError(
                "node_lost", "the nodes that remain lack room for its KV", retryable=True
            )
        return InvalidRequestError(
            f"prompt and max_tokens come to {request.capacity} positions; the KV cache holds "
            f"{self._pool.limit * BLOCK_POSITIONS} ({self._pool.limit} blocks, "
            f"{blocks_for(request.capacity)} needed): shorten one or give nodes more memory",
            "prompt_too_long",
        )

    def _known(self) -> int:
        """Requests here, and logs elsewhere: what an ACK can tell of is limited."""
        held = (self._waiting, self._running, self._closing, self._logged, self._to_free)
        return sum(len(requests) for requests in held)

    def cancel(self, request_id: int) -> bool:
        """End a request and free its place; False when nothing is known of it."""
        if request_id in self._logged:
            del self._logged[request_id]
            self._to_free.append(request_id)
            return True
        for held in (self._waiting, self._running, self._closing):
            request = held.pop(request_id, None)
            if request is not None:
                self._news = [piece for piece in self._news if piece.request_id != request_id]
                self._finals.pop(request_id, None)
                self._release(request)
                return True
        return False

    def committed(self, request_id: int) -> None:
        """The end of a reply is committed: nodes may forget it."""
        request = self._closing.pop(request_id, None)
        if request is not None:
            self._release(request)

    def _release(self, request: _Request) -> None:
        """A request is over: its blocks are free, and nodes may free what they hold of it."""
        self._in_flight.pop(request.request_id, None)
        self._pool.free(request.request_id)
        if request.placed:
            self._to_free.append(request.request_id)

    # --- steps ------------------------------------------------------------------------------------

    def next_step(self) -> Work | None:
        """What the next step says; None when there is nothing to say.

        Each request with one pending token gets it computed; what is left of the step's tokens, and
        of the time that replies may wait for it, goes to longer runs, first come, first served. All
        of it counts as sent: should the step fail, this fence is over. What ended is told first: an
        id may be used again by one of the slots.
        """
        self._admit()
        return self._work(self._slots())

    def _work(self, slots: tuple[Slot, ...]) -> Work | None:
        """A step of these slots, and of all that is to be told."""
        news, self._news = tuple(self._news), []
        ended, self._to_free = tuple(self._to_free[:MAX_REQUESTS]), self._to_free[MAX_REQUESTS:]
        finals, self._finals = tuple(self._finals.values()), {}
        if not (slots or news or ended or finals):
            return None
        return Work(slots=slots, ended=ended, finals=finals, news=news)

    def last_words(self) -> Work | None:
        """What a step says that computes nothing more: all that the step before drew. None when
        there is nothing to say.

        Another plan is to take over, and what was not told by then would be drawn again.
        """
        for piece in self._news:
            if isinstance(piece, DrawnToken) and piece.request_id in self._running:
                self._finals[piece.request_id] = _final(self._running[piece.request_id])
        self._decoding = 0
        return self._work(())

    def _slots(self) -> tuple[Slot, ...]:
        single = sum(request.pending == 1 for request in self._running.values())
        self._decoding = sum(request.decodes for request in self._running.values())
        room = min(self._max_step_tokens - single, self._budget.rows(self._decoding))
        slots = []
        self._in_flight = {}
        for request in self._running.values():
            count = 1
            if request.pending > 1:
                count = min(room, request.pending)
                room -= count
            if count:
                slots.append(request.slot(count))
                request.placed = request.announced = True
                self._in_flight[request.request_id] = request
        return tuple(slots)

    def finish_step(self, slots: Sequence[Slot], drawn: Mapping[int, int], seconds: float) -> None:
        """The step of `slots` took so many `seconds`; `drawn` has a token for each with `sample`.

        The tokens, and after its last one the end of a reply, are news of the next step. Slots of
        requests that were cancelled since are ignored. Raises `LocalProtocolError` when a token
        lacks.
        """
        rows = sum(len(slot.tokens) for slot in slots)
        self._budget.finished(self._decoding, rows - self._decoding, seconds)
        for slot in slots:
            request = self._in_flight.pop(slot.request_id, None)
            if request is None:
                continue
            request.computed = slot.start + len(slot.tokens)
            if not slot.sample:
                continue
            if slot.request_id not in drawn:
                raise LocalProtocolError(f"no token was drawn for request {slot.request_id:#x}")
            token, index = drawn[slot.request_id], request.reply_tokens
            reason = request.append(token, self._eos)
            self._news.append(DrawnToken(request_id=slot.request_id, index=index, token=token))
            if reason:
                self._closing[slot.request_id] = self._running.pop(slot.request_id)
                self._finals[slot.request_id] = _final(request)
                self._news.append(request.ended(reason))

    def _admit(self) -> None:
        """Let waiting requests in, in their order, as long as there are slots and blocks."""
        while self._waiting and len(self._running) < self._max_running:
            request = next(iter(self._waiting.values()))
            if not self._pool.reserve(request.request_id, request.capacity):
                return
            del self._waiting[request.request_id]
            self._running[request.request_id] = request


def _final(request: _Request) -> FinalToken:
    """A request's last token, to be told without being computed."""
    return FinalToken(
        request_id=request.request_id,
        position=len(request.tokens) - 1,
        token=request.tokens[-1],
    )
