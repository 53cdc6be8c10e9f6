"""Every message of the protocol as a typed, bounded value, and the table of their numbers.

Control bodies (MessagePack maps with the field names below) and data frames (a fixed header, then
raw tensor bytes) are told apart by their base class. Ids are append-only: a retired id is never
used again. `proto_spec.md` says what each message means; `tests/test_spec.py` compares the two.
Those of elections and plans are in `plan_messages.py`, those of operators in
`operator_messages.py`, those of steps and bulk in `step_messages.py`; readers import all of them
from here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from p2pinfer.limits import (
    MAX_FAILOVERS,
    MAX_NODES,
    MAX_STANDBY_LAG,
    MAX_STEP_SLOTS,
)
from p2pinfer.types import (
    U16,
    U32,
    U63,
    Address,
    Digest,
    Failover,
    Fence,
    Identity,
    Member,
    Name,
    RoundTrips,
    SamplingParams,
    Seconds,
    TokenId,
    Tokens,
)
from p2pinfer.wire.fields import (
    Code,
    ControlMessage,
    DataFrame,
    Label,
    MaybeIdentity,
    Plane,
    Rate,
    Reason,
    Text,
)
from p2pinfer.wire.operator_messages import (
    Done,
    Drain,
    MeasureLink,
    Pause,
    PlanRequest,
    StatusReply,
    StatusRequest,
)
from p2pinfer.wire.plan_messages import (
    Ack,
    Activate,
    AgreedLog,
    CoverageRun,
    InputsRun,
    LogDigest,
    LogEntry,
    LogRequest,
    Nack,
    PreVoteReply,
    PreVoteRequest,
    Propose,
    VoteReply,
    VoteRequest,
)
from p2pinfer.wire.step_messages import (
    Candidates,
    Credit,
    EchoReply,
    EchoRequest,
    FinalToken,
    Hidden,
    KvDelta,
    KvRequest,
    LinkOpen,
    Logits,
    LogitsRequest,
    Partial,
    Slot,
    Step,
    StepAck,
)

# --- membership ---------------------------------------------------------------------------------


class Hello(ControlMessage, frozen=True, kw_only=True):
    """First message on a control link: who I am and what I hold. Answered on the same link."""

    versions: Annotated[tuple[U16, ...], Meta(min_length=1, max_length=16)]
    member: Member
    cluster_id: MaybeIdentity = ""
    model_id: Digest
    dtype: Annotated[str, Meta(max_length=16)]
    quant: Annotated[str, Meta(max_length=16)]
    wire_dtype: Annotated[str, Meta(max_length=16)] = "float32"
    layout: Annotated[str, Meta(max_length=16)] = ""


class Welcome(ControlMessage, frozen=True, kw_only=True):
    """The sender of HELLO is accepted; these are the members the answering node knows."""

    version: U16
    member: Member
    cluster_id: Identity
    leader_id: MaybeIdentity
    members: Annotated[tuple[Member, ...], Meta(max_length=MAX_NODES)]


class Refused(ControlMessage, frozen=True, kw_only=True):
    """The sender of HELLO is not accepted, and why; the link is closed by its opener."""

    code: Code
    message: Reason
    retryable: bool = False


class MemberState(StrEnum):
    """SWIM's states of a member, and `left` for one that said goodbye."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


class Rumour(Struct, frozen=True, kw_only=True):
    """What the sender of a heartbeat believes of one member."""

    node_id: Identity
    boot_id: Identity
    state: MemberState
    incarnation: U63


class Heartbeat(ControlMessage, frozen=True, kw_only=True):
    """Sent every period to every peer: the sender's membership table and its health.

    A sender whose `leader_id` is itself leads in `term`. `hears_control` and `hears_steps` are the
    node ids heard lately on those links; `steps` counts finished compute steps; `owes_step` is the
    step it is working on (0 when idle), `hung` says that its compute loop stands still, and
    `compute_ms` how long it computed lately for a decoding step, without waiting for others.
    Of `standby_units` that the plan of `standby_fence` makes the sender keep, `standby_units_ready`
    have their weights there, `standby_units_warm` of them in the page cache only (`standby_error`
    says why others have not); what they lack of a request is `standby_behind` positions at most.
    `round_trips` are those that it has measured to others.
    """

    node_id: Identity
    boot_id: Identity
    incarnation: U63
    term: U63
    fence: Fence
    leader_id: MaybeIdentity = ""
    steps: U63 = 0
    owes_step: U63 = 0
    rumours: Annotated[tuple[Rumour, ...], Meta(max_length=2 * MAX_NODES)] = ()
    hears_control: Annotated[tuple[Identity, ...], Meta(max_length=MAX_NODES)] = ()
    hears_steps: Annotated[tuple[Identity, ...], Meta(max_length=MAX_NODES)] = ()
    sent_at_ms: U63 = 0
    echo_ms: U63 = 0
    tokens_per_s: Rate = 0.0
    kv_used_bytes: U63 = 0
    kv_limit_bytes: U63 = 0
    kv_inputs_bytes: U63 = 0
    hung: bool = False
    draining: bool = False
    compute_ms: Rate = 0.0
    paused: bool = False
    standby_fence: Fence | None = None
    standby_units: U32 = 0
    standby_units_ready: U32 = 0
    standby_behind: U32 = 0
    standby_error: Reason = ""
    standby_units_warm: U32 = 0
    round_trips: RoundTrips = ()

    @property
    def standbys_ready(self) -> bool:
        """Whether the sender could take over all that it keeps by the plan of `standby_fence`."""
        loaded = self.standby_units_ready == self.standby_units
        return loaded and self.standby_behind <= MAX_STANDBY_LAG


