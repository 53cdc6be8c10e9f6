"""One toy node's part in every step of one plan: what `StepEngine` and a runner do, in integers.

`compute` is a generator that gives out what it waits for: seconds of computing, or frames. Each
residual is compared with the truth as soon as it is summed, and each read of KV with the log that
it was written for, so that a wrong token's cause is found where it arises.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from struct import pack
from typing import Protocol

from msgspec import Struct

from p2pinfer.core import tree
from p2pinfer.core.step_checks import write_down
from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.wire.messages import Candidates, Hidden, Partial, Slot, Step, StepAck
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.simulation import toy_model as toy
from tests.simulation.toy_links import StepBroken, ToyLinks
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


class Row(Struct, frozen=True):
    """One position of a step."""

    request_id: int
    position: int
    token: int
    before: int
    """The tag of the log up to this token, without it."""
    name: int
    """With it."""


class ToyCache:
    """KV by request, layer and position: for each head unit what was attended up to there."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], list[tuple[int, dict[int, int]]]] = {}
        """By request and layer: (tag of the log that it was written for, value by unit)."""

    def read(self, row: Row, layer: int) -> Mapping[int, int]:
        """What is there for the position before `row`."""
        if row.position == 0:
            return {}
        rows = self._rows.get((row.request_id, layer), [])
        check(
            len(rows) >= row.position,
            f"KV of request {row.request_id} is read at {row.position - 1}: {len(rows)} are there",
        )
        name, values = rows[row.position - 1]
        check(
            name == row.before,
            f"KV of request {row.request_id} at {row.position - 1} was written for another log",
        )
        return values

    def write(self, row: Row, layer: int, values: dict[int, int]) -> None:
        """Write a position; what follows it is void."""
        rows = self._rows.setdefault((row.request_id, layer), [])
        del rows[row.position :]
        rows.append((row.name, values))

    def cut(self, request_id: int, positions: int) -> None:
        """Only so many positions stay."""
        for (known, _), rows in self._rows.items():
            if known == request_id:
                del rows[positions:]

    def forget(self, request_ids: Sequence[int]) -> None:
        """Free what these requests hold."""
        for key in [key for key in self._rows if key[0] in request_ids]:
            del self._rows[key]

    def clear(self) -> None:
        """Free everything."""
        self._rows.clear()


