"""What a worker holds when plans come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from p2pinfer.core.replication import fed_units
from p2pinfer.core.topology import topology, weight_bytes
from p2pinfer.errors import LocalProtocolError
from p2pinfer.model.part import Part
from p2pinfer.model.stage_loader import StageLoader
from p2pinfer.types import DType, Fence, Plan
from p2pinfer.unit_holder import kept_units
from tests.holder_bench import DEADLINE_S, Fleet, Node, copies, placed, plan, slots
from tests.lockstep import Lockstep
from tests.random_models import write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model: 4 head units, 2 MLP units, 5 vocab units, 2 layers."""
    return write_random_model(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("ready", [True, False])
def test_promoted_standbys_go_on_bit_by_bit(folder: Path, dtype: DType, ready: bool) -> None:
    """One member after the other dies, each reply goes on where it was, and its logits are those
    of the unsplit model; nothing is loaded then if the standbys were ready."""
    fleet = Fleet(folder, 4, dtype)
    alive = fleet.members
    fleet.adopt(alive)
    position = 0
    while True:
        if ready:
            fleet.ready()
        for slot in slots(position, 9, 1, 3):
            fleet.step(slot)
        position += 13
        if len(alive) == 1:
            break
        alive = alive[1:]
        fleet.adopt(alive)
        assert any(fleet.nodes[member.node_id].told for member in alive) == (not ready)
    assert fleet.restarts == [0, 13, 26, 39]


def test_who_owns_nothing_keeps_replicas(folder: Path) -> None:
    """A member without units of its own is sent KV, and takes over all of it."""
    base, one = plan(folder), Lockstep(folder)
    owner, keeper = Node(folder), Node(folder)
    every = tuple((1,) for _ in range(5))
    first = placed(
        base,
        "0000",
        "00",
        "00000",
        head_standbys=every[:4],
        mlp_standbys=every[:2],
        vocab_standbys=every,
    )
    owner.load(first, 0)
    keeper.load(first, 1)
    one.under(first, {0: owner.runner, 1: keeper.runner})
    keeper.units.start_standbys()
    assert keeper.units.await_standbys(DEADLINE_S) == (11, 11)
    logits = [one.step((slot,)) for slot in slots(0, 40, 1)]
    for unit in fed_units(first, 1):
        assert keeper.units.write_kv(unit, 1, 0, owner.units.read_kv(unit, 1, 0, 40))
    assert (owner.units.kv_standby_bytes, keeper.units.kv_used_bytes) == (0, 0)
    assert owner.units.kv_used_bytes == keeper.units.kv_standby_bytes > 0
    assert owner.units.weight_bytes == keeper.units.standby_weight_bytes > 0
    second = placed(base, "1111", "11", "11111")
    keeper.load(second, 1)
    assert not keeper.told
    one.under(second, {1: keeper.runner})
    assert np.array_equal(one.step(tuple(slots(40, 1))), logits[1])
    assert keeper.units.standby_ready == (0, 0)


def test_replicas_of_another_stage_do_not_compute(folder: Path) -> None:
    """Their units have the same numbers as those that are owned."""
    two = Lockstep(folder, nodes=2, layout="layers")
    first, second = two.plan.stages
    every = copies(*([0] for _ in second.head_owners))
    second = msgspec.structs.replace(second, head_standbys=every)
    two.under(msgspec.structs.replace(two.plan, stages=(first, second)), two.runners)
    nodes = {me: Node(folder) for me in range(2)}
    for me, node in nodes.items():
        node.load(two.plan, me)
        node.units.start_standbys()
        node.units.await_standbys(DEADLINE_S)
    assert nodes[0].units.standby_ready == (4, 4)
    two.under(two.plan, {me: node.runner for me, node in nodes.items()})
    whole = Lockstep(folder)
    for slot in slots(0, 9, 1):
        assert np.array_equal(two.step((slot,)), whole.step((slot,)))


def two_with_standbys(base: Plan) -> Plan:
    """Each of two members keeps all that the other owns."""
    return placed(
        base,
        "0011",
        head_standbys=copies([1], [1], [0], [0]),
        mlp_standbys=copies([1], [0]),
        vocab_standbys=copies([1], [0], [1], [0], [1]),
    )


def holding_some(folder: Path, *, standbys: bool = False) -> tuple[Node, Plan]:
    """Member 0 of two holds its units, and KV of three positions of request 1."""
    base = plan(folder)
    base = two_with_standbys(base) if standbys else placed(base, "0011")
    node = Node(folder)
    node.load(base)
    for slot in slots(0, 3):
        run = node.runner.run((slot,))
        need = next(run)
        try:
            while True:
                need = run.send(torch.ones(next(iter(need.partials.values())).shape))
        except StopIteration:
            pass
    node.write(1, 3)
    return node, base


def kv(node: Node, *units: int) -> list[bytes]:
    """KV of the three positions, by head unit."""
    coverage = node.logs.coverage
    found = {unit.unit: unit for unit in coverage.computed | coverage.fed}
    return [bytes(node.units.read_kv(found[unit], 1, 0, 3).data) for unit in units]


def test_the_same_units_are_kept(folder: Path) -> None:
    """With their KV; nothing is loaded again, and what loads in the background goes on."""
    node, base = holding_some(folder, standbys=True)
    before = node.runner
    node.units.start_standbys()
    node.load(msgspec.structs.replace(base, fence=Fence(1, 2)))
    assert node.units.runner is before
    assert not node.told
    assert node.units.await_standbys(DEADLINE_S) == (5, 5)
    assert node.units.weight_bytes == sum(
        weight_bytes(base.model, each)
        for each in (*topology(base, 0).holdings, *kept_units(base, 0))
    )
    assert node.logs.coverage.least(1) == 3


def test_kv_stays_where_the_heads_stay(folder: Path) -> None:
    """Other MLP or vocab units are loaded, and the KV goes on."""
    node, base = holding_some(folder)
    before = kv(node, 0, 1)
    node.load(placed(base, "0011", "10", "10101"))
    assert node.told
    assert kv(node, 0, 1) == before
    assert node.logs.coverage.least(1) == 3


def test_kv_of_other_heads_is_lost(folder: Path) -> None:
    """The logs stay, and say that nothing is covered."""
    node, base = holding_some(folder)
    node.load(placed(base, "1100"))
    assert (node.logs.coverage.least(1), list(node.logs.tokens(1))) == (0, [5, 6, 7])
    assert node.units.kv_used_bytes == 0


def test_coverage_is_lost_with_the_units(folder: Path) -> None:
    """Even where a load is never followed by what the worker does then."""
    node, base = holding_some(folder)
    unit = next(iter(node.logs.coverage.computed))
    node.units.hold(topology(placed(base, "1100"), 0))
    assert node.logs.coverage.of(1, unit) == 0


def test_who_gives_units_away_may_keep_them(folder: Path) -> None:
    """What was given away is a replica now, and ready; nothing is loaded, and no KV is lost."""
    node, base = holding_some(folder)
    before = kv(node, 0, 1)
    node.load(shared(base))
    assert not node.told
    assert node.units.standby_ready == (1, 1)
    assert kv(node, 0, 1) == before
    assert node.units.kv_used_bytes == node.units.kv_standby_bytes > 0
    node.load(base)
    assert not node.told
    assert kv(node, 0, 1) == before
    assert node.logs.coverage.least(1) == 3


def shared(base: Plan) -> Plan:
    """Member 0 keeps a replica of a head unit that it owned."""
    return placed(base, "0111", head_standbys=copies([], [0], [], []))


def test_what_is_still_owned_is_loaded_anew_in_the_background(folder: Path) -> None:
    """It takes the place of the part that has more, with its KV; then less is computed with."""
    node, base = holding_some(folder)
    before = kv(node, 0, 1)
    node.load(shared(base))
    fat = node.units.weight_bytes
    assert not node.units.trim()
    node.units.start_standbys()
    assert node.units.await_standbys(DEADLINE_S) == (1, 1)
    assert node.units.weight_bytes == 2 * fat
    said = node.said
    assert node.units.trim()
    assert not node.units.trim()
    # The plan is in force: who says that it loads would not be missed for long.
    assert node.said == said
    assert node.units.weight_bytes == fat
    assert node.units.standby_weight_bytes > 0
    assert node.units.standby_ready == (1, 1)
    assert kv(node, 0, 1) == before
    node.load(placed(base, "0111"))
    assert not node.told
    assert node.units.weight_bytes < fat


def test_without_memory_for_both_nothing_is_loaded_anew(folder: Path) -> None:
    """The part that has more goes on."""
    node, base = holding_some(folder)
    plan = shared(base)
    members = tuple(
        msgspec.structs.replace(member, memory_bytes=node.units.weight_bytes + 1)
        for member in plan.members
    )
    node.load(msgspec.structs.replace(plan, members=members))
    fat = node.units.weight_bytes
    node.units.start_standbys()
    node.units.await_standbys(DEADLINE_S)
    assert not node.units.trim()
    assert node.units.weight_bytes == fat


def test_what_was_begun_is_gone_on_with(folder: Path) -> None:
    """Another plan that gives the same away does not begin anew."""
    node, base = holding_some(folder)
    node.load(shared(base))
    node.units.start_standbys()
    node.units.await_standbys(DEADLINE_S)
    both = node.units.weight_bytes
    node.load(
        placed(base, "0111", head_standbys=copies([1], [0], [], [])),
    )
    assert node.units.weight_bytes == both
    assert node.units.trim()


def test_who_gives_everything_away_has_it_ready(folder: Path) -> None:
    """A member that is drained keeps its units as they are, whoever owns them now."""
    node, base = holding_some(folder)
    before = kv(node, 0, 1)
    node.load(
        placed(
            base,
            "1211",
            "11",
            "11111",
            head_standbys=copies([0], [0], [], []),
            mlp_standbys=copies([0], []),
            vocab_standbys=copies([0], [], [0], [], [0]),
        )
    )
    assert not node.told
    assert node.units.standby_ready == (6, 6)
    assert kv(node, 0, 1) == before


def test_a_replica_that_is_promoted_in_part_is_not_loaded_again(folder: Path) -> None:
    """Whether or not the rest is still wanted: that would take long, and replies wait."""
    node, base = holding_some(folder, standbys=True)
    node.units.start_standbys()
    node.units.await_standbys(DEADLINE_S)
    before = kv(node, 0, 1, 2, 3)
    mixed = placed(base, "0001", head_standbys=copies([], [], [], [0]))
    node.load(mixed)
    assert not node.told
    assert kv(node, 0, 1, 2, 3) == before
    node.load(placed(base, "0001"))
    assert not node.told
    assert kv(node, 0, 1, 2) == before[:3]
    assert node.logs.coverage.least(1) == 3
    node.load(placed(base, "0011"))
    assert node.told == []
    assert node.units.weight_bytes == weight_bytes(base.model, *topology(base, 0).holdings)


def test_a_replica_of_less_is_loaded_anew(folder: Path) -> None:
    """In the background, and its KV stays."""
    node, base = holding_some(folder, standbys=True)
    node.units.start_standbys()
    node.units.await_standbys(DEADLINE_S)
    before = kv(node, 2)
    node.load(placed(base, "0011", head_standbys=copies([], [], [0], [])))
    assert (node.told, node.units.standby_ready) == ([], (0, 1))
    assert kv(node, 2) == before


class Half:
    """Loads one product, and is stopped then."""

    def __init__(
        self, parts: Sequence[Part], loader: Callable[[], StageLoader], *_: object, after_s: float
    ) -> None:
        while not parts[0].loaded_bytes:
            parts[0].load_piece(loader)

    def stop(self) -> None:
        """It is."""


def test_what_was_loading_is_finished_by_who_needs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is half loaded stays so by a plan that still wants it; one that promotes it
    goes on from there."""
    monkeypatch.setattr("p2pinfer.unit_holder.StandbyLoader", Half)
    node, base = holding_some(folder, standbys=True)
    node.units.start_standbys()
    loaded = node.units.standby_weight_bytes
    kept = base.stages[0]
    node.load(
        placed(
            base,
            "0011",
            vocab="11010",
            head_standbys=kept.head_standbys,
            mlp_standbys=kept.mlp_standbys,
            vocab_standbys=copies([], [0], [], [0], []),
        )
    )
    assert node.told[0][0] == 0
    assert (node.units.standby_weight_bytes, node.units.standby_ready) == (loaded, (0, 5))
    node.load(placed(base, "0000", "00", "10000"))
    assert node.told[0][0] == loaded > 0
    assert node.units.standby_ready == (0, 0)
    assert node.logs.coverage.least(1) == 3


def test_agreed_logs_say_what_is_of_use(folder: Path) -> None:
    """KV of requests that are gone is freed, in replicas too."""
    node, _ = holding_some(folder, standbys=True)
    told = msgspec.structs.replace(node.logs.snapshot()[0], tokens=(5, 9))
    node.units.adopt(node.logs.adopt((told,)), {1: 8})
    assert node.logs.coverage.least(1) == 1
    assert node.units.kv_used_bytes > 0
    unit = next(iter(node.logs.coverage.fed))
    rows = node.units.read_kv(unit, 1, 0, 3)
    node.units.adopt(node.logs.adopt(()), {})
    assert (node.units.kv_used_bytes, node.units.kv_standby_bytes) == (0, 0)
    assert not node.units.write_kv(unit, 1, 0, rows)


def test_requests_that_are_agreed_on_have_their_place_at_once(folder: Path) -> None:
    """So their KV can come from others before any step computes a position of them."""
    node, _ = holding_some(folder, standbys=True)
    unit = next(iter(node.logs.coverage.fed))
    rows = node.units.read_kv(unit, 1, 0, 3)
    assert not node.units.write_kv(unit, 2, 0, rows)
    node.units.adopt((), {1: 8, 2: 8})
    assert node.units.write_kv(unit, 2, 0, rows)


def test_who_holds_nothing_any_more_frees_it_after_its_word(folder: Path) -> None:
    """To free gigabytes takes a while, and a plan waits for the word of all."""
    node, base = Node(folder), plan(folder)
    node.load(placed(base, "0000", "00", "00000"))
    stages = [part.stage for part in node.units._parts]
    node.load(placed(base, "1111", "11", "11111"))
    assert node.units.weight_bytes == 0
    held = [part.stage for part in node.units._left]
    assert held == stages
    assert None not in held
    assert node.units.trim()
    assert not node.units._left
    assert not node.units.trim()


def test_a_witness_holds_nothing(folder: Path) -> None:
    """A plan that gives it units cannot be loaded."""
    base, node = plan(folder), Node(None)
    with pytest.raises(LocalProtocolError, match="witness"):
        node.load(base)
    node.load(placed(base, "1111", "11", "11111"))
    node.units.adopt((), {})
    node.units.start_standbys()
    units = node.units
    assert (units.runner, units.weight_bytes, units.kv_used_bytes) == (None, 0, 0)


class Moved:
    """Weights that can be taken away and put back."""

    def __init__(self, folder: Path, copy: Path) -> None:
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        self.folder = copy
        self._files = [file for file in copy.iterdir() if file.suffix == ".safetensors"]

    def away(self) -> None:
        """They cannot be found."""
        for file in self._files:
            file.rename(file.with_suffix(".away"))

    def back(self) -> None:
        """They are there again."""
        for file in self._files:
            file.with_suffix(".away").rename(file)


def test_a_load_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """Neither units nor coverage; the next plan is loaded from the beginning."""
    model = Moved(folder, tmp_path / "model")
    node, base = holding_some(model.folder)
    model.away()
    with pytest.raises(Exception, match="safetensors"):
        node.load(placed(base, "0011", "10"))
    assert (node.units.runner, node.units.weight_bytes) == (None, 0)
    assert node.logs.coverage.most(1) == 0
    model.back()
    node.load(base)
    assert node.units.runner is not None


def test_a_replica_that_cannot_be_loaded_is_tried_again(folder: Path, tmp_path: Path) -> None:
    """The reason is told; the next plan tries again, and who needs it loads it at once."""
    model = Moved(folder, tmp_path / "model")
    node, base = holding_some(model.folder, standbys=True)
    model.away()
    node.units.start_standbys()
    assert node.units.await_standbys(DEADLINE_S) == (0, 5)
    assert "safetensors" in node.units.standby_error
    assert node.logs.coverage.least(1) == 3
    model.back()
    node.units.start_standbys()
    assert node.units.await_standbys(DEADLINE_S) == (5, 5)
    assert node.units.standby_error == ""
    again, _ = holding_some(model.folder, standbys=True)
    again.load(placed(base, "0000", "00", "00000"))
    assert again.told
    assert again.logs.coverage.least(1) == 3
