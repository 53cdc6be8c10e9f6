"""The daemon: one thread that carries what happens to the core, and does what the core decides.

Happens: messages, connections made and lost, the worker's reports, signals, time. The core
(`core/node.py`) answers with outputs; `_act` does each. It knows no rule of the protocol itself.
"""

from __future__ import annotations

import json
import random
import socket
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

import zmq

from p2pinfer import logs, notify
from p2pinfer.clock import LoopClock
from p2pinfer.config import NodeSettings, parse_address
from p2pinfer.core.events import (
    CloseLink,
    Conclude,
    Deliver,
    Exit,
    Fact,
    Input,
    LinkDown,
    LinkUp,
    LoadProgress,
    OpenLink,
    Output,
    Persist,
    Probe,
    ProbeAnswered,
    Received,
    ReplyTo,
    Send,
    ShutdownAsked,
    TellWorker,
    Ticked,
    WorkerDied,
    WorkerReady,
    WorkerSaid,
)
from p2pinfer.core.node import Node
from p2pinfer.disk import DiskWriter
from p2pinfer.errors import (
    ClusterError,
    LocalProtocolError,
    P2pinferError,
    RemoteProtocolError,
    UsageError,
)
from p2pinfer.lifeline import die_with_parent
from p2pinfer.limits import MAX_CONTROL_BYTES, MAX_VOCAB
from p2pinfer.node_setup import LocalModel, await_worker_ports, node_config, worker_config
from p2pinfer.pipe import PipeClosed
from p2pinfer.priority import be_prompt, keep_off
from p2pinfer.serving import Serving
from p2pinfer.signals import StopSignals
from p2pinfer.state_dir import StateDir
from p2pinfer.transport import LinkKind, PairLimits, Reply, SocketPair
from p2pinfer.types import Member, ModelSpec
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import (
    ControlMessage,
    Failed,
    Plane,
    PlanRequest,
    StatusReply,
    StatusRequest,
    Submit,
)
from p2pinfer.worker_process import WorkerProcess

CONTROL_HWM: Final = 1024
"""Control frames queued per peer or client: several seconds of tokens of a full batch."""

FRAMES_PER_TURN: Final = 256
"""Frames handled before timers are looked at again, whoever floods us."""

FORMER_WORKER_S: Final = 10.0
"""How long the worker of this node's former life may take to end: it gives gigabytes back."""

PROBE_S: Final = 1.0
"""A fresh connect that is not answered by then was not refused."""

COMPLAIN_S: Final = 5.0
"""At most one log line about undecodable frames, and one about progress, in that time."""

PROGRESS_S: Final = 2.0
SLOW_TO_HASH_BYTES: Final = 1 << 30
NOTIFY_S: Final = 0.5
GOODBYE_MS: Final = 300
"""How long LEAVE and last replies may take to leave the sockets at the end."""


def run_node(settings: NodeSettings) -> int:
    """Run a node until it is told to end (Ctrl-C, SIGTERM) or cannot go on; returns 0.

    Raises `UsageError` for what this machine's owner must mend (model, ports, state folder) and
    `P2pinferError` for what the cluster's must (nobody to join, refused, the worker died). Call it
    from the main thread, which gets the signals.
    """
    die_with_parent()
    logs.configure()
    model = None if settings.witness else LocalModel.open(settings)
    keep_off(settings.cpus)
    with StateDir(settings.state_dir) as state, StopSignals() as signals:
        try:
            daemon = Daemon(settings, model, state, signals)
        except _Stopped:
            return 0
        try:
            end = daemon.run()
        finally:
            daemon.close()
    if end.error:
        raise UsageError(end.error) if end.exit_code == 2 else P2pinferError(end.error)
    return end.exit_code


class _Stopped(Exception):
    """A stop signal came before there was anything to leave."""


