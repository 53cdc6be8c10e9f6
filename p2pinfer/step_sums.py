"""Sums of a half layer over the nodes of a stage: partials go out and come in, by one tree.

Each node sends the sums of its own subtrees to every other one and adds up all; where rows are many
(`core/scatter`), each adds some of them for the others. A partial is written into the frame that is
sent. While a reply is decoded, frames are kept from step to step (see `wire/partial_frame`): caches
are full of weights then, and what is neither made nor looked up again is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from p2pinfer.core import tree
from p2pinfer.core.step_checks import SUM_DTYPES
from p2pinfer.core.topology import Topology
from p2pinfer.core.units import Slice
from p2pinfer.model.reduction import subtree_sums, whole_sum
from p2pinfer.model.runner import NeedSum
from p2pinfer.step_links import StepLinks
from p2pinfer.step_tensors import FrameTensor, check_tensor, from_wire, not_finite
from p2pinfer.types import Plan
from p2pinfer.wire.partial_frame import PartialFrame

KEPT_ROWS: Final = 16
"""Frames of so few rows are kept, those of the last number of rows for each half of a stage: a few
megabytes for the largest of models."""


class _Sums:
    """Sums of subtrees, [rows, hidden] each, that lie in the frame of a partial."""

    def __init__(self, plan: Plan, sender: int, need: NeedSum, nodes: Sequence[int], rows: int):
        dtype = SUM_DTYPES[plan.model.wire_dtype]
        self.frame = PartialFrame(
            plan.fence,
            (sender, need.stage, need.half),
            tuple(nodes),
            dtype,
            (rows, plan.model.hidden_size),
        )
        self.tensor = FrameTensor(self.frame.tensor)
        self.nodes = tuple(nodes)
        self.values = self.tensor.values.unbind()

    def by_node(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The sums, in place, by their tree nodes."""
        return zip(self.nodes, self.values, strict=True)


class _Addition(NamedTuple):
    """`result` = `left` + `right`: arrays, where numpy knows their format, and otherwise tensors.

    Between products, which leave no cache as it was, numpy takes half of torch's time.
    """

    left: Any
    right: Any
    result: Any

    def do(self) -> None:
        """Add them up."""
        add = torch.add if isinstance(self.left, torch.Tensor) else np.add
        add(self.left, self.right, out=self.result)


class _Half(NamedTuple):
    """What goes out, and comes in by member, for one half of any layer of a stage; how that is
    added up, and where the total of it lies then."""

    rows: int
    mine: _Sums | None
    peers: tuple[int, ...]
    due: tuple[tuple[int, _Sums], ...]
    additions: tuple[_Addition, ...]
    total: torch.Tensor


