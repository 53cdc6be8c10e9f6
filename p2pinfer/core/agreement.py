"""Which token logs an epoch begins with, and from where each request computes again.

Pure functions over the ACKs of a plan. Logs are compared as in Raft (section 5.4.1 of Ongaro and
Ousterhout, 2014): the later term wins, then the longer log. A log is compared by its length and
digest only, so that tokens travel to where they lack and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from struct import pack
from typing import NamedTuple

from msgspec import Struct

from p2pinfer.core.events import TokenLog
from p2pinfer.limits import MAX_REQUESTS
from p2pinfer.types import Plan, Stage
from p2pinfer.wire.messages import Ack, LogDigest

RERUN_POSITIONS = 8
"""To compute so few positions again takes one small step, as long as to decode one token: for less
than that KV is not made of inputs."""


def digest(tokens: Sequence[int]) -> str:
    """SHA-256, in hexadecimal, of token ids of 4 bytes each, little-endian."""
    return sha256(pack(f"<{len(tokens)}I", *tokens)).hexdigest()


def summary(log: TokenLog) -> LogDigest:
    """What an ACK says of a token log."""
    return LogDigest(
        request_id=log.request_id,
        term=log.term,
        length=len(log.tokens),
        digest=digest(log.tokens),
    )


class Agreed(Struct, frozen=True, kw_only=True):
    """The log agreed on for a request; its KV is right on every owner before `restart`.

    `rung` says where that KV was: `none` of it was lost, a `replica` of some was taken, some has to
    be made of inputs (`recompute`: of so many positions), or there is nothing for it but `replay`.
    """

    request_id: int
    log: TokenLog
    restart: int
    recompute: int = 0
    rung: str


class Restart(NamedTuple):
    """All owners have the KV of a request before `position`, or can make it of inputs that they
    keep: of the last `recompute` of these positions."""

    position: int
    recompute: int


class Choice(NamedTuple):
    """The best log of a request, and the node id of a member that has it."""

    holder: str
    log: LogDigest


class Prefixes:
    """Tells beginnings of one log by their digests, each of which it computes once."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.length = len(tokens)
        self._tokens = tokens
        self._digests: dict[int, str] = {}

    def __contains__(self, log: LogDigest) -> bool:
        """Whether a member's log is a beginning of this one (or all of it)."""
        if log.length > self.length:
            return False
        if log.length not in self._digests:
            self._digests[log.length] = digest(self._tokens[: log.length])
        return self._digests[log.length] == log.digest


def choose(plan: Plan, acks: Mapping[str, Ack]) -> dict[int, Choice]:
    """The log to agree on for each request in the ACKs (by node id): the highest (term, length).

    Of its own term the leader's log is the truth, whatever its length: it wrote all of them. Of
    equal logs the leader's is taken, since the leader has its tokens. At most `MAX_REQUESTS` are
    kept, those of the latest terms: a client brings back what it still wants of the others.
    """
    leader = plan.members[plan.leader].node_id

    def rank(choice: Choice) -> tuple[int, bool, int, bool, str, str]:
        holder, log = choice
        leads = holder == leader
        wrote = leads and log.term == plan.fence.term
        return (log.term, wrote, log.length, leads, log.digest, holder)

    best: dict[int, Choice] = {}
    for holder, ack in acks.items():
        for log in ack.logs:
            choice, known = Choice(holder, log), best.get(log.request_id)
            if log.length and (known is None or rank(choice) > rank(known)):
                best[log.request_id] = choice
    latest = sorted(best, key=lambda request_id: (-best[request_id].log.term, request_id))
    return {request_id: best[request_id] for request_id in sorted(latest[:MAX_REQUESTS])}


def reported(ack: Ack, request_id: int) -> LogDigest | None:
    """What a member said of its log of a request; None: it has none."""
    return next((log for log in ack.logs if log.request_id == request_id), None)


