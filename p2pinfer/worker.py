"""The worker: a node's data plane, in a process of its own.

It obeys the plans that the control plane gives it over a pipe, loads the units it owns, and
computes steps: those it is sent or, on the leader, those its scheduler makes. It decides nothing
about who owns what. A process of its own keeps heartbeats free of the interpreter's lock, and lets
the control plane see a compute loop that hangs.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections import deque
from pathlib import Path

import click
import psutil
import torch
import zmq

from p2pinfer.core.blocks import BLOCK_POSITIONS, BlockPool
from p2pinfer.core.events import (
    ActivatePlan,
    AnyOrder,
    CancelRequest,
    LinkLost,
    LoadPlan,
    LoadProgress,
    PlanLoaded,
    RequestEnded,
    StartRequest,
    StepFailed,
    StopWorker,
    TokensDrawn,
    WorkerFailed,
    WorkerReady,
    WorkerStats,
)
from p2pinfer.core.scheduler import EndedReply, Scheduler
from p2pinfer.core.topology import Topology, kv_room, position_limit, topology, weight_bytes
from p2pinfer.errors import ClusterError, P2pinferError, RemoteProtocolError, UsageError
from p2pinfer.leader import Leader
from p2pinfer.lifeline import die_with_parent
from p2pinfer.limits import MAX_BULK_BYTES, MAX_STEP_BYTES
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import load_config
from p2pinfer.model.llama import StageLoader
from p2pinfer.model.numeric_class import numeric_class
from p2pinfer.model.runner import StageRunner
from p2pinfer.model.weights import Weights
from p2pinfer.pipe import PipeClosed, WorkerConfig, WorkerPipe, worker_side
from p2pinfer.step_engine import StepEngine
from p2pinfer.step_links import StepBroken, StepLinks
from p2pinfer.transport import PairLimits, SocketPair
from p2pinfer.types import Fence
from p2pinfer.wire.messages import DrawnToken

HEADROOM_BYTES = 450 << 20

STATS_EVERY_S = 0.2
PROGRESS_EVERY_S = 0.2
STEP_HWM = 2048
"""Frames queued per step link: a step's exchanges of every layer, with room."""


class StepInterrupted(P2pinferError):
    """An order came that ends the step in hand."""


