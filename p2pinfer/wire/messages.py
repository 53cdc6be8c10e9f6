"""Every message of the protocol as a typed, bounded value, and the table of their numbers.

Control bodies (MessagePack maps with the field names below) and data frames (a fixed header, then
raw tensor bytes) are told apart by their base class. Ids are append-only: a retired id is never
used again. `proto_spec.md` says what each message means; `tests/test_spec.py` compares the two.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from p2pinfer.limits import (
    MAX_CANDIDATES,
    MAX_LAYERS,
    MAX_NAME_BYTES,
    MAX_NODES,
    MAX_PARTS,
    MAX_REQUESTS,
    MAX_STATUS_BYTES,
    MAX_STEP_SLOTS,
    MAX_STEP_TOKENS,
    MAX_TEXT_BYTES,
    MAX_UNITS,
)
from p2pinfer.types import (
    U8,
    U16,
    U32,
    U63,
    Digest,
    Failover,
    Fence,
    Identity,
    Member,
    MemberIndex,
    Plan,
    SamplingParams,
    TokenId,
    Tokens,
)
from p2pinfer.wire.tensors import Tensor

Text = Annotated[str, Meta(max_length=MAX_TEXT_BYTES)]
Reason = Annotated[str, Meta(max_length=4096)]
Code = Annotated[str, Meta(max_length=64, pattern="^[a-z_]*$")]
Label = Annotated[str, Meta(max_length=MAX_NAME_BYTES)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]


class Plane(StrEnum):
    """Which pair of sockets carries a message."""

    CONTROL = "control"
    STEPS = "steps"
    BULK = "bulk"


class ControlMessage(Struct, frozen=True, kw_only=True):
    """A message whose body is MessagePack."""


class DataFrame(Struct, frozen=True, kw_only=True):
    """A message whose body is a fixed header and raw tensor bytes.

    `link_seq` numbers the frames of one directed step link from 0 in every fence, so that a lost
    frame is seen as a gap. `sender` is the index of the sending member in the plan of `fence`.
    """

    fence: Fence
    step: U63
    link_seq: U63
    sender: MemberIndex


# --- membership ---------------------------------------------------------------------------------


class Hello(ControlMessage, kw_only=True):
    """First message on a control link: who I am and what I hold. Answered on the same link."""

    versions: Annotated[tuple[U16, ...], Meta(min_length=1, max_length=16)]
    member: Member
    cluster_id: Annotated[str, Meta(pattern="^([0-9a-f]{16})?$")] = ""
    model_id: Digest
    dtype: Annotated[str, Meta(max_length=16)]
    quant: Annotated[str, Meta(max_length=16)]
    layout: Annotated[str, Meta(max_length=16)] = ""


class Welcome(ControlMessage, kw_only=True):
    """The sender of HELLO is accepted; these are the members the answering node knows."""

    version: U16
    member: Member
    cluster_id: Identity
    leader_id: Annotated[str, Meta(pattern="^([0-9a-f]{16})?$")]
    members: Annotated[tuple[Member, ...], Meta(max_length=MAX_NODES)]


class Refused(ControlMessage, kw_only=True):
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


class Heartbeat(ControlMessage, kw_only=True):
    """Sent every period to every peer: the sender's membership table and its health.

    `hears_control` and `hears_steps` are the node ids heard lately on those links; `steps` counts
    finished compute steps; `owes_step` is the step it is working on (0 when idle).
    """

    node_id: Identity
    boot_id: Identity
    incarnation: U63
    term: U63
    fence: Fence
    leader_id: Annotated[str, Meta(pattern="^([0-9a-f]{16})?$")] = ""
    steps: U63 = 0
    owes_step: U63 = 0
    rumours: Annotated[tuple[Rumour, ...], Meta(max_length=2 * MAX_NODES)] = ()
    hears_control: Annotated[tuple[Identity, ...], Meta(max_length=MAX_NODES)] = ()
    hears_steps: Annotated[tuple[Identity, ...], Meta(max_length=MAX_NODES)] = ()
    sent_at_ms: U63 = 0
    echo_ms: U63 = 0
    tokens_per_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    kv_used_bytes: U63 = 0
    kv_limit_bytes: U63 = 0


class Leave(ControlMessage, kw_only=True):
    """The sender is going away on purpose: it is `left`, not `dead`."""

    node_id: Identity
    boot_id: Identity
    reason: Reason = ""


# --- election and plans -------------------------------------------------------------------------


class PreVoteRequest(ControlMessage, kw_only=True):
    """Would you vote for me in `term`? Changes nobody's term (Raft, section 9.6 of the thesis)."""

    term: U63
    candidate_id: Identity
    plan_fence: Fence


