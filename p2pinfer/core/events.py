"""Inputs and outputs of the control plane's core, and the orders and reports of the worker.

`Node.handle(input, now) -> list[Output]`: everything that happens to a node is an `Input`, all it
wants done is an `Output`. Facts are outputs too: logs, metrics and tests read the same ones.
Orders and reports are in `orders.py`; readers import all of them from here.
"""

from __future__ import annotations

from msgspec import Struct

from p2pinfer.core.orders import (
    ActivatePlan,
    AnyOrder,
    AnyReport,
    CancelRequest,
    Covered,
    FenceSettled,
    Halt,
    LinkLost,
    LoadPlan,
    LoadProgress,
    Order,
    PlanLoaded,
    Recompute,
    Report,
    RequestEnded,
    StandbysLoaded,
    StartRequest,
    StepFailed,
    StopWorker,
    TokenLog,
    TokensCommitted,
    WorkerFailed,
    WorkerReady,
    WorkerStats,
)
from p2pinfer.core.timing import LAN, Timing
from p2pinfer.types import Failover, Fence, Member, ModelSpec, Plan, SamplingParams
from p2pinfer.wire.messages import ControlMessage

# --- inputs ---------------------------------------------------------------------------------------


class Input(Struct, frozen=True, kw_only=True):
    """Something that happened to this node."""


class Received(Input, frozen=True, kw_only=True):
    """A control message. `route` is where a reply on the same connection goes (opaque bytes);
    for answers to our own HELLO, `link` is the address of our link that they came back on."""

    message: ControlMessage
    route: bytes = b""
    link: str = ""


class LinkUp(Input, frozen=True, kw_only=True):
    """Our control link to `address` is connected."""

    address: str


class LinkDown(Input, frozen=True, kw_only=True):
    """Our control link to `address` lost its connection (ZeroMQ goes on reconnecting)."""

    address: str


class ProbeAnswered(Input, frozen=True, kw_only=True):
    """The fresh TCP connect asked for by `Probe` was refused (or not)."""

    address: str
    refused: bool


class WorkerSaid(Input, frozen=True, kw_only=True):
    """A report of this node's worker."""

    report: AnyReport


class WorkerDied(Input, frozen=True, kw_only=True):
    """The worker's process ended without being told to."""

    detail: str


class ClientSubmitted(Input, frozen=True, kw_only=True):
    """A client of this node submits, resumes or repeats a request (text is already tokenised).

    `stopped`: with the tokens that it has received a stop string is complete, so it lacks only the
    end.
    """

    route: bytes
    request_id: int
    prompt_ids: tuple[int, ...]
    received: tuple[int, ...]
    params: SamplingParams
    attempt: int = 0
    stopped: bool = False


class ClientCancelled(Input, frozen=True, kw_only=True):
    """A client cancels, or is gone (`reason` `orphan`), or the serving node saw a stop string
    (`stop`)."""

    request_id: int
    reason: str = "client"


class Persisted(Input, frozen=True, kw_only=True):
    """What `Persist` number `number`, and all before it, said is on the disk."""

    number: int


class PersistFailed(Input, frozen=True, kw_only=True):
    """The disk did not take it."""

    reason: str


class Ticked(Input, frozen=True, kw_only=True):
    """The deadline passed, or nothing happened; timers are looked at on every input anyway."""


class ShutdownAsked(Input, frozen=True, kw_only=True):
    """Ctrl-C, SIGTERM or `node leave`."""


# --- outputs --------------------------------------------------------------------------------------


class Output(Struct, frozen=True, kw_only=True):
    """Something this node wants done."""


class Send(Output, frozen=True, kw_only=True):
    """Send on our own link to `address` (opened by `OpenLink`)."""

    address: str
    message: ControlMessage


class ReplyTo(Output, frozen=True, kw_only=True):
    """Send back on the connection that `route` came from (a client, or the answer to HELLO)."""

    route: bytes
    message: ControlMessage


class OpenLink(Output, frozen=True, kw_only=True):
    """Connect a DEALER to a peer's control address."""

    address: str