class StepSums:
    """One node's exchanges of partials under one plan."""

    def __init__(self, topology: Topology, links: StepLinks) -> None:
        self._topology = topology
        self._links = links
        self._halves: dict[tuple[int, int], _Half] = {}

    def total(self, step: int, need: NeedSum, rows: int) -> torch.Tensor:
        """The sum of these partials and of those of all others, [rows, hidden]: good until the next
        call. Raises `StepBroken` when a peer's frame does not come or is wrong."""
        units = self._topology.units[need.half]
        role = self._topology.role_of(need.stage)
        if not role.peers:
            return whole_sum(need.partials, units)
        parts = subtree_sums(need.partials, units) if need.partials else {}
        if rows <= KEPT_ROWS:
            return self._of_few(step, need, parts, rows)
        if shares := self._topology.shares(role, need.half, rows):
            return self._shared(step, need, parts, shares)
        self._send_new(step, need, parts, role.peers)
        self._collect(step, need, parts, rows, role.senders(need.half))
        return whole_sum(parts, units)

    # --- few rows ---------------------------------------------------------------------------------

    def _of_few(
        self, step: int, need: NeedSum, parts: dict[int, torch.Tensor], rows: int
    ) -> torch.Tensor:
        """Send these parts and add what others send, by memory that is kept."""
        half = self._halves.get((need.stage, need.half))
        if half is None or half.rows != rows:
            half = self._halves[need.stage, need.half] = self._half(need, parts, rows)
        if half.mine is not None:
            self._send(step, need.layer, half.mine, parts, half.peers)
        late, until = [], self._links.awake_until()
        for sender, due in half.due:
            if not self._links.receive_due(sender, due.frame, step, need.layer, until):
                late.append(sender)
            elif not due.tensor.is_finite():
                raise not_finite(self._id(sender), "a partial")
        if late:
            return self._of_late(step, need, half, late)
        for addition in half.additions:
            addition.do()
        return half.total

    def _of_late(self, step: int, need: NeedSum, half: _Half, late: Sequence[int]) -> torch.Tensor:
        """The sum where the parts of some did not come as they were due."""
        there = [sums for sender, sums in half.due if sender not in late]
        if half.mine is not None:
            there.append(half.mine)
        parts = {node: value for sums in there for node, value in sums.by_node()}
        self._collect(step, need, parts, half.rows, late, awake=False)
        return whole_sum(parts, self._topology.units[need.half])

    def _half(self, need: NeedSum, parts: Mapping[int, torch.Tensor], rows: int) -> _Half:
        plan, me = self._topology.plan, self._topology.me
        role, units = self._topology.role_of(need.stage), self._topology.units[need.half]
        mine = _Sums(plan, me, need, tuple(parts), rows) if parts else None
        due = tuple(
            (sender, _Sums(plan, sender, need, role.parts[need.half][sender], rows))
            for sender in role.senders(need.half)
        )
        everything = [*((mine,) if mine else ()), *(sums for _, sums in due)]
        values = {node: value for sums in everything for node, value in sums.by_node()}
        additions = []
        for left, right, result in tree.plan_additions(values, units):
            values[result] = torch.empty_like(values[left])
            operands = (_operand(values[node]) for node in (left, right, result))
            additions.append(_Addition(*operands))
        return _Half(rows, mine, role.peers, due, tuple(additions), values[tree.root(units)])

    # --- many rows --------------------------------------------------------------------------------

    def _shared(
        self,
        step: int,
        need: NeedSum,
        parts: dict[int, torch.Tensor],
        shares: Mapping[int, Slice],
    ) -> torch.Tensor:
        """The sum whose rows the members of the stage add for one another."""
        me, units = self._topology.me, self._topology.units[need.half]
        cut = {
            member: {node: part[rows.start : rows.end] for node, part in parts.items()}
            for member, rows in shares.items()
        }
        others = [member for member in shares if member != me]
        for member in others:
            self._send_new(step, need, cut[member], (member,))
        senders = self._topology.role_of(need.stage).senders(need.half)
        self._collect(step, need, cut[me], shares[me].end - shares[me].start, senders)
        mine = whole_sum(cut[me], units)
        self._send_new(step, need, {tree.root(units): mine}, others)
        arrived = self._links.collect(
            self._links.inbox.wholes,
            (step, need.layer, need.half),
            {member: member for member in others},
        )
        pieces = {me: mine}
        for member, whole in arrived.items():
            rows = shares[member].end - shares[member].start
            fits = whole.tensor.shape[1] == rows
            check_tensor(self._id(member), whole.tensor, fits, "a sum")
            pieces[member] = from_wire(whole.tensor)[0].to(mine.device)
        return torch.cat([pieces[member] for member in shares])

    def _send_new(
        self, step: int, need: NeedSum, parts: dict[int, torch.Tensor], peers: Sequence[int]
    ) -> None:
        if parts and peers:
            rows = next(iter(parts.values())).shape[0]
            sums = _Sums(self._topology.plan, self._topology.me, need, tuple(parts), rows)
            self._send(step, need.layer, sums, parts, peers)

    # --- frames -----------------------------------------------------------------------------------

    def _send(
        self,
        step: int,
        layer: int,
        sums: _Sums,
        parts: Mapping[int, torch.Tensor],
        peers: Sequence[int],
    ) -> None:
        for node, value in sums.by_node():
            value.copy_(parts[node])
        if not sums.tensor.is_finite():
            raise not_finite(self._id(self._topology.me), "a partial")
        for peer in peers:
            self._links.send_partial(peer, sums.frame, step, layer)

    def _collect(
        self,
        step: int,
        need: NeedSum,
        parts: dict[int, torch.Tensor],
        rows: int,
        senders: Sequence[int],
        *,
        awake: bool = True,
    ) -> None:
        """Wait for the partials of these members, and add them to the parts."""
        if not senders:
            return
        arrived = self._links.collect(
            self._links.inbox.partials,
            (step, need.layer, need.half),
            {sender: sender for sender in senders},
            awake=awake,
        )
        device = next(iter(parts.values())).device if parts else torch.device("cpu")
        for sender, partial in arrived.items():
            fits = partial.tensor.shape[1] == rows
            check_tensor(self._id(sender), partial.tensor, fits, "a partial")
            sums = from_wire(partial.tensor)
            parts.update(zip(partial.parts, sums.to(device).unbind(), strict=True))

    def _id(self, member: int) -> str:
        return self._topology.plan.members[member].node_id


def _operand(values: torch.Tensor) -> Any:
    """What is given to an addition: numpy does not know bfloat16."""
    return values if values.dtype is torch.bfloat16 else values.numpy()
