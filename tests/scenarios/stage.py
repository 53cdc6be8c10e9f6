"""The simulated cluster that a play runs on: fixed delays, named nodes, and a record of facts.

It is the world of `tests/simulation` without anything random: what is drawn there is always the
middle of its range here, except that nodes draw different waits before elections, the first in the
alphabet the shortest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from p2pinfer.core import events as e
from p2pinfer.core.node import Node
from p2pinfer.wire.codec import decode
from p2pinfer.wire.messages import BY_KIND, Message, Plane
from tests.scenarios.words import fact_in_words, failover_in_words, message_in_words
from tests.simulation import toy_model as toy
from tests.simulation.clients import Client, Clients
from tests.simulation.cluster import Cluster, Setting
from tests.simulation.judge import Judge
from tests.simulation.machine import Machine, Process
from tests.simulation.network import Network
from tests.simulation.network import Process as Peer
from tests.simulation.world import World

TOGETHER_S = 0.06
"""What several nodes say alike within this time is told in one line."""

PROMPT = (11, 12, 13, 14, 21)
T = TypeVar("T")
Where = tuple[str, str, str]
"""A kind of message, its sender and its receiver, by their names."""


class Steady(Random):
    """No random numbers: always the same one, in the middle unless said otherwise."""

    def __init__(self, value: float = 0.5) -> None:
        super().__init__(0)
        self._value = value

    def random(self) -> float:
        """The number."""
        return self._value

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        """The first one."""
        return seq[0]


class SteadyWorld(World):
    """A world without chance; what is told goes to `say(machine, text)`."""

    def __init__(self, say: Callable[[int, str], None]) -> None:
        super().__init__(0)
        self._say = say

    def stream(self, name: str) -> Random:
        """Each boot's own number for elections, the middle for everything else."""
        purpose, _, which = name.partition("/")
        if purpose == "draw":
            return Steady((int(which[:2], 16) - 0.5) / 5 % 1)
        return Steady()

    def tell(self, machine: int, text: str) -> None:
        """A line of the story."""
        super().tell(machine, text)
        self._say(machine, text)


class WatchedNetwork(Network):
    """Loses the messages that it is told to lose, and shows all to `seen`."""

    def __init__(self, world: World, seen: Callable[[Where, Message], None]) -> None:
        super().__init__(world)
        self.names: dict[int, str] = {}
        self.to_lose: Counter[Where] = Counter()
        self._seen = seen

    def send(self, process: Peer, plane: Plane, address: str, frame: bytes) -> bool:
        """As before, unless this very message is to be lost."""
        target = self.machines.get(address, 0)
        return self._vanishes(process.number, target, plane, frame) or super().send(
            process, plane, address, frame
        )

    def reply(self, process: Peer, route: bytes, frame: bytes) -> bool:
        """The same, for an answer on the connection that a message came from."""
        receivers = (c.back.receiver for c in self.connections() if c.route == route)
        target = next((receiver.number for receiver in receivers), 0)
        return self._vanishes(process.number, target, Plane.CONTROL, frame) or super().reply(
            process, route, frame
        )

    def _vanishes(self, source: int, target: int, plane: Plane, frame: bytes) -> bool:
        message = decode(frame, plane)
        kind = BY_KIND[type(message)].name
        where = (kind, self.names.get(source, "?"), self.names.get(target, "?"))
        self._seen(where, message)
        if self.to_lose[where] > 0:
            self.to_lose[where] -= 1
            return True
        return False


class ListeningJudge(Judge):
    """Holds everybody to what was promised, as ever, and passes facts on."""

    def __init__(
        self, cluster: Cluster, reference: toy.Reference, hear: Callable[[Process, e.Fact], None]
    ) -> None:
        super().__init__(cluster, reference)
        self._hear = hear

    def fact(self, process: Process, fact: e.Fact) -> None:
        """A node says that something became true."""
        super().fact(process, fact)
        self._hear(process, fact)


class DirectedClients(Clients):
    """Clients that do nothing unless the play says so."""

    def __init__(self, cluster: Cluster, reference: toy.Reference) -> None:
        super().__init__(cluster, reference, alike=True)
        self.conclusions: dict[int, e.Conclude] = {}

    def submit(self, client: Client, *, avoid: Machine | None = None) -> None:
        """Its node is gone, or refused it: it waits for the play."""

    def conclude(self, process: Process, output: e.Conclude) -> None:
        """Remember how a reply ended."""
        super().conclude(process, output)
        self.conclusions[output.request_id] = output