class Leave(ControlMessage, frozen=True, kw_only=True):
    """The sender is going away on purpose: it is `left`, not `dead`."""

    node_id: Identity
    boot_id: Identity
    reason: Reason = ""


# --- clients and requests -----------------------------------------------------------------------


class Submit(ControlMessage, frozen=True, kw_only=True):
    """A client submits or resumes a request, idempotently: the id is its own choice.

    At most one of `text` and `prompt_ids` is given (neither is an empty prompt); `received` are
    reply tokens the client already has (forced, never drawn again). `attempt` grows with each
    submission of the same request: of two nodes that serve it the later one's counts.
    """

    request_id: U63
    text: Text = ""
    prompt_ids: Tokens = ()
    params: SamplingParams
    received: Tokens = ()
    attempt: U63 = 0


class Contact(Struct, frozen=True, kw_only=True):
    """Another member that takes requests, and where."""

    name: Name
    address: Address


class Accepted(ControlMessage, frozen=True, kw_only=True):
    """The request is known to the serving node. `waiting` says what it waits for, or is empty.

    `others` are the members through which the client may go on if this node is gone.
    """

    request_id: U63
    served_by: Label
    prompt_ids: Tokens
    waiting: Reason = ""
    others: Annotated[tuple[Contact, ...], Meta(max_length=MAX_NODES)] = ()


class Chunk(ControlMessage, frozen=True, kw_only=True):
    """Serving node to client: reply tokens from index `start` and the text they complete."""

    request_id: U63
    start: U32
    tokens: Tokens
    text: Text = ""


class Finished(ControlMessage, frozen=True, kw_only=True):
    """Serving node to client: the reply is complete, with the text that was still held back."""

    request_id: U63
    reason: Annotated[str, Meta(pattern=r"\A(stop|length)\Z")]
    total_tokens: U32
    text: Text = ""
    ttft_s: Seconds = 0.0
    tokens_per_s: Rate = 0.0
    failovers: Annotated[tuple[Failover, ...], Meta(max_length=MAX_FAILOVERS)] = ()


class Failed(ControlMessage, frozen=True, kw_only=True):
    """A request (or, with id 0, the last control message) failed; codes are in `proto_spec.md`."""

    request_id: U63 = 0
    code: Code
    message: Reason
    retryable: bool = False


class Cancel(ControlMessage, frozen=True, kw_only=True):
    """Stop this request and free its slot; `reason` is `client`, `stop` or `orphan`."""

    request_id: U63
    reason: Annotated[str, Meta(pattern=r"\A(client|stop|orphan)\Z")] = "client"


class Forward(ControlMessage, frozen=True, kw_only=True):
    """Serving node to leader: enter this request into the log (idempotent).

    `attempt` is that of the client's submission.
    """

    request_id: U63
    serving_id: Identity
    prompt_ids: Tokens
    received: Tokens = ()
    params: SamplingParams
    attempt: U63 = 0


class DrawnToken(Struct, frozen=True, kw_only=True):
    """Token number `index` of a reply."""

    request_id: U63
    index: U32
    token: TokenId


class Interruption(Struct, frozen=True, kw_only=True):
    """A request's reply was interrupted, and goes on."""

    request_id: U63
    failover: Failover


class Drawn(ControlMessage, frozen=True, kw_only=True):
    """Leader to serving node: tokens that are committed, in order, and what interrupted them."""

    tokens: Annotated[tuple[DrawnToken, ...], Meta(max_length=MAX_STEP_SLOTS)]
    interruptions: Annotated[tuple[Interruption, ...], Meta(max_length=MAX_STEP_SLOTS)] = ()


class Ended(ControlMessage, frozen=True, kw_only=True):
    """Leader to serving node: the reply ended; with `code` set, in that error."""

    request_id: U63
    reason: Annotated[str, Meta(pattern=r"\A(stop|length|cancelled|error)\Z")]
    total_tokens: U32
    code: Code = ""
    message: Reason = ""
    retryable: bool = False


Message = ControlMessage | DataFrame


class MessageType(NamedTuple):
    """One row of the message table of `proto_spec.md`."""

    id: int
    name: str
    plane: Plane
    direction: str
    kind: type[ControlMessage] | type[DataFrame]
    since: int = 1

    def allowed_on(self, plane: Plane) -> bool:
        """Whether a frame of this type may arrive on `plane`; LINK_OPEN also opens bulk links."""
        return plane is self.plane or (self.kind is LinkOpen and plane is Plane.BULK)


_C, _S, _B = Plane.CONTROL, Plane.STEPS, Plane.BULK

