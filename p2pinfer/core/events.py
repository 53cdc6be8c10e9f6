"""Inputs and outputs of the control plane's core, and the orders and reports of the worker.

`Node.handle(input, now) -> list[Output]`: everything that happens to a node is an `Input`, all it
wants done is an `Output`. Orders to the worker and its reports are encoded by `msgspec` on the pipe
between the two processes, so they are tagged structs. Facts are outputs too: logs, metrics and
tests read the same ones.
"""

from __future__ import annotations

from msgspec import Struct

from p2pinfer.types import Fence, Member, ModelSpec, Plan, SamplingParams
from p2pinfer.wire.messages import ControlMessage, DrawnToken

# --- orders: control plane to worker --------------------------------------------------------------


class Order(Struct, frozen=True, kw_only=True, tag=True):
    """What the control plane tells the worker (the data plane's process)."""


class LoadPlan(Order, frozen=True, kw_only=True):
    """Stop obeying the active plan; load the units that `members[me]` owns in `plan`."""

    plan: Plan
    me: int


class ActivatePlan(Order, frozen=True, kw_only=True):
    """The loaded plan of `fence` is in force; the leader's worker starts to schedule steps."""

    fence: Fence


class StartRequest(Order, frozen=True, kw_only=True):
    """Leader only: enter a request. `received` tokens are forced, never drawn again."""

    request_id: int
    prompt_ids: tuple[int, ...]
    received: tuple[int, ...]
    params: SamplingParams


class CancelRequest(Order, frozen=True, kw_only=True):
    """Leader only: end a request and free its slot."""

    request_id: int


class StopWorker(Order, frozen=True, kw_only=True):
    """Close the links and exit."""


# --- reports: worker to control plane -------------------------------------------------------------


class Report(Struct, frozen=True, kw_only=True, tag=True):
    """What the worker tells the control plane."""


class WorkerReady(Report, frozen=True, kw_only=True):
    """The worker runs and can load plans."""

    numeric_class: str
    device: str
    threads: int
    memory_bytes: int


class WorkerFailed(Report, frozen=True, kw_only=True):
    """The worker cannot go on, for a reason that the operator must mend."""

    message: str
    usage: bool = False


class LoadProgress(Report, frozen=True, kw_only=True):
    """Bytes of the plan's weights read so far."""

    done_bytes: int
    total_bytes: int


class PlanLoaded(Report, frozen=True, kw_only=True):
    """The units of the plan of `fence` are loaded; `error` is empty when all went well."""

    fence: Fence
    weight_bytes: int = 0
    error: str = ""


class TokensDrawn(Report, frozen=True, kw_only=True):
    """Leader only: tokens drawn in one step, in the order of its slots."""

    tokens: tuple[DrawnToken, ...]


class RequestEnded(Report, frozen=True, kw_only=True):
    """Leader only: a request ended by itself (`stop`, `length`) or in an error code."""

    request_id: int
    reason: str
    total_tokens: int
    code: str = ""
    message: str = ""
    ttft_s: float = 0.0
    tokens_per_s: float = 0.0


class StepFailed(Report, frozen=True, kw_only=True):
    """A step could not be finished; `node_id` names whom it waited for or who sent it broken."""

    fence: Fence
    step: int
    node_id: str
    reason: str


class LinkLost(Report, frozen=True, kw_only=True):
    """The step link to a member broke."""

    node_id: str


class WorkerStats(Report, frozen=True, kw_only=True):
    """Counters for heartbeats and `status`; sent a few times a second and after a request."""

    steps: int = 0
    owes_step: int = 0
    hears_steps: tuple[str, ...] = ()
    tokens_per_s: float = 0.0
    kv_used_bytes: int = 0
    kv_limit_bytes: int = 0
    running: int = 0
    waiting: int = 0
    dropped_frames: int = 0
    messages_sent: int = 0
    bytes_sent: int = 0
    compute_s: float = 0.0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    python_s: float = 0.0


AnyOrder = LoadPlan | ActivatePlan | StartRequest | CancelRequest | StopWorker
AnyReport = (
    WorkerReady
    | WorkerFailed
    | LoadProgress
    | PlanLoaded
    | TokensDrawn
    | RequestEnded
    | StepFailed
    | LinkLost
    | WorkerStats
)

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
    """A client of this node submits, resumes or repeats a request (text is already tokenised)."""

    route: bytes
    request_id: int
    prompt_ids: tuple[int, ...]
    received: tuple[int, ...]
    params: SamplingParams


class ClientCancelled(Input, frozen=True, kw_only=True):
    """A client cancels, or the serving node saw a stop string (`reason` `stop`)."""

    request_id: int
    reason: str = "client"


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


class PlanProposed(Fact, frozen=True, kw_only=True):
    fence: Fence
    members: tuple[str, ...]
    why: str


class PlanAdopted(Fact, frozen=True, kw_only=True):
    fence: Fence
    members: tuple[str, ...]


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

    `model` is None for a witness. `join` empty means: found a cluster.
    """

    member: Member
    model: ModelSpec | None
    cluster_id: str
    join: tuple[str, ...] = ()
    layout: str = "heads"
    min_nodes: int = 1
    join_timeout: float = 30.0
    wait_for_nodes: float = 30.0
    heartbeat_every: float = 0.1
    dead_after: float = 1.2
    settle: float = 0.3
    """How long the membership must be quiet before a plan for more members is proposed."""
