"""A TCP proxy of ours between nodes: it slows, silences or resets each direction of each pair.

A node advertises the proxy's ports instead of its own. Who connects is found from the first bytes
that it sends: HELLO and LINK_OPEN have the sender's node id in them as text. Until then, and for
clients, all passes.

Silence is as on a broken path: bytes stay under way until the path is whole again, and what the
other direction carries still arrives.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pinfer.cluster import HOST, PORT_STEP, LocalCluster, LocalNode, free_base_port
from p2pinfer.config import PORTS_PER_NODE, format_address

CHUNK_BYTES = 1 << 16
NODE_ID_CHARS = 16
GREETING_BYTES = 1 << 14
"""Who has not said who it is in so many bytes is no node."""

RETRANSMIT_S = 0.2
"""TCP's least retransmission time-out (Linux)."""

Direction = tuple[str, str]
"""Names of the node that sends and of the one that is to receive."""


@dataclass(eq=False)
class _Connection:
    """One connection through the proxy: who opened it, once that is known, and to whom it leads."""

    target: str
    opener: str = ""
    greeting: bytes = b""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)


class Proxy:
    """Forwards the ports of some nodes; all its work is done in a thread of its own.

    `who` gives the name of the node whose id it is told, or an empty text.
    """

    def __init__(self, who: Callable[[str], str]) -> None:
        self._who = who
        self._delays: dict[Direction, float] = {}
        self._losses: dict[Direction, float] = {}
        self._draw = random.Random(1)
        self._cuts: set[Direction] = set()
        self._connections: set[_Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End every connection, and the thread."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def forward(self, name: str, front: int, back: int) -> None:
        """Listen on the ports from `front` for the node `name`, which has those from `back`."""
        for offset in range(PORTS_PER_NODE):
            self._call(self._listen(name, front + offset, back + offset))

    # --- faults -----------------------------------------------------------------------------------

    def delay(self, *directions: Direction, seconds: float) -> None:
        """What is sent this way arrives so much later."""
        self._delays |= dict.fromkeys(directions, seconds)

    def lose(self, *directions: Direction, share: float) -> None:
        """So large a share of what is sent this way is lost on the path and sent again by TCP:
        it comes later by the retransmission time-out, which doubles, and all behind it waits."""
        self._losses |= dict.fromkeys(directions, share)

    def cut(self, *directions: Direction) -> None:
        """What is sent this way does not arrive any more; nobody is told."""
        self._cuts |= set(directions)

    def mend(self) -> None:
        """Every path is whole and quick again."""
        self._delays.clear()
        self._losses.clear()
        self._cuts.clear()
        self._call(self._tell())

    def reset(self, one: str, other: str) -> int:
        """Break all connections between two nodes with a TCP reset; returns how many."""
        broken: int = self._call(self._reset({one, other}))
        return broken

    # --- in the thread ----------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _listen(self, name: str, front: int, back: int) -> None:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await self._serve(name, back, reader, writer)
            finally:
                self._tasks.discard(task)

        self._servers.append(await asyncio.start_server(accepted, HOST, front))

    async def _serve(
        self, name: str, back: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        connection = _Connection(target=name, writers=[writer])
        self._connections.add(connection)
        try:
            with suppress(OSError, asyncio.CancelledError):
                there, onward = await asyncio.open_connection(HOST, back)
                connection.writers.append(onward)
                pumps = [
                    asyncio.ensure_future(self._pump(connection, reader, onward, inward=True)),
                    asyncio.ensure_future(self._pump(connection, there, writer, inward=False)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            self._connections.discard(connection)
            for each in connection.writers:
                each.transport.abort()

    async def _pump(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        inward: bool,
    ) -> None:
        """Carry one direction: read at once, write when it is due and the path is whole."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                # This wait is the delay itself, not a guess at how long something takes.
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                while self._direction(connection, inward) in self._cuts:
                    await self._changed.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        delivering = asyncio.ensure_future(deliver())
        try:
            data = b"?"
            while data and not delivering.done():
                data = await reader.read(CHUNK_BYTES)
                if inward:
                    self._identify(connection, data)
                late = self._late(self._direction(connection, inward))
                queue.put_nowait((self._loop.time() + late, data))
            await delivering
        finally:
            delivering.cancel()

    def _late(self, direction: Direction) -> float:
        """By how many seconds a piece comes later than it was sent."""
        late, again = self._delays.get(direction, 0.0), RETRANSMIT_S
        while self._draw.random() < self._losses.get(direction, 0.0):
            late, again = late + again, 2 * again
        return late

    def _direction(self, connection: _Connection, inward: bool) -> Direction:
        ends = (connection.opener, connection.target)
        return ends if inward else (ends[1], ends[0])

    def _identify(self, connection: _Connection, data: bytes) -> None:
        if connection.opener or len(connection.greeting) > GREETING_BYTES:
            return
        connection.greeting += data
        text = connection.greeting.decode("latin-1")
        for at in range(len(text) - NODE_ID_CHARS + 1):
            if name := self._who(text[at : at + NODE_ID_CHARS]):
                connection.opener = name
                return

    async def _reset(self, names: set[str]) -> int:
        found = [c for c in self._connections if {c.opener, c.target} == names]
        for connection in found:
            for writer in connection.writers:
                _abort(writer)
        return len(found)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # one turn of the loop, no time: aborted transports close in it


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN: SO_LINGER of zero seconds."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class ProxiedCluster(LocalCluster):
    """A local cluster whose nodes reach one another through `proxy`; clients connect directly."""

    def __init__(self, nodes: int, *, folder: Path, **options: Any) -> None:
        # All in one piece: none of them is bound yet, so each must know of the others.
        self._base = free_base_port(2 * nodes)
        # What does not pass the proxy cannot be cut there.
        settings = {**(options.pop("options", None) or {}), "local_links": False}
        super().__init__(nodes, base_port=self._base, folder=folder, options=settings, **options)
        self._place = folder
        self._ids: dict[str, str] = {}
        self._fronts: dict[int, int] = {}
        self._backs: dict[int, int] = {}
        self._first_front = self._base + PORT_STEP * nodes
        self.proxy = Proxy(self._named)

    def start_node(self, index: int) -> LocalNode:
        """Start a node that advertises the proxy's address."""
        for each in (0, index):
            if each not in self._fronts:
                self._forward(
                    each, self._first_front + PORT_STEP * each, self._base + PORT_STEP * each
                )
        front = format_address(HOST, self._fronts[index])
        listen = format_address(HOST, self._backs[index])
        join = (format_address(HOST, self._fronts[0]),) if index else ()
        return super().start_node(index, **{"advertise": front, "join": join, "listen": listen})

    def move_node(self, index: int) -> LocalNode:
        """Start a node again at other ports, behind other ports of the proxy; it does not wait."""
        self._forward(index, free_base_port(1), free_base_port(1))
        return self.start_node(index)

    def _forward(self, index: int, front: int, back: int) -> None:
        self._fronts[index], self._backs[index] = front, back
        self.proxy.forward(f"node{index + 1}", front, back)

    def stop(self) -> None:
        """End the nodes, then the proxy."""
        super().stop()
        self.proxy.close()

    def _named(self, text: str) -> str:
        """The name of the node of this id."""
        if text not in self._ids:
            if not all(char in "0123456789abcdef" for char in text):
                return ""
            for file in self._place.glob("*/node_id"):
                self._ids[file.read_text().strip()] = file.parent.name
        return self._ids.get(text, "")
