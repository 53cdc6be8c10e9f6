"""Clients that keep a cluster busy, each in a thread: good ones, impatient ones and broken ones.

What each saw of its reply is judged at once, and kept in a `Ledger`.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

from msgspec.structs import replace

from p2pinfer.client import Client, Moved, new_request_id
from p2pinfer.client_link import ClientLink, client_sockets
from p2pinfer.config import parse_address
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Chunk, Finished, Submit
from tests.faults.truth import Truth

MANNERS = {"read": 12, "cancel": 3, "abandon": 2, "garbage": 1}
"""How often a client reads its reply to the end, cancels it, goes without a word, or sends what is
no message."""

OPENINGS = (
    *("Once upon a time", "A brave dog", "The old house", "One day a girl named Clara"),
    *("In the deep wood", "The king said", "It was raining", "Nobody knew why"),
)
FILLER = "The little fox ran into the wood. "
MAX_TOKENS = 300
ANSWER_S = 5.0

Wish = tuple[str, SamplingParams]


def wishes(draw: random.Random, count: int) -> list[Wish]:
    """Prompts, short and long, with settings, greedy and seeded."""
    found: list[Wish] = []
    for number in range(count):
        prompt = f"{draw.choice(OPENINGS)} {number}. "
        if draw.random() < 0.3:
            prompt += FILLER * draw.randrange(10, 100)
        params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=draw.random() < 0.7)
        if draw.random() < 0.5:
            params = replace(
                params,
                temperature=draw.choice((0.7, 1.0)),
                top_k=draw.choice((0, 40)),
                top_p=draw.choice((0.9, 1.0)),
                seed=draw.randrange(1 << 31),
            )
        found.append((prompt, params))
    return found


@dataclass
class Ledger:
    """What all clients saw together. For any thread."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    moves: int = 0
    pauses: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    waiting: dict[int, tuple[float, str]] = field(default_factory=dict)
    """By client: since when (monotonic) it has heard nothing, and of what."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hears(self, client: int, of: str) -> None:
        """A client waits for more of something from now on; of nothing if `of` is empty."""
        with self._lock:
            if of:
                self.waiting[client] = (time.monotonic(), of)
            else:
                self.waiting.pop(client, None)

    def reply(self, manner: str, times: Sequence[float], began: float) -> None:
        """A reply came, at these times, or as much of it as the client wanted."""
        with self._lock:
            self.counts[manner] += 1
            self.tokens += len(times)
            if times:
                self.first.append(times[0] - began)
                gaps = (later - earlier for earlier, later in pairwise(times))
                self.pauses.append(max(gaps, default=0.0))

    def complain(self, among: list[str], text: str) -> None:
        """Something was wrong, or ended in an error; with the time of day, as in the logs."""
        with self._lock:
            among.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {text}")

    def count(self, manner: str) -> None:
        """A client is done that saw no reply, or did not look at it."""
        with self._lock:
            self.counts[manner] += 1

    def moved(self) -> None:
        """A reply went on through another node."""
        with self._lock:
            self.moves += 1

    def hanging(self, longer_than: float) -> list[str]:
        """What clients have waited for without a word for longer than so many seconds."""
        now = time.monotonic()
        with self._lock:
            return [
                f"client {client} waits for {of} since {now - since:.0f} s"
                for client, (since, of) in self.waiting.items()
                if now - since > longer_than
            ]


class Customer(threading.Thread):
    """Asks one thing after the other until told to end. `addresses` is shared, and may change."""

    def __init__(
        self,
        number: int,
        *,
        addresses: dict[str, str],
        pool: Sequence[Wish],
        truth: Truth,
        ledger: Ledger,
        seed: int,
        retry_for: float,
    ) -> None:
        super().__init__(daemon=True, name=f"client-{number}")
        self._number = number
        self._addresses = addresses
        self._pool = pool
        self._truth = truth
        self._ledger = ledger
        self._draw = random.Random(f"{seed}/client/{number}")
        self._retry_for = retry_for
        self._over = threading.Event()

    def end(self) -> None:
        """Begin nothing more."""
        self._over.set()

    def run(self) -> None:
        """Ask until told to end."""
        while not self._over.is_set():
            try:
                self._ask()
            except Exception as error:  # a fault of this program must not look like calm
                self._ledger.complain(self._ledger.errors, f"{self.name}: {error!r}")
            self._ledger.hears(self._number, "")
            self._over.wait(self._draw.expovariate(4.0))

    def _ask(self) -> None:
        (manner,) = self._draw.choices(list(MANNERS), list(MANNERS.values()))
        prompt, params = self._draw.choice(self._pool)
        params = replace(params, max_tokens=self._draw.randrange(1, MAX_TOKENS + 1))
        if manner == "garbage":
            self._send_garbage()
        elif manner == "abandon":
            self._abandon(prompt, params)
        else:
            stop_at = self._draw.randrange(params.max_tokens) if manner == "cancel" else None
            self._read(prompt, params, manner, stop_at)

    def _shuffled(self) -> list[str]:
        addresses = list(self._addresses.values())
        self._draw.shuffle(addresses)
        return addresses

    def _read(self, prompt: str, params: SamplingParams, manner: str, stop_at: int | None) -> None:
        ledger, tokens, times, complete = self._ledger, list[int](), list[float](), False
        request_id = new_request_id()
        label = f"{request_id:016x}, {prompt[:24]!r}, {params.max_tokens} tokens"
        began = time.monotonic()
        ledger.hears(self._number, label)
        try:
            client = Client(self._shuffled(), retry_for=self._retry_for)
            for event in client.submit(prompt, params, request_id=request_id):
                if isinstance(event, Moved):
                    ledger.moved()
                elif isinstance(event, Chunk):
                    ledger.hears(self._number, label)
                    if event.start != len(tokens):
                        ledger.complain(ledger.wrong, f"{label}: a gap or a repetition")
                    tokens += event.tokens
                    times += [time.monotonic()] * len(event.tokens)
                elif isinstance(event, Finished):
                    complete = True
                if stop_at is not None and len(tokens) >= stop_at:
                    break
        except ClusterError as error:
            ledger.complain(ledger.errors, f"{label}: {error.code}: {error.message}")
            ledger.count("failed")
            return
        ledger.hears(self._number, "")
        ledger.reply(manner, times, began)
        if wrong := self._truth.difference(prompt, params, tokens, complete=complete):
            ledger.complain(ledger.wrong, f"{label}: {wrong}")

    def _abandon(self, prompt: str, params: SamplingParams) -> None:
        """Ask, and close the connection in the middle of the answer, without a CANCEL."""
        with client_sockets() as pair, suppress(ClusterError):  # the node may be gone by then
            link = ClientLink(pair, self._shuffled()[0])
            if link.is_up(ANSWER_S):
                link.send(Submit(request_id=new_request_id(), text=prompt, params=params))
                for _ in range(self._draw.randrange(1, 20)):
                    link.receive(0.2)
            link.close()
        self._ledger.count("abandon")

    def _send_garbage(self) -> None:
        """What no ZeroMQ peer would send, or the beginning of what one would, and then nothing."""
        host, port = parse_address(self._shuffled()[0])
        greeting = bytes.fromhex("ff00000000000000017f03014e554c4c")
        noise = self._draw.randbytes(self._draw.randrange(1, 5000))
        begin = greeting if self._draw.random() < 0.5 else b""
        try:
            with socket.create_connection(
                (host, port + self._draw.randrange(3)), ANSWER_S
            ) as stream:
                stream.sendall(begin + noise)
        except OSError:  # the node is gone, or has had enough
            pass
        self._ledger.count("garbage")
