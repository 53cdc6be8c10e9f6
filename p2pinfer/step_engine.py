"""Computes steps of the active plan: drives the model's runner and exchanges over the step links.

Two exchanges per layer and stage, direct, without acknowledgement; hidden states pass from stage
to stage; owners of vocab units offer candidates to the leader. Every node keeps the token log of
each request, from the steps themselves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from p2pinfer.core.topology import Topology
from p2pinfer.core.units import unit_bounds
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.model.reduction import subtree_sums, whole_sum
from p2pinfer.model.runner import GiveHidden, NeedHidden, NeedSum, StageRunner
from p2pinfer.model.sampling import (
    UnitCandidates,
    candidates_wanted,
    penalise,
    unit_candidates,
)
from p2pinfer.step_links import StepBroken, StepLinks, from_wire, is_finite, to_wire
from p2pinfer.types import SamplingParams, UnitKind
from p2pinfer.wire.messages import Candidates, Hidden, Logits, LogitsRequest, Partial, Slot, Step


@dataclass
class Log:
    """A request's tokens as the steps told them, and its parameters."""

    params: SamplingParams
    tokens: list[int] = field(default_factory=list)

    def write(self, slot: Slot) -> None:
        """Tokens are written by position; a step that runs again writes the same ones.

        Raises `RemoteProtocolError` for a run that would leave a hole.
        """
        if slot.start > len(self.tokens):
            raise RemoteProtocolError(
                f"positions {len(self.tokens)} to {slot.start} of a request were never computed"
            )
        del self.tokens[slot.start :]
        self.tokens.extend(slot.tokens)


@dataclass
class Clock:
    """Where a node's time went, in seconds, since the plan was adopted."""

    compute_s: float = 0.0
    exchange_s: float = 0.0
    python_s: float = 0.0
    steps: int = 0