class Worker:
    """Takes orders, computes steps, reports."""

    def __init__(self, config: WorkerConfig, pipe: WorkerPipe) -> None:
        self._config = config
        self._pipe = pipe
        self._device = choose_device(config.device)
        self._folder = Path(config.model_folder)
        self._llama = load_config(self._folder)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._steps = SocketPair(
            self._context, limits=PairLimits(MAX_STEP_BYTES, STEP_HWM, STEP_HWM)
        )
        self._bulk = SocketPair(self._context, limits=PairLimits(MAX_BULK_BYTES, 64, 64))
        identity = (config.node_id, config.boot_id)
        self._links = StepLinks(
            self._steps,
            identity,
            pipe_fd=pipe.fileno(),
            interrupt=self._interrupt,
            on_pause=self._tell,
        )
        self._orders: deque[AnyOrder] = deque()
        self._stopping = False
        self._loaded: tuple[Topology, StageRunner | None] | None = None
        self._engine: StepEngine | None = None
        self._leader: Leader | None = None
        self._scheduler: Scheduler | None = None
        self._kv_limit = 0
        self._stats_at = 0.0
        self._drawn = 0
        self._rate = 0.0

    # --- life -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Obey until told to stop or the control plane is gone."""
        config = self._config
        self._steps.bind(config.listen_host, config.step_port)
        self._bulk.bind(config.listen_host, config.bulk_port)
        self._pipe.send(
            WorkerReady(
                numeric_class=numeric_class(config.model.dtype, self._device),
                device=str(self._device),
                threads=torch.get_num_threads(),
                memory_bytes=offered_memory(self._device),
            )
        )
        while not self._stopping:
            try:
                self._turn()
            except StepInterrupted:
                continue
            except StepBroken as broken:
                self._break(broken)
            except (RemoteProtocolError, RuntimeError, MemoryError) as error:
                # A product that fails, or a step that nothing explains, is no reason to die.
                reason = str(error).partition("\n")[0] or type(error).__name__
                self._break(StepBroken(config.node_id, reason))
            self._tell()

    def close(self) -> None:
        """Close every socket at once."""
        self._steps.shutdown()
        self._bulk.shutdown()
        self._context.destroy(linger=0)

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
        if busy:
            # A busy loop still looks for orders between two steps.
            self._read_orders()
        else:
            self._links.idle(STATS_EVERY_S)

    def _read_orders(self) -> None:
        while (order := self._pipe.receive()) is not None:
            assert not isinstance(order, WorkerConfig)
            self._orders.append(order)

    def _interrupt(self) -> None:
        """Called while waiting, when the pipe has something. What ends a step raises."""
        self._read_orders()
        if any(isinstance(order, LoadPlan | StopWorker) for order in self._orders):
            raise StepInterrupted("a new plan, or the end")

    def _tell(self) -> None:
        """Report links that broke and, several times a second, counters."""
        self._drop_bulk()
        while self._links.lost:
            self._pipe.send(LinkLost(node_id=self._links.lost.pop()))
        now = time.monotonic()
        if now - self._stats_at < STATS_EVERY_S:
            return
        elapsed = now - self._stats_at if self._stats_at else STATS_EVERY_S
        self._rate = 0.7 * self._rate + 0.3 * self._drawn / elapsed
        self._drawn, self._stats_at = 0, now
        self._pipe.send(self._stats())

    def _drop_bulk(self) -> None:
        """Nothing is sent in bulk yet: what comes is counted, and connections are taken note of."""
        while self._bulk.receive() is not None:
            self._links.traffic.dropped += 1
        self._bulk.events()

    def _stats(self) -> WorkerStats:
        engine, scheduler, traffic = self._engine, self._scheduler, self._links.traffic
        clock = engine.clock if engine else None
        return WorkerStats(
            steps=clock.steps if clock else 0,
            owes_step=engine.owes if engine else 0,
            hears_steps=self._links.heard_within(1.0),
            tokens_per_s=round(self._rate, 3),
            kv_used_bytes=engine.kv_used_bytes if engine else 0,
            kv_limit_bytes=self._kv_limit,
            running=scheduler.running if scheduler else 0,
            waiting=scheduler.waiting if scheduler else 0,
            dropped_frames=traffic.dropped,
            messages_sent=traffic.messages,
            bytes_sent=traffic.bytes,
            compute_s=clock.compute_s if clock else 0.0,
            exchange_s=clock.exchange_s if clock else 0.0,
            wait_s=traffic.wait_s,
            python_s=clock.python_s if clock else 0.0,
        )

    # --- orders -----------------------------------------------------------------------------------

    def _obey(self, order: AnyOrder) -> None:
        match order:
            case LoadPlan():
                self._load(order)
            case ActivatePlan():
                self._activate(order.fence)
            case StartRequest():
                self._start(order)
            case CancelRequest():
                if self._scheduler is not None:
                    self._scheduler.cancel(order.request_id)
            case StopWorker():
                self._stopping = True

    def _load(self, order: LoadPlan) -> None:
        """Stop obeying the active plan, free what it held, and load what `order` says."""
        held, self._loaded = self._loaded, None
        self._engine = self._leader = None
        self._links.close()
        fence = order.plan.fence
        try:
            mine = topology(order.plan, order.me)
            runner = self._same_units(mine, held)
            held = None
            if runner is None and mine.holding.stage is not None:
                runner = self._load_units(mine)
            self._links.open(order.plan, order.me)
        except StepInterrupted:
            raise
        except (P2pinferError, OSError, RuntimeError, MemoryError) as error:
            self._pipe.send(PlanLoaded(fence=fence, error=str(error) or type(error).__name__))
            return
        self._loaded = (mine, runner)
        loaded = runner.weight_bytes if runner else 0
        self._pipe.send(PlanLoaded(fence=fence, weight_bytes=loaded))

    @staticmethod
    def _same_units(
        mine: Topology, held: tuple[Topology, StageRunner | None] | None
    ) -> StageRunner | None:
        """What the last plan made this node hold, without its KV, if the new one says the same."""
        if held is None or held[1] is None or held[0].holding != mine.holding:
            return None
        held[1].cache.clear()
        return held[1]

    def _load_units(self, mine: Topology) -> StageRunner:
        model, holding = mine.plan.model, mine.holding
        total = weight_bytes(model, holding)
        done, told = 0, time.monotonic()

        def progress(more: int) -> None:
            nonlocal done, told
            done += more
            if time.monotonic() - told >= PROGRESS_EVERY_S:
                told = time.monotonic()
                self._pipe.send(LoadProgress(done_bytes=done, total_bytes=max(done, total)))
                self._links.pump()

        weights = Weights(Checkpoint.open(self._folder, self._llama))
        loader = StageLoader(weights, self._llama, model, self._device, progress)
        return StageRunner(loader.load(holding), holding, self._llama, model, self._device)

    def _activate(self, fence: Fence) -> None:
        if self._loaded is None or self._loaded[0].plan.fence != fence:
            return
        mine, runner = self._loaded
        # What is loaded stays: without this a collection now and then walks all of torch, in the
        # middle of a step that other nodes wait for.
        gc.freeze()
        self._kv_limit = kv_room(mine.plan, mine.me) or 0
        self._engine = StepEngine(mine, runner, self._links)
        self._links.activate(mine)
        if not mine.leads:
            self._scheduler = None
            return
        pool = BlockPool(max(1, position_limit(mine.plan) // BLOCK_POSITIONS))
        if self._scheduler is None:
            self._scheduler = Scheduler(
                pool=pool,
                max_positions=mine.plan.model.max_positions,
                eos_token_ids=frozenset(mine.plan.model.eos_token_ids),
            )
        else:
            for request_id in self._scheduler.restart(pool):
                self._refuse(request_id, "node_lost", "the nodes that remain lack room for its KV")
        self._leader = Leader(self._engine, self._links, self._scheduler)

    def _start(self, order: StartRequest) -> None:
        if self._scheduler is None:
            self._refuse(order.request_id, "not_ready", "this node does not lead a ready cluster")
            return
        try:
            ended = self._scheduler.add(
                order.request_id, order.prompt_ids, order.received, order.params, time.monotonic()
            )
        except ClusterError as error:
            self._refuse(order.request_id, error.code, error.message)
            return
        if ended is not None:
            self._end(ended)

    def _refuse(self, request_id: int, code: str, message: str) -> None:
        self._pipe.send(
            RequestEnded(
                request_id=request_id, reason="error", total_tokens=0, code=code, message=message
            )
        )

    # --- steps ------------------------------------------------------------------------------------

    def _lead(self, leader: Leader) -> bool:
        results = leader.run_step()
        if results is None:
            return False
        drawn = tuple(r for r in results if isinstance(r, DrawnToken))
        if drawn:
            self._drawn += len(drawn)
            self._pipe.send(TokensDrawn(tokens=drawn))
        for result in results:
            if isinstance(result, EndedReply):
                self._end(result)
        return True

    def _end(self, reply: EndedReply) -> None:
        self._pipe.send(
            RequestEnded(
                request_id=reply.request_id,
                reason=reply.reason,
                total_tokens=reply.total_tokens,
                ttft_s=reply.ttft_s,
                tokens_per_s=reply.tokens_per_s,
            )
        )

    def _follow(self, engine: StepEngine) -> bool:
        inbox = self._links.inbox
        self._links.pump()
        if inbox.steps:
            step = inbox.steps.popleft()
            offers = engine.compute(step)
            if step.slots and engine.topology.holding.vocab_units:
                engine.send_candidates(step, offers)
            self._drawn += sum(slot.sample for slot in step.slots)
            return True
        if inbox.requests:
            engine.send_logits(inbox.requests.popleft())
            return True
        return False

    def _break(self, broken: StepBroken) -> None:
        """Stop at once: what the step would have been is for a new epoch to say."""
        engine = self._engine
        self._engine = self._leader = None
        self._links.close()
        if engine is not None:
            fence = engine.topology.plan.fence
            failed = StepFailed(
                fence=fence, step=engine.step, node_id=broken.node_id, reason=broken.reason
            )
            self._pipe.send(failed)


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`; raises `UsageError` where there is no such device."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {wanted}: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def offered_memory(device: torch.device) -> int:
    """Bytes that the device has free for weights and KV, within the control group's limit.

    `HEADROOM_BYTES` are left for activations, masks and temporary copies while loading.
    """
    if device.type == "cuda":
        return max(1, int(torch.cuda.mem_get_info(device)[0]) - HEADROOM_BYTES)
    available = max(1, psutil.virtual_memory().available - HEADROOM_BYTES)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return int(available)
    return int(min(available, max(1, limit - used - HEADROOM_BYTES)))


@click.command()
@click.option("--pipe-fd", type=int, required=True)
def main(pipe_fd: int) -> None:
    """Run a worker; started by the daemon, not by people."""
    die_with_parent()
    # Ctrl-C in a terminal reaches the whole group: the daemon alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = worker_side(pipe_fd)
    try:
        _serve(pipe)
    except PipeClosed:
        raise SystemExit(1) from None


def _serve(pipe: WorkerPipe) -> None:
    while (config := pipe.receive()) is None:
        select.select((pipe,), (), ())
    assert isinstance(config, WorkerConfig)
    if config.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, config.cpus)
    torch.set_num_threads(config.threads)
    torch.set_grad_enabled(False)
    try:
        worker = Worker(config, pipe)
        try:
            worker.run()
        finally:
            worker.close()
    except PipeClosed:
        raise
    except P2pinferError as error:
        pipe.send(WorkerFailed(message=str(error), usage=isinstance(error, UsageError)))


if __name__ == "__main__":
    main()
