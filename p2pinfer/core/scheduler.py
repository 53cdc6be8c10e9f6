"""Which positions of which requests the next step computes: continuous batching.

Requests join and leave the batch at every step (Orca, Yu et al., OSDI 2022), and long prompts are
cut in chunks that ride along with everybody's next token, so that a long prompt stops nobody
(Sarathi-Serve, Agrawal et al., OSDI 2024). Admission is first come, first served: a request whose
KV does not fit yet waits, and all behind it wait too, so none starves.

The leader's worker calls `next_slots` and `finish_step` in turn; requests may be added or cancelled
in between. Tokens that are known already (prompt, tokens received, tokens drawn before a restart)
are forced, never drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from p2pinfer.core.blocks import BLOCK_POSITIONS, BlockPool, blocks_for
from p2pinfer.errors import ClusterError, InvalidRequestError, LocalProtocolError
from p2pinfer.limits import MAX_REQUESTS, MAX_STEP_SLOTS, MAX_STEP_TOKENS
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import DrawnToken, Slot

STOP, LENGTH = "stop", "length"


class EndedReply(Struct, frozen=True):
    """A reply is complete. `reason` is `stop` or `length`; `total_tokens` counts a last EOS too.

    `ttft_s` is the time from `add` to the first token drawn here; `tokens_per_s` the rate of those
    after it (0 where there are none).
    """

    request_id: int
    reason: str
    total_tokens: int
    ttft_s: float = 0.0
    tokens_per_s: float = 0.0


class _Request:
    """One request: its known tokens, how many of them have their KV, and its times."""

    def __init__(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        max_positions: int,
        now: float,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.tokens = list(prompt_ids)
        self.prompt_tokens = len(prompt_ids)
        self.capacity = min(len(prompt_ids) + params.max_tokens, max_positions)
        self.computed = 0
        self.placed = False
        """Nodes may hold KV of it."""
        self.announced = False
        """Its capacity and parameters were sent under the present fence."""
        self.added_at = now
        self.first_at = now
        self.drawn = 0

    @property
    def pending(self) -> int:
        """Known tokens that are still to be computed: at least 1, for the last one drawn."""
        return len(self.tokens) - self.computed

    @property
    def reply_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

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
        )

    def append(self, token: int, eos_token_ids: frozenset[int]) -> str:
        """Add a token of the reply; returns why the reply ends with it, or an empty string."""
        self.tokens.append(token)
        if token in eos_token_ids and not self.params.ignore_eos:
            return STOP
        return LENGTH if len(self.tokens) >= self.capacity else ""

    def time(self, now: float) -> None:
        """Note that a token was drawn."""
        self.drawn += 1
        if self.drawn == 1:
            self.first_at = now

    def ended(self, reason: str, now: float) -> EndedReply:
        seconds = now - self.first_at
        return EndedReply(
            request_id=self.request_id,
            reason=reason,
            total_tokens=self.reply_tokens,
            ttft_s=self.first_at - self.added_at,
            tokens_per_s=(self.drawn - 1) / seconds if self.drawn > 1 and seconds > 0 else 0.0,
        )


class Scheduler:
    """All requests of the leader, waiting and running.

    A step has at most `max_step_tokens` positions in at most `max_slots` slots, one per request.
    `max_positions` is the model's; `pool` accounts for KV. Raises `ValueError` for a step beyond
    what the wire allows.
    """

    def __init__(
        self,
        *,
        pool: BlockPool,
        max_positions: int,
        eos_token_ids: frozenset[int],
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
        self._max_running = min(max_slots, max_step_tokens)
        self._waiting: dict[int, _Request] = {}
        self._running: dict[int, _Request] = {}
        self._in_flight: dict[int, _Request] = {}
        self._to_free: list[int] = []

    @property
    def running(self) -> int:
        """Requests that have their place in the KV cache."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    def add(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        received: Sequence[int],
        params: SamplingParams,
        now: float,
    ) -> EndedReply | None:
        """Enter a request at the end of the queue; one that is here already is left as it is.

        `received` tokens of the reply are forced. Returns the end of a reply that they complete
        already: such a request is not entered. `max_tokens` is cut to what the context has room
        for. Raises `ClusterError`: `invalid_request`, `empty_prompt`, `prompt_too_long` or
        `overloaded`.
        """
        if request_id in self._running or request_id in self._waiting:
            return None
        params.check()
        if not prompt_ids:
            raise InvalidRequestError("the prompt has no tokens; give some text", "empty_prompt")
        if len(prompt_ids) + 1 > self._max_positions:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_ids)} tokens; with one token of reply the model has "
                f"room for {self._max_positions - 1}: shorten it",
                "prompt_too_long",
            )
        request = _Request(request_id, prompt_ids, params, self._max_positions, now)
        if not self._pool.fits(request.capacity):
            raise InvalidRequestError(
                f"prompt and max_tokens come to {request.capacity} positions; the KV cache holds "
                f"{self._pool.limit * BLOCK_POSITIONS} ({self._pool.limit} blocks, "
                f"{blocks_for(request.capacity)} needed): shorten one or give nodes more memory",
                "prompt_too_long",
            )
        for token in received:
            if reason := request.append(token, self._eos):
                return request.ended(reason, now)
        if self.running + self.waiting >= MAX_REQUESTS:
            raise ClusterError(
                "overloaded",
                f"{MAX_REQUESTS} requests are queued or running already; try again later",
                retryable=True,
            )
        self._waiting[request_id] = request
        return None

    def cancel(self, request_id: int) -> bool:
        """End a request and free its place; False when there is no such request."""
        request = self._waiting.pop(request_id, None) or self._running.pop(request_id, None)
        if request is None:
            return False
        self._release(request)
        return True

    def next_slots(self) -> tuple[Slot, ...]:
        """The slots of the next step, in order of admission; empty when there is nothing to do.

        Each request with one pending token gets it computed; what is left of the step's tokens goes
        to longer runs, first come, first served. The slots count as sent; a step that then fails is
        made good by `restart`.
        """
        self._admit()
        single = sum(request.pending == 1 for request in self._running.values())
        room = self._max_step_tokens - single
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

    def ended_since_last(self) -> tuple[int, ...]:
        """Requests whose KV every node may free, each told once.

        They go with the next step and are freed before its slots: an id may be used again.
        """
        ended, self._to_free = tuple(self._to_free), []
        return ended

    def finish_step(
        self, slots: Sequence[Slot], drawn: Mapping[int, int], now: float
    ) -> list[DrawnToken | EndedReply]:
        """The step of `slots` is computed; `drawn` has the token of each slot with `sample`.

        Returns the tokens, and after its last one the end of a reply, in the order of the slots.
        Slots of requests that were cancelled or restarted since are ignored. Raises
        `LocalProtocolError` when a token lacks.
        """
        news: list[DrawnToken | EndedReply] = []
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
            request.time(now)
            news.append(DrawnToken(request_id=slot.request_id, index=index, token=token))
            if reason:
                del self._running[slot.request_id]
                self._release(request)
                news.append(request.ended(reason, now))
        return news

    def restart(self, pool: BlockPool | None = None) -> tuple[int, ...]:
        """A new fence: every running request is computed again from position 0, in the same order.

        A step in flight is forgotten; known tokens are forced. `pool` is empty and takes the old
        one's place where the new plan has other room. Returns the requests that it can never hold:
        they are gone, and the caller tells their clients.
        """
        for request in self._running.values():
            self._pool.free(request.request_id)
            request.computed = 0
            request.announced = False
        self._pool = pool or self._pool
        self._in_flight = {}
        self._waiting = self._running | self._waiting
        self._running = {}
        lost = [r.request_id for r in self._waiting.values() if not self._pool.fits(r.capacity)]
        for request_id in lost:
            self.cancel(request_id)
        return tuple(lost)

    def _admit(self) -> None:
        """Let waiting requests in, in their order, as long as there are slots and blocks."""
        while self._waiting and len(self._running) < self._max_running:
            request = next(iter(self._waiting.values()))
            if not self._pool.reserve(request.request_id, request.capacity):
                return
            del self._waiting[request.request_id]
            self._running[request.request_id] = request

    def _release(self, request: _Request) -> None:
        """A request has ended: its blocks are free, and nodes that hold KV of it may free that."""
        self._in_flight.pop(request.request_id, None)
        self._pool.free(request.request_id)
        if request.placed:
            self._to_free.append(request.request_id)