class StepEngine:
    """One node's part in every step of one plan. `runner` is None on a node that holds nothing."""

    def __init__(self, topology: Topology, runner: StageRunner | None, links: StepLinks) -> None:
        self.topology = topology
        self.clock = Clock()
        self.step = 0
        self.owes = 0
        """The step in hand; 0 between steps."""
        self._runner = runner
        self._links = links
        self._logs: dict[int, Log] = {}
        self._last: list[NDArray[np.float32]] = []
        self._sampling: list[Slot] = []

    # --- one step ---------------------------------------------------------------------------------

    def compute(self, step: Step) -> list[list[UnitCandidates]]:
        """Compute a step. Returns [sampling slots][owned vocab units] of candidates.

        Raises `StepBroken` when a peer's frame does not come or is wrong.
        """
        self.step = self.owes = self._links.step = step.step
        self._links.inbox.forget_before(step.step)
        began, elsewhere = time.perf_counter(), self._elsewhere_s()
        self._forget(step.ended)
        for slot in step.slots:
            self._log(slot).write(slot)
        self._sampling = [slot for slot in step.slots if slot.sample]
        self._last = []
        if self._runner is not None and step.slots:
            self._run(self._runner, step)
        self.clock.steps += 1
        offers = self._offers()
        self.owes = 0
        elsewhere = self._elsewhere_s() - elsewhere
        self.clock.python_s += time.perf_counter() - began - elsewhere
        return offers

    def _elsewhere_s(self) -> float:
        """Seconds that are accounted for already: computing, exchanging, waiting."""
        return self.clock.compute_s + self.clock.exchange_s + self._links.traffic.wait_s

    def _forget(self, ended: tuple[int, ...]) -> None:
        for request_id in ended:
            self._logs.pop(request_id, None)
        if self._runner is not None:
            self._runner.forget(ended)

    def _log(self, slot: Slot) -> Log:
        log = self._logs.get(slot.request_id)
        if log is None:
            if slot.params is None:
                leader = self.topology.plan.members[self.topology.plan.leader]
                raise StepBroken(leader.node_id, "a step of a request that was never introduced")
            log = self._logs[slot.request_id] = Log(slot.params)
        return log

    def _run(self, runner: StageRunner, step: Step) -> None:
        run = runner.run(step.slots)
        rows = sum(len(slot.tokens) for slot in step.slots)
        answer: torch.Tensor | None = None
        while True:
            began = time.perf_counter()
            try:
                need = run.send(answer)
            except StopIteration as done:
                self._last = [logits.cpu().numpy() for logits in done.value]
                self._check_logits()
                return
            finally:
                self.clock.compute_s += time.perf_counter() - began
            began, waited = time.perf_counter(), self._links.traffic.wait_s
            match need:
                case NeedSum():
                    answer = self._sum(step, need, rows)
                case NeedHidden():
                    answer = self._hidden(step, rows)
                case GiveHidden():
                    self._give(step, need)
                    answer = None
            waited = self._links.traffic.wait_s - waited
            self.clock.exchange_s += time.perf_counter() - began - waited

    def _check_logits(self) -> None:
        """Where no partial was exchanged, this is the only place that sees a broken product."""
        with np.errstate(all="ignore"):
            if not all(np.isfinite(logits.sum()) for logits in self._last):
                raise StepBroken(self._id(self.topology.me), "logits that are not finite")

    # --- exchanges --------------------------------------------------------------------------------

    def _sum(self, step: Step, need: NeedSum, rows: int) -> torch.Tensor:
        t = self.topology
        units = t.units[need.half]
        parts = subtree_sums(need.partials, units) if need.partials else {}
        if parts and t.peers:
            self._send_parts(step, need, parts)
        senders = t.senders(need.half)
        if not senders:
            return whole_sum(parts, units)
        arrived = self._links.collect(
            self._links.inbox.partials,
            (step.step, need.layer, need.half),
            {sender: sender for sender in senders},
        )
        device = next(iter(parts.values())).device if parts else torch.device("cpu")
        for member, partial in arrived.items():
            if partial.tensor.shape[1] != rows or not is_finite(partial.tensor):
                raise StepBroken(self._id(member), "a partial of the wrong size or not finite")
            sums = from_wire(partial.tensor)
            parts.update(zip(partial.parts, sums.to(device).unbind(), strict=True))
        return whole_sum(parts, units)

    def _send_parts(self, step: Step, need: NeedSum, parts: dict[int, torch.Tensor]) -> None:
        t = self.topology
        stacked = (
            next(iter(parts.values()))[None]
            if len(parts) == 1
            else torch.stack(list(parts.values()))
        )
        tensor = to_wire(stacked)
        if not is_finite(tensor):
            raise StepBroken(self._id(t.me), "a partial that is not finite")
        assert t.holding.stage is not None
        for peer in t.peers:
            frame = Partial(
                fence=t.plan.fence,
                step=step.step,
                link_seq=self._links.next_sequence(peer),
                sender=t.me,
                stage=t.holding.stage,
                layer=need.layer,
                half=need.half,
                parts=tuple(parts),
                tensor=tensor,
            )
            self._links.send(peer, frame)

    def _hidden(self, step: Step, rows: int) -> torch.Tensor:
        sender = self.topology.hidden_from
        assert sender is not None
        arrived = self._links.collect(self._links.inbox.hidden, step.step, {sender: sender})
        hidden = arrived[sender].tensor
        if hidden.shape[0] != rows or not is_finite(hidden):
            raise StepBroken(self._id(sender), "hidden states of the wrong size or not finite")
        return from_wire(hidden)

    def _give(self, step: Step, need: GiveHidden) -> None:
        t = self.topology
        if not t.hidden_to:
            return
        tensor = to_wire(need.hidden)
        assert t.holding.stage is not None
        for receiver in t.hidden_to:
            frame = Hidden(
                fence=t.plan.fence,
                step=step.step,
                link_seq=self._links.next_sequence(receiver),
                sender=t.me,
                stage=t.holding.stage,
                tensor=tensor,
            )
            self._links.send(receiver, frame)

    def _id(self, member: int) -> str:
        return self.topology.plan.members[member].node_id

    # --- the vocabulary ---------------------------------------------------------------------------

    def _offers(self) -> list[list[UnitCandidates]]:
        """[sampling slots][owned vocab units]; keeps penalised logits, should the leader ask."""
        if not self._last:
            return []
        model, offers = self.topology.plan.model, []
        for row, slot in enumerate(self._sampling):
            log = self._logs[slot.request_id]
            position = slot.start + len(slot.tokens)
            of_slot = []
            for place, unit in enumerate(self.topology.holding.vocab_units):
                first = unit_bounds(model, UnitKind.VOCAB, unit).start
                logits = self._last[place][row]
                penalty = log.params.repetition_penalty
                if penalty != 1.0:
                    logits = self._last[place][row] = penalise(logits, first, log.tokens, penalty)
                of_slot.append(unit_candidates(logits, first, log.params, position))
            offers.append(of_slot)
        return offers

    def send_candidates(self, step: Step, offers: list[list[UnitCandidates]]) -> None:
        """Offer this node's candidates to the leader, one frame for all slots and units.

        Where no slot samples, one row without candidates says that the step is done: the leader
        begins no other before.
        """
        t = self.topology
        units = t.holding.vocab_units
        wanted = [candidates_wanted(self._logs[s.request_id].params) for s in self._sampling]
        shape = (max(len(offers), 1), len(units), max(wanted, default=1))
        ids = np.full(shape, -1, np.int32)
        scores = np.zeros(shape, np.float32)
        lse = np.zeros(shape[:2], np.float32)
        for row, of_slot in enumerate(offers):
            for place, offer in enumerate(of_slot):
                count = len(offer.ids)
                ids[row, place, :count] = offer.ids
                scores[row, place, :count] = offer.scores
                lse[row, place] = offer.lse
        frame = Candidates(
            fence=t.plan.fence,
            step=step.step,
            link_seq=self._links.next_sequence(t.plan.leader),
            sender=t.me,
            units=units,
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
        for place, unit in enumerate(t.holding.vocab_units):
            frame = Logits(
                fence=t.plan.fence,
                step=request.step,
                link_seq=self._links.next_sequence(t.plan.leader),
                sender=t.me,
                unit=unit,
                tensor=to_wire(self._last[place][list(request.slots)]),
            )
            self._links.send(t.plan.leader, frame)

    def own_logits(self, unit: int, slots: list[int]) -> NDArray[np.float32]:
        """[slots, unit width] of a vocab unit that this node owns, of the last step."""
        return self._last[self.topology.holding.vocab_units.index(unit)][slots]

    @property
    def kv_used_bytes(self) -> int:
        """Bytes of KV written on this node."""
        return self._runner.cache.used_bytes if self._runner else 0
