"""The pipe between a node's two processes: the control plane (daemon) and the worker.

A socketpair that carries `msgspec` MessagePack (never pickle), each message behind its length in
four bytes. The daemon's side never blocks, in either direction: a worker deep in a long step does
not hold up heartbeats. The worker's side may wait for the daemon to read, which it always does.
"""

from __future__ import annotations

import select
import socket
from typing import Any, Final, Generic, TypeVar

import msgspec

from p2pinfer.core.events import AnyOrder, AnyReport
from p2pinfer.core.step_clock import LEAST_S
from p2pinfer.errors import LocalProtocolError, P2pinferError
from p2pinfer.types import Identity, ModelSpec

MAX_PIPE_BYTES: Final = 256 << 20
"""One message: a million tokens take about 5 MB, and `PlanLoaded` has those of all requests."""

_LENGTH_BYTES: Final = 4
_READ_BYTES: Final = 1 << 18

Out = TypeVar("Out", bound=msgspec.Struct)
In = TypeVar("In", bound=msgspec.Struct)


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message to a worker: who it is and what it may use.

    `model` is None for a witness, which holds no model. Quantised weights are kept in the folder
    `copies`. `standby` is how weights are kept for others (`UnitHolder`). No step is overdue before
    `least_step_s` seconds. `kernels` compute on a CPU what is not quantised. `speed` says whether
    the machine's is to be measured (`measurement.machine_speed`). `local_links`: frames for nodes
    on this machine go over Unix sockets.
    """

    node_id: Identity
    boot_id: Identity
    name: str
    model_folder: str = ""
    model: ModelSpec | None = None
    listen_host: str
    step_port: int
    bulk_port: int
    device: str
    kernels: str = "auto"
    threads: int
    standby: str = "auto"
    copies: str = ""
    speed: str = "off"
    local_links: bool = True
    least_step_s: float = LEAST_S


class PipeClosed(P2pinferError):
    """The other process has closed its end, or is gone."""


class Pipe(Generic[Out, In]):
    """One end: sends `Out` structs, receives `In` structs. For one thread.

    With `patient`, `send` waits until the other side has taken everything; without, what does not
    fit is kept, `unsent` is true, and `flush` sends on when `fileno()` is writable.
    """

    def __init__(self, end: socket.socket, incoming: Any, *, patient: bool) -> None:
        end.setblocking(False)
        self._end = end
        self._patient = patient
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(incoming)
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._eof = False

    def fileno(self) -> int:
        """The file descriptor to poll: readable when something came or the other end closed."""
        return self._end.fileno()

    @property
    def unsent(self) -> bool:
        """Something waits until the other side reads."""
        return bool(self._outgoing)

    def send(self, struct: Out) -> None:
        """Send a struct, or keep what does not fit now.

        Raises `PipeClosed`, and `LocalProtocolError` when it is larger than `MAX_PIPE_BYTES`.
        """
        body = self._encoder.encode(struct)
        if len(body) > MAX_PIPE_BYTES:
            raise LocalProtocolError(
                f"a {type(struct).__name__} of {len(body)} bytes is too large for the worker's pipe"
            )
        self._outgoing += len(body).to_bytes(_LENGTH_BYTES, "little")
        self._outgoing += body
        self.flush()
        while self._patient and self._outgoing:
            select.select((), (self._end,), ())
            self.flush()

    def flush(self) -> None:
        """Send on what was kept, as far as it goes now. Raises `PipeClosed`."""
        while self._outgoing:
            try:
                sent = self._end.send(self._outgoing)
            except BlockingIOError:
                return
            except OSError as error:
                raise PipeClosed(f"the pipe is closed: {error.strerror}") from error
            del self._outgoing[:sent]

    def receive(self) -> In | None:
        """The next struct, or None when there is none yet.

        Raises `PipeClosed` once the other end is closed and all it sent has been returned, and
        `LocalProtocolError` for bytes that no version of this program sends.
        """
        body = self._next_body()
        if body is None and not self._eof:
            self._fill()
            body = self._next_body()
        if body is None:
            if self._eof:
                raise PipeClosed("the other process has closed the pipe")
            return None
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise LocalProtocolError(f"no message of the worker's pipe: {error}") from error

    def close(self) -> None:
        """Close this end; the other one sees it."""
        self._end.close()

    def _fill(self) -> None:
        while not self._eof:
            try:
                piece = self._end.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                piece = b""
            self._eof = not piece
            self._incoming += piece

    def _next_body(self) -> bytes | None:
        if len(self._incoming) < _LENGTH_BYTES:
            return None
        end = _LENGTH_BYTES + int.from_bytes(self._incoming[:_LENGTH_BYTES], "little")
        if end > MAX_PIPE_BYTES + _LENGTH_BYTES:
            raise LocalProtocolError(f"a message of {end} bytes on the worker's pipe")
        if len(self._incoming) < end:
            return None
        body = bytes(self._incoming[_LENGTH_BYTES:end])
        del self._incoming[:end]
        return body


DaemonPipe = Pipe[AnyOrder | WorkerConfig, AnyReport]
WorkerPipe = Pipe[AnyReport, AnyOrder | WorkerConfig]


def daemon_side(end: socket.socket) -> DaemonPipe:
    """The control plane's end of a `socket.socketpair()`: sends orders, receives reports."""
    return Pipe(end, AnyReport, patient=False)


def worker_side(fd: int) -> WorkerPipe:
    """The worker's end, from the file descriptor it was started with."""
    return Pipe(socket.socket(fileno=fd), AnyOrder | WorkerConfig, patient=True)
