"""A worker that computes the toy model: the data plane of one node, without processes or sockets.

It joins the same pure parts as `p2pinfer/worker.py` and `leader.py` do (gate, logs, step maker,
step clock, topology), but never blocks: what the true worker waits for, its task gives out, and it
goes on when that is there. Between two steps, and while there is none, replicas are kept up to
date; weights of standbys are read in the background.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.orders import GaveWay, GiveWay
from p2pinfer.core.recompute import recompute
from p2pinfer.core.replication import computed_units
from p2pinfer.core.step_clock import StepClock
from p2pinfer.core.step_maker import StepMaker, StepReport
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology, topology
from p2pinfer.types import Fence, ModelSpec
from p2pinfer.wire.messages import Plane, Step
from tests.simulation import toy_model as toy
from tests.simulation import toy_times as times
from tests.simulation.toy_bulk import ToyBulk
from tests.simulation.toy_engine import Frames, Sleep, ToyEngine, Wait, made
from tests.simulation.toy_links import StepBroken, ToyLinks
from tests.simulation.toy_units import ToyUnits
from tests.simulation.world import check

if TYPE_CHECKING:
    from tests.simulation.machine import Process

Task = Generator[Wait, None, None]


class ToyWorker:
    """Takes orders, computes steps, reports; `model` is None on a witness."""

    def __init__(self, process: Process, model: ModelSpec | None) -> None:
        self.process = process
        self.world = process.world
        self.hung = False
        self.logs = TokenLogs()
        self.engine: ToyEngine | None = None
        self.maker: StepMaker | None = None
        self.loading: Fence | None = None
        self.links = ToyLinks(process, self._look)
        self._model = model
        self.units = ToyUnits(self.logs)
        self.bulk = ToyBulk(process, self.logs, self.units)
        self._steps = StepClock()
        self._random = self.world.stream(f"worker/{process.boot_id}")
        self._ready = self._over = False
        self._orders: deque[e.AnyOrder] = deque()
        self._frames: deque[tuple[bytes, bytes]] = deque()
        self._loaded: Topology | None = None
        self._held = self._in_force = Fence()
        """Of the plan whose units are held, loaded or not; of the one that was activated since."""
        self._listeners: tuple[int, ...] = ()
        self._step: Step | None = None
        self._task: Task | None = None
        self._wait: Wait | None = None
        self._task_number = 0
        self._late = False
        """The processor is done with what the task waited for, while the worker stood still."""
        self._limit_at = self._resumes_at = 0.0
        self._rows = self._recomputed = 0
        self.world.later(self._random.uniform(*times.STARTS_S), self._begin)

    # --- life -------------------------------------------------------------------------------------

    @property
    def active(self) -> Topology | None:
        """The plan in force here."""
        return self.engine.topology if self.engine else None

    def ended(self) -> None:
        """The process is gone."""
        self._over = True
        self._task = None

    def hang(self) -> None:
        """Nothing of it moves any more."""
        self.hung = True

    def move(self) -> None:
        """It moves again, and finds what came meanwhile."""
        if not self.hung or self._over:
            return
        self.hung = False
        self._guard(self._catch_up)

    def _catch_up(self) -> None:
        for plane in (Plane.STEPS, Plane.BULK):
            self.process.network.resumed(self.process, plane)
        if self._late:
            self._late = False
            self._wait = None
        self._turn()

    def _begin(self) -> None:
        if self._over:
            return
        if self.hung:
            self.world.later(times.STATS_S, self._begin)
            return
        self._ready = True
        kind = f"kind{self.process.machine.kind}" if self._model else ""
        self._say(e.WorkerReady(numeric_class=kind, device="cpu", threads=1, memory_bytes=0))
        self._tell()
        self._guard(self._turn)

    def _tell(self) -> None:
        """Counters, several times a second, whatever else it does."""
        if self._over:
            return
        self.world.later(times.STATS_S * self._random.uniform(0.9, 1.1), self._tell)
        if self.hung:
            return
        if self.loading is not None:
            self._say(e.LoadProgress(done_bytes=1, total_bytes=2))
        engine, maker = self.engine, self.maker
        stats = e.WorkerStats(
            steps=engine.steps if engine else 0,
            owes_step=engine.owes if engine else 0,
            hears_steps=self.links.heard_within(1.0),
            running=maker.scheduler.running if maker else 0,
            waiting=maker.scheduler.waiting if maker else 0,
            dropped_frames=self.links.dropped,
            standby_units_ready=self.units.kept - self.units.lacking,
            standby_units_wanted=self.units.kept,
            standby_behind=self.bulk.behind,
            fence=self._in_force,
            compute_ms=20.0 * self.process.machine.pace if engine and engine.steps else 0.0,
        )
        self._say(stats)
        self._guard(self._check_time)
        self._guard(self._turn)

    def _say(self, report: e.AnyReport) -> None:
        self.process.report(report)

    # --- what happens to it -----------------------------------------------------------------------

    def order(self, order: e.AnyOrder) -> None:
        """The control plane says something."""
        if not self._over:
            self._orders.append(order)
            self._guard(self._turn)

    def reads(self, plane: Plane) -> bool:
        """Whether it takes in what comes on its links."""
        return not self.hung and not (plane is Plane.BULK and self.bulk.pair.full)

    def arrived(self, plane: Plane, route: bytes, frame: bytes) -> None:
        """A frame came on a link."""
        if self._over:
            return
        if plane is Plane.STEPS:
            self._frames.append((route, frame))
        else:
            self.bulk.pair.arrived(route, frame)
        if not self.bulk.working:
            self._guard(self._turn)

    def link_changed(self, plane: Plane, address: str, *, up: bool) -> None:
        """A link is connected, or broke."""
        if plane is Plane.STEPS:
            self.links.changed(address, up=up)
        else:
            self.bulk.pair.changed(address, up=up)
            self._guard(self._turn)

    def _look(self) -> None:
        """Time to look at what became of the links."""
        if self._over:
            return
        if self.hung:
            self.world.later(times.STATS_S, self._look)
            return
        self._guard(self._look_now)

    def _look_now(self) -> None:
        try:
            self.links.look()
        finally:
            while self.links.lost:
                self._say(e.LinkLost(node_id=self.links.lost.pop()))
        self._turn()

    def _guard(self, what: Callable[[], None]) -> None:
        """Do something that a broken step may put an end to."""
        while not self._over and not self.hung:
            try:
                what()
                return
            except StepBroken as broken:
                self._break(broken)
                what = self._turn

    # --- turns ------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Do all that can be done without waiting."""
        while not (self.hung or self._over) and self._ready:
            if any(isinstance(o, e.LoadPlan | e.Halt | e.StopWorker) for o in self._orders):
                self._drop_task()
            if isinstance(self._wait, Sleep) and self.loading is None:
                return
            self._file()
            if self._task is not None:
                if not self._go_on():
                    return
            elif self._orders:
                self._obey(self._orders.popleft())
            elif not self._begin_step():
                if self.bulk.turn():
                    self.world.later(times.BULK_TURN_S, self._again)
                return

    def _again(self) -> None:
        """A portion of delta KV is done; there may be more of it."""
        self._guard(self._turn)

    def _file(self) -> None:
        while self._frames:
            self.links.file(*self._frames.popleft())

    def _go_on(self) -> bool:
        """Go on with the task; false when it must wait."""
        if isinstance(self._wait, Sleep):
            return False
        if isinstance(self._wait, Frames) and self._wait.owing() is not None:
            return False
        assert self._task is not None
        try:
            self._wait = next(self._task)
        except StopIteration:
            self._task = self._wait = None
            return True
        if isinstance(self._wait, Sleep):
            wait = self._wait.seconds * self.process.machine.pace
            self.world.later(wait, self._woke, self._task_number)
        return True

    def _woke(self, number: int) -> None:
        if self._over or number != self._task_number:
            return
        if self.hung:
            self._late = True
            return
        self._wait = None
        self._guard(self._turn)

    def _start_task(self, task: Task) -> None:
        self._task_number += 1
        self._task, self._wait, self._late = task, None, False

    def _drop_task(self) -> None:
        self._task_number += 1
        self._task = self._wait = self.loading = None
        self._late = False

    def _break(self, broken: StepBroken) -> None:
        """Stop at once: what the step would have been is for a new epoch to say."""
        engine = self.engine
        self._drop_task()
        self._stop_steps()
        if engine is not None:
            failed = e.StepFailed(
                fence=engine.topology.plan.fence,
                step=engine.step,
                node_id=broken.node_id,
                reason=broken.reason,
            )
            self._say(failed)

    # --- orders -----------------------------------------------------------------------------------

    def _obey(self, order: e.AnyOrder) -> None:
        match order:
            case e.LoadPlan():
                self._load(order)
            case e.ActivatePlan():
                self._activate(order)
            case e.Halt():
                self._stop_steps()
            case GiveWay():
                self._give_way(order.fence)
            case e.StartRequest():
                self._start(order)
            case e.CancelRequest() if self.maker is not None:
                self.maker.cancel(order.request_id)
            case e.StopWorker():
                self.ended()

    def _stop_steps(self) -> None:
        """Obey no plan; logs and KV stay, and KV of its steps is still taken."""
        self.engine = self.maker = None
        self.links.close()
        self.bulk.halt()

    def _load(self, order: e.LoadPlan) -> None:
        filling = self.bulk.filling
        self.bulk.leave()
        self._stop_steps()
        self._loaded = None
        mine = topology(order.plan, order.me)
        taken = self.logs.coverage.fed & computed_units(order.plan, order.me).keys()
        self.units.hold(mine)
        self._held, self._in_force = order.plan.fence, Fence()
        if taken:
            self.bulk.taken_over(filling)
        loaded = e.PlanLoaded(
            fence=order.plan.fence,
            logs=self.logs.snapshot(),
            coverage=self.logs.covered(order.plan),
            inputs=self.logs.kept_inputs(order.plan),
        )
        self.loading = order.plan.fence
        self._start_task(self._loads(mine, loaded))

    def _loads(self, mine: Topology, loaded: e.PlanLoaded) -> Task:
        """Read weights, then connect to the others."""
        quick = self.units.complete
        self.bulk.load(mine)
        yield Sleep(times.RELOADS_S if quick else self._random.uniform(*times.LOADS_S))
        self.units.load()
        self.links.open(mine)
        until = self.world.now + times.LINK_TIMEOUT_S
        while member := self.links.unconnected():
            if self.world.now > until:
                self.loading = None
                error = f"no step link to {member}"
                self._say(e.PlanLoaded(fence=loaded.fence, error=error))
                return
            yield Sleep(0.02)
        self._loaded = mine
        self.loading = None
        self._say(loaded)

    def _activate(self, order: e.ActivatePlan) -> None:
        mine = self._loaded
        if mine is None or mine.plan.fence != order.fence or self.engine is not None:
            return
        self._in_force = order.fence
        self.units.forget(self.logs.adopt(order.logs))
        for log in order.logs:
            self.units.cache.open(log.request_id)
        judge = self.process.cluster.judge
        self.engine = ToyEngine(mine, self.logs, self.units, self.links, judge)
        judge.activated(self.process, order)
        if mine.leads:
            self._listeners = tuple(sorted(set(order.listeners) - {mine.me}))
            self.maker = StepMaker(mine, self._listeners, order.logs, times.MAX_STEP_TOKENS)
            self._resumes_at = 0.0
            self.links.on_ack = self._acked
        self.links.activate(mine)
        self.bulk.activate(mine, order.computed)
        self._load_next(mine.plan.fence)
        self._recomputed = sum(each.rows for each in order.recomputes)
        self._start_task(made(recompute(self.units, self.logs, order.recomputes)))

    def _load_next(self, fence: Fence) -> None:
        """In the background: read the weights that are kept for the next owner, if some lack."""
        if self.units.lacking:
            wait = self._random.uniform(*times.STANDBY_LOADS_S) * self.process.machine.pace
            self.world.later(wait, self._loaded_next, fence)

    def _loaded_next(self, fence: Fence) -> None:
        if self._over or self._held != fence:
            return
        if not self.hung:
            self.units.load_next()
        self._load_next(fence)

    def _start(self, order: e.StartRequest) -> None:
        if self.maker is not None:
            self._say_all(self.maker.start(order))

    # --- steps ------------------------------------------------------------------------------------

    def _begin_step(self) -> bool:
        """Begin what there is to compute, if there is."""
        if self.engine is None:
            return False
        if self.maker is not None:
            return self._lead(self.engine, self.maker)
        if not self.links.inbox.steps:
            return False
        self._start_task(self._follow(self.engine, self.links.inbox.steps.popleft()))
        return True

    def _lead(self, engine: ToyEngine, maker: StepMaker) -> bool:
        self._check_time()
        step = maker.next_step() if self.world.now >= self._resumes_at else None
        if step is None:
            return False
        self._start_task(self._leads(engine, maker, step))
        return True

    def _give_way(self, fence: Fence) -> None:
        if self.engine is not None and self.maker is not None and self._in_force == fence:
            self._start_task(self._gives_way(self.engine, self.maker))

    def _gives_way(self, engine: ToyEngine, maker: StepMaker) -> Task:
        """Tell what the last step drew, and begin no other for a moment."""
        if (step := maker.last_words()) is not None:
            yield from self._leads(engine, maker, step)
        self._resumes_at = self.world.now + times.GIVE_WAY_S
        self.world.later(times.GIVE_WAY_S, self._again)
        self._say(GaveWay(fence=engine.topology.plan.fence))

    def _leads(self, engine: ToyEngine, maker: StepMaker, step: Step) -> Task:
        began = self.process.machine.monotonic()
        self._set_limit(step, began)
        engine.write(step)
        self.bulk.stepped(step)
        for member in self._listeners:
            if member not in self.links.deaf:
                number = self.links.next_sequence(member)
                self.links.send(member, replace(step, link_seq=number))
        self._say_all(maker.sent(began))
        self.bulk.turn()
        own = yield from engine.compute(step)
        drawn = {}
        if step.slots:
            offers = yield from engine.collect(step, own)
            kind = self.process.machine.kind
            sampling = (slot for slot in step.slots if slot.sample)
            for slot, of_slot in zip(sampling, offers, strict=True):
                check(len(of_slot) == toy.VOCABS, "a vocab unit offered not exactly once")
                drawn[slot.request_id] = toy.draw(of_slot, kind)
        maker.finished(step, drawn, self.process.machine.monotonic() - began)
        # What it wrote is sent once the others have the next step to compute.
        self._finish(engine, step, began)

    def _follow(self, engine: ToyEngine, step: Step) -> Task:
        began = self.process.machine.monotonic()
        self._set_limit(step, began)
        engine.write(step)
        self.bulk.stepped(step)
        engine.acknowledge(step)
        offers = yield from engine.compute(step)
        if step.slots and engine.topology.vocab_units:
            engine.send_candidates(step, offers)
        self._finish(engine, step, began)
        self.bulk.turn()

    def _set_limit(self, step: Step, began: float) -> None:
        self._rows = sum(len(slot.tokens) for slot in step.slots)
        self._limit_at = began + self._steps.limit(self._rows + self._recomputed)

    def _finish(self, engine: ToyEngine, step: Step, began: float) -> None:
        if engine.topology.is_needed and not self._recomputed:
            self._steps.finished(self._rows, self.process.machine.monotonic() - began)
        if self._rows:
            self._recomputed = 0
        engine.owes = 0
        self.bulk.finished(step)

    def _check_time(self) -> None:
        """Is a step, or the acknowledgement of one, overdue?"""
        now = self.process.machine.monotonic()
        if self.engine is None:
            return
        if isinstance(self._wait, Frames) and now > self._limit_at:
            owing = self._wait.owing()
            if owing is not None:
                self._overdue(owing, "a step is overdue")
        elif self._task is None and self.maker is not None:
            member = self.maker.overdue(now, self._steps.limit(self._rows))
            if member is not None:
                self._overdue(member, "the acknowledgement of a step is overdue")

    def _overdue(self, member: int, reason: str) -> None:
        assert self.engine is not None
        self._steps.overdue()
        self.world.count("a step overdue")
        raise StepBroken(self.engine.topology.plan.members[member].node_id, reason)

    def _acked(self, member: int, step: int) -> None:
        if self.maker is not None:
            self._say_all(self.maker.acked(member, step))

    def _say_all(self, reports: list[StepReport]) -> None:
        for report in reports:
            self._say(report)
