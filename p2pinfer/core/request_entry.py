"""One request in the leader's log, and how what others know of it is joined to that.

Pure functions over one entry; `request_log.py` decides when they apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from p2pinfer.core.agreement import RUNGS, Agreed
from p2pinfer.core.events import RequestEnded, TokenLog
from p2pinfer.errors import ERROR_CODES
from p2pinfer.limits import MAX_FAILOVERS, MAX_NODES, MAX_REASON_CHARS
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire.messages import Ended, Forward


@dataclass(slots=True)
class Entry:
    """One request in the leader's log. `tokens` are those of the reply that are known."""

    request_id: int
    params: SamplingParams
    prompt_tokens: int
    prompt_ids: tuple[int, ...]
    """Only its beginning, where the log was taken over in the middle of the prompt and nobody has
    claimed it yet."""

    tokens: list[int]
    committed: int
    """So many of `tokens` may be shown: committed under this leader, or brought by a client."""

    serving_id: str = ""
    """Empty for an orphan: its serving node died, or has not forwarded it to this leader."""

    sent: int = 0
    """So many tokens the serving node has, or has been sent."""

    claimed: bool = False
    """A serving node forwarded it to this leader: it may run."""

    started: bool = False
    """The worker has it, under the present fence."""

    logged: bool = False
    """Workers' logs may have it, so they must be told when it is removed."""

    begun: bool = False
    """This leader has started it, or taken its log over."""

    restart: int = 0
    """Leading positions with KV on every owner, until it is started."""

    interruptions: list[Failover] = field(default_factory=list)
    ending: tuple[RequestEnded, float] | None = None
    """It is complete since then, but its last tokens are not known to be committed."""

    ended: Ended | None = None
    ended_at: float = inf
    orphan_at: float = inf
    """When it will have had no serving node for too long."""

    fixed_until: float = -inf
    attempt: int = 0
    """The latest submission of the client's that is known: an earlier one moves nothing."""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two runs of tokens differ, as far as both go."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def error(entry: Entry, code: str, message: str) -> Ended:
    """The end of a request in an error."""
    return Ended(
        request_id=entry.request_id,
        reason="error",
        total_tokens=entry.sent,
        code=code,
        message=message[:MAX_REASON_CHARS],
        retryable=ERROR_CODES.get(code, False),
    )


def conflict_of(message: Forward, entry: Entry) -> str:
    """How a forwarded request contradicts the log; empty where it does not."""
    same = message.params == entry.params and len(message.prompt_ids) == entry.prompt_tokens
    if not same or message.prompt_ids[: len(entry.prompt_ids)] != entry.prompt_ids:
        return "this request id has another prompt or settings"
    at = first_difference(message.received, entry.tokens)
    if at is not None:
        return (
            f"token {at} that you have is {message.received[at]}, the log has "
            f"{entry.tokens[at]}; submit the prompt under a new request id"
        )
    if entry.ended and len(message.received) > len(entry.tokens):
        return f"the reply ended with {len(entry.tokens)} tokens"
    return ""


def contradicts(entry: Entry, log: TokenLog) -> bool:
    """Whether an entry and a log cannot be of the same request."""
    ours = (*entry.prompt_ids, *entry.tokens)
    if (log.params, log.prompt_tokens) != (entry.params, entry.prompt_tokens):
        return True
    return first_difference(ours, log.tokens) is not None


def merge(entry: Entry, news: Agreed) -> int:
    """Take the agreed log into an entry; returns the position from which it is to be computed.

    What may have been shown is kept, whatever the log says: the leader's own log is among those
    that it was chosen from, so it lacks only what a client brought since.
    """
    log = news.log
    kept = (*entry.prompt_ids, *entry.tokens[: entry.committed])
    if (log.params, log.prompt_tokens) != (entry.params, entry.prompt_tokens):
        # Another request of the same id: nothing of it is of use.
        entry.tokens = list(kept[entry.prompt_tokens :])
        return 0
    at = first_difference(kept, log.tokens)
    if at is None and len(log.tokens) >= len(kept):
        tokens, common = log.tokens, len(log.tokens)
    else:
        tokens, common = kept, len(log.tokens) if at is None else at
    entry.prompt_ids = tokens[: log.prompt_tokens]
    entry.tokens = list(tokens[log.prompt_tokens :])
    return max(0, min(news.restart, common, len(tokens) - 1))


def note(entry: Entry, failover: Failover) -> None:
    """Remember an interruption; without a token since the last one the two are one, by the costlier
    rung of both."""
    known = entry.interruptions
    if known and known[-1].position >= failover.position:
        last = known.pop()
        failover = Failover(
            position=last.position,
            lost=tuple(dict.fromkeys((*last.lost, *failover.lost)))[:MAX_NODES],
            rung=max(last.rung, failover.rung, key=RUNGS.index),
            detect_s=max(last.detect_s, failover.detect_s),
            stall_s=0.0,
            exact=last.exact and failover.exact,
        )
    known.append(failover)
    del known[:-MAX_FAILOVERS]
