"""One toy node's part in every step of one plan: what `StepEngine` and a runner do, in integers.

`compute` is a generator that gives out what it waits for: seconds of computing, or frames. Each
residual is compared with the truth as soon as it is summed, and each read of KV with the log that
it was written for, so that a wrong token's cause is found where it arises.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from struct import pack
from typing import Protocol

from msgspec import Struct

from p2pinfer.core import tree
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.step_checks import write_down
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Role, Topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.wire.messages import Candidates, Hidden, Partial, Slot, Step, StepAck
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.simulation import toy_model as toy
from tests.simulation.toy_links import StepBroken, ToyLinks
from tests.simulation.toy_units import Row, ToyUnits
from tests.simulation.world import check

HALF_LAYER_S = 0.005
ROW_S = 0.0002


class Sleep(Struct, frozen=True):
    """Wait for the processor, so many seconds."""

    seconds: float


class Frames(Struct, frozen=True):
    """Wait until `box[key]` has something from every member in `wanted`."""

    box: dict  # type: ignore[type-arg]
    key: object
    wanted: tuple[int, ...]

    def owing(self) -> int | None:
        """The first member that owes its part."""
        arrived = self.box.get(self.key, {})
        return next((member for member in self.wanted if member not in arrived), None)


Wait = Sleep | Frames


class Truth(Protocol):
    """Who knows what is right."""

    def summed(self, before: int, token: int, position: int, half: int, x: int) -> None:
        """The residual after `half` half layers of the position of `token`."""


class ToyEngine:
    """Computes steps; logs and units outlive it."""

    def __init__(
        self, mine: Topology, logs: TokenLogs, units: ToyUnits, links: ToyLinks, truth: Truth
    ) -> None:
        self.topology = mine
        self.steps = 0
        self.step = 0
        self.owes = 0
        self._logs = logs
        self._units = units
        self._cache = units.cache
        self._links = links
        self._truth = truth
        self._subtrees = {
            role.holding.stage: [
                {node: _units_below(node, count) for node in role.parts[half].get(mine.me, ())}
                for half, count in enumerate(mine.units)
            ]
            for role in mine.roles
        }
        for role in mine.roles:
            _check_cover(mine, role)

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
        self._units.forget(step.ended)
        for slot in step.slots:
            self._cache.open(slot.request_id)

    def acknowledge(self, step: Step) -> None:
        """Tell the leader that the tokens are written."""
        plan = self.topology.plan
        number = self._links.next_sequence(plan.leader)
        self._links.send(plan.leader, StepAck(fence=plan.fence, step=step.step, link_seq=number))

    def compute(self, step: Step) -> Generator[Wait, None, list[list[tuple[int, int]]]]:
        """Compute a step that was written.

        Returns [sampling slots][owned vocab units] of (token, score).
        """
        self.owes = step.step
        self._links.gate.began(step.step)
        self._links.inbox.forget_before(step.step)
        offers: list[list[tuple[int, int]]] = []
        if step.slots and self.topology.roles:
            rows = [row for slot in step.slots for row in self._rows(slot)]
            offers = yield from self._run(step, rows)
        self._logs.finish(step.slots)
        self.steps += 1
        return offers

    def _rows(self, slot: Slot) -> list[Row]:
        tokens = self._logs.tokens(slot.request_id)
        end = slot.start + len(slot.tokens)
        check(tuple(tokens[slot.start : end]) == slot.tokens, "a log differs from its step")
        names = [toy.ROOT_TAG, *toy.tags(tokens[:end])]
        return [
            Row(slot.request_id, position, tokens[position], names[position], names[position + 1])
            for position in range(slot.start, end)
        ]

    def _run(
        self, step: Step, rows: list[Row]
    ) -> Generator[Wait, None, list[list[tuple[int, int]]]]:
        xs: list[int] = []
        for role in self.topology.roles:
            held = role.holding
            if held.stage == 0:
                xs = [toy.embedding(row.token, row.position) for row in rows]
            elif role.hidden_from is not None:
                xs = yield from self._hidden(step, held.stage, role.hidden_from, len(rows))
            yield from self._run_stage(step, role, rows, xs)
            for receiver in role.hidden_to:
                self._give(step, held.stage, receiver, xs)
        return self._offers(step, xs)

    def _run_stage(
        self, step: Step, role: Role, rows: list[Row], xs: list[int]
    ) -> Generator[Wait, None, None]:
        """Compute the layers of a stage; the residuals `xs` become what leaves it."""
        busy, held = Sleep(HALF_LAYER_S + ROW_S * len(rows)), role.holding
        heads = [KvUnit(held.span, unit) for unit in held.head_units]
        inputs = self._units.inputs.get(held.span)
        for layer in range(*held.span):
            yield busy
            if inputs is not None:
                for row, x in zip(rows, xs, strict=True):
                    inputs.write(layer, row, x)
            own = self._attend(heads, layer, rows, xs)
            xs[:] = yield from self._add(step, (role, layer, 0), own, xs)
            self._check_rows(rows, 2 * layer + 1, xs)
            yield busy
            own = [{u: toy.mlp_partial(layer, u, x) for u in held.mlp_units} for x in xs]
            xs[:] = yield from self._add(step, (role, layer, 1), own, xs)
            self._check_rows(rows, 2 * layer + 2, xs)

    def _attend(
        self, heads: list[KvUnit], layer: int, rows: list[Row], xs: list[int]
    ) -> list[dict[int, int]]:
        own = []
        for row, x in zip(rows, xs, strict=True):
            partials = {}
            for head in heads:
                value = toy.attend(layer, head.unit, self._cache.past(head, layer, row), x)
                self._cache.write(head, layer, row, value)
                partials[head.unit] = toy.head_partial(layer, head.unit, value, x)
            own.append(partials)
        return own

    def _check_rows(self, rows: list[Row], half: int, xs: list[int]) -> None:
        for row, x in zip(rows, xs, strict=True):
            self._truth.summed(row.before, row.token, row.position, half, x)

    # --- exchanges --------------------------------------------------------------------------------

    def _add(
        self,
        step: Step,
        place: tuple[Role, int, int],
        own: list[dict[int, int]],
        xs: list[int],
    ) -> Generator[Wait, None, list[int]]:
        """Exchange partial sums, own and others', and add all of them to the residuals; `place` is
        (role, layer, half)."""
        links, (role, layer, half) = self._links, place
        stage = role.holding.stage
        totals = list(xs)
        subtrees = self._subtrees[stage][half]
        if subtrees:
            sums = [sum(row[u] for u in units) for units in subtrees.values() for row in own]
            sums = [value % toy.PRIME for value in sums]
            _add_to(totals, sums)
            tensor = toy.to_tensor(sums, (len(subtrees), len(xs)))
            for peer in role.peers:
                parts = tuple(subtrees)
                links.send(peer, self._partial(step, peer, (stage, layer, half), parts, tensor))
        senders = role.senders(half)
        if senders:
            key = (step.step, layer, half)
            yield Frames(links.inbox.partials, key, senders)
            for member, partial in links.inbox.partials.pop(key).items():
                if partial.tensor.shape[1] != len(xs):
                    raise StepBroken(self._id(member), "a partial of the wrong size")
                _add_to(totals, toy.from_tensor(partial.tensor))
        return [total % toy.PRIME for total in totals]

    def _partial(
        self,
        step: Step,
        peer: int,
        place: tuple[int, int, int],
        parts: tuple[int, ...],
        tensor: Tensor,
    ) -> Partial:
        """A frame; `place` is (stage, layer, half)."""
        mine, (stage, layer, half) = self.topology, place
        return Partial(
            fence=mine.plan.fence,
            step=step.step,
            link_seq=self._links.next_sequence(peer),
            sender=mine.me,
            stage=stage,
            layer=layer,
            half=half,
            parts=parts,
            tensor=tensor,
        )

    def _hidden(
        self, step: Step, stage: int, sender: int, rows: int
    ) -> Generator[Wait, None, list[int]]:
        """What the stage before `stage` has computed."""
        inbox, key = self._links.inbox, (step.step, stage - 1)
        yield Frames(inbox.hidden, key, (sender,))
        hidden = inbox.hidden.pop(key)[sender]
        if hidden.tensor.shape[0] != rows:
            raise StepBroken(self._id(sender), "hidden states of the wrong size")
        return toy.from_tensor(hidden.tensor)

    def _give(self, step: Step, stage: int, receiver: int, xs: list[int]) -> None:
        mine = self.topology
        frame = Hidden(
            fence=mine.plan.fence,
            step=step.step,
            link_seq=self._links.next_sequence(receiver),
            sender=mine.me,
            stage=stage,
            tensor=toy.to_tensor(xs, (len(xs),)),
        )
        self._links.send(receiver, frame)

    def _id(self, member: int) -> str:
        return self.topology.plan.members[member].node_id

    # --- the vocabulary ---------------------------------------------------------------------------

    def _offers(self, step: Step, xs: list[int]) -> list[list[tuple[int, int]]]:
        offers, row = [], -1
        for slot in step.slots:
            row += len(slot.tokens)
            if slot.sample:
                units = self.topology.vocab_units
                offers.append([toy.offer(unit, xs[row]) for unit in units])
        return offers

    def send_candidates(self, step: Step, offers: list[list[tuple[int, int]]]) -> None:
        """Offer this node's candidates to the leader; without any, say that the step is done."""
        mine = self.topology
        units = mine.vocab_units
        flat = [offer for of_slot in offers for offer in of_slot] or [(-1, 0)] * len(units)
        shape = (max(len(offers), 1), len(units), 1)
        ids = pack(f"<{len(flat)}i", *(token for token, _ in flat))
        scores = pack(f"<{len(flat)}f", *(score for _, score in flat))
        frame = Candidates(
            fence=mine.plan.fence,
            step=step.step,
            link_seq=self._links.next_sequence(mine.plan.leader),
            sender=mine.me,
            units=units,
            ids=Tensor(WireDType.INT32, shape, ids),
            logits=Tensor(WireDType.FLOAT32, shape, scores),
            lse=Tensor(WireDType.FLOAT32, shape[:2], bytes(4 * len(flat))),
        )
        self._links.send(mine.plan.leader, frame)

    def collect(
        self, step: Step, own: list[list[tuple[int, int]]]
    ) -> Generator[Wait, None, list[list[tuple[int, int]]]]:
        """[sampling slots] of candidates of all vocab units."""
        mine, inbox = self.topology, self._links.inbox
        owing = tuple(member for member in mine.vocab if member != mine.me)
        slots = sum(slot.sample for slot in step.slots)
        offers: list[list[tuple[int, int]]] = own or [[] for _ in range(slots)]
        if owing:
            yield Frames(inbox.candidates, step.step, owing)
            for member, frame in inbox.candidates.pop(step.step).items():
                if frame.ids.shape[:2] != (max(slots, 1), len(frame.units)):
                    node_id = mine.plan.members[member].node_id
                    raise StepBroken(node_id, "candidates for another number of slots")
                ids = memoryview(frame.ids.data).cast("i")
                scores = memoryview(frame.logits.data).cast("f")
                width = len(frame.units)
                for place, of_slot in enumerate(offers):
                    for unit in range(width):
                        at = place * width + unit
                        of_slot.append((ids[at], int(scores[at])))
        return offers


def made(portions: Iterator[None]) -> Generator[Wait, None, None]:
    """Make KV of inputs, portion by portion, which takes its time."""
    for _ in portions:
        yield Sleep(HALF_LAYER_S)


def _add_to(totals: list[int], sums: list[int]) -> None:
    """Add [parts][rows] of sums to the rows."""
    rows = len(totals)
    for place, value in enumerate(sums):
        totals[place % rows] += value


def _units_below(node: int, count: int) -> tuple[int, ...]:
    """The units whose sum a tree node is."""
    level, first = node >> tree.INDEX_BITS, tree.first_unit(node)
    return tuple(range(first, min(first + (1 << level), count)))


def _check_cover(mine: Topology, role: Role) -> None:
    """All parts of all members together must be every unit once, and make the whole tree."""
    for half, count in enumerate(mine.units):
        nodes = [node for parts in role.parts[half].values() for node in parts]
        below = sorted(unit for node in nodes for unit in _units_below(node, count))
        check(below == list(range(count)), "a unit contributes not exactly once")
        additions = tree.plan_additions(nodes, count)
        left = set(nodes) | {result for *_, result in additions}
        left -= {node for one, other, _ in additions for node in (one, other)}
        check(len(left) == 1, "the parts of a sum do not come together")
