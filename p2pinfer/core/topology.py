"""What a plan means for one member: whom it hears from and sends to within a step, and what.

The plan is data and the data plane runs it blindly; this is that data, worked out once per plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from msgspec import Struct

from p2pinfer.core import tree
from p2pinfer.core.holdings import (
    Holding,
    holdings,
    owners_of,
    sender_of_hidden,
    stage_members,
    standby_holdings,
    standbys_of,
)
from p2pinfer.core.inputs import input_spans
from p2pinfer.core.room import kept_bytes
from p2pinfer.core.scatter import shares
from p2pinfer.core.units import (
    Slice,
    input_bytes_per_position,
    kv_bytes_per_position,
    unit_count,
    unit_weight_bytes,
)
from p2pinfer.limits import MAX_POSITIONS, MAX_REQUESTS
from p2pinfer.types import ModelSpec, Plan, UnitKind


class Role(Struct, frozen=True, kw_only=True):
    """A member's part in one stage. Members are indices into the plan's members.

    `peers` are the other members of the stage. `parts[half][member]` are the tree nodes whose sums
    a member of it sends in that half layer. `hidden_from` sends me the hidden states of the stage
    before; None in the first one, and where I have them myself, being of that stage too.
    `hidden_to` get mine.
    """

    holding: Holding
    peers: tuple[int, ...]
    parts: tuple[Mapping[int, tuple[int, ...]], Mapping[int, tuple[int, ...]]]
    hidden_from: int | None
    hidden_to: tuple[int, ...]

    def senders(self, half: int) -> tuple[int, ...]:
        """Peers that send a partial in this half layer."""
        return tuple(p for p in self.peers if self.parts[half].get(p))


class Topology(Struct, frozen=True, kw_only=True):
    """Members are indices into `plan.members`.

    `roles` are my parts in the stages of which I own anything, in the order of the stages.
    `units[half]` counts the units. `vocab[member]` are the vocab units that a member owns.
    """

    plan: Plan
    me: int
    roles: tuple[Role, ...]
    units: tuple[int, int]
    vocab: Mapping[int, tuple[int, ...]]

    @property
    def leads(self) -> bool:
        """Whether this member draws the tokens."""
        return self.me == self.plan.leader

    @property
    def is_needed(self) -> bool:
        """Whether no step can do without this member: it draws the tokens, or owns units. It waits
        for others in each, too; who is not needed only takes note of the tokens."""
        return self.leads or bool(self.roles)

    @property
    def others(self) -> tuple[int, ...]:
        """Every member but me."""
        return tuple(i for i in range(len(self.plan.members)) if i != self.me)

    @property
    def holdings(self) -> tuple[Holding, ...]:
        """What I own, by stage."""
        return tuple(role.holding for role in self.roles)

    @property
    def vocab_units(self) -> tuple[int, ...]:
        """The vocab units that I own."""
        return self.vocab.get(self.me, ())

    def role(self, stage: int) -> Role | None:
        """My part in the stage of that number; None where I own nothing of it."""
        for role in self.roles:
            if role.holding.stage == stage:
                return role
        return None

    def role_of(self, stage: int) -> Role:
        """My part in a stage of which I own something."""
        role = self.role(stage)
        assert role is not None, "what is computed is owned"
        return role

    def shares(self, role: Role, half: int, rows: int) -> Mapping[int, Slice]:
        """The rows of a sum that each member of a stage adds for all; empty: each adds all of them.

        There is nothing to share where one member owns all units of a kind.
        """
        alone = len(role.parts[half]) < 2
        return {} if alone else shares((self.me, *role.peers), rows)

    def is_whole(self, stage: int, half: int, parts: tuple[int, ...]) -> bool:
        """Whether a partial of these tree nodes is a share that its sender has added for all."""
        if parts != (tree.root(self.units[half]),):
            return False
        role = self.role(stage)
        return role is not None and len(role.parts[half]) > 1

    @property
    def sends_to(self) -> frozenset[int]:
        """Members to which I send partials or hidden states."""
        return frozenset(m for role in self.roles for m in (*role.peers, *role.hidden_to))

    @property
    def hears_from(self) -> frozenset[int]:
        """Members that send me partials or hidden states."""
        peers = {peer for role in self.roles for peer in role.peers}
        return frozenset(peers | {r.hidden_from for r in self.roles if r.hidden_from is not None})


def topology(plan: Plan, me: int) -> Topology:
    """Work out `me`'s part in the steps of `plan`; the plan must be valid."""
    held = [holdings(plan, index) for index in range(len(plan.members))]
    units = unit_count(plan.model, UnitKind.HEAD), unit_count(plan.model, UnitKind.MLP)
    return Topology(
        plan=plan,
        me=me,
        roles=tuple(_role(plan, me, mine, held, units) for mine in held[me]),
        units=units,
        vocab={m: each[-1].vocab_units for m, each in enumerate(held) if _offers(each)},
    )


