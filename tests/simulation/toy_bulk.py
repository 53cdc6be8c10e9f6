"""A toy worker's replicas: the true `BulkLinks` and `Replicator` over a simulated socket.

Nothing in them waits, so nothing of them has to be made anew here; only what they take for the time
is simulated, and how small their portions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from p2pinfer import replicator
from p2pinfer.bulk_links import BulkLinks
from p2pinfer.core import replication
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology
from p2pinfer.core.units import kv_bytes_per_position
from p2pinfer.replicator import Replicator, partners
from p2pinfer.transport import SocketPair
from p2pinfer.wire.messages import Step
from tests.simulation import toy_model as toy
from tests.simulation.toy_pair import ToyPair
from tests.simulation.toy_units import ToyUnits

if TYPE_CHECKING:
    from tests.simulation.machine import Process

ROW_BYTES = kv_bytes_per_position(toy.MODEL, toy.MODEL.num_layers)
"""Of one position of a head unit, in a plan of one stage."""


class _Clock:
    """Stands where the replicator has the module `time`."""

    def __init__(self, process: Process) -> None:
        self.monotonic = process.machine.monotonic


@contextmanager
def narrow(rows: int) -> Iterator[None]:
    """Windows of that many positions of one unit, and portions to match; 0: as they truly are."""
    if not rows:
        yield
        return
    narrowed = (
        (replication, "WINDOW_BYTES", rows * ROW_BYTES),
        (replication, "FRAME_BYTES", max(1, rows // 4) * ROW_BYTES),
        (replication, "MORE_ROWS", max(1, rows // 4)),
        (replicator, "STEP_BYTES", rows * ROW_BYTES),
        (replicator, "LEAST_BYTES", ROW_BYTES),
        (replicator, "STEP_FRAMES", max(1, rows // 2)),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in narrowed]
    for module, name, value in narrowed:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class ToyBulk:
    """Exchanges delta KV under the plan in force."""

    def __init__(self, process: Process, logs: TokenLogs, units: ToyUnits) -> None:
        self.pair = ToyPair(process)
        self.working = False
        """It is at it: whatever comes now is read later."""
        self._process = process
        self._logs = logs
        self._units = units
        member = process.config.member
        pair = cast(SocketPair, self.pair)
        self._links = BulkLinks(pair, (member.node_id, member.boot_id))
        self._replicator: Replicator | None = None
        self._out: set[int] = set()
        """Standbys whose credit is used up."""

    def taken_over(self, filling: bool) -> None:
        """A plan makes this node the owner of what it was a standby of."""
        world = self._process.world
        world.count("a standby is to take units over")
        world.moment("Promotion", self._process.number)
        if not self._units.complete:
            world.count("units taken over before their weights were there")
        if filling:
            world.count("units taken over while they filled")

    @property
    def filling(self) -> bool:
        """Whether it has asked for KV that did not come yet."""
        return bool(self.pair.asked)

    @property
    def behind(self) -> int:
        """Positions that the replica here lacks that lacks the most."""
        return self._replicator.behind if self._replicator else 0

    # --- plans ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The plan in force is left for another: what has come under it is taken first."""
        with self._at_work() as at_work:
            self._links.look()
            if at_work is not None:
                at_work.drain()
        self._replicator = None
        self._links.close()
        self.pair.asked.clear()

    def load(self, mine: Topology) -> None:
        """Connect to those that a plan makes this node exchange KV with."""
        self._links.load(mine, partners(mine.plan, mine.me))

    def activate(self, mine: Topology, computed: Mapping[int, int]) -> None:
        """The plan is in force; owners have so many positions of each request."""
        self._links.activate()
        with self._at_work():
            self._replicator = Replicator(
                mine, self._units.cache, self._links, self._logs, computed
            )
        self._out = set()

    def halt(self) -> None:
        """No more steps under this plan; what still comes is taken."""
        if self._replicator is not None:
            self._replicator.halt()

    # --- steps ------------------------------------------------------------------------------------

    def stepped(self, step: Step) -> None:
        """A step's tokens are written, and it begins."""
        with self._at_work() as at_work:
            assert at_work is not None
            at_work.stepped(step)

    def finished(self, step: Step) -> None:
        """A step is computed here."""
        with self._at_work() as at_work:
            assert at_work is not None
            at_work.finished(step)

    def turn(self) -> bool:
        """Send, read, answer and ask; whether there was any of it to do."""
        with self._at_work() as at_work:
            self._links.look()
            if at_work is None:
                # Whatever comes now is of a plan that is over, or is kept for one to come.
                return self._links.receive() is not None
            answered = self.pair.answered
            busy = at_work.turn()
            self._look_at_credit(at_work)
        if self.pair.answered > answered and self._units.lacking:
            self._process.world.count("KV came before the weights of standbys were there")
        return busy

    @contextmanager
    def _at_work(self) -> Iterator[Replicator | None]:
        before, replicator.time = replicator.time, _Clock(self._process)  # type: ignore[assignment]
        self.working = True
        try:
            yield self._replicator
        finally:
            self.working = False
            replicator.time = before

    def _look_at_credit(self, at_work: Replicator) -> None:
        feed = at_work._feed
        out = {i for i in feed.standbys if feed._credit.get(i, ROW_BYTES) < ROW_BYTES}
        for _ in out - self._out:
            self._process.world.count("credit ran out")
        self._out = out