class CloseLink(Output, frozen=True, kw_only=True):
    """Close our link to `address` at once, dropping what it holds."""

    address: str


class Probe(Output, frozen=True, kw_only=True):
    """Try a fresh TCP connect to `address` and report whether it was refused."""

    address: str


class StoredState(Struct, frozen=True, kw_only=True):
    """What a node must not forget: kept in its state folder.

    `voted_for` is whom it voted for in `term`. `plan` is the newest that it acknowledged (None:
    there was none since it founded the cluster); `active`: that plan is known to be in force.
    `memory` is drawn when the state begins, `blank` until a plan in force names that a voter: what
    the node promised before is forgotten. `addresses` are those of the members of plans before that
    may still be needed for a quorum.
    """

    cluster_id: str
    term: int = 0
    voted_for: str = ""
    plan: Plan | None = None
    active: bool = False
    blank: bool = False
    memory: str = ""
    addresses: tuple[str, ...] = ()


class Persist(Output, frozen=True, kw_only=True):
    """Write `state` to the disk, for good, and say `Persisted`; None: forget it (the node left).

    Nothing waits meanwhile but what depends on it. Numbers grow; only the newest need be written.
    """

    number: int
    state: StoredState | None


class TellWorker(Output, frozen=True, kw_only=True):
    """Give an order to the worker."""

    order: AnyOrder


class Deliver(Output, frozen=True, kw_only=True):
    """Reply tokens for a client of this node: detokenise and send them on."""

    route: bytes
    request_id: int
    start: int
    tokens: tuple[int, ...]


class Conclude(Output, frozen=True, kw_only=True):
    """A reply to a client of this node ended; with `code` set, in that error."""

    route: bytes
    request_id: int
    reason: str
    total_tokens: int
    code: str = ""
    message: str = ""
    retryable: bool = False
    ttft_s: float = 0.0
    tokens_per_s: float = 0.0
    failovers: tuple[Failover, ...] = ()


class Exit(Output, frozen=True, kw_only=True):
    """Leave the process; `error` is empty for a wanted end."""

    error: str = ""
    exit_code: int = 0


# --- facts ----------------------------------------------------------------------------------------


class Fact(Output, frozen=True, kw_only=True):
    """Something that became true: read by logs, metrics and tests."""


class PeerJoined(Fact, frozen=True, kw_only=True):
    member: Member


class PeerSuspected(Fact, frozen=True, kw_only=True):
    name: str
    node_id: str
    reason: str


class PeerDead(Fact, frozen=True, kw_only=True):
    name: str
    node_id: str
    reason: str
    silence_s: float


class PeerLeft(Fact, frozen=True, kw_only=True):
    name: str
    node_id: str


class PeerRefused(Fact, frozen=True, kw_only=True):
    """Either side refused: `by_us` says which."""

    address: str
    code: str
    message: str
    by_us: bool


class JoinWaiting(Fact, frozen=True, kw_only=True):
    """No `--join` address has answered yet."""

    addresses: tuple[str, ...]
    waited_s: float


class LeaderElected(Fact, frozen=True, kw_only=True):
    name: str
    node_id: str
    term: int


class LeaderLost(Fact, frozen=True, kw_only=True):
    """Nobody leads, as far as this node knows."""

    name: str
    node_id: str
    term: int
    reason: str


class ElectionStarted(Fact, frozen=True, kw_only=True):
    """This node asks for votes in `term`."""

    term: int


class WorkerHung(Fact, frozen=True, kw_only=True):
    """This node's worker says nothing any more (or again does: `hung` false)."""

    hung: bool
    silence_s: float


class Draining(Fact, frozen=True, kw_only=True):
    """This node is to hand over what it holds, and leave."""

    for_good: bool
    timeout_s: float


class PairBroken(Fact, frozen=True, kw_only=True):
    """Two members do not hear each other, as one of them says; `loses` is to own nothing."""

    names: tuple[str, str]
    loses: str


class MemberSlow(Fact, frozen=True, kw_only=True):
    """A member computes `factor` times slower than its share predicts."""

    name: str
    factor: float


