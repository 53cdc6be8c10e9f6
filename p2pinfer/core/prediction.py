"""How long one step of decoding takes by a plan, from what its members have measured of themselves.

A step is a chain: half layer by half layer each owner reads its weights, and then all exchange
their sums, so each waits for the slowest; stage by stage hidden states are handed over; the
vocabulary is read; candidates go to the leader. Nothing is predicted where a speed or a round trip
is unknown. What attention reads of a long context is left out: it is the same for all plans of as
many heads. The constants are from `docs/benchmarks.md`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import inf
from typing import NamedTuple

from p2pinfer.core import tree
from p2pinfer.core.holdings import owners_of, sender_of_hidden, stage_members
from p2pinfer.core.units import unit_count, unit_read_bytes
from p2pinfer.types import Member, ModelSpec, Plan, UnitKind

QUANTISED_HALF_S = 0.0002
HALF_LAYER_S = 0.0005
"""What a half layer takes beside its products: norms, attention over a short context, calls. With
quantised weights most of these are part of what the product library computes."""

EXCHANGE_S = 0.0001
"""An exchange of sums between processes of one machine, without waiting for the others."""

WAITING = 0.1
"""Of what a crew computes: so much longer each exchange makes all wait for the last one, who is
another every time."""

PEER_S = 0.00005
"""Each further member of a stage is one more message to send and to read."""

STEP_S = 0.001
"""Once a step: to make it, to tell it, and to draw."""

SUM_BYTES = 4
"""Of a number of a partial sum, and of a hidden state."""

NETWORK_BYTES_PER_S = 110e6
MEMORY_BYTES_PER_S = 2e9
"""What a message goes at between two machines (1 Gbit/s, the slowest that is usual) and within
one."""


class Prediction(NamedTuple):
    """Seconds of one step of one reply: computing, exchanging sums, handing over."""

    compute_s: float
    exchange_s: float
    handover_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.compute_s + self.exchange_s + self.handover_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of one reply per second."""
        return 1.0 / self.step_s


def round_trip_s(one: Member, other: Member) -> float | None:
    """A message to another member and its answer, by the slower of what both measured; 0 within a
    machine, None: nobody knows."""
    if one.node_id == other.node_id or (one.machine and one.machine == other.machine):
        return 0.0
    known = [
        trip.ms / 1000
        for teller, about in ((one, other), (other, one))
        for trip in teller.round_trips
        if trip.node_id == about.node_id
    ]
    return max(known, default=None)


def rates(members: Iterable[Member]) -> Mapping[str, float] | None:
    """Bytes of weights per second that each of some members reads while all do, by node id: those
    of one machine share what its memory gives. None where one of them is unknown."""
    by_machine: defaultdict[str, list[Member]] = defaultdict(list)
    for member in members:
        if not member.product_gb_s:
            return None
        by_machine[member.machine or member.node_id].append(member)
    found = {}
    for together in by_machine.values():
        wanted = sum(member.product_gb_s for member in together)
        given = max(member.read_gb_s for member in together) or inf
        for member in together:
            found[member.node_id] = 1e9 * member.product_gb_s * min(1.0, given / wanted)
    return found


def predict(plan: Plan) -> Prediction | None:
    """One decoding step by a plan; None where a speed or a round trip of its owners is unknown."""
    crews = [
        [plan.members[i] for i in stage_members(plan, number)] for number in range(len(plan.stages))
    ]
    compute, exchange = STEP_S, 0.0
    beside = HALF_LAYER_S if plan.model.quant == "none" else QUANTISED_HALF_S
    for number, crew in enumerate(crews):
        speeds, trip = rates(crew), _longest(combinations(crew, 2))
        if speeds is None or trip is None:
            return None
        stage = plan.stages[number]
        depth = stage.end - stage.start
        before = compute
        for kind, owners in zip(UnitKind, owners_of(stage), strict=True):
            slowest = _slowest_s(plan, kind, owners, speeds)
            if kind is UnitKind.VOCAB:
                compute += slowest
            else:
                compute += depth * (slowest + beside)
                exchange += depth * _exchange_s(plan.model, kind, owners, crew, trip)
        exchange += WAITING * (compute - before) if len(crew) > 1 else 0.0
    handover = _handovers_s(plan, crews)
    return None if handover is None else Prediction(compute, exchange, handover)


def _longest(pairs: Iterable[tuple[Member, Member]]) -> float | None:
    """The longest round trip of some pairs; None where one is unknown."""
    longest = 0.0
    for one, other in pairs:
        trip = round_trip_s(one, other)
        if trip is None:
            return None
        longest = max(longest, trip)
    return longest


def _slowest_s(
    plan: Plan, kind: UnitKind, owners: Sequence[int], speeds: Mapping[str, float]
) -> float:
    """How long the slowest owner reads the weights of its units of one kind, in one layer; only
    the last stage has any of the vocabulary."""
    held: defaultdict[int, int] = defaultdict(int)
    for unit, owner in enumerate(owners):
        held[owner] += unit_read_bytes(plan.model, kind, unit)
    times = (nbytes / speeds[plan.members[i].node_id] for i, nbytes in held.items())
    return max(times, default=0.0)


def _exchange_s(
    model: ModelSpec, kind: UnitKind, owners: Sequence[int], crew: Sequence[Member], trip: float
) -> float:
    """One exchange of sums: each owner sends the sums of its subtrees to all others of the crew."""
    peers = len(crew) - 1
    if not peers:
        return 0.0
    units = unit_count(model, kind)
    parts = max(
        len(tree.cover(tuple(u for u, o in enumerate(owners) if o == owner), units))
        for owner in set(owners)
    )
    nbytes = parts * peers * model.hidden_size * SUM_BYTES
    return EXCHANGE_S + (peers - 1) * PEER_S + trip / 2 + nbytes / _bytes_per_s(crew)


def _handovers_s(plan: Plan, crews: Sequence[Sequence[Member]]) -> float | None:
    """The step's way: from the leader to the first stage, from stage to stage, and back."""
    leader = plan.members[plan.leader]
    members = plan.members
    took = 0.0
    for number in range(1, len(crews)):
        here = stage_members(plan, number)
        pairs = [(members[sender_of_hidden(plan, number, i)], members[i]) for i in here]
        pairs = [pair for pair in pairs if pair[0] is not pair[1]]
        trip = _longest(pairs)
        if trip is None:
            return None
        if pairs:
            together = [member for pair in pairs for member in pair]
            nbytes = plan.model.hidden_size * SUM_BYTES
            took += EXCHANGE_S + trip / 2 + nbytes / _bytes_per_s(together)
    for crew in (crews[0], crews[-1]):
        others = [(leader, member) for member in crew if member.node_id != leader.node_id]
        trip = _longest(others)
        if trip is None:
            return None
        took += EXCHANGE_S / 2 + trip / 2 if others else 0.0
    return took


def _bytes_per_s(members: Sequence[Member]) -> float:
    """What messages between some members go at."""
    machines = {member.machine or member.node_id for member in members}
    return MEMORY_BYTES_PER_S if len(machines) == 1 else NETWORK_BYTES_PER_S