class Daemon:
    """One node's control process. Raises `UsageError` where its ports cannot be had."""

    def __init__(
        self,
        settings: NodeSettings,
        model: LocalModel | None,
        state: StateDir,
        signals: StopSignals,
    ) -> None:
        be_prompt()
        self._settings = settings
        self._signals = signals
        self._log = logs.node_logger(settings.name)
        self._probed: SimpleQueue[ProbeAnswered] = SimpleQueue()
        self._end: Exit | None = None
        self._undecodable = 0
        self._complained_at = self._progress_at = self._notified_at = 0.0
        self._worker_ready = self._told_ready = False
        self._clock = LoopClock()
        with ExitStack() as undo:
            self._pair = self._listen(undo, FORMER_WORKER_S if state.read() else 0.0)
            # Started before the model is hashed: importing torch takes as long.
            self._worker = WorkerProcess(settings.threads, quant=settings.quant, cpus=settings.cpus)
            undo.callback(self._worker.stop)
            spec = model.spec(settings, self._hashing) if model else None
            self._serving = Serving(
                send=self._reply,
                wake=signals.wake,
                tokenizer=model.tokenizer if model else None,
                vocab_size=model.config.vocab_size if model else MAX_VOCAB,
            )
            undo.callback(self._serving.close)
            self._disk = DiskWriter(state, signals.wake)
            undo.callback(self._disk.close)
            self._probes = ThreadPoolExecutor(max_workers=4, thread_name_prefix="probe")
            undo.callback(self._probes.shutdown, wait=False, cancel_futures=True)
            config = node_config(settings, spec, state)
            self._node = Node(config, random.SystemRandom().random)
            self._undo = undo.pop_all()
        self._introduce(model, spec, config.member)

    def _listen(self, undo: ExitStack, patience_s: float) -> SocketPair:
        host, port = parse_address(self._settings.listen)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        undo.callback(context.term)
        limits = PairLimits(MAX_CONTROL_BYTES, CONTROL_HWM, CONTROL_HWM)
        pair = SocketPair(context, limits=limits)
        undo.callback(pair.shutdown, GOODBYE_MS)
        await_worker_ports(host, port, patience_s, self._port_taken)
        pair.bind(host, port)
        return pair

    def _port_taken(self, port: int) -> None:
        if self._signals.asked:
            raise _Stopped
        if self._clock() - self._progress_at >= COMPLAIN_S:
            self._progress_at = self._clock()
            self._log.info("port_taken", port=port, waits_s=FORMER_WORKER_S)

    def _introduce(self, model: LocalModel | None, spec: ModelSpec | None, member: Member) -> None:
        """Tell the worker, and the log, who this node is."""
        folder = model.folder if model else None
        with suppress(PipeClosed):  # found again, with the reason, when the pipe is read
            self._worker.pipe.send(worker_config(self._settings, folder, spec, member))
        self._log.info(
            "node_started",
            address=member.address,
            node_id=member.node_id,
            pid=member.pid,
            worker_pid=self._worker.pid,
            model=spec.name if spec else "none: a witness",
            model_id=spec.model_id[:12] if spec else "",
            dtype=spec.dtype.value if spec else "",
            join=list(self._settings.join),
        )

    def _hashing(self, done: int, total: int) -> None:
        if self._signals.asked:
            raise _Stopped
        if total > SLOW_TO_HASH_BYTES:
            self._progress("hashing_model", done, total)

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> Exit:
        """Turn until the core says `Exit`, which is returned."""
        watchdog = notify.watchdog_interval()
        poller, version = zmq.Poller(), -1
        pipe = self._worker.pipe.fileno()
        asked = False
        self._feed(Ticked())
        while self._end is None:
            if version != self._pair.version:
                poller, version = self._poller(), self._pair.version
            poller.register(pipe, zmq.POLLIN | (zmq.POLLOUT if self._worker.pipe.unsent else 0))
            ready = self._wait(poller, watchdog)
            if self._signals.asked and not asked:
                asked = True
                self._log.info("stopping")
                self._feed(ShutdownAsked())
            if pipe in ready:
                self._read_worker()
            self._read_sockets(ready)
            if self._signals.fileno() in ready:
                self._read_threads()
            if self._clock() >= self._node.deadline:
                self._feed(Ticked())
            if self._clock() >= self._serving.deadline:
                self._feed(*self._serving.sweep(self._clock()))
            self._tell_systemd(watchdog)
        return self._end

    def close(self) -> None:
        """End and reap the worker, let goodbyes leave, close the sockets. Safe to call twice."""
        notify.notify(notify.STOPPING)
        self._undo.close()

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for each in self._pair.pollables():
            poller.register(each, zmq.POLLIN)
        poller.register(self._signals.fileno(), zmq.POLLIN)
        return poller

    def _wait(self, poller: zmq.Poller, watchdog: float | None) -> dict[Any, int]:
        """Wait until something comes, or it is time; returns the sockets and the file descriptors
        that are ready."""
        until = min(self._node.deadline, self._serving.deadline)
        timeout = min(until - self._clock(), watchdog or NOTIFY_S, NOTIFY_S)
        ready = dict(poller.poll(max(0, int(timeout * 1000) + 1)))
        self._clock()
        return ready

    def _read_sockets(self, ready: dict[Any, int]) -> None:
        """What peers and clients sent since the last turn, and what became of links."""
        for event in self._pair.events(ready):
            if event.address and event.kind is LinkKind.UP:
                self._feed(LinkUp(address=event.address))
            elif event.address and event.kind is LinkKind.DOWN:
                self._feed(LinkDown(address=event.address))
        for address, frame in self._pair.receive_answers(ready):
            message = self._decode(frame)
            if message is not None:
                self._feed(Received(message=message, link=address))
        for _ in range(FRAMES_PER_TURN if self._pair.router in ready else 0):
            received = self._pair.receive()
            if received is None:
                break
            route, frame = received
            message = self._decode(frame)
            if message is not None:
                self._take(route, message)

    def _read_threads(self) -> None:
        """What threads of this process have done: each has woken the poll."""
        self._signals.drain()
        self._feed(*self._serving.tokenised())
        self._feed(*self._disk.done())
        while True:
            try:
                self._feed(self._probed.get_nowait())
            except Empty:
                break

    def _read_worker(self) -> None:
        pipe = self._worker.pipe
        try:
            pipe.flush()
            while self._end is None and (report := pipe.receive()) is not None:
                if isinstance(report, LoadProgress):
                    self._progress("loading_weights", report.done_bytes, report.total_bytes)
                elif isinstance(report, WorkerReady):
                    self._worker_ready = True
                    self._log.info(
                        "worker_ready",
                        device=report.device,
                        kernels=report.kernels,
                        numeric_class=report.numeric_class,
                    )
                    if report.rows_matter:
                        self._log.warning("bits_depend_on_rows", numeric_class=report.numeric_class)
                self._feed(WorkerSaid(report=report))
        except (PipeClosed, LocalProtocolError) as error:
            if self._end is None:
                detail = f"{error}; {self._worker.obituary()}"
                self._feed(WorkerDied(detail=detail))

    def _decode(self, frame: bytes) -> ControlMessage | None:
        try:
            message = decode(frame, Plane.CONTROL)
        except RemoteProtocolError as error:
            self._undecodable += 1
            if self._clock() - self._complained_at >= COMPLAIN_S:
                self._complained_at = self._clock()
                self._log.warning("frame_undecodable", error=str(error), so_far=self._undecodable)
            return None
        assert isinstance(message, ControlMessage)
        return message

    def _take(self, route: bytes, message: ControlMessage) -> None:
        """A message on our ROUTER: a client's, or a peer's for the core."""
        match message:
            case Submit():
                self._feed(*self._serving.submit(route, message, self._clock()))
            case StatusRequest():
                body = json.dumps(self._node.status(self._clock())).encode()
                self._reply(route, StatusReply(request_id=message.request_id, body=body))
            case PlanRequest():
                self._reply(route, self._plan_reply(message))
            case _:
                self._feed(Received(message=message, route=route))

    def _plan_reply(self, message: PlanRequest) -> StatusReply | Failed:
        try:
            body = json.dumps(self._node.plan_object(message.without)).encode()
        except ClusterError as error:
            return Failed(
                request_id=message.request_id,
                code=error.code,
                message=error.message,
                retryable=error.retryable,
            )
        return StatusReply(request_id=message.request_id, body=body)

    # --- what the core wants done -----------------------------------------------------------------

    def _feed(self, *inputs: Input) -> None:
        """Hand inputs to the core and do what it wants, and what follows from that."""
        waiting = deque(inputs)
        while waiting:
            for output in self._node.handle(waiting.popleft(), self._clock()):
                waiting.extend(self._act(output))

    def _act(self, output: Output) -> Iterable[Input]:
        match output:
            case Send():
                self._send(output.address, output.message)
            case ReplyTo():
                self._reply(output.route, output.message)
                if isinstance(output.message, Failed):
                    self._serving.forget(output.route, output.message.request_id)
            case Deliver():
                return self._serving.deliver(output, self._clock())
            case Conclude():
                self._serving.conclude(output, self._clock())
            case TellWorker():
                with suppress(PipeClosed):  # its end is told when the pipe is read
                    self._worker.pipe.send(output.order)
            case OpenLink():
                self._open(output.address)
            case CloseLink():
                self._pair.close(output.address)
            case Persist():
                self._disk.write(output.number, output.state)
            case Probe():
                self._probes.submit(self._probe, output.address)
            case Exit():
                self._end = self._end or output
            case Fact():
                logs.log_fact(self._log, output)
        return ()

    def _send(self, address: str, message: ControlMessage) -> None:
        try:
            self._pair.send(address, encode(message))
        except LocalProtocolError as error:
            self._log.error("message_not_sent", error=str(error))

    def _reply(self, route: bytes, message: ControlMessage) -> Reply:
        try:
            return self._pair.reply(route, encode(message))
        except LocalProtocolError as error:
            self._log.error("message_not_sent", error=str(error))
            return Reply.SENT

    def _open(self, address: str) -> None:
        try:
            self._pair.open(address)
        except UsageError as error:  # an address that a peer told us
            self._log.warning("link_not_opened", error=str(error))

    def _probe(self, address: str) -> None:
        """In a thread of its own: name resolution and connecting may take their time."""
        try:
            with socket.create_connection(parse_address(address), PROBE_S):
                refused = False
        except ConnectionRefusedError:
            refused = True
        except (OSError, UsageError):
            refused = False
        self._probed.put(ProbeAnswered(address=address, refused=refused))
        self._signals.wake()

    # --- telling others ---------------------------------------------------------------------------

    def _progress(self, event: str, done: int, total: int) -> None:
        if self._clock() - self._progress_at >= PROGRESS_S:
            self._progress_at = self._clock()
            self._log.info(event, percent=int(100 * done / max(1, total)), total_bytes=total)

    def _tell_systemd(self, watchdog: float | None) -> None:
        """READY when this node is a member with a working worker, even if the cluster still waits
        for others: a unit's start must not depend on machines that boot later."""
        if self._clock() - self._notified_at < min(NOTIFY_S, watchdog or NOTIFY_S):
            return
        self._notified_at = self._clock()
        if watchdog is not None:
            notify.notify(notify.WATCHDOG)
        if (
            self._worker_ready
            and not self._told_ready
            and self._node.status(self._clock())["cluster_id"]
        ):
            self._told_ready = True
            notify.notify(notify.READY)