MESSAGES: tuple[MessageType, ...] = (
    MessageType(1, "HELLO", _C, "node to node", Hello),
    MessageType(2, "WELCOME", _C, "node to node", Welcome),
    MessageType(3, "REFUSED", _C, "node to node", Refused),
    MessageType(4, "HEARTBEAT", _C, "node to node", Heartbeat),
    MessageType(5, "LEAVE", _C, "node to node", Leave),
    MessageType(16, "PRE_VOTE_REQUEST", _C, "candidate to voter", PreVoteRequest),
    MessageType(17, "PRE_VOTE_REPLY", _C, "voter to candidate", PreVoteReply),
    MessageType(18, "VOTE_REQUEST", _C, "candidate to voter", VoteRequest),
    MessageType(19, "VOTE_REPLY", _C, "voter to candidate", VoteReply),
    MessageType(20, "PROPOSE", _C, "leader to node", Propose),
    MessageType(21, "ACK", _C, "node to leader", Ack),
    MessageType(22, "NACK", _C, "node to leader", Nack),
    MessageType(23, "ACTIVATE", _C, "leader to node", Activate),
    MessageType(24, "LOG_REQUEST", _C, "leader to node", LogRequest),
    MessageType(25, "LOG_ENTRY", _C, "node to leader, leader to node", LogEntry),
    MessageType(32, "SUBMIT", _C, "client to node", Submit),
    MessageType(33, "ACCEPTED", _C, "node to client", Accepted),
    MessageType(34, "CHUNK", _C, "node to client", Chunk),
    MessageType(35, "FINISHED", _C, "node to client", Finished),
    MessageType(36, "FAILED", _C, "node to client", Failed),
    MessageType(37, "CANCEL", _C, "client to node, node to leader", Cancel),
    MessageType(38, "FORWARD", _C, "node to leader", Forward),
    MessageType(39, "DRAWN", _C, "leader to node", Drawn),
    MessageType(40, "ENDED", _C, "leader to node", Ended),
    MessageType(41, "STATUS_REQUEST", _C, "client to node", StatusRequest),
    MessageType(42, "STATUS_REPLY", _C, "node to client", StatusReply),
    MessageType(43, "DRAIN", _C, "client to node, node to node", Drain),
    MessageType(44, "DONE", _C, "node to client", Done),
    MessageType(45, "PLAN_REQUEST", _C, "client to node", PlanRequest),
    MessageType(46, "PAUSE", _C, "client to node, node to node", Pause),
    MessageType(47, "MEASURE_LINK", _C, "client to node", MeasureLink),
    MessageType(64, "LINK_OPEN", _S, "node to node", LinkOpen),
    MessageType(65, "STEP", _S, "leader to node", Step),
    MessageType(66, "PARTIAL", _S, "node to node", Partial),
    MessageType(67, "HIDDEN", _S, "node to node", Hidden),
    MessageType(68, "CANDIDATES", _S, "node to leader", Candidates),
    MessageType(69, "LOGITS_REQUEST", _S, "leader to node", LogitsRequest),
    MessageType(70, "LOGITS", _S, "node to leader", Logits),
    MessageType(71, "STEP_ACK", _S, "node to leader", StepAck),
    MessageType(72, "ECHO_REQUEST", _S, "node to node", EchoRequest),
    MessageType(73, "ECHO_REPLY", _S, "node to node", EchoReply),
    MessageType(96, "KV_DELTA", _B, "owner to standby", KvDelta),
    MessageType(97, "KV_REQUEST", _B, "standby to owner", KvRequest),
    MessageType(98, "CREDIT", _B, "receiver to sender", Credit),
)
"""The message table, in the order of the ids."""

BY_ID: dict[int, MessageType] = {row.id: row for row in MESSAGES}
BY_KIND: dict[type, MessageType] = {row.kind: row for row in MESSAGES}

__all__ = [
    "BY_ID",
    "BY_KIND",
    "MESSAGES",
    "Accepted",
    "Ack",
    "Activate",
    "AgreedLog",
    "Cancel",
    "Candidates",
    "Chunk",
    "Contact",
    "ControlMessage",
    "CoverageRun",
    "Credit",
    "DataFrame",
    "Done",
    "Drain",
    "Drawn",
    "DrawnToken",
    "EchoReply",
    "EchoRequest",
    "Ended",
    "Failed",
    "FinalToken",
    "Finished",
    "Forward",
    "Heartbeat",
    "Hello",
    "Hidden",
    "InputsRun",
    "Interruption",
    "KvDelta",
    "KvRequest",
    "Leave",
    "LinkOpen",
    "LogDigest",
    "LogEntry",
    "LogRequest",
    "Logits",
    "LogitsRequest",
    "MeasureLink",
    "MemberState",
    "Message",
    "MessageType",
    "Nack",
    "Partial",
    "Pause",
    "PlanRequest",
    "Plane",
    "PreVoteReply",
    "PreVoteRequest",
    "Propose",
    "Refused",
    "Rumour",
    "Slot",
    "StatusReply",
    "StatusRequest",
    "Step",
    "StepAck",
    "Submit",
    "VoteReply",
    "VoteRequest",
    "Welcome",
]