def restart(plan: Plan, request_id: int, agreed: Prefixes, acks: Mapping[str, Ack]) -> Restart:
    """How many leading positions of a request have their KV on the owner of every head unit, made
    of inputs where that is worth it.

    A member's coverage counts only where its own log is a beginning of the agreed one: the KV of
    other tokens is of no use, nor are their inputs. The last known token is always computed again,
    since the next one is drawn from what comes of it.
    """
    covered = possible = max(0, agreed.length - 1)
    for number, stage in enumerate(plan.stages):
        for index in sorted(set(stage.head_owners)):
            ack = acks.get(plan.members[index].node_id)
            units = {unit for unit, owner in enumerate(stage.head_owners) if owner == index}
            here = _covered(ack, request_id, number, units, agreed) if ack else 0
            inputs = _inputs(ack, request_id, number, agreed) if ack else 0
            covered, possible = min(covered, here), min(possible, max(here, inputs))
    if possible - covered <= RERUN_POSITIONS:
        return Restart(covered, 0)
    return Restart(possible, possible - covered)


def _covered(ack: Ack, request_id: int, stage: int, units: set[int], agreed: Prefixes) -> int:
    """Positions that an owner has of all these units."""
    log = reported(ack, request_id)
    if log is None or log not in agreed:
        return 0
    positions = dict.fromkeys(units, 0)
    for run in ack.coverage:
        if (run.request_id, run.stage) == (request_id, stage):
            positions.update({unit: run.positions for unit in run.units if unit in units})
    return min(log.length, *positions.values())


def _inputs(ack: Ack, request_id: int, stage: int, agreed: Prefixes) -> int:
    """Positions of which a member can make the KV of any head unit of a stage."""
    log = reported(ack, request_id)
    if log is None or log not in agreed:
        return 0
    runs = (run for run in ack.inputs if (run.request_id, run.stage) == (request_id, stage))
    return min(log.length, max((run.positions for run in runs), default=0))


RUNGS = ("none", "replica", "recompute", "replay")
"""How the KV of a request may be there, the cheapest first."""


def rung(before: Plan | None, after: Plan, restart: Restart) -> str:
    """Which of `RUNGS` brings the KV before `restart`; `before` was the last plan in force."""
    if restart.position == 0:
        return "replay"
    if restart.recompute:
        return "recompute"
    moved = before is not None and {*_head_owners(before)} != {*_head_owners(after)}
    return "replica" if moved else "none"


def _head_owners(plan: Plan) -> Iterator[tuple[int, int, str]]:
    """(layer, head unit, node id of its owner)."""
    for stage in plan.stages:
        for unit, owner in enumerate(stage.head_owners):
            for layer in range(stage.start, stage.end):
                yield layer, unit, plan.members[owner].node_id


def tail_start(theirs: LogDigest | None, agreed: Prefixes) -> int:
    """From which token on a member lacks the agreed log; its whole length: it lacks nothing."""
    return theirs.length if theirs is not None and theirs in agreed else 0


def same_bits(before: Plan, after: Plan) -> bool:
    """Whether each unit stays in its numeric class, and the drawing of tokens too."""
    if _class_of(before, before.leader) != _class_of(after, after.leader):
        return False
    spans = [[(stage.start, stage.end) for stage in plan.stages] for plan in (before, after)]
    if spans[0] == spans[1]:
        return [*_classes(before)] == [*_classes(after)]
    return len({*_classes(before), *_classes(after)}) == 1


def _classes(plan: Plan) -> Iterator[str]:
    """The numeric class of each unit's owner, in the order of the units."""
    return (_class_of(plan, owner) for stage in plan.stages for owner in _owners(stage))


def _owners(stage: Stage) -> tuple[int, ...]:
    return (*stage.head_owners, *stage.mlp_owners, *stage.vocab_owners)


def _class_of(plan: Plan, index: int) -> str:
    return plan.members[index].numeric_class
