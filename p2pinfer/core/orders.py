"""What the control plane orders its worker to do, and what the worker reports.

Both are encoded by `msgspec` on the pipe between the two processes, so they are tagged structs.
Readers import them from `core/events`.
"""

from __future__ import annotations

from msgspec import Struct

from p2pinfer.types import Fence, Plan, SamplingParams
from p2pinfer.wire.messages import DrawnToken

# --- orders: control plane to worker --------------------------------------------------------------


class Order(Struct, frozen=True, kw_only=True, tag=True):
    """What the control plane tells the worker (the data plane's process)."""


class LoadPlan(Order, frozen=True, kw_only=True):
    """Stop obeying the active plan; load the units that `members[me]` owns in `plan`.

    Token logs are kept, and the KV of units that stay. Answered by `PlanLoaded`.
    """

    plan: Plan
    me: int


class TokenLog(Struct, frozen=True, kw_only=True):
    """A request's tokens, prompt first, and the term that wrote the last of them."""

    request_id: int
    term: int
    prompt_tokens: int
    params: SamplingParams
    tokens: tuple[int, ...]


class Recompute(Struct, frozen=True, kw_only=True):
    """KV of a request before `position` is to be there, up to `rows` positions of it made of kept
    inputs."""

    request_id: int
    position: int
    rows: int


class ActivatePlan(Order, frozen=True, kw_only=True):
    """The loaded plan of `fence` is in force; the leader's worker starts to schedule steps.

    `logs` are the token logs from now on: others are forgotten, longer ones cut. `listeners` are
    the members (indices) that take part in steps: those that have acknowledged the plan.
    `recomputes` names the requests of which any owner makes KV of inputs before the first step, and
    `computed` says by request how many positions have their KV on every owner then.
    """

    fence: Fence
    logs: tuple[TokenLog, ...] = ()
    recomputes: tuple[Recompute, ...] = ()
    listeners: tuple[int, ...] = ()
    computed: dict[int, int] = {}


class Halt(Order, frozen=True, kw_only=True):
    """Stop obeying the active plan: its leader has lost its office. Logs and KV are kept."""


class GiveWay(Order, frozen=True, kw_only=True):
    """Leader only: end the step in hand, tell all what it drew, and begin no other for a moment.

    Another plan is to take the place of that of `fence`, and no work is to be lost by it. Answered
    by `GaveWay`, unless a step breaks.
    """

    fence: Fence


class StartRequest(Order, frozen=True, kw_only=True):
    """Leader only: enter a request. `received` tokens are forced, never drawn again.

    KV is there for the first `computed` positions, on every owner.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    received: tuple[int, ...]
    params: SamplingParams
    computed: int = 0


class CancelRequest(Order, frozen=True, kw_only=True):
    """Leader only: end a request and free its slot."""

    request_id: int


class MeasureEchoes(Order, frozen=True, kw_only=True):
    """Send `count` echoes to `members[member]` of the plan in force, with `there` bytes of filler
    and `back` bytes in the answer. Answered by `EchoesMeasured` of the same `run`."""

    run: int
    member: int
    there: int
    back: int
    count: int


class StopWorker(Order, frozen=True, kw_only=True):
    """Close the links and exit."""


# --- reports: worker to control plane -------------------------------------------------------------


class Report(Struct, frozen=True, kw_only=True, tag=True):
    """What the worker tells the control plane."""


class Speed(Struct, frozen=True, kw_only=True):
    """How fast a worker multiplies weights and its machine reads memory, in GB/s, and the share of
    work that follows; 0: not measured. `machine`: whose memory that is, as in `Member`."""

    product_gb_s: float = 0.0
    read_gb_s: float = 0.0
    weight: float = 0.0
    machine: str = ""


class WorkerReady(Report, frozen=True, kw_only=True):
    """The worker runs and can load plans. `rows_matter`: a position's bits depend on how many are
    computed together, so that a reply may go on otherwise after a failover. `kernels`: whose
    compute what is not quantised; empty without a model."""

    numeric_class: str
    rows_matter: bool = False
    device: str
    kernels: str = ""
    threads: int
    memory_bytes: int
    speed: Speed = Speed()


class WorkerFailed(Report, frozen=True, kw_only=True):
    """The worker cannot go on, for a reason that the operator must mend."""

    message: str
    usage: bool = False


class LoadProgress(Report, frozen=True, kw_only=True):
    """Bytes of the plan's weights read so far."""

    done_bytes: int
    total_bytes: int


class Covered(Struct, frozen=True, kw_only=True):
    """Leading positions of a request whose KV a worker has of some head units of one stage."""

    request_id: int
    stage: int
    units: tuple[int, ...]
    positions: int


class KeptInputs(Struct, frozen=True, kw_only=True):
    """Leading positions of a request whose inputs a worker keeps in the layers of one stage."""

    request_id: int
    stage: int
    positions: int