class Stage:
    """The cluster of one play. `lines` are what was told and not yet taken."""

    def __init__(self, names: Sequence[str], setting: Setting) -> None:
        self.world = SteadyWorld(self._told)
        reference = toy.Reference()
        self.reference = reference
        self.cluster = Cluster(self.world, setting, reference, Node)
        self.network = self.cluster.network = WatchedNetwork(self.world, self._seen)
        self.cluster.judge = ListeningJudge(self.cluster, reference, self._fact)
        self.clients = self.cluster.clients = DirectedClients(self.cluster, reference)
        self.told_kinds: set[str] = set()
        self.recent: Counter[Where] = Counter()
        """All messages that were sent, by kind, sender and receiver."""

        self.adoptions = 0
        self.requests: dict[str, Client] = {}
        self._lines: list[tuple[float, list[str], str]] = []
        for name in names:
            machine = self.cluster.add_machine()
            machine.name = name
            self.network.names[machine.number] = name

    # --- the record -------------------------------------------------------------------------------

    def _line(self, who: str, text: str) -> None:
        for at, others, said in reversed(self._lines):
            if self.world.now - at > TOGETHER_S:
                break
            if said == text and who and others != [""]:
                if who not in others:
                    others.append(who)
                    return
                break
        self._lines.append((self.world.now, [who], text))

    def _fact(self, process: Process, fact: e.Fact) -> None:
        if isinstance(fact, e.PlanAdopted) and fact.leader == process.machine.name:
            self.adoptions += 1
        if text := fact_in_words(fact, process.machine.name, self.request_name):
            self._line(process.machine.name, text)

    def _seen(self, where: Where, message: Message) -> None:
        kind, source, target = where
        self.recent[where] += 1
        lost = self.network.to_lose[where] > 0
        if lost or kind in self.told_kinds:
            text = message_in_words(message, self.request_name)
            self._line(f"{source} > {target}", f"{text}{' is lost' if lost else ''}")

    def _told(self, number: int, text: str) -> None:
        who = self.network.names.get(number, "")
        words = text.split()
        if words[0] == "request":
            self._line("", f"{self.request_name(int(words[1]))} ends: {words[3]}")
        elif not text.startswith(("starts without", "is killed", "loses its power")):
            self._line(who, text)

    def take(self) -> list[str]:
        """The lines since the last time, with their times in seconds."""
        lines, self._lines = self._lines, []
        told = []
        for at, names, text in lines:
            who = " ".join(sorted(names))
            told.append(f"{at:.2f} {who}: {text}" if who else f"{at:.2f} {text}")
        return told

    # --- names ------------------------------------------------------------------------------------

    def request_name(self, request_id: int) -> str:
        """`r1`, by its id."""
        return next((n for n, c in self.requests.items() if c.request_id == request_id), "?")

    def machine(self, name: str) -> Machine:
        """A machine by its name."""
        for machine in self.cluster.machines:
            if machine.name == name:
                return machine
        raise ValueError(f"there is no node {name}")

    def process(self, name: str) -> Process:
        """The running node of that name."""
        process = self.machine(name).process
        if process is None or not process.alive:
            raise ValueError(f"{name} does not run")
        return process

    # --- time -------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.world.run_until(self.world.now + seconds)

    def until(self, condition: Callable[[], bool], seconds: float = 12.0) -> None:
        """Let time pass until something holds."""
        if not condition() and not self.world.run_until(self.world.now + seconds, condition):
            told = "\n".join(self.take())
            raise ValueError(f"that is not so within {seconds:g} s:\n{told}")

    def at_rest(self) -> bool:
        """Whether all living nodes obey one plan of all of them, in which all of them vote."""
        if not self.cluster.agreed():
            return False
        topology = self.cluster.living()[0].worker.active
        return topology is not None and len(topology.plan.voters) == len(topology.plan.members)

    # --- clients ----------------------------------------------------------------------------------

    def submit(self, name: str, through: str, tokens: int) -> None:
        """A client submits a new request through a node."""
        client = self.clients.add((*PROMPT, len(self.requests) + 1), tokens, 1)
        self.requests[name] = client
        client.attempt = self.clients.connect(client, self.process(through))

    def resume(self, name: str, through: str, *, wrong: bool) -> None:
        """A client goes on through a node, with the tokens that it has, or with a wrong one."""
        client = self.requests[name]
        if wrong:
            client.lied_to = True
            client.shown[-1] = (client.shown[-1] + 1) % toy.MODEL.vocab_size
        client.end = ""
        client.attempt = self.clients.connect(client, self.process(through))

    def reply(self, name: str) -> str:
        """What a client has of its reply, in words."""
        client = self.requests[name]
        truth = self.reference.reply(client.prompt, client.params.max_tokens)
        shown = tuple(client.shown)
        right = "as without faults" if shown == truth[: len(shown)] else "not those without faults"
        text = f"{name}: {client.end or 'goes on'}, {len(shown)} of {len(truth)} tokens, {right}"
        conclusion = self.clients.conclusions.get(client.request_id)
        failovers = conclusion.failovers if conclusion and client.end == "complete" else ()
        told = [failover_in_words(f, len(client.prompt)) for f in failovers]
        return "\n".join((text, *(f"  {each}" for each in told)))
