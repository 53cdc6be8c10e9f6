"""A simulated cluster: machines, the network between them, clients, and who watches them."""

from __future__ import annotations

from msgspec import Struct

from p2pinfer.core import events as e
from p2pinfer.core.timing import Timing
from p2pinfer.wire.messages import ControlMessage
from tests.simulation import toy_model as toy
from tests.simulation.clients import Clients
from tests.simulation.judge import Judge
from tests.simulation.machine import Machine, MakeNode, Process
from tests.simulation.network import Network
from tests.simulation.world import World

TIMING = Timing(
    heartbeat_every=0.2,
    dead_after=1.2,
    hang_after=1.2,
    pair_after=0.9,
    settle=0.2,
    straggle=0.5,
    hello_retry=0.5,
    unable_for=1.0,
    unable_max=4.0,
    slow_after=2.0,
    give_up_hung=8.0,
    first_word=2.0,
)
"""The ratios of the control plane's own presets; fewer heartbeats, since each costs real time."""

RESTART_S = 1.0
"""A process that ends in an error is started again, as systemd does."""


LINGER_S = 0.3
"""How long a daemon that ends lets its last words leave."""


class Setting(Struct, frozen=True, kw_only=True):
    """What a cluster is like.

    `kinds` are the machines' numeric classes, `window` how many positions of a unit a standby
    grants an owner (0: as many as truly), `keep_inputs` whether they keep what KV is made of.
    """

    nodes: int = 3
    layout: str = "heads"
    quorum: str = "majority"
    replicas: int = 0
    window: int = 0
    kinds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = (1.0,)
    weights: tuple[float, ...] = (1.0,)
    witness: bool = False
    keep_inputs: tuple[bool, ...] = (False,)
    wait_for_nodes: float = 4.0
    orphan_timeout: float = 1.5
    drain_timeout: float = 4.0
    join_timeout: float = 15.0
    min_nodes: int = 1