class PlanLoaded(Report, frozen=True, kw_only=True):
    """The units of the plan of `fence` are loaded; `error` is empty when all went well.

    `logs` and `coverage` are as they stood when the worker stopped obeying the plan before; the
    latter is of all head units whose KV is here, by the stages of this plan, as are `inputs`.
    """

    fence: Fence
    weight_bytes: int = 0
    error: str = ""
    logs: tuple[TokenLog, ...] = ()
    coverage: tuple[Covered, ...] = ()
    inputs: tuple[KeptInputs, ...] = ()


class StandbysLoaded(Report, frozen=True, kw_only=True):
    """The weights of all units that this node keeps for others are ready under the plan of `fence`,
    `units_warm` of them in the page cache only (`reason` says why, where that was not ordered); or
    `error` says why they are not."""

    fence: Fence
    units: int
    units_warm: int = 0
    weight_bytes: int
    reason: str = ""
    error: str = ""


class GaveWay(Report, frozen=True, kw_only=True):
    """No step of the plan of `fence` is in hand, and for a moment none is begun."""

    fence: Fence


class FenceSettled(Report, frozen=True, kw_only=True):
    """Leader only: all that the logs held when the plan of `fence` was activated is committed."""

    fence: Fence


class TokensCommitted(Report, frozen=True, kw_only=True):
    """Leader only: tokens that every owner and a quorum have in their logs, in order."""

    fence: Fence
    tokens: tuple[DrawnToken, ...]


class RequestEnded(Report, frozen=True, kw_only=True):
    """Leader only: a request ended by itself (`stop`, `length`: its last token is committed, and
    was reported) or in an error code."""

    fence: Fence
    request_id: int
    reason: str
    total_tokens: int
    code: str = ""
    message: str = ""


class StepFailed(Report, frozen=True, kw_only=True):
    """A step could not be finished; `node_id` names whom it waited for or who sent it broken.

    `broken`: that node computed what is no number; it is not a matter of the network.
    """

    fence: Fence
    step: int
    node_id: str
    reason: str
    broken: bool = False


class LinkLost(Report, frozen=True, kw_only=True):
    """The step link to a member broke."""

    node_id: str


class EchoesMeasured(Report, frozen=True, kw_only=True):
    """How long echoes took there and back. `disturbed` ones met a step and do not count; `lost`
    ones did not come back in time."""

    run: int
    round_trips_s: tuple[float, ...]
    disturbed: int
    lost: int


class WorkerStats(Report, frozen=True, kw_only=True):
    """Counters for heartbeats and `status`; sent several times a second, busy or not.

    A worker that sends none for a while hangs. `compute_ms` is how long it computed lately for a
    decoding step, without waiting for others. `messages_local` are those of `messages_sent` that
    went over Unix sockets, to nodes on the same machine. Frames of delta KV (`delta_bytes_...`) are
    not counted among messages and bytes, but `bulk_s` is all time that they took between steps.
    `standby_units_ready` of `..._wanted` have their weights here, `standby_weight_bytes`, but for
    `standby_units_warm` of them, which have them in the page cache (`standby_error` says why others
    have them nowhere); `standby_lacks` counts the positions whose KV they have not got yet, over
    all requests and head units, and `standby_behind` those of one of them at most. All this
    goes by the plan of `fence`, which is in force here; (0, 0) while there is none.
    `replicas_held`: replication is held on this node, so that its cost can be measured.
    `kv_inputs_bytes` are those of the inputs that KV can be made of again. `products_s` and
    `attention_s` are parts of `compute_s`.
    """

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
    messages_local: int = 0
    bytes_sent: int = 0
    compute_s: float = 0.0
    products_s: float = 0.0
    attention_s: float = 0.0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    python_s: float = 0.0
    compute_ms: float = 0.0
    bulk_s: float = 0.0
    delta_bytes_sent: int = 0
    delta_bytes_received: int = 0
    kv_standby_bytes: int = 0
    kv_inputs_bytes: int = 0
    standby_units_ready: int = 0
    standby_units_wanted: int = 0
    standby_units_warm: int = 0
    standby_lacks: int = 0
    standby_weight_bytes: int = 0
    replicas_held: bool = False
    standby_behind: int = 0
    standby_error: str = ""
    fence: Fence = Fence()


AnyOrder = (
    LoadPlan
    | ActivatePlan
    | Halt
    | GiveWay
    | StartRequest
    | CancelRequest
    | MeasureEchoes
    | StopWorker
)
AnyReport = (
    WorkerReady
    | WorkerFailed
    | LoadProgress
    | PlanLoaded
    | StandbysLoaded
    | GaveWay
    | FenceSettled
    | TokensCommitted
    | RequestEnded
    | StepFailed
    | LinkLost
    | EchoesMeasured
    | WorkerStats
)