class ToyEngine:
    """Computes steps; logs and cache outlive it."""

    def __init__(
        self, mine: Topology, logs: TokenLogs, cache: ToyCache, links: ToyLinks, truth: Truth
    ) -> None:
        self.topology = mine
        self.steps = 0
        self.step = 0
        self.owes = 0
        self._logs = logs
        self._cache = cache
        self._links = links
        self._truth = truth
        self._subtrees = tuple(
            {node: _units_below(node, count) for node in mine.parts[half].get(mine.me, ())}
            for half, count in enumerate(mine.units)
        )
        if mine.holding.stage is not None:
            _check_cover(mine)

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
        self._cache.forget(step.ended)

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
        if step.slots and self.topology.holding.stage is not None:
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
        mine = self.topology
        busy = Sleep(HALF_LAYER_S + ROW_S * len(rows))
        if mine.holding.stage == 0:
            xs = [toy.embedding(row.token, row.position) for row in rows]
        else:
            xs = yield from self._hidden(step, len(rows))
        for layer in range(*mine.holding.span):
            yield busy
            own = self._heads(layer, rows, xs)
            xs = yield from self._add(step, layer, 0, own, xs)
            self._check_rows(rows, 2 * layer + 1, xs)
            yield busy
            own = [{u: toy.mlp_partial(layer, u, x) for u in mine.holding.mlp_units} for x in xs]
            xs = yield from self._add(step, layer, 1, own, xs)
            self._check_rows(rows, 2 * layer + 2, xs)
        for receiver in mine.hidden_to:
            self._give(step, receiver, xs)
        return self._offers(step, xs)

    def _heads(self, layer: int, rows: list[Row], xs: list[int]) -> list[dict[int, int]]:
        own = []
        for row, x in zip(rows, xs, strict=True):
            past = self._cache.read(row, layer)
            values = {
                unit: toy.attend(layer, unit, past.get(unit, 0), x)
                for unit in self.topology.holding.head_units
            }
            check(not past or values.keys() <= past.keys(), "KV of a unit that was not held")
            self._cache.write(row, layer, values)
            own.append({u: toy.head_partial(layer, u, value, x) for u, value in values.items()})
        return own

    def _check_rows(self, rows: list[Row], half: int, xs: list[int]) -> None:
        for row, x in zip(rows, xs, strict=True):
            self._truth.summed(row.before, row.token, row.position, half, x)

    # --- exchanges --------------------------------------------------------------------------------

    def _add(
        self, step: Step, layer: int, half: int, own: list[dict[int, int]], xs: list[int]
    ) -> Generator[Wait, None, list[int]]:
        """Exchange partial sums, own and others', and add all of them to the residuals."""
        mine, links = self.topology, self._links
        totals = list(xs)
        subtrees = self._subtrees[half]
        if subtrees:
            sums = [sum(row[u] for u in units) for units in subtrees.values() for row in own]
            sums = [value % toy.PRIME for value in sums]
            _add_to(totals, sums)
            tensor = toy.to_tensor(sums, (len(subtrees), len(xs)))
            for peer in mine.peers:
                frame = self._partial(
                    step, peer, layer=layer, half=half, parts=tuple(subtrees), tensor=tensor
                )
                links.send(peer, frame)
        senders = mine.senders(half)
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
        *,
        layer: int,
        half: int,
        parts: tuple[int, ...],
        tensor: Tensor,
    ) -> Partial:
        mine = self.topology
        assert mine.holding.stage is not None
        return Partial(
            fence=mine.plan.fence,
            step=step.step,
            link_seq=self._links.next_sequence(peer),
            sender=mine.me,
            stage=mine.holding.stage,
            layer=layer,
            half=half,
            parts=parts,
            tensor=tensor,
        )

    def _hidden(self, step: Step, rows: int) -> Generator[Wait, None, list[int]]:
        sender = self.topology.hidden_from
        assert sender is not None
        inbox = self._links.inbox
        yield Frames(inbox.hidden, step.step, (sender,))
        hidden = inbox.hidden.pop(step.step)[sender]
        if hidden.tensor.shape[0] != rows:
            raise StepBroken(self._id(sender), "hidden states of the wrong size")
        return toy.from_tensor(hidden.tensor)

    def _give(self, step: Step, receiver: int, xs: list[int]) -> None:
        mine = self.topology
        assert mine.holding.stage is not None
        frame = Hidden(
            fence=mine.plan.fence,
            step=step.step,
            link_seq=self._links.next_sequence(receiver),
            sender=mine.me,
            stage=mine.holding.stage,
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
                units = self.topology.holding.vocab_units
                offers.append([toy.offer(unit, xs[row]) for unit in units])
        return offers

    def send_candidates(self, step: Step, offers: list[list[tuple[int, int]]]) -> None:
        """Offer this node's candidates to the leader; without any, say that the step is done."""
        mine = self.topology
        units = mine.holding.vocab_units
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


def _add_to(totals: list[int], sums: list[int]) -> None:
    """Add [parts][rows] of sums to the rows."""
    rows = len(totals)
    for place, value in enumerate(sums):
        totals[place % rows] += value


def _units_below(node: int, count: int) -> tuple[int, ...]:
    """The units whose sum a tree node is."""
    level, first = node >> tree.INDEX_BITS, tree.first_unit(node)
    return tuple(range(first, min(first + (1 << level), count)))


def _check_cover(mine: Topology) -> None:
    """All parts of all members together must be every unit once, and make the whole tree."""
    for half, count in enumerate(mine.units):
        nodes = [node for parts in mine.parts[half].values() for node in parts]
        below = sorted(unit for node in nodes for unit in _units_below(node, count))
        check(below == list(range(count)), "a unit contributes not exactly once")
        additions = tree.plan_additions(nodes, count)
        left = set(nodes) | {result for *_, result in additions}
        left -= {node for one, other, _ in additions for node in (one, other)}
        check(len(left) == 1, "the parts of a sum do not come together")