class Cluster:
    """Starts, stops and asks machines."""

    def __init__(
        self, world: World, setting: Setting, reference: toy.Reference, make_node: MakeNode
    ) -> None:
        self.world = world
        self.make_node = make_node
        self.setting = setting
        self.network = Network(world)
        self.machines: list[Machine] = []
        self.judge = Judge(self, reference)
        alike = not any(setting.kinds)
        self.clients = Clients(self, reference, alike=alike)
        self.calm = False
        self.losing: dict[str, int] = {}
        """How many of the next control messages of each kind, by name, are lost."""
        self.last_death = -1.0
        self.deaths = 0
        """Processes that were killed, or ended in an error."""
        self.struck = 0
        """Faults that struck."""

    # --- machines ---------------------------------------------------------------------------------

    def add_machine(self, join: tuple[Machine, ...] = ()) -> Machine:
        """A new machine, which does not run yet; `join` are those it asks."""
        machine = Machine(self, len(self.machines) + 1)
        place = machine.number - 1
        setting = self.setting
        machine.kind = setting.kinds[place % len(setting.kinds)]
        machine.rate = setting.rates[place % len(setting.rates)]
        machine.weight = setting.weights[place % len(setting.weights)]
        machine.keeps_inputs = setting.keep_inputs[place % len(setting.keep_inputs)]
        machine.witness = setting.witness and machine.number == setting.nodes
        machine.join = tuple(other.address for other in join)
        self.machines.append(machine)
        return machine

    def boot(self, machine: Machine) -> None:
        """Start the node of a machine that does not run one."""
        if machine.running or machine.gone:
            return
        machine.boots += 1
        self.network.dark.discard(machine.number)
        stored = machine.disk.state
        setting = self.setting
        config = e.NodeConfig(
            member=machine.member(blank=stored is None and bool(machine.join)),
            model=None if machine.witness else toy.MODEL,
            cluster_id=f"{0xC0 + machine.number:x}{machine.boots:014x}",
            join=machine.join,
            stored=stored,
            layout=setting.layout,
            replicas=setting.replicas,
            quorum=setting.quorum,
            wait_for_nodes=setting.wait_for_nodes,
            orphan_timeout=setting.orphan_timeout,
            drain_timeout=setting.drain_timeout,
            join_timeout=setting.join_timeout,
            min_nodes=setting.min_nodes,
            timing=TIMING,
        )
        state = "with its state" if stored else "without state"
        self.world.tell(machine.number, f"starts {state}")
        self.judge.started(machine.number, stored)
        machine.process = Process(machine, config)

    def crash(self, machine: Machine, *, silent: bool = False, wipe: bool = False) -> None:
        """A machine's process dies; `silent`: with its machine; `wipe`: and its disk is lost."""
        process = machine.process
        if process is None or not process.alive:
            return
        self.world.tell(machine.number, "loses its power" if silent else "is killed")
        self.last_death = self.world.now
        self.deaths += 1
        self.judge.kv.dies(process)
        if silent:
            self.network.dark.add(machine.number)
        process.end(silent=silent)
        self.clients.process_ended(process)
        if wipe:
            machine.disk.wipe()
            others = [m for m in self.machines if m is not machine and not m.gone]
            machine.join = tuple(other.address for other in others)

    def exited(self, process: Process, output: e.Exit) -> None:
        """A node ends its process."""
        machine = process.machine
        self.world.tell(machine.number, f"exits: {output.error or 'as told'}")
        process.end(silent=False, linger_s=LINGER_S)
        self.clients.process_ended(process)
        if output.error:
            self.world.count("a node ended in an error")
            self.last_death = self.world.now
            self.deaths += 1
            self.world.later(RESTART_S, self.boot, machine)
        elif machine.returns:
            machine.returns = False
            self.world.later(RESTART_S, self.boot, machine)
        else:
            machine.gone = True

    def drained(self, route: bytes, *, done: bool) -> None:
        """A client that asked for a drain has its answer."""
        self.world.count("a drain was done" if done else "a drain failed")

    def loses(self, message: ControlMessage) -> bool:
        """Whether this message is one of those that are to be lost."""
        name = type(message).__name__
        left = self.losing.get(name, 0)
        if left:
            self.losing[name] = left - 1
        return left > 0

    # --- what there is ----------------------------------------------------------------------------

    def living(self) -> list[Process]:
        """Processes that run."""
        return [m.process for m in self.machines if m.process is not None and m.process.alive]

    def by_boot(self, boot_id: str) -> Process | None:
        """The living process with that boot id."""
        return next((p for p in self.living() if p.boot_id == boot_id), None)

    def leader(self) -> Machine | None:
        """Who leads in the highest term, if anybody says so."""
        leading = [p for p in self.living() if p.leads_in]
        return max(leading, key=lambda p: p.leads_in).machine if leading else None

    def changing(self) -> bool:
        """Whether a plan has been made ready somewhere that is newer than all in force."""
        return self.judge.newest > self.judge.adopted

    def activating(self) -> bool:
        """Whether the newest plan is in force at some of its members and not yet at others."""
        active = [p.worker.active for p in self.living()]
        fences = [mine.plan.fence if mine else None for mine in active]
        return self.judge.adopted in fences and len(set(fences)) > 1

    def recovering(self) -> bool:
        """Whether somebody died, and no plan came into force since."""
        return self.last_death >= 0 and self.judge.adopted_at < self.last_death

    def agreed(self) -> bool:
        """Whether all living nodes are ready, under one plan of exactly themselves."""
        living = self.living()
        first = living[0].worker.active if living else None
        if first is None:
            return False
        fence = first.plan.fence
        for process in living:
            mine = process.worker.active
            if mine is None or mine.plan.fence != fence or not process.node.ready:
                return False
        boots = sorted(process.boot_id for process in living)
        return sorted(member.boot_id for member in first.plan.members) == boots
