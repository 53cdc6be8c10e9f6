"""The messages of the election and of plans: who leads, which plan is in force, with which logs.

`messages.py` numbers them and gives them out together with the others.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from p2pinfer.limits import MAX_NODES, MAX_REQUESTS, MAX_STAGES, MAX_UNITS
from p2pinfer.types import U63, Digest, Fence, Identity, Length, Plan, SamplingParams, Tokens
from p2pinfer.wire.fields import Code, ControlMessage, MaybeIdentity, Reason, StageIndex, Unit

# --- election -----------------------------------------------------------------------------------


class PreVoteRequest(ControlMessage, frozen=True, kw_only=True):
    """Would you vote for me in `term`, the next one? Changes nobody's term (Raft thesis, 9.6)."""

    term: U63
    candidate_id: Identity
    plan_fence: Fence


class PreVoteReply(ControlMessage, frozen=True, kw_only=True):
    """Answer to PRE_VOTE_REQUEST: `term` is the one asked for or, where denied, the voter's own.

    To a candidate whose plan is older goes the voter's own: a witness may be the only one that has
    it, and never stands for election itself.
    """

    term: U63
    voter_id: Identity
    granted: bool
    plan: Plan | None = None


class VoteRequest(ControlMessage, frozen=True, kw_only=True):
    """A candidate asks for a vote in `term`; granted only if its plan is not older."""

    term: U63
    candidate_id: Identity
    plan_fence: Fence


class VoteReply(ControlMessage, frozen=True, kw_only=True):
    """Answer to VOTE_REQUEST, sent when the vote is persisted; `term` as in PRE_VOTE_REPLY."""

    term: U63
    voter_id: Identity
    granted: bool


# --- plans --------------------------------------------------------------------------------------


class Propose(ControlMessage, frozen=True, kw_only=True):
    """The leader proposes a plan; the receiver stops obeying the old one and makes ready."""

    plan: Plan


class LogDigest(Struct, frozen=True, kw_only=True):
    """A request's token log on one node: the term that last wrote it, its length and its hash."""

    request_id: U63
    term: U63
    length: Length
    digest: Digest


class CoverageRun(Struct, frozen=True, kw_only=True):
    """Leading positions of a request whose KV of `units` a node holds (finished steps only)."""

    request_id: U63
    stage: StageIndex
    units: Annotated[tuple[Unit, ...], Meta(max_length=MAX_UNITS)]
    positions: Length


class InputsRun(Struct, frozen=True, kw_only=True):
    """Leading positions of a request whose inputs a node keeps, in all layers of a stage."""

    request_id: U63
    stage: StageIndex
    positions: Length


class Ack(ControlMessage, frozen=True, kw_only=True):
    """The plan of `fence` is persisted and its units are loaded here."""

    fence: Fence
    node_id: Identity
    logs: Annotated[tuple[LogDigest, ...], Meta(max_length=MAX_REQUESTS)] = ()
    coverage: Annotated[tuple[CoverageRun, ...], Meta(max_length=MAX_REQUESTS * MAX_NODES)] = ()
    inputs: Annotated[tuple[InputsRun, ...], Meta(max_length=MAX_REQUESTS * MAX_STAGES)] = ()


class Nack(ControlMessage, frozen=True, kw_only=True):
    """The plan of `fence` cannot be held here, and why; the leader proposes another."""

    fence: Fence
    node_id: Identity
    code: Code
    message: Reason
    about: MaybeIdentity = ""


class LogRequest(ControlMessage, frozen=True, kw_only=True):
    """The leader asks for token logs that a member acknowledged the plan of `fence` with."""

    fence: Fence
    request_ids: Annotated[tuple[U63, ...], Meta(min_length=1, max_length=MAX_REQUESTS)]


class LogEntry(ControlMessage, frozen=True, kw_only=True):
    """A request's token log from index `start` on: prompt first, then the reply.

    Member to leader: the answer to LOG_REQUEST. Leader to member, before ACTIVATE: what that member
    lacks of the log agreed on.
    """

    fence: Fence
    request_id: U63
    term: U63
    prompt_tokens: Length
    params: SamplingParams
    start: Length = 0
    tokens: Tokens


class AgreedLog(Struct, frozen=True, kw_only=True):
    """The log that all members have of a request from now on, and where computing restarts.

    `recompute`: of how many positions before that some owner makes KV of the inputs that it keeps.
    """

    request_id: U63
    length: Length
    digest: Digest
    restart: Length
    recompute: Length = 0


class Activate(ControlMessage, frozen=True, kw_only=True):
    """The plan of `fence` is in force, with these token logs and no others."""

    fence: Fence
    logs: Annotated[tuple[AgreedLog, ...], Meta(max_length=MAX_REQUESTS)] = ()
