"""The worker: a node's data plane, in a process of its own.

It obeys the plans that the control plane gives it over a pipe, loads the units it owns, and
computes steps: those it is sent or, on the leader, those that it makes. It decides nothing about
who owns what. A process of its own keeps heartbeats free of the interpreter's lock, and lets the
control plane see a compute loop that hangs. Token logs and KV outlive plans.
"""

from __future__ import annotations

import select
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
import zmq

from p2pinfer import heap
from p2pinfer.bulk_links import BULK_HWM, BulkLinks
from p2pinfer.core.events import (
    ActivatePlan,
    AnyOrder,
    CancelRequest,
    Halt,
    LinkLost,
    LoadPlan,
    LoadProgress,
    PlanLoaded,
    Recompute,
    StandbysLoaded,
    StartRequest,
    StepFailed,
    StopWorker,
    WorkerFailed,
    WorkerStats,
)
from p2pinfer.core.inputs import input_spans
from p2pinfer.core.orders import GaveWay, GiveWay, MeasureEchoes
from p2pinfer.core.recompute import recompute
from p2pinfer.core.replication import computed_units, fed_units
from p2pinfer.core.scheduler import capacity
from p2pinfer.core.step_clock import StepClock
from p2pinfer.core.step_maker import StepReport
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology, kv_room, topology
from p2pinfer.device import choose_device, use_kernels, use_threads
from p2pinfer.errors import (
    LinkBroken,
    P2pinferError,
    RemoteProtocolError,
    StepBroken,
    StepOverdue,
    UsageError,
)
from p2pinfer.leader import Leader
from p2pinfer.limits import MAX_BULK_BYTES, MAX_STEP_BYTES
from p2pinfer.measurement import introduction
from p2pinfer.model.quantised_copies import copies_folder
from p2pinfer.pipe import PipeClosed, WorkerConfig, WorkerPipe
from p2pinfer.priority import be_last, be_prompt, unhurried
from p2pinfer.replicator import Replicator, partners
from p2pinfer.step_engine import Clock, StepEngine
from p2pinfer.step_links import StepLinks
from p2pinfer.transport import PairLimits, SocketPair
from p2pinfer.types import Fence
from p2pinfer.unit_holder import UnitHolder

STATS_EVERY_S = 0.1
"""Busy or not: a worker that says nothing for a while counts as hung."""

STATS_WITH_TOKENS_S = 0.075
"""After so long counters go along with tokens, for which the control process wakes up anyhow."""

HEAD_START_S = 1.0
"""Where a plan interrupted replies, weights of standbys are loaded only so long after it came into
force: those replies go on first."""

STEP_HWM = 2048
"""Frames queued per step link: a step's exchanges of every layer, with room."""


class StepInterrupted(P2pinferError):
    """An order came that ends the step in hand."""


