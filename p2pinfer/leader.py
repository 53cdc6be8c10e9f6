"""The leader's side of the data plane: sends steps, joins candidates, draws tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from p2pinfer.candidates import joined, unpacked
from p2pinfer.core.orders import GaveWay, StartRequest, TokenLog
from p2pinfer.core.step_maker import StepMaker, StepReport
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.units import unit_bounds, unit_count
from p2pinfer.errors import RemoteProtocolError, StepBroken, StepOverdue
from p2pinfer.model.sampling import SlotCandidates, draw, gather, stacked, whole_offer
from p2pinfer.step_engine import StepEngine
from p2pinfer.step_links import StepLinks
from p2pinfer.types import Fence, SamplingParams, UnitKind
from p2pinfer.wire.messages import LogitsRequest, Slot, Step

GIVE_WAY_S = 0.5
"""So long no step is begun where another plan is to come. It takes some hundredths of a second;
should it not come at all, replies go on."""


class Leader:
    """Runs one step after another while there is work.

    `listeners` are the members (indices) that steps go to, `agreed` the logs that the plan was
    activated with. `report` is called with what the control plane is to know, the moment that it
    is known: also in the middle of a step.
    """

    def __init__(
        self,
        engine: StepEngine,
        links: StepLinks,
        logs: TokenLogs,
        *,
        listeners: Iterable[int],
        agreed: Iterable[TokenLog],
        report: Callable[[StepReport | GaveWay], None],
    ) -> None:
        self._engine = engine
        self._links = links
        self._logs = logs
        self._topology = t = engine.topology
        self._listeners = tuple(sorted(set(listeners) - {t.me}))
        self._maker = StepMaker(t, self._listeners, agreed)
        self._report = report
        self._rows = 0
        self._resumes_at = 0.0
        model = t.plan.model
        count = unit_count(model, UnitKind.VOCAB)
        bounds = [unit_bounds(model, UnitKind.VOCAB, unit) for unit in range(count)]
        self._bounds = np.array(bounds, np.int32)
        """Of all vocab units, [units, 2]."""
        self._widths = self._bounds[:, 1] - self._bounds[:, 0]
        links.on_ack = self._acked

    @property
    def running(self) -> int:
        """Requests that have their place in the KV cache."""
        return self._maker.scheduler.running

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return self._maker.scheduler.waiting

    def start(self, order: StartRequest) -> None:
        """Enter a request."""
        self._say(self._maker.start(order))

    def cancel(self, request_id: int) -> None:
        """End a request and free its place."""
        self._maker.cancel(request_id)

    # --- steps ------------------------------------------------------------------------------------

    def run_step(self) -> int | None:
        """Run one step on all nodes; returns how many tokens it drew, None if none was needed.

        Raises `StepBroken` when a member's part, or its acknowledgement, does not come in time.
        """
        self._check_overdue()
        if time.monotonic() < self._resumes_at:
            return None
        step = self._maker.next_step()
        return None if step is None else self._run(step)

    def give_way(self, fence: Fence) -> None:
        """Tell what the last step drew, and begin no other for a moment: a new plan is to come."""
        if fence != self._topology.plan.fence:
            return
        if (step := self._maker.last_words()) is not None:
            self._run(step)
        self._resumes_at = time.monotonic() + GIVE_WAY_S
        self._report(GaveWay(fence=fence))

    def _run(self, step: Step) -> int:
        """Run a step that was made; returns how many tokens it drew."""
        started = time.perf_counter()
        self._rows = sum(len(slot.tokens) for slot in step.slots)
        # First in the leader's own log, which is the truth of its term: should sending fail, no
        # listener may hold more.
        self._engine.write(step)
        self._announce(step)
        self._say(self._maker.sent(time.monotonic()))
        self._engine.clock.python_s += time.perf_counter() - started
        # The others compute already: what the step before has written goes out now.
        self._engine.replicate()
        # Acknowledgements are here by now: a token leaves with them, and what comes next is due.
        self._links.pump()
        own = self._engine.compute(step)
        self._engine.foresee(step)
        began, waited = time.perf_counter(), self._links.traffic.wait_s
        drawn = self._draw(step, own) if step.slots else {}
        self._maker.finished(step, drawn, time.perf_counter() - started)
        self._engine.finish(step)
        waited = self._links.traffic.wait_s - waited
        self._engine.clock.python_s += time.perf_counter() - began - waited
        return len(drawn)

    def _announce(self, step: Step) -> None:
        """Send the step to every other listener: with it go the tokens, and so the log."""
        for member in self._listeners:
            if member in self._links.deaf:
                continue
            number = self._links.next_sequence(member)
            self._links.send(
                member,
                Step(
                    fence=step.fence,
                    step=step.step,
                    link_seq=number,
                    slots=step.slots,
                    ended=step.ended,
                    finals=step.finals,
                ),
            )

    def _acked(self, member: int, step: int) -> None:
        self._say(self._maker.acked(member, step))

    def _say(self, reports: list[StepReport]) -> None:
        for report in reports:
            self._report(report)

    def _check_overdue(self) -> None:
        """A step that nobody computes any more may still lack an acknowledgement."""
        member = self._maker.overdue(time.monotonic(), self._engine.limit(self._rows))
        if member is not None:
            node_id = self._topology.plan.members[member].node_id
            raise StepOverdue(node_id, "the acknowledgement of a step is overdue")

    # --- drawing ----------------------------------------------------------------------------------

    def _draw(self, step: Step, own: list[SlotCandidates]) -> dict[int, int]:
        sampling = [slot for slot in step.slots if slot.sample]
        offers = self._collect(step, [self._params(slot) for slot in sampling], own)
        drawn: dict[int, int] = {}
        unsettled: list[int] = []
        for index, slot in enumerate(sampling):
            token = draw(gather(offers[index], self._widths), self._params(slot), _position(slot))
            if token is None:
                unsettled.append(index)
            else:
                drawn[slot.request_id] = token
        if unsettled:
            for index, row in zip(unsettled, self._whole_logits(step, unsettled), strict=True):
                slot = sampling[index]
                params = self._params(slot)
                token = draw(whole_offer(row, params), params, _position(slot))
                assert token is not None
                drawn[slot.request_id] = token
        return drawn

    def _params(self, slot: Slot) -> SamplingParams:
        return self._logs.params(slot.request_id)

    def _collect(
        self, step: Step, sampling: list[SamplingParams], own: list[SlotCandidates]
    ) -> list[SlotCandidates]:
        """By slot that samples, those of all vocab units in order, from all members.

        Their owners answer every step that has slots, so that no member falls behind by more than
        one.
        """
        t = self._topology
        arrived = self._links.collect(
            self._links.inbox.candidates,
            step.step,
            {member: member for member in t.vocab if member != t.me},
        )
        offers = [(t.vocab_units, stacked(own))] if own else []
        for member, frame in arrived.items():
            node_id = t.plan.members[member].node_id
            try:
                offers.append((frame.units, unpacked(frame, sampling, self._bounds)))
            except RemoteProtocolError as error:
                raise StepBroken(node_id, str(error)) from error
            except ArithmeticError as error:
                raise StepBroken(node_id, str(error), broken=True) from error
        return joined(offers, len(sampling), len(self._widths))

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