class PreVoteReply(ControlMessage, kw_only=True):
    """Answer to PRE_VOTE_REQUEST."""

    term: U63
    voter_id: Identity
    granted: bool


class VoteRequest(ControlMessage, kw_only=True):
    """A candidate asks for a vote in `term`; granted only if its plan is not older."""

    term: U63
    candidate_id: Identity
    plan_fence: Fence


class VoteReply(ControlMessage, kw_only=True):
    """Answer to VOTE_REQUEST, sent when the vote is persisted."""

    term: U63
    voter_id: Identity
    granted: bool


class Propose(ControlMessage, kw_only=True):
    """The leader proposes a plan; the receiver stops obeying the old one and makes ready."""

    plan: Plan


class LogDigest(Struct, frozen=True, kw_only=True):
    """A request's token log on one node: its length, and the hash of its tokens."""

    request_id: U63
    term: U63
    length: U32
    digest: Digest


class CoverageRun(Struct, frozen=True, kw_only=True):
    """Leading positions of a request whose KV of `units` a node holds, written by finished steps."""

    request_id: U63
    stage: U8
    units: Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_UNITS)], ...], Meta(max_length=MAX_UNITS)]
    positions: U32


class Ack(ControlMessage, kw_only=True):
    """The plan of `fence` is persisted and its units are loaded here."""

    fence: Fence
    node_id: Identity
    logs: Annotated[tuple[LogDigest, ...], Meta(max_length=MAX_REQUESTS)] = ()
    coverage: Annotated[tuple[CoverageRun, ...], Meta(max_length=MAX_REQUESTS * 4)] = ()


class Nack(ControlMessage, kw_only=True):
    """The plan of `fence` cannot be held here, and why; the leader proposes another."""

    fence: Fence
    node_id: Identity
    code: Code
    message: Reason


class LogTail(Struct, frozen=True, kw_only=True):
    """Tokens that complete a request's log from index `start`, and where computing restarts."""

    request_id: U63
    start: U32
    tokens: Tokens
    restart: U32


class Activate(ControlMessage, kw_only=True):
    """The plan of `fence` is in force."""

    fence: Fence
    tails: Annotated[tuple[LogTail, ...], Meta(max_length=MAX_REQUESTS)] = ()


# --- clients and requests -----------------------------------------------------------------------


class Submit(ControlMessage, kw_only=True):
    """A client submits or resumes a request, idempotently: the id is its own choice.

    Exactly one of `text` and `prompt_ids` is given; `received` are reply tokens the client already
    has (forced, never drawn again).
    """

    request_id: U63
    text: Text = ""
    prompt_ids: Tokens = ()
    params: SamplingParams
    received: Tokens = ()


class Accepted(ControlMessage, kw_only=True):
    """The request is known to the serving node. `waiting` says what it waits for, or is empty."""

    request_id: U63
    served_by: Label
    prompt_ids: Tokens
    waiting: Reason = ""


class Chunk(ControlMessage, kw_only=True):
    """Serving node to client: reply tokens from index `start` and the text they complete."""

    request_id: U63
    start: U32
    tokens: Tokens
    text: Text = ""