class PlanProposed(Fact, frozen=True, kw_only=True):
    fence: Fence
    members: tuple[str, ...]
    why: str


class PlanAdopted(Fact, frozen=True, kw_only=True):
    """The plan is in force here; `agree_s` is how long after this node heard of it."""

    fence: Fence
    members: tuple[str, ...]
    leader: str = ""
    voters: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    agree_s: float = 0.0


class StandbysReady(Fact, frozen=True, kw_only=True):
    """This node has the weights of all units that it keeps for others, or says why not."""

    fence: Fence
    units: int
    units_warm: int = 0
    weight_bytes: int
    reason: str = ""
    error: str = ""


class RequestRestored(Fact, frozen=True, kw_only=True):
    """On the leader: a request goes on under a new plan, computing from `restart` of `length`."""

    request_id: int
    length: int
    restart: int
    rung: str


class PlanFailed(Fact, frozen=True, kw_only=True):
    fence: Fence
    reason: str


class RequestAccepted(Fact, frozen=True, kw_only=True):
    request_id: int
    prompt_tokens: int
    waiting: str = ""


class RequestFinished(Fact, frozen=True, kw_only=True):
    """The canonical line of one reply, on its serving node."""

    request_id: int
    reason: str
    prompt_tokens: int
    reply_tokens: int
    ttft_s: float
    tokens_per_s: float
    code: str = ""


class FrameDropped(Fact, frozen=True, kw_only=True):
    """A control message was ignored, and why (unknown sender, foreign fence)."""

    reason: str


class NodeConfig(Struct, frozen=True, kw_only=True):
    """What the core needs to know of its own node; times in seconds.

    `model` is None for a witness. `stored` is what it knew when it ended; with it the node comes
    back to its cluster, whatever `join` says. Without, and with `join` empty, it founds one, of id
    `cluster_id`. `replicas` is how many standbys a plan names for each unit; `weighed`: an operator
    gave `member` its weight.
    """

    member: Member
    model: ModelSpec | None
    cluster_id: str
    join: tuple[str, ...] = ()
    stored: StoredState | None = None
    layout: str = "heads"
    use_nodes: str = "all"
    replicas: int = 0
    weighed: bool = False
    quorum: str = "majority"
    min_nodes: int = 1
    join_timeout: float = 30.0
    wait_for_nodes: float = 30.0
    orphan_timeout: float = 10.0
    drain_timeout: float = 30.0
    timing: Timing = LAN


__all__ = [
    "ActivatePlan",
    "AnyOrder",
    "AnyReport",
    "CancelRequest",
    "ClientCancelled",
    "ClientSubmitted",
    "CloseLink",
    "Conclude",
    "Covered",
    "Deliver",
    "Draining",
    "ElectionStarted",
    "Exit",
    "Fact",
    "FenceSettled",
    "FrameDropped",
    "Halt",
    "Input",
    "JoinWaiting",
    "LeaderElected",
    "LeaderLost",
    "LinkDown",
    "LinkLost",
    "LinkUp",
    "LoadPlan",
    "LoadProgress",
    "MemberSlow",
    "NodeConfig",
    "OpenLink",
    "Order",
    "Output",
    "PairBroken",
    "PeerDead",
    "PeerJoined",
    "PeerLeft",
    "PeerRefused",
    "PeerSuspected",
    "Persist",
    "PersistFailed",
    "Persisted",
    "PlanAdopted",
    "PlanFailed",
    "PlanLoaded",
    "PlanProposed",
    "Probe",
    "ProbeAnswered",
    "Received",
    "Recompute",
    "ReplyTo",
    "Report",
    "RequestAccepted",
    "RequestEnded",
    "RequestFinished",
    "RequestRestored",
    "Send",
    "ShutdownAsked",
    "StandbysLoaded",
    "StandbysReady",
    "StartRequest",
    "StepFailed",
    "StopWorker",
    "StoredState",
    "TellWorker",
    "Ticked",
    "TokenLog",
    "TokensCommitted",
    "WorkerDied",
    "WorkerFailed",
    "WorkerHung",
    "WorkerReady",
    "WorkerSaid",
    "WorkerStats",
]
