"""Simulated clients: they submit, lose their nodes, go away, come back elsewhere, and keep count.

What a client was shown may never be repeated, skipped or contradicted; where all nodes compute
alike it is the reply of a cluster without faults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pinfer.core import events as e
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import ControlMessage, Done, Failed
from tests.simulation import toy_model as toy
from tests.simulation.world import check

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster
    from tests.simulation.machine import Machine, Process

KEEPALIVE_S = 2.0
"""Within this time a daemon notices that a client's connection is gone."""

PATIENCE_S = 3.0
"""A liar waits so long for its answer."""


class Attempt:
    """One connection of a client to a node: `next` is the reply token due on it."""

    def __init__(self, client: Client, number: int, process: Process, received: list[int]) -> None:
        self.client = client
        self.route = b"c%d.%d" % (client.request_id, number)
        self.process = process
        self.next = len(received)
        self.open = True
        self.over = False
        self.liar = False
        self.answered_at = 0.0
        self.answered_late: bool | None = None
        """Whether the reply had been completed already when the first word of it came this way."""

    def answered(self, *, late: bool) -> None:
        """A node says something of the reply."""
        if self.answered_late is None:
            self.answered_late = late


class Client:
    """Somebody who wants a reply. `shown` is what it has of it, over all its connections."""

    def __init__(self, request_id: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = SamplingParams(max_tokens=max_tokens)
        self.shown: list[int] = []
        self.attempts = 0
        self.attempt: Attempt | None = None
        self.end = ""
        """`complete`, or the code of the error that it took for an answer."""
        self.gone = False
        """It went away for good."""
        self.concluded = False
        """A node has said that its reply is complete, whether that reached it or not."""
        self.tries = 6
        self.lied_to = False
        """Somebody submitted its request with a wrong token."""


class Clients:
    """All of them. `alike`: all nodes are of one numeric class."""

    def __init__(self, cluster: Cluster, reference: toy.Reference, *, alike: bool) -> None:
        self.all: list[Client] = []
        self.world = cluster.world
        self._cluster = cluster
        self._reference = reference
        self._alike = alike
        self._random = cluster.world.stream("clients")
        self._attempts: dict[bytes, Attempt] = {}
        self._liars: list[Attempt] = []

    def prompt_tokens(self, request_id: int) -> int:
        """How long a request's prompt is."""
        return len(self.all[request_id - 1].prompt)

    def add(self, prompt: tuple[int, ...], max_tokens: int, tries: int) -> Client:
        """A new client, which has not submitted yet."""
        client = Client(len(self.all) + 1, prompt, max_tokens)
        client.tries = tries
        self.all.append(client)
        return client

    @property
    def waiting(self) -> list[Client]:
        """Those that are there and have no end of their reply."""
        return [client for client in self.all if not client.end and not client.gone]

    # --- what clients do --------------------------------------------------------------------------

    def submit(self, client: Client, *, avoid: Machine | None = None) -> None:
        """Submit or resume through some node that runs; wait where there is none."""
        if client.end or client.gone or client.attempt is not None:
            return
        machines = [m for m in self._cluster.machines if m.running and m is not avoid]
        machines = machines or [m for m in self._cluster.machines if m.running]
        if not machines:
            self.world.later(0.5, self.submit, client)
            return
        machine = self._random.choice(machines)
        assert machine.process is not None
        if client.shown:
            self.world.count("a client resumed with tokens")
            if self._cluster.changing():
                self.world.count("resume while no plan is in force")
        client.attempt = self._attempt(client, machine.process, client.shown)

    def connect(self, client: Client, process: Process) -> Attempt:
        """Submit through that very node."""
        return self._attempt(client, process, client.shown)

    def _attempt(self, client: Client, process: Process, received: list[int]) -> Attempt:
        client.attempts += 1
        attempt = Attempt(client, client.attempts, process, received)
        self._attempts[attempt.route] = attempt
        submitted = e.ClientSubmitted(
            route=attempt.route,
            request_id=client.request_id,
            prompt_ids=client.prompt,
            received=tuple(received),
            params=client.params,
            attempt=client.attempts,
        )
        self.world.later(self._random.uniform(0.0005, 0.003), process.take, submitted)
        return attempt

    def vanish(self, client: Client, *, for_good: bool) -> None:
        """The client's connection ends; it comes back through another node, or never."""
        attempt = client.attempt
        if client.end or attempt is None:
            return
        self._hang_up(attempt)
        client.attempt = None
        if for_good:
            client.gone = True
            self.world.count("a client vanished for good")
        else:
            self.world.count("a client moved")
            wait = self._random.uniform(0.0, 0.6)
            machine = attempt.process.machine
            self.world.later(wait, lambda: self.submit(client, avoid=machine))

    def _hang_up(self, attempt: Attempt) -> None:
        attempt.open = False
        self.world.later(self._random.uniform(0.1, KEEPALIVE_S), self._notice, attempt)

    def _notice(self, attempt: Attempt) -> None:
        """The daemon sees that nobody is there any more."""
        if attempt.over or not attempt.process.alive:
            return
        attempt.over = True
        here = (a for a in self._attempts.values() if a.process is attempt.process)
        if not any(a.open and a.client is attempt.client for a in here):
            cancelled = e.ClientCancelled(request_id=attempt.client.request_id, reason="orphan")
            attempt.process.take(cancelled)

    def lie(self, client: Client) -> None:
        """Somebody submits the client's request elsewhere with a wrong token."""
        if client.end or client.gone or client.attempt is None or not client.shown:
            return
        machines = [
            m
            for m in self._cluster.machines
            if m.running and m.process is not client.attempt.process
        ]
        if not machines:
            return
        client.lied_to = True
        wrong = [*client.shown[:-1], (client.shown[-1] + 1) % toy.MODEL.vocab_size]
        process = self._random.choice(machines).process
        assert process is not None
        attempt = self._attempt(client, process, wrong)
        attempt.liar = True
        self._liars.append(attempt)
        self.world.count("a wrong token was submitted")
        self.world.later(PATIENCE_S, self._hang_up, attempt)

    def process_ended(self, process: Process) -> None:
        """Clients of a process that is gone notice, and go elsewhere."""
        for attempt in [a for a in self._attempts.values() if a.process is process]:
            attempt.over = True
            if attempt.open:
                attempt.open = False
                wait = self._random.uniform(0.002, 0.3)
                self.world.later(wait, self._lost, attempt)

    def _lost(self, attempt: Attempt) -> None:
        client = attempt.client
        if client.attempt is attempt:
            client.attempt = None
            self.submit(client, avoid=attempt.process.machine)

    # --- what clients get -------------------------------------------------------------------------

    def _find(self, process: Process, route: bytes) -> Attempt:
        attempt = self._attempts[route]
        check(attempt.process is process, "a reply of a node that was not asked")
        return attempt

    def _later(self, attempt: Attempt, what: object, *arguments: object) -> None:
        """What a node says arrives, in order."""
        assert callable(what)
        wait = self._random.uniform(0.0003, 0.002)
        attempt.answered_at = max(attempt.answered_at, self.world.now + wait)
        self.world.at(attempt.answered_at, what, attempt, *arguments)

    def deliver(self, process: Process, output: e.Deliver) -> None:
        """A node has tokens for a client."""
        attempt = self._find(process, output.route)
        client = attempt.client
        check(not attempt.over or not attempt.open, "tokens after the end")
        check(
            output.start == attempt.next,
            f"tokens from {output.start} on where {attempt.next} was due",
        )
        attempt.next += len(output.tokens)
        attempt.answered(late=client.concluded)
        if not attempt.open:
            self._notice(attempt)
            return
        if self._alike and not attempt.liar and not client.lied_to:
            truth = self._reference.reply(client.prompt, client.params.max_tokens)
            end = output.start + len(output.tokens)
            check(
                output.tokens == truth[output.start : end],
                f"request {client.request_id} has {output.tokens} from {output.start} on, "
                f"not {truth[output.start : end]}",
            )
        self._later(attempt, self._show, output.start, output.tokens)

    def _show(self, attempt: Attempt, start: int, tokens: tuple[int, ...]) -> None:
        client = attempt.client
        if not attempt.open or attempt.liar:
            return
        shown = client.shown
        known = shown[start : start + len(tokens)]
        check(tuple(known) == tokens[: len(known)], "what a client was shown is contradicted")
        check(start <= len(shown), "a token of a reply was skipped")
        shown += tokens[len(known) :]
        self.world.moment("Shown", attempt.process.number)

    def conclude(self, process: Process, output: e.Conclude) -> None:
        """A node says that a reply is over."""
        attempt = self._find(process, output.route)
        check(not (attempt.over and attempt.open), "a reply ends twice")
        attempt.over = True
        if output.code:
            self._later(attempt, self._failed, output.code, output.retryable)
            return
        check(
            output.total_tokens == attempt.next,
            f"{output.total_tokens} tokens are said, {attempt.next} were delivered",
        )
        attempt.answered(late=attempt.client.concluded)
        attempt.client.concluded |= not attempt.liar
        self._later(attempt, self._complete, output.reason)

    def answer(self, process: Process, route: bytes, message: ControlMessage) -> None:
        """A node answers a client outside of a reply's tokens."""
        if isinstance(message, Failed) and route in self._attempts:
            attempt = self._find(process, route)
            attempt.over = True
            self._later(attempt, self._failed, message.code, message.retryable)
        elif isinstance(message, Done | Failed):
            self._cluster.drained(route, done=isinstance(message, Done))

    def _complete(self, attempt: Attempt, reason: str) -> None:
        client = attempt.client
        if attempt.liar:
            self.world.count("a wrong token was taken for true")
            attempt.open = False
            # After the end nobody remembers the request: it is a new one, which begins as it says.
            check(
                client.end != "complete" or attempt.answered_late,
                "two replies that contradict each other are complete",
            )
            client.end = client.end or "log_conflict"
            return
        if not attempt.open:
            return
        attempt.open = False
        tokens = client.shown
        last = bool(tokens) and tokens[-1] == toy.EOS
        room = min(client.params.max_tokens, toy.MODEL.max_positions - len(client.prompt))
        check(
            reason == ("stop" if last else "length") and (last or len(tokens) == room),
            f"request {client.request_id} ends as {reason} after {len(tokens)} tokens",
        )
        if self._alike and not client.lied_to:
            truth = self._reference.reply(client.prompt, client.params.max_tokens)
            check(tuple(tokens) == truth, "a reply is not the one without faults")
        self._end(client, attempt, "complete")

    def _failed(self, attempt: Attempt, code: str, retryable: bool) -> None:
        client = attempt.client
        self.world.count(f"error {code}")
        if attempt.liar:
            attempt.open = False
            if code == "log_conflict":
                self.world.count("a wrong token was refused")
            return
        if not attempt.open:
            return
        attempt.open = False
        if client.attempt is not attempt:
            return
        client.attempt = None
        client.tries -= 1
        check(
            code in EXPLAINED or (code == "log_conflict" and client.lied_to),
            f"request {client.request_id} ends in {code}",
        )
        if retryable and client.tries > 0:
            wait = self._random.uniform(0.1, 0.8)
            self.world.later(wait, lambda: self.submit(client, avoid=attempt.process.machine))
        else:
            self._end(client, attempt, code)

    def _end(self, client: Client, attempt: Attempt, end: str) -> None:
        client.end, client.attempt = end, None
        self.world.count(f"a request ended: {end}")
        machine = attempt.process.number
        self.world.tell(machine, f"request {client.request_id} ended: {end}")


EXPLAINED = frozenset(("no_quorum", "not_ready", "leaving", "internal"))
"""Errors that a request may end in under faults. `log_conflict` is none: what a client was shown is
committed, and never contradicted."""
