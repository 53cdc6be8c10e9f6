"""The token logs of one node: what each request's tokens are, and how many have their KV here.

Every STEP carries the tokens that it computes, so every node that hears it has the log; a leader
may die and any of them can say what was drawn. The logs outlive plans: a new plan's leader collects
them, and what it then agrees on takes their place everywhere. What is covered goes by the log: KV
is of use only as far as its tokens are those of the log, and so are the inputs it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from struct import pack

from p2pinfer.core.coverage import Coverage
from p2pinfer.core.inputs import Inputs
from p2pinfer.core.orders import Covered, KeptInputs, TokenLog
from p2pinfer.core.units import Slice
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_REQUESTS
from p2pinfer.types import Fence, Plan, SamplingParams
from p2pinfer.wire.messages import FinalToken, Slot, Step

HASH_EVERY = 256
"""Tokens between two hashes that a log keeps: to tell a beginning of it costs no more than that."""


class _Log:
    """One request's log, and the hashes of beginnings of it, to go on from."""

    def __init__(self, params: SamplingParams, prompt_tokens: int) -> None:
        self.params = params
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.term = 0
        self._hashes = [sha256()]
        """Of the first 0, 1, 2, ... times `HASH_EVERY` tokens, as far as they were needed."""

    def cut(self, length: int) -> None:
        """Tokens from `length` on are void."""
        del self.tokens[length:]
        del self._hashes[length // HASH_EVERY + 1 :]

    def digest(self, length: int) -> str:
        """As `agreement.digest` of the first `length` tokens."""
        whole = length // HASH_EVERY
        while len(self._hashes) <= whole:
            self._hashes.append(self._hashes[-1].copy())
            self._hashes[-1].update(self._packed(len(self._hashes) - 2, HASH_EVERY))
        found = self._hashes[whole].copy()
        found.update(self._packed(whole, length % HASH_EVERY))
        return found.hexdigest()

    def _packed(self, block: int, count: int) -> bytes:
        """The first `count` tokens of a block of `HASH_EVERY`, as they are hashed."""
        start = block * HASH_EVERY
        return pack(f"<{count}I", *self.tokens[start : start + count])


class TokenLogs:
    """All logs of a node, by request. At most `MAX_REQUESTS`, which is what an ACK can tell of."""

    def __init__(self) -> None:
        self.coverage = Coverage()
        self.inputs = Inputs()
        self._logs: dict[int, _Log] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._logs

    def __len__(self) -> int:
        return len(self._logs)

    def tokens(self, request_id: int) -> Sequence[int]:
        """The tokens of a request, prompt first: to be read, not kept."""
        return self._logs[request_id].tokens

    def params(self, request_id: int) -> SamplingParams:
        """How the tokens of a request are drawn."""
        return self._logs[request_id].params

    def digest(self, request_id: int, length: int) -> str | None:
        """SHA-256 of the first `length` tokens of a request, in hexadecimal; None: they are not
        here."""
        log = self._logs.get(request_id)
        return log.digest(length) if log and length <= len(log.tokens) else None

    # --- steps ------------------------------------------------------------------------------------

    def take(self, step: Step) -> None:
        """Write down all that a step says: what ended first, since its id may be used again.

        Raises `RemoteProtocolError` where the step does not join what is here.
        """
        self.forget(step.ended)
        for slot in step.slots:
            self.write(step.fence, slot)
        for final in step.finals:
            self.final(step.fence, final)

    def write(self, fence: Fence, slot: Slot) -> None:
        """Write the tokens of a slot at their positions; KV from its start on is void.

        Known tokens that are computed again stay, and all that follow them: a step that begins
        before the end must not lose what was committed. The first that differs cuts the log. Raises
        `RemoteProtocolError` for a hole, and for a request that was never introduced.
        """
        log = self._logs.get(slot.request_id)
        if log is None:
            if slot.params is None:
                raise RemoteProtocolError("a slot of a request that was never introduced")
            if len(self._logs) >= MAX_REQUESTS:
                raise RemoteProtocolError(f"more than {MAX_REQUESTS} requests at a time")
            log = _Log(slot.params, slot.prompt_tokens)
        if slot.start > len(log.tokens):
            raise RemoteProtocolError(
                f"positions {len(log.tokens)} to {slot.start} of a request were never told"
            )
        if slot.params is not None:
            log.params, log.prompt_tokens = slot.params, slot.prompt_tokens
        self._logs[slot.request_id] = log
        known = log.tokens[slot.start : slot.start + len(slot.tokens)]
        if tuple(known) == slot.tokens[: len(known)]:
            log.tokens.extend(slot.tokens[len(known) :])
        else:
            log.cut(slot.start)
            log.tokens.extend(slot.tokens)
        self._void(slot.request_id, slot.start)
        log.term = fence.term

    def final(self, fence: Fence, final: FinalToken) -> None:
        """Write the last token of a reply. Raises `RemoteProtocolError` where it joins nothing."""
        log = self._logs.get(final.request_id)
        if log is None or final.position != len(log.tokens):
            raise RemoteProtocolError("a last token that does not follow the ones before it")
        log.tokens.append(final.token)
        log.term = fence.term

    def finish(self, slots: Iterable[Slot]) -> None:
        """The step of `slots` is computed in every layer here: their positions have their KV."""
        for slot in slots:
            log = self._logs.get(slot.request_id)
            if log is not None:
                end = min(slot.start + len(slot.tokens), len(log.tokens))
                self.coverage.finish(slot.request_id, slot.start, end)
                self.inputs.finish(slot.request_id, slot.start, end)

    def forget(self, request_ids: Iterable[int]) -> None:
        """Nothing more is known of these requests; unknown ones are ignored."""
        for request_id in request_ids:
            self._logs.pop(request_id, None)
            self._forget(request_id)

    def _void(self, request_id: int, start: int) -> None:
        """KV and inputs of a request from `start` on are void."""
        self.coverage.cut(request_id, start)
        self.inputs.cut(request_id, start)

    def _forget(self, request_id: int) -> None:
        """All KV and inputs of a request are void."""
        self.coverage.forget(request_id)
        self.inputs.forget(request_id)

    # --- plans ------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[TokenLog, ...]:
        """All logs, in the order of the request ids."""
        return tuple(
            TokenLog(
                request_id=request_id,
                term=log.term,
                prompt_tokens=log.prompt_tokens,
                params=log.params,
                tokens=tuple(log.tokens),
            )
            for request_id, log in sorted(self._logs.items())
        )

    def covered(self, plan: Plan) -> tuple[Covered, ...]:
        """What is covered of each log, by the stages of `plan`, in the order of the request ids."""
        stages = {Slice(stage.start, stage.end): n for n, stage in enumerate(plan.stages)}
        return tuple(
            Covered(
                request_id=request_id,
                stage=stages[run.span],
                units=run.units,
                positions=run.positions,
            )
            for request_id in sorted(self._logs)
            for run in self.coverage.runs(request_id)
            if run.span in stages
        )

    def kept_inputs(self, plan: Plan) -> tuple[KeptInputs, ...]:
        """Of each log the positions whose inputs are here, by the stages of `plan`, in the order
        of the request ids."""
        return tuple(
            KeptInputs(request_id=request_id, stage=number, positions=positions)
            for request_id in sorted(self._logs)
            for number, stage in enumerate(plan.stages)
            if (positions := self.inputs.of(request_id, Slice(stage.start, stage.end)))
        )

    def adopt(self, agreed: Iterable[TokenLog]) -> tuple[int, ...]:
        """The logs that were agreed on take the place of all others.

        KV stays as far as the tokens are the same. Returns the requests that are gone, ascending:
        their KV is to be freed.
        """
        before, self._logs = self._logs, {}
        for told in agreed:
            log = _Log(told.params, told.prompt_tokens)
            log.tokens, log.term = list(told.tokens), told.term
            old = before.pop(told.request_id, None)
            self._void(told.request_id, _common(old.tokens, log.tokens) if old else 0)
            self._logs[told.request_id] = log
        for request_id in before:
            self._forget(request_id)
        return tuple(sorted(before))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two logs have in common."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])
