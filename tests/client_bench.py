"""A node that a client speaks to: a true socket that says what a test wants."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import zmq

from p2pinfer.limits import MAX_CONTROL_BYTES
from p2pinfer.transport import PairLimits, SocketPair
from p2pinfer.types import SamplingParams
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import (
    Accepted,
    Chunk,
    ControlMessage,
    Finished,
    Message,
    Submit,
)

PARAMS = SamplingParams(max_tokens=4)
ID = 7

CLOSE = None
Answer = Callable[[ControlMessage], list[ControlMessage | bytes | None]]


class Node:
    """Answers each message by a script, in which bytes are sent as they are and CLOSE ends it.

    Keeps what it got.
    """

    def __init__(self, answer: Answer) -> None:
        self.got: list[Message] = []
        self.arrived = threading.Semaphore(0)
        self._answer = answer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pair = SocketPair(self._context, limits=PairLimits(MAX_CONTROL_BYTES, 64, 64))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self._pair.bind("127.0.0.1", port)
        self.address = f"tcp://127.0.0.1:{port}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._pair.router.poll(20)
                received = self._pair.receive()
                if received is None:
                    continue
                route, frame = received
                message = decode(frame)
                self.got.append(message)
                self.arrived.release()
                assert isinstance(message, ControlMessage)
                for answer in self._answer(message):
                    if answer is None:
                        return
                    frame = answer if isinstance(answer, bytes) else encode(answer)
                    self._pair.reply(route, frame)
        finally:
            self._pair.shutdown()

    def die(self) -> None:
        """Close the connections, once the client has what was said."""
        self._over.set()
        self._thread.join()

    def close(self) -> None:
        """End the thread and its sockets."""
        self.die()
        self._context.term()


MakeNode = Callable[[Answer], Node]

ACCEPTED = Accepted(request_id=ID, served_by="node1", prompt_ids=(1, 2))
FINISHED = Finished(request_id=ID, reason="length", total_tokens=3, text="!", ttft_s=0.5)


def chunk(start: int, *tokens: int, text: str = "") -> Chunk:
    """A part of the reply."""
    return Chunk(request_id=ID, start=start, tokens=tokens, text=text)


def to_submit(*answers: ControlMessage | bytes | None) -> Answer:
    """A script that answers SUBMIT by these, and nothing else."""
    return lambda message: list(answers) if isinstance(message, Submit) else []