def _offers(held: Sequence[Holding]) -> bool:
    """Whether any of it is of the vocabulary, which is the last stage's."""
    return bool(held) and bool(held[-1].vocab_units)


def _role(
    plan: Plan,
    me: int,
    mine: Holding,
    held: Sequence[Sequence[Holding]],
    units: tuple[int, int],
) -> Role:
    """My part in the stage of `mine`; `held` is what each member owns."""
    stage = mine.stage
    here = {m: h for m, each in enumerate(held) for h in each if h.stage == stage}
    hears = sender_of_hidden(plan, stage, me) if stage > 0 else me
    return Role(
        holding=mine,
        peers=tuple(m for m in here if m != me),
        parts=(
            {m: tree.cover(h.head_units, units[0]) for m, h in here.items() if h.head_units},
            {m: tree.cover(h.mlp_units, units[1]) for m, h in here.items() if h.mlp_units},
        ),
        hidden_from=hears if hears != me else None,
        hidden_to=_receivers(plan, stage, me),
    )


def _receivers(plan: Plan, stage: int, me: int) -> tuple[int, ...]:
    """Other members of the next stage that get their hidden states from `me`."""
    following = stage + 1
    if following == len(plan.stages):
        return ()
    members = stage_members(plan, following)
    return tuple(m for m in members if m != me and sender_of_hidden(plan, following, m) == me)


def position_limit(plan: Plan) -> int:
    """Positions of KV that every member has room for, over all requests, replicas included, and
    the inputs that it keeps.

    A member that says neither how much memory it offers nor how much of it for KV does not limit.
    """
    limit = MAX_POSITIONS * MAX_REQUESTS
    for index in range(len(plan.members)):
        room = kv_room(plan, index)
        row = sum(_kv_bytes_per_position(plan, held) for held in _held(plan, index))
        for span in input_spans(plan, index):
            row += input_bytes_per_position(plan.model, span.end - span.start)
        if room is not None and row:
            limit = min(limit, room // row)
    return limit


def kv_room(plan: Plan, index: int) -> int | None:
    """Bytes of KV, replicas and kept inputs included, that a member has room for beside the weights
    of what it owns and keeps; None when it does not say. Of weights that it keeps warm those of one
    owner count, the most (`core/room`)."""
    member = plan.members[index]
    rooms = []
    if member.memory_bytes:
        weights = sum(weight_bytes(plan.model, held) for held in holdings(plan, index))
        kept = int(kept_bytes(member, _kept_weights(plan, index)))
        rooms.append(max(0, member.memory_bytes - weights - kept))
    if member.kv_bytes:
        rooms.append(member.kv_bytes)
    return min(rooms, default=None)


def _kept_weights(plan: Plan, index: int) -> Mapping[int, int]:
    """Bytes of the weights that a member is a standby of, by their owner."""
    found: Counter[int] = Counter()
    for stage in plan.stages:
        by_kind = zip(UnitKind, owners_of(stage), standbys_of(stage), strict=True)
        for kind, owners, copies in by_kind:
            layers = 1 if kind is UnitKind.VOCAB else stage.end - stage.start
            for unit, members in enumerate(copies):
                if index in members:
                    found[owners[unit]] += unit_weight_bytes(plan.model, kind, unit) * layers
    return found


def _held(plan: Plan, index: int) -> tuple[Holding, ...]:
    """What a member owns, and what it keeps replicas of."""
    return holdings(plan, index) + standby_holdings(plan, index)


def _kv_bytes_per_position(plan: Plan, held: Holding) -> int:
    layers = held.span.end - held.span.start
    return kv_bytes_per_position(plan.model, layers) * len(held.head_units)


def weight_bytes(model: ModelSpec, held: Holding) -> int:
    """Bytes of the weights of all units that a member holds."""
    layers = held.span.end - held.span.start
    kinds = (
        (UnitKind.HEAD, held.head_units, layers),
        (UnitKind.MLP, held.mlp_units, layers),
        (UnitKind.VOCAB, held.vocab_units, 1),
    )
    return sum(
        unit_weight_bytes(model, kind, unit) * times
        for kind, units, times in kinds
        for unit in units
    )