class Finished(ControlMessage, kw_only=True):
    """Serving node to client: the reply is complete, with the text that was still held back."""

    request_id: U63
    reason: Annotated[str, Meta(pattern="^(stop|length)$")]
    total_tokens: U32
    text: Text = ""
    ttft_s: Seconds = 0.0
    tokens_per_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    failovers: Annotated[tuple[Failover, ...], Meta(max_length=1024)] = ()


class Failed(ControlMessage, kw_only=True):
    """A request (or, with id 0, the last control message) failed; codes are in `proto_spec.md`."""

    request_id: U63 = 0
    code: Code
    message: Reason
    retryable: bool = False


class Cancel(ControlMessage, kw_only=True):
    """Stop this request and free its slot; `reason` is `client`, `stop` or `orphan`."""

    request_id: U63
    reason: Annotated[str, Meta(pattern="^(client|stop|orphan)$")] = "client"


class Forward(ControlMessage, kw_only=True):
    """Serving node to leader: enter this request into the log (idempotent)."""

    request_id: U63
    serving_id: Identity
    prompt_ids: Tokens
    received: Tokens = ()
    params: SamplingParams


class DrawnToken(Struct, frozen=True, kw_only=True):
    """Token number `index` of a reply."""

    request_id: U63
    index: U32
    token: TokenId


class Drawn(ControlMessage, kw_only=True):
    """Leader to serving node: tokens drawn in one step."""

    tokens: Annotated[tuple[DrawnToken, ...], Meta(max_length=MAX_STEP_SLOTS)]


class Ended(ControlMessage, kw_only=True):
    """Leader to serving node: the reply ended; with `code` set, in that error."""

    request_id: U63
    reason: Annotated[str, Meta(pattern="^(stop|length|cancelled|error)$")]
    total_tokens: U32
    code: Code = ""
    message: Reason = ""
    retryable: bool = False
    ttft_s: Seconds = 0.0
    tokens_per_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    failovers: Annotated[tuple[Failover, ...], Meta(max_length=1024)] = ()


class StatusRequest(ControlMessage, kw_only=True):
    """A client asks for the node's view of the cluster."""

    request_id: U63


class StatusReply(ControlMessage, kw_only=True):
    """The `status --json` object as UTF-8 JSON."""

    request_id: U63
    body: Annotated[bytes, Meta(max_length=MAX_STATUS_BYTES)]


class Drain(ControlMessage, kw_only=True):
    """An operator asks that a member's units be handed over, and that it leave."""

    request_id: U63
    name: Label


# --- steps --------------------------------------------------------------------------------------


class LinkOpen(ControlMessage, kw_only=True):
    """First message on a step or bulk link: whose it is and which plan it serves."""

    node_id: Identity
    boot_id: Identity
    fence: Fence


class Slot(Struct, frozen=True, kw_only=True):
    """A request's run of positions `[start, start + len(tokens))` in one step.

    `capacity` (positions to reserve) and `params` come with the first slot of a request in a
    fence; `drops` KV beyond `start`. `sample` asks for candidates after the last position.
    """

    request_id: U63
    start: U32
    tokens: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]
    sample: bool = False
    capacity: U32 = 0
    params: SamplingParams | None = None


class Step(ControlMessage, kw_only=True):
    """Leader to every node: compute these slots; also the token log, and requests that ended."""

    fence: Fence
    step: U63
    link_seq: U63
    slots: Annotated[tuple[Slot, ...], Meta(max_length=MAX_STEP_SLOTS)]
    ended: Annotated[tuple[U63, ...], Meta(max_length=MAX_REQUESTS)] = ()


class Partial(DataFrame, kw_only=True):
    """Subtree sums of one half layer. `parts` are tree nodes; `tensor` is [parts, rows, hidden]."""

    stage: U8
    layer: Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]
    half: Annotated[int, Meta(ge=0, le=1)]
    parts: Annotated[tuple[U16, ...], Meta(min_length=1, max_length=MAX_PARTS)]
    tensor: Tensor


