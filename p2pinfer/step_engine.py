"""Computes steps of the active plan: drives the model's runner and exchanges over the step links.

Two exchanges per layer and stage, direct, without acknowledgement; hidden states pass from stage
to stage; owners of vocab units offer candidates to the leader. Before it computes a step, every
node writes its tokens down and says so: that is what commits them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from p2pinfer.core.step_checks import write_down
from p2pinfer.core.step_clock import StepClock
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology
from p2pinfer.core.units import unit_bounds
from p2pinfer.errors import RemoteProtocolError, StepBroken
from p2pinfer.model.runner import GiveHidden, NeedHidden, NeedSum, StageRunner
from p2pinfer.model.sampling import (
    SlotCandidates,
    no_candidates,
    penalise,
    places,
    stacked,
    unit_candidates,
)
from p2pinfer.model.stopwatch import ATTENTION, PRODUCTS
from p2pinfer.replicator import Replicator
from p2pinfer.step_links import StepLinks
from p2pinfer.step_sums import StepSums
from p2pinfer.step_tensors import check_tensor, from_wire, to_wire
from p2pinfer.types import SamplingParams, UnitKind
from p2pinfer.wire.messages import (
    Candidates,
    Hidden,
    Logits,
    LogitsRequest,
    Slot,
    Step,
    StepAck,
)

DECODE_ROWS = 8
"""A step of so few rows decodes: it takes what reading the weights takes."""

DECODE_STEPS = 32
"""The last ones count."""


@dataclass
class Clock:
    """Where a node's time went, in seconds, since the plan was adopted; names are those of
    `WorkerStats`."""

    compute_s: float = 0.0
    products_s: float = 0.0
    """Of `compute_s`: products with weights."""
    attention_s: float = 0.0
    """Of `compute_s`: attention over the KV cache."""
    exchange_s: float = 0.0
    python_s: float = 0.0
    bulk_s: float = 0.0
    """Sending and taking delta KV between steps."""
    steps: int = 0


class StepEngine:
    """One node's part in every step of one plan. `runner` is None on a node that holds nothing.

    `logs` and `step_clock` outlive the plan; `replicator` is the plan's. The first step waits for
    others as if it computed `recomputed_rows` more: they may have to make KV of inputs before it.
    """

    def __init__(
        self,
        topology: Topology,
        runner: StageRunner | None,
        links: StepLinks,
        *,
        logs: TokenLogs,
        step_clock: StepClock,
        replicator: Replicator,
        recomputed_rows: int = 0,
    ) -> None:
        self.topology = topology
        self.clock = Clock()
        self.step = 0
        self.owes = 0
        """The step in hand; 0 between steps."""
        self._runner = runner
        self._links = links
        self._sums = StepSums(topology, links)
        self._logs = logs
        self._step_clock = step_clock
        self._replicator = replicator
        self._recomputed_rows = recomputed_rows
        self._began = 0.0
        self._decoded: deque[float] = deque(maxlen=DECODE_STEPS)
        self._sampling: list[Slot] = []
        model, vocab = topology.plan.model, topology.vocab_units
        self._bounds = tuple(unit_bounds(model, UnitKind.VOCAB, unit) for unit in vocab)
        """Bounds of the vocab units that are owned here."""
        self._last: NDArray[np.float32] = np.empty((0, 0), np.float32)
        """Logits of the last step [sampling slots, width of them all], unit after unit."""

    # --- one step ---------------------------------------------------------------------------------

    def write(self, step: Step) -> None:
        """Write a step's tokens in the log, and free what ended: to be done before it is computed.

        Raises `StepBroken` when the step does not follow from those before it.
        """
        try:
            write_down(self.topology, self._logs, self.step, step)
        except RemoteProtocolError as error:
            raise StepBroken(self._id(self.topology.plan.leader), str(error)) from error
        self.step = step.step
        self._replicator.stepped(step)
        if self._runner is not None:
            self._runner.forget(step.ended)

    def acknowledge(self, step: Step) -> None:
        """Tell the leader that the tokens are written."""
        leader = self.topology.plan.leader
        number = self._links.next_sequence(leader)
        self._links.send(
            leader, StepAck(fence=self.topology.plan.fence, step=step.step, link_seq=number)
        )

    def compute(self, step: Step) -> list[SlotCandidates]:
        """Compute a step that was written. Returns what the owned vocab units offer, by slot that
        samples.

        Raises `StepBroken` when a peer's frame does not come or is wrong.
        """
        self.owes = step.step
        rows = sum(len(slot.tokens) for slot in step.slots)
        self._links.begin(step.step, self.limit(rows))
        self._began = time.monotonic()
        began, elsewhere = time.perf_counter(), self._elsewhere_s()
        self._sampling = [slot for slot in step.slots if slot.sample]
        self._last = self._last[:0]
        if self._runner is not None and rows:
            computed = self.clock.compute_s
            products, attention = PRODUCTS.seconds, ATTENTION.seconds
            self._run(self._runner, step, rows)
            self.clock.products_s += PRODUCTS.seconds - products
            self.clock.attention_s += ATTENTION.seconds - attention
            if rows <= DECODE_ROWS and self.topology.roles:
                self._decoded.append(self.clock.compute_s - computed)
        self._logs.finish(step.slots)
        self.clock.steps += 1
        offers = self._offers()
        elsewhere = self._elsewhere_s() - elsewhere
        self.clock.python_s += time.perf_counter() - began - elsewhere
        return offers

    def limit(self, rows: int) -> float:
        """How long a step of so many rows may take, in seconds, what is done before it included."""
        return self._step_clock.limit(rows + self._recomputed_rows)

    def foresee(self, step: Step) -> None:
        """Prepare for the step that probably follows, while others are still at this one."""
        began = time.perf_counter()
        if self._runner is not None:
            self._runner.foresee(step.slots)
        self.clock.compute_s += time.perf_counter() - began

    def finish(self, step: Step) -> None:
        """This node has nothing more to do in a step: note how long it took, with its waits."""
        self.owes = 0
        rows = sum(len(slot.tokens) for slot in step.slots)
        # Who only takes note of the tokens would later find any step of its own overdue.
        if rows and self.topology.is_needed and not self._recomputed_rows:
            self._step_clock.finished(rows, time.monotonic() - self._began)
        if rows:
            self._recomputed_rows = 0
        self._replicator.finished(step)

    def replicate(self) -> None:
        """Between two steps: send and take delta KV, a portion that nobody notices."""
        began = time.perf_counter()
        self._replicator.turn()
        self.clock.bulk_s += time.perf_counter() - began

    @property
    def compute_ms(self) -> float:
        """The median time that a decoding step took to compute lately; 0 before the first."""
        return 1000 * median(self._decoded) if self._decoded else 0.0

    def _elsewhere_s(self) -> float:
        """Seconds that are accounted for already: computing, exchanging, waiting."""
        return self.clock.compute_s + self.clock.exchange_s + self._links.traffic.wait_s

    def _run(self, runner: StageRunner, step: Step, rows: int) -> None:
        run = runner.run(step.slots)
        answer: torch.Tensor | None = None
        while True:
            began = time.perf_counter()
            try:
                need = run.send(answer)
            except StopIteration as done:
                if done.value is not None:
                    self._keep(done.value.cpu().numpy())
                return
            finally:
                self.clock.compute_s += time.perf_counter() - began
            began, waited = time.perf_counter(), self._links.traffic.wait_s
            self._links.breathe()
            match need:
                case NeedSum():
                    answer = self._sums.total(step.step, need, rows)
                case NeedHidden():
                    answer = self._hidden(step, need, rows)
                case GiveHidden():
                    self._give(step, need)
                    answer = None
            waited = self._links.traffic.wait_s - waited
            self.clock.exchange_s += time.perf_counter() - began - waited

    def _keep(self, logits: NDArray[np.float32]) -> None:
        """Where no partial was exchanged, this is the only place that sees a broken product."""
        self._last = logits
        with np.errstate(all="ignore"):
            if not np.isfinite(self._last.sum(axis=1)).all():
                me = self._id(self.topology.me)
                raise StepBroken(me, "logits that are not finite", broken=True)

    # --- exchanges --------------------------------------------------------------------------------

    def _hidden(self, step: Step, need: NeedHidden, rows: int) -> torch.Tensor:
        sender = self.topology.role_of(need.stage).hidden_from
        assert sender is not None
        arrived = self._links.collect(
            self._links.inbox.hidden, (step.step, need.stage - 1), {sender: sender}
        )
        hidden = arrived[sender].tensor
        check_tensor(self._id(sender), hidden, hidden.shape[0] == rows, "hidden states")
        return from_wire(hidden)

    def _give(self, step: Step, need: GiveHidden) -> None:
        t, receivers = self.topology, self.topology.role_of(need.stage).hidden_to
        if not receivers:
            return
        tensor = to_wire(need.hidden)
        for receiver in receivers:
            frame = Hidden(
                fence=t.plan.fence,
                step=step.step,
                link_seq=self._links.next_sequence(receiver),
                sender=t.me,
                stage=need.stage,
                tensor=tensor,
            )
            self._links.send(receiver, frame)

    def _id(self, member: int) -> str:
        return self.topology.plan.members[member].node_id

    # --- the vocabulary ---------------------------------------------------------------------------

    def _offers(self) -> list[SlotCandidates]:
        """By sampling slot; keeps penalised logits, should the leader ask."""
        offers: list[SlotCandidates] = []
        if not len(self._last):
            return offers
        for logits, slot in zip(self._last, self._sampling, strict=True):
            params = self._logs.params(slot.request_id)
            if params.repetition_penalty != 1.0:
                self._penalise(logits, self._logs.tokens(slot.request_id), params)
            position = slot.start + len(slot.tokens)
            offers.append(unit_candidates(logits, self._bounds, params, position))
        return offers

    def _penalise(
        self, logits: NDArray[np.float32], tokens: Sequence[int], by: SamplingParams
    ) -> None:
        for (first, _), (start, end) in zip(self._bounds, places(self._bounds), strict=True):
            logits[start:end] = penalise(logits[start:end], first, tokens, by.repetition_penalty)

    def send_candidates(self, step: Step, offers: list[SlotCandidates]) -> None:
        """Offer the leader what this node has of the vocabulary: one frame for all slots and units.

        Where no slot samples, one row without candidates says that the step is done: the leader
        begins no other before.
        """
        t = self.topology
        if not step.slots or not t.vocab_units:
            return
        ids, scores, lse = stacked(offers or [no_candidates(len(t.vocab_units), 1)])
        frame = Candidates(
            fence=t.plan.fence,
            step=step.step,
            link_seq=self._links.next_sequence(t.plan.leader),
            sender=t.me,
            units=t.vocab_units,
            ids=to_wire(ids),
            logits=to_wire(scores),
            lse=to_wire(lse),
        )
        self._links.send(t.plan.leader, frame)

    def send_logits(self, request: LogitsRequest) -> None:
        """Answer the leader's request for the whole logits of some sampling slots."""
        t = self.topology
        if request.step != self.step or max(request.slots) >= len(self._sampling):
            raise StepBroken(self._id(t.plan.leader), "logits asked of a step that is over")
        for unit in t.vocab_units:
            frame = Logits(
                fence=t.plan.fence,
                step=request.step,
                link_seq=self._links.next_sequence(t.plan.leader),
                sender=t.me,
                unit=unit,
                tensor=to_wire(self.own_logits(unit, list(request.slots))),
            )
            self._links.send(t.plan.leader, frame)

    def own_logits(self, unit: int, slots: list[int]) -> NDArray[np.float32]:
        """[slots, unit width] of a vocab unit that this node owns, of the last step."""
        start, end = places(self._bounds)[self.topology.vocab_units.index(unit)]
        return self._last[slots, start:end]