class Worker:
    """Takes orders, computes steps, reports."""

    def __init__(self, config: WorkerConfig, pipe: WorkerPipe, device: torch.device) -> None:
        self._config, self._device = config, device
        self._pipe = pipe
        self._logs = TokenLogs()
        folder = Path(config.model_folder) if config.model else None
        self._units = UnitHolder(
            folder,
            self._device,
            self._logs,
            self._loading,
            standby=config.standby,
            copies=copies_folder(config.copies, config.model),
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._bulk_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        """Of its own: its thread is not to interrupt a step for every frame of delta KV."""
        self._bulk = BulkLinks(unhurried(self._bulk_pair), (config.node_id, config.boot_id))
        self._links = StepLinks(
            SocketPair(self._context, limits=PairLimits(MAX_STEP_BYTES, STEP_HWM, STEP_HWM)),
            (config.node_id, config.boot_id),
            pipe_fd=pipe.fileno(),
            interrupt=self._interrupt,
            on_pause=self._tell,
        )
        self._step_clock = StepClock(config.least_step_s)
        self._orders: deque[AnyOrder] = deque()
        self._stopping = False
        self._in_force = Fence()
        """Of the plan that was activated last, until another is loaded; (0, 0): of none."""
        self._loaded: Topology | None = None
        """A plan that is loaded, and not yet in force."""
        self._engine: StepEngine | None = None
        self._leader: Leader | None = None
        self._replicator: Replicator | None = None
        """Stays after the steps of its plan have ended: what still comes is of use to the next."""
        self._held = False
        """Replication is held, so that what it costs can be measured."""
        self._standbys_told = True
        self._kv_limit = 0
        self._stats_at = 0.0
        self._drawn = 0
        self._rate = 0.0

    # --- life -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Obey until told to stop or the control plane is gone."""
        config = self._config
        self._links.bind(config.listen_host, config.step_port, local=config.local_links)
        self._bulk.pair.bind(config.listen_host, config.bulk_port)
        # So that the collection after loading walks what was loaded, and not all of torch.
        heap.settle()
        self._pipe.send(introduction(config, self._device))
        while not self._stopping:
            try:
                self._turn()
            except StepInterrupted:
                continue
            except StepBroken as broken:
                self._break(broken)
            except (RemoteProtocolError, RuntimeError, MemoryError, LookupError, ValueError) as why:
                # A product that fails, or a step that nothing explains, is no reason to die.
                reason = str(why).partition("\n")[0] or type(why).__name__
                self._break(StepBroken(config.node_id, reason))
            self._tell()

    def hold_replicas(self, held: bool) -> None:
        """Neither send nor take delta KV for as long as `held`."""
        self._held = held
        if self._replicator is not None:
            self._replicator.hold(held)

    def close(self) -> None:
        """Close every socket at once, and load nothing more."""
        self._units.close()
        self._links.shutdown()
        self._bulk.pair.shutdown()
        for context in (self._context, self._bulk_context):
            context.destroy(linger=0)

    def _bulk_pair(self) -> SocketPair:
        return SocketPair(self._bulk_context, limits=PairLimits(MAX_BULK_BYTES, BULK_HWM, BULK_HWM))

    def _turn(self) -> None:
        while self._orders:
            self._obey(self._orders.popleft())
        if self._stopping:
            return
        if self._leader is not None:
            busy = self._lead(self._leader)
        elif self._engine is not None:
            busy = self._follow(self._engine)
        else:
            busy = False
        if self._units.trim() or busy or self._replicate():
            # A busy loop still looks for orders between two steps.
            self._read_orders()
        else:
            full = self._replicator is not None and not self._replicator.has_room
            self._links.idle(STATS_EVERY_S, None if full else self._bulk.pair.router)

    def _replicate(self) -> bool:
        """No step is there: send and take delta KV. Returns whether there was any of it to do."""
        if self._replicator is not None:
            return self._replicator.turn()
        return self._bulk.receive() is not None

    def _read_orders(self) -> None:
        while (order := self._pipe.receive()) is not None:
            assert not isinstance(order, WorkerConfig)
            self._orders.append(order)

    def _interrupt(self) -> None:
        """Called while waiting, when the pipe may have something. What ends a step raises."""
        self._read_orders()
        ends = LoadPlan | StopWorker if self._engine is None else LoadPlan | Halt | StopWorker
        if any(isinstance(order, ends) for order in self._orders):
            raise StepInterrupted("a new plan, or the end")

    def _tell(self) -> None:
        """Report links that broke and, several times a second, counters."""
        self._bulk.look()
        self._tell_of_standbys()
        while self._links.lost:
            self._pipe.send(LinkLost(node_id=self._links.lost.pop()))
        if (measured := self._links.echoes.done(time.monotonic())) is not None:
            self._pipe.send(measured)
        self._tell_counters(STATS_EVERY_S)

    def _tell_step(self, report: StepReport | GaveWay) -> None:
        """Report what the leader's part in steps says."""
        self._pipe.send(report)
        self._tell_counters(STATS_WITH_TOKENS_S)

    def _tell_counters(self, after_s: float) -> None:
        """Report counters if the last were so long ago."""
        now = time.monotonic()
        if now - self._stats_at < after_s:
            return
        elapsed = now - self._stats_at if self._stats_at else STATS_EVERY_S
        self._rate = 0.85 * self._rate + 0.15 * self._drawn / elapsed
        self._drawn, self._stats_at = 0, now
        self._pipe.send(self._stats())

    def _tell_of_standbys(self) -> None:
        """Report, once under each plan that names any, that all standby units can take over."""
        if self._standbys_told or self._engine is None:
            return
        ready, wanted = self._units.standby_ready
        if ready == wanted or self._units.standby_error:
            self._standbys_told = True
            if wanted:
                self._pipe.send(
                    StandbysLoaded(
                        fence=self._engine.topology.plan.fence,
                        units=ready,
                        units_warm=self._units.standby_units_warm,
                        weight_bytes=self._units.standby_weight_bytes,
                        reason=self._units.standby_reason,
                        error=self._units.standby_error,
                    )
                )

    def _stats(self) -> WorkerStats:
        engine, leader, traffic = self._engine, self._leader, self._links.traffic
        clock, bulk, replicator = engine.clock if engine else Clock(), self._bulk, self._replicator
        ready, wanted = self._units.standby_ready
        return WorkerStats(
            **asdict(clock),
            owes_step=engine.owes if engine else 0,
            hears_steps=self._links.heard_within(1.0),
            tokens_per_s=round(self._rate, 3),
            kv_used_bytes=self._units.kv_used_bytes,
            kv_limit_bytes=self._kv_limit,
            running=leader.running if leader else 0,
            waiting=leader.waiting if leader else 0,
            dropped_frames=traffic.dropped + bulk.traffic.dropped,
            messages_sent=traffic.messages,
            messages_local=traffic.local_messages,
            bytes_sent=traffic.bytes,
            wait_s=traffic.wait_s,
            compute_ms=engine.compute_ms if engine else 0.0,
            delta_bytes_sent=bulk.traffic.sent_bytes,
            delta_bytes_received=bulk.traffic.received_bytes,
            kv_standby_bytes=self._units.kv_standby_bytes,
            kv_inputs_bytes=self._units.kv_inputs_bytes,
            standby_units_ready=ready,
            standby_units_wanted=wanted,
            standby_units_warm=self._units.standby_units_warm,
            standby_lacks=replicator.lacking if replicator else 0,
            standby_weight_bytes=self._units.standby_weight_bytes,
            replicas_held=self._held,
            standby_behind=replicator.behind if replicator else 0,
            standby_error=self._units.standby_error,
            fence=self._in_force,
        )

    # --- orders -----------------------------------------------------------------------------------

    def _obey(self, order: AnyOrder) -> None:
        match order:
            case LoadPlan():
                self._load(order)
            case ActivatePlan():
                self._activate(order)
            case Halt():
                if self._engine is not None:
                    self._stop_steps()
            case GiveWay() if self._leader is not None:
                self._leader.give_way(order.fence)
            case StartRequest():
                # Without a plan in force it is too late: the next one starts all requests anew.
                if self._leader is not None:
                    self._leader.start(order)
            case CancelRequest():
                if self._leader is not None:
                    self._leader.cancel(order.request_id)
            case MeasureEchoes():
                self._links.echoes.begin(order, time.monotonic())
            case StopWorker():
                self._stopping = True

    def _stop_steps(self) -> None:
        """Obey no plan; logs and KV stay, and delta KV that is on its way is still taken."""
        self._engine = self._leader = self._loaded = None
        if self._replicator is not None:
            self._replicator.halt()
        self._links.close()

    def _load(self, order: LoadPlan) -> None:
        """Stop obeying the active plan, free what is no longer needed, load what `order` says.

        What owners have sent for finished steps of the plan before is taken first: one of them may
        be gone, and this is all that is left of its KV.
        """
        plan, me, fence = order.plan, order.me, order.plan.fence
        self._in_force = Fence()
        if self._replicator is not None:
            self._replicator.drain()
            self._replicator = None
        self._stop_steps()
        try:
            mine = topology(plan, me)
            # Links connect while weights load.
            self._links.reach(mine)
            self._bulk.load(mine, partners(plan, me))
            self._units.hold(mine)
            self._logs.coverage.hold(computed_units(plan, me).keys(), fed_units(plan, me).keys())
            self._logs.inputs.hold(input_spans(plan, me))
            self._links.open(mine)
        except StepInterrupted:
            raise
        except Exception as error:  # whatever it is, the leader waits for a word
            self._pipe.send(PlanLoaded(fence=fence, error=str(error) or type(error).__name__))
            return
        self._loaded = mine
        self._pipe.send(
            PlanLoaded(
                fence=fence,
                weight_bytes=self._units.weight_bytes,
                logs=self._logs.snapshot(),
                coverage=self._logs.covered(plan),
                inputs=self._logs.kept_inputs(plan),
            )
        )

    def _loading(self, done_bytes: int, total_bytes: int) -> None:
        self._pipe.send(LoadProgress(done_bytes=done_bytes, total_bytes=total_bytes))
        self._links.pump()

    def _activate(self, order: ActivatePlan) -> None:
        """The loaded plan is in force, with these logs; another one's activation is too late."""
        mine = self._loaded
        if mine is None or mine.plan.fence != order.fence:
            return
        self._loaded, self._in_force = None, order.fence
        gone = self._logs.adopt(order.logs)
        most = mine.plan.model.max_positions
        kept = {log.request_id: capacity(log.prompt_tokens, log.params, most) for log in order.logs}
        self._units.adopt(gone, kept)
        self._kv_limit = kv_room(mine.plan, mine.me) or 0
        self._links.activate(mine)
        self._bulk.activate()
        self._replicator = Replicator(mine, self._units, self._bulk, self._logs, order.computed)
        self._replicator.hold(self._held)
        self._engine = engine = StepEngine(
            mine,
            self._units.runner,
            self._links,
            logs=self._logs,
            step_clock=self._step_clock,
            replicator=self._replicator,
            recomputed_rows=sum(each.rows for each in order.recomputes),
        )
        if mine.leads:
            self._leader = Leader(
                engine,
                self._links,
                self._logs,
                listeners=order.listeners,
                agreed=order.logs,
                report=self._tell_step,
            )
        self._units.start_standbys(HEAD_START_S if order.logs else 0.0)
        self._standbys_told = False
        self._recompute(order.recomputes)

    def _recompute(self, orders: Sequence[Recompute]) -> None:
        """Make KV of inputs before the first step; frames of others are filed meanwhile."""
        try:
            for _ in recompute(self._units, self._logs, orders):
                self._links.breathe()
        except (RuntimeError, MemoryError, LookupError, ValueError):
            # Whatever is wrong with them, the next plan must not build on them again.
            self._logs.inputs.lose()
            raise

    # --- steps ------------------------------------------------------------------------------------

    def _lead(self, leader: Leader) -> bool:
        drawn = leader.run_step()
        self._drawn += drawn or 0
        return drawn is not None

    def _follow(self, engine: StepEngine) -> bool:
        inbox = self._links.inbox
        self._links.pump()
        if inbox.steps:
            step = inbox.steps.popleft()
            engine.write(step)
            engine.acknowledge(step)
            engine.send_candidates(step, engine.compute(step))
            engine.foresee(step)
            engine.finish(step)
            engine.replicate()
            self._drawn += sum(slot.sample for slot in step.slots)
            return True
        if inbox.requests:
            engine.send_logits(inbox.requests.popleft())
            return True
        return False

    def _break(self, broken: StepBroken) -> None:
        """Stop at once: what the step would have been is for a new epoch to say.

        A member without units that loses its link is not missed in a step: should its
        acknowledgements be, the leader sees that by itself.
        """
        engine = self._engine
        if engine is None:
            return
        self._stop_steps()
        if isinstance(broken, StepOverdue):
            self._step_clock.overdue()
        mine = engine.topology
        if isinstance(broken, LinkBroken) and not mine.is_needed:
            self._links.lost.append(broken.node_id)
            return
        self._pipe.send(
            StepFailed(
                fence=mine.plan.fence,
                step=engine.step,
                node_id=broken.node_id,
                reason=broken.reason,
                broken=broken.broken,
            )
        )


def serve(pipe: WorkerPipe) -> None:
    """Work for the daemon at the other end of a pipe until it says to stop.

    Raises `PipeClosed` when it is gone.
    """
    while (config := pipe.receive()) is None:
        select.select((pipe,), (), ())
    assert isinstance(config, WorkerConfig)
    be_prompt()
    quant = config.model.quant if config.model else "none"
    use_threads(config.threads, quant)
    torch.set_grad_enabled(False)
    try:
        device = choose_device(config.device, quant)
        use_kernels(config.kernels, config.model, device)
        worker = Worker(config, pipe, device)
        _obey_signals(worker)
        try:
            worker.run()
        finally:
            worker.close()
            # To free gigabytes takes a while, and nobody waits for it.
            be_last()
    except PipeClosed:
        raise
    except P2pinferError as error:
        pipe.send(WorkerFailed(message=str(error), usage=isinstance(error, UsageError)))


def _obey_signals(worker: Worker) -> None:
    """SIGUSR1 holds replication on this node, SIGUSR2 lets it go on: for measurements."""

    def obey(number: int, _: FrameType | None) -> None:
        worker.hold_replicas(number == signal.SIGUSR1)

    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, obey)
        signal.signal(signal.SIGUSR2, obey)
