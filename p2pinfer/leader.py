"""The leader's side of the data plane: schedules steps, joins candidates, draws tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2pinfer.core.scheduler import EndedReply, Scheduler
from p2pinfer.core.units import Slice, unit_bounds, unit_count
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.model.sampling import UnitCandidates, draw, gather, whole_offer
from p2pinfer.step_engine import StepEngine
from p2pinfer.step_links import StepBroken, StepLinks
from p2pinfer.types import SamplingParams, UnitKind
from p2pinfer.wire.messages import Candidates, DrawnToken, LogitsRequest, Slot, Step


class Leader:
    """Runs one step after another while the scheduler has work."""

    def __init__(self, engine: StepEngine, links: StepLinks, scheduler: Scheduler) -> None:
        self._engine = engine
        self._links = links
        self._scheduler = scheduler
        self._topology = engine.topology
        model = self._topology.plan.model
        count = unit_count(model, UnitKind.VOCAB)
        self._bounds = [unit_bounds(model, UnitKind.VOCAB, unit) for unit in range(count)]
        self._widths = [end - start for start, end in self._bounds]
        self._params: dict[int, SamplingParams] = {}
        self._step = 0

    def run_step(self) -> list[DrawnToken | EndedReply] | None:
        """Compute one step on all nodes and draw; None when there is nothing to do.

        A step without slots tells the nodes to free what the last requests held. Raises
        `StepBroken` when a member's part does not come.
        """
        began = time.perf_counter()
        slots = self._scheduler.next_slots()
        ended = self._scheduler.ended_since_last()
        if not slots and not ended:
            return None
        self._step += 1
        step = self._announce(slots, ended)
        self._engine.clock.python_s += time.perf_counter() - began
        own = self._engine.compute(step)
        began, waited = time.perf_counter(), self._links.traffic.wait_s
        drawn = self._draw(step, own)
        results = self._scheduler.finish_step(slots, drawn, time.monotonic())
        waited = self._links.traffic.wait_s - waited
        self._engine.clock.python_s += time.perf_counter() - began - waited
        return results

    def _announce(self, slots: tuple[Slot, ...], ended: tuple[int, ...]) -> Step:
        """Send the step to every other member: with it go the tokens, and so the log.

        What ended goes first: its id may be used again by one of the slots.
        """
        for request_id in ended:
            self._params.pop(request_id, None)
        for slot in slots:
            if slot.params is not None:
                self._params[slot.request_id] = slot.params
        fence = self._topology.plan.fence
        for member in self._topology.others:
            number = self._links.next_sequence(member)
            self._links.send(
                member,
                Step(fence=fence, step=self._step, link_seq=number, slots=slots, ended=ended),
            )
        return Step(fence=fence, step=self._step, link_seq=0, slots=slots, ended=ended)

    def _draw(self, step: Step, own: list[list[UnitCandidates]]) -> dict[int, int]:
        sampling = [slot for slot in step.slots if slot.sample]
        offers = self._collect(step, len(sampling), own)
        drawn: dict[int, int] = {}
        unsettled: list[int] = []
        for index, slot in enumerate(sampling):
            params = self._params[slot.request_id]
            token = draw(gather(offers[index], self._widths), params, _position(slot))
            if token is None:
                unsettled.append(index)
            else:
                drawn[slot.request_id] = token
        if unsettled:
            for index, row in zip(unsettled, self._whole_logits(step, unsettled), strict=True):
                slot = sampling[index]
                params = self._params[slot.request_id]
                token = draw(whole_offer(row, params), params, _position(slot))
                assert token is not None
                drawn[slot.request_id] = token
        return drawn

    def _collect(
        self, step: Step, slots: int, own: list[list[UnitCandidates]]
    ) -> list[list[UnitCandidates]]:
        """[slots][vocab units in order] of candidates, from all members.

        Their owners answer every step, so that no member falls behind by more than one.
        """
        t = self._topology
        owners = [member for member in t.vocab if member != t.me and step.slots]
        arrived = self._links.collect(
            self._links.inbox.candidates, step.step, {member: member for member in owners}
        )
        by_unit: list[dict[int, UnitCandidates]] = [{} for _ in range(slots)]
        for row, of_slot in enumerate(own):
            by_unit[row].update(zip(t.holding.vocab_units, of_slot, strict=True))
        for member, frame in arrived.items():
            try:
                _unpack(frame, by_unit, self._bounds)
            except RemoteProtocolError as error:
                raise StepBroken(t.plan.members[member].node_id, str(error)) from error
        return [[units[u] for u in range(len(self._widths))] for units in by_unit]

    def _whole_logits(self, step: Step, slots: list[int]) -> list[NDArray[np.float32]]:
        """The whole vocabulary's logits [vocab] of each of the sampling slots asked for."""
        t = self._topology
        for member in t.vocab:
            if member != t.me:
                number = self._links.next_sequence(member)
                self._links.send(
                    member,
                    LogitsRequest(
                        fence=t.plan.fence, step=step.step, link_seq=number, slots=tuple(slots)
                    ),
                )
        wanted = {u: m for m, units in t.vocab.items() if m != t.me for u in units}
        arrived = self._links.collect(self._links.inbox.logits, step.step, wanted)
        pieces: list[NDArray[np.float32]] = []
        for unit in range(len(self._widths)):
            if unit in wanted:
                tensor = arrived[unit].tensor
                if tensor.shape[0] != len(slots):
                    owner = t.plan.members[wanted[unit]]
                    raise StepBroken(owner.node_id, "logits of the wrong size")
                values = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
            else:
                values = self._engine.own_logits(unit, slots)
            pieces.append(values)
        return list(np.concatenate(pieces, axis=1))


def _position(slot: Slot) -> int:
    """The position that the token drawn after this slot will have."""
    return slot.start + len(slot.tokens)


def _unpack(
    frame: Candidates, by_unit: list[dict[int, UnitCandidates]], bounds: Sequence[Slice]
) -> None:
    """Put a member's candidates into `by_unit` [slots].

    Raises `RemoteProtocolError` for other slots than were asked, ids outside their unit, and
    numbers that are not finite.
    """
    slots, units, width = frame.ids.shape
    if slots != max(len(by_unit), 1) or units != len(frame.units):
        raise RemoteProtocolError("candidates for another number of slots")
    ids = np.frombuffer(frame.ids.data, np.int32).reshape(slots, units, width)
    scores = np.frombuffer(frame.logits.data, np.float32).reshape(slots, units, width)
    lse = np.frombuffer(frame.lse.data, np.float32).reshape(slots, units)
    if not (np.isfinite(scores).all() and np.isfinite(lse).all()):
        raise RemoteProtocolError("candidates that are not finite")
    for row, of_slot in enumerate(by_unit):
        for place, unit in enumerate(frame.units):
            count = int(np.count_nonzero(ids[row, place] >= 0))
            mine, (start, end) = ids[row, place, :count], bounds[unit]
            if count == 0 or mine.min() < start or mine.max() >= end:
                raise RemoteProtocolError("candidates outside their unit")
            of_slot[unit] = UnitCandidates(mine, scores[row, place, :count], float(lse[row, place]))
