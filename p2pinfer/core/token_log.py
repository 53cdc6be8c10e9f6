"""The token logs of one node: what each request's tokens are, and how many have their KV here.

Every STEP carries the tokens that it computes, so every node that hears it has the log; a leader
may die and any of them can say what was drawn. The logs outlive plans: a new plan's leader collects
them, and what it then agrees on takes their place everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from p2pinfer.core.orders import Covered, TokenLog
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_REQUESTS
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.messages import FinalToken, Slot, Step


class _Log:
    """One request's log. `covered` leading positions have their KV, by finished steps."""

    def __init__(self, params: SamplingParams, prompt_tokens: int) -> None:
        self.params = params
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.term = 0
        self.covered = 0


class TokenLogs:
    """All logs of a node, by request. At most `MAX_REQUESTS`, which is what an ACK can tell of."""

    def __init__(self) -> None:
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

    def covered(self, request_id: int) -> int:
        """Leading positions of a request whose KV is here; 0 for an unknown one."""
        log = self._logs.get(request_id)
        return log.covered if log else 0

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
            log.tokens[slot.start :] = slot.tokens
        log.covered = min(log.covered, slot.start)
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
            if log is not None and log.covered >= slot.start:
                log.covered = min(slot.start + len(slot.tokens), len(log.tokens))

    def forget(self, request_ids: Iterable[int]) -> None:
        """Nothing more is known of these requests; unknown ones are ignored."""
        for request_id in request_ids:
            self._logs.pop(request_id, None)

    # --- plans ------------------------------------------------------------------------------------

    def lose_kv(self) -> None:
        """This node's head units or layers change: the KV of no position is here any more."""
        for log in self._logs.values():
            log.covered = 0

    def snapshot(self) -> tuple[tuple[TokenLog, ...], tuple[Covered, ...]]:
        """All logs, and how much of each is covered, in the order of the request ids."""
        ordered = sorted(self._logs.items())
        logs = tuple(
            TokenLog(
                request_id=request_id,
                term=log.term,
                prompt_tokens=log.prompt_tokens,
                params=log.params,
                tokens=tuple(log.tokens),
            )
            for request_id, log in ordered
        )
        covered = tuple(Covered(request_id=r, positions=log.covered) for r, log in ordered)
        return logs, covered

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
            if old is not None:
                log.covered = min(old.covered, _common(old.tokens, log.tokens))
            self._logs[told.request_id] = log
        return tuple(sorted(before))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two logs have in common."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])
