"""Sums of a half layer over the nodes of a stage: partials go out and come in, by one tree.

Each node sends the sums of its own subtrees to every other one and adds up all; where rows are many
(`core/scatter`), each adds some of them for the others. A partial is written into the frame that is
sent. While a reply is decoded, frames are kept from step to step (see `wire/partial_frame`): caches
are full of weights then, and what is neither made nor looked up again is not waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

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
"""Frames of so few rows are kept."""

KEPT_HALVES: Final = 64
"""Of so many, by stage, half and rows; then they are made anew."""


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


class _Half(NamedTuple):
    """What goes out, and comes in by member, for one half of any layer of a stage."""

    mine: _Sums | None
    due: tuple[tuple[int, _Sums], ...]
    peers: tuple[int, ...]
    device: torch.device


class StepSums:
    """One node's exchanges of partials under one plan."""

    def __init__(self, topology: Topology, links: StepLinks) -> None:
        self._topology = topology
        self._links = links
        self._halves: dict[tuple[int, int, int], _Half] = {}

    def total(self, step: int, need: NeedSum, rows: int) -> torch.Tensor:
        """The sum of these partials and of those of all others, [rows, hidden]: good until the next
        call. Raises `StepBroken` when a peer's frame does not come or is wrong."""
        units = self._topology.units[need.half]
        parts = subtree_sums(need.partials, units) if need.partials else {}
        if rows <= KEPT_ROWS:
            self._exchange(step, need, parts, rows)
            return whole_sum(parts, units)
        role = self._topology.role_of(need.stage)
        if shares := self._topology.shares(role, need.half, rows):
            return self._shared(step, need, parts, shares)
        self._send_new(step, need, parts, role.peers)
        self._collect(step, need, parts, rows, role.senders(need.half))
        return whole_sum(parts, units)

    # --- few rows ---------------------------------------------------------------------------------

    def _exchange(
        self, step: int, need: NeedSum, parts: dict[int, torch.Tensor], rows: int
    ) -> None:
        """Send these parts, and add to them what others send: by frames that are kept."""
        half = self._halves.get((need.stage, need.half, rows)) or self._half(need, parts, rows)
        if half.mine is not None:
            self._send(step, need.layer, half.mine, parts, half.peers)
        for place, (sender, due) in enumerate(half.due):
            if not self._links.receive_due(sender, due.frame, step, need.layer):
                late = [sender for sender, _ in half.due[place:]]
                self._collect(step, need, parts, rows, late)
                return
            if not due.tensor.is_finite():
                raise not_finite(self._id(sender), "a partial")
            values = due.values
            if half.device.type != "cpu":
                values = tuple(value.to(half.device) for value in values)
            parts.update(zip(due.nodes, values, strict=True))

    def _half(self, need: NeedSum, parts: Mapping[int, torch.Tensor], rows: int) -> _Half:
        plan, me = self._topology.plan, self._topology.me
        role = self._topology.role_of(need.stage)
        due = [
            (sender, _Sums(plan, sender, need, role.parts[need.half][sender], rows))
            for sender in role.senders(need.half)
        ]
        device = next(iter(parts.values())).device if parts else torch.device("cpu")
        mine = _Sums(plan, me, need, tuple(parts), rows) if parts and role.peers else None
        if len(self._halves) >= KEPT_HALVES:
            self._halves.clear()
        half = _Half(mine, tuple(due), role.peers, device)
        self._halves[need.stage, need.half, rows] = half
        return half

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
        for node, value in zip(sums.nodes, sums.values, strict=True):
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
    ) -> None:
        """Wait for the partials of these members, and add them to the parts."""
        if not senders:
            return
        arrived = self._links.collect(
            self._links.inbox.partials,
            (step, need.layer, need.half),
            {sender: sender for sender in senders},
        )
        device = next(iter(parts.values())).device if parts else torch.device("cpu")
        for sender, partial in arrived.items():
            fits = partial.tensor.shape[1] == rows
            check_tensor(self._id(sender), partial.tensor, fits, "a partial")
            sums = from_wire(partial.tensor)
            parts.update(zip(partial.parts, sums.to(device).unbind(), strict=True))

    def _id(self, member: int) -> str:
        return self._topology.plan.members[member].node_id