class Hidden(DataFrame, kw_only=True):
    """Hidden states [rows, hidden] leaving `stage` for the next one."""

    stage: U8
    tensor: Tensor


class Candidates(DataFrame, kw_only=True):
    """Best candidates of some vocab units for every sampling slot, in the order of the step.

    `ids` and `logits` are [slots, units, k] (unused places: id -1), `lse` is [slots, units]: the
    log-sum-exp of the unit's logits after penalty and temperature.
    """

    units: Annotated[tuple[U16, ...], Meta(min_length=1, max_length=MAX_UNITS)]
    ids: Tensor
    logits: Tensor
    lse: Tensor


class LogitsRequest(ControlMessage, kw_only=True):
    """Leader to vocab owners: send the whole logits of these sampling slots of `step`."""

    fence: Fence
    step: U63
    link_seq: U63
    slots: Annotated[tuple[U16, ...], Meta(min_length=1, max_length=MAX_STEP_SLOTS)]


class Logits(DataFrame, kw_only=True):
    """Whole logits, after penalty, of one vocab unit for the asked slots: [slots, unit width]."""

    unit: Annotated[int, Meta(ge=0, lt=MAX_UNITS)]
    tensor: Tensor


# --- bulk ---------------------------------------------------------------------------------------


class KvDelta(DataFrame, kw_only=True):
    """New K and V rows of one unit for positions [start, start + rows), all layers of the span.

    `tensor` is [layers, 2, rows, head_dim]; `log_digest` is the hash of tokens[0 : start + rows].
    """

    request_id: U63
    stage: U8
    unit: Annotated[int, Meta(ge=0, lt=MAX_UNITS)]
    start: U32
    log_digest: Digest
    tensor: Tensor


class KvRequest(ControlMessage, kw_only=True):
    """A standby asks for the KV of a unit by position, and grants credit in bytes."""

    fence: Fence
    request_id: U63
    stage: U8
    unit: Annotated[int, Meta(ge=0, lt=MAX_UNITS)]
    start: U32
    end: U32
    credit: U63


class Credit(ControlMessage, kw_only=True):
    """The receiver of bulk frames grants that many more bytes."""

    fence: Fence
    bytes: U63


Message = ControlMessage | DataFrame


class MessageType(NamedTuple):
    """One row of the message table of `proto_spec.md`."""

    id: int
    name: str
    plane: Plane
    direction: str
    kind: type[ControlMessage] | type[DataFrame]
    since: int = 1


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
    MessageType(43, "DRAIN", _C, "client to node", Drain),
    MessageType(64, "LINK_OPEN", _S, "node to node", LinkOpen),
    MessageType(65, "STEP", _S, "leader to node", Step),
    MessageType(66, "PARTIAL", _S, "node to node", Partial),
    MessageType(67, "HIDDEN", _S, "node to node", Hidden),
    MessageType(68, "CANDIDATES", _S, "node to leader", Candidates),
    MessageType(69, "LOGITS_REQUEST", _S, "leader to node", LogitsRequest),
    MessageType(70, "LOGITS", _S, "node to leader", Logits),
    MessageType(96, "KV_DELTA", _B, "owner to standby", KvDelta),
    MessageType(97, "KV_REQUEST", _B, "standby to owner", KvRequest),
    MessageType(98, "CREDIT", _B, "receiver to sender", Credit),
)
"""The message table. LINK_OPEN also opens bulk links."""

BY_ID: dict[int, MessageType] = {row.id: row for row in MESSAGES}
BY_KIND: dict[type, MessageType] = {row.kind: row for row in MESSAGES}

__all__ = [row.kind.__name__ for row in MESSAGES] + [
    "BY_ID",
    "BY_KIND",
    "MAX_CANDIDATES",
    "MESSAGES",
    "ControlMessage",
    "DataFrame",
    "Message",
    "MessageType",
    "Plane",
]
