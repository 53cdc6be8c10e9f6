"""KV that is made of kept inputs has the bits that it had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.orders import Recompute
from p2pinfer.core.recompute import recompute
from p2pinfer.core.units import Slice
from p2pinfer.model.attention import Run
from p2pinfer.model.input_store import InputStore
from p2pinfer.types import DType, Plan
from tests.holder_bench import CPU, Fleet, Node, placed, plan, slots
from tests.random_models import LLAMA3_ROPE, write_random_model

SPAN = Slice(0, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with biases: 4 head units, 2 MLP units, 5 vocab units, 2 layers."""
    folder = tmp_path_factory.mktemp("model")
    return write_random_model(folder, seed=3, attention_bias=True, rope=LLAMA3_ROPE)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def kv(node: Node, number: int, positions: int) -> bytes:
    """KV of leading positions of request 1, of one head unit."""
    return bytes(node.units.read_kv(KvUnit(SPAN, number), 1, 0, positions).data)


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("rows", [1, 3, 7, 64, 1000])
def test_lost_kv_is_made_anew_bit_by_bit(
    folder: Path, dtype: DType, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every head unit, whatever chunks it was computed in and is recomputed in; the next
    positions have the logits of the unsplit model. Those who are left can lose another."""
    monkeypatch.setattr("p2pinfer.core.recompute.CHUNK_ROWS", rows)
    fleet = Fleet(folder, 4, dtype, keep_inputs=True)
    alive, position = fleet.members, 0
    fleet.adopt(alive, replicas=0)
    while True:
        for slot in slots(position, 11, 1, 3):
            fleet.step(slot)
        position += 15
        if len(alive) == 1:
            break
        assert fleet.plan is not None
        owners = [fleet.plan.members[i].node_id for i in fleet.plan.stages[0].head_owners]
        before = [kv(fleet.nodes[owner], u, position) for u, owner in enumerate(owners)]
        alive = alive[1:]
        fleet.adopt(alive, replicas=0)
        fleet.recompute(position)
        owners = [fleet.plan.members[i].node_id for i in fleet.plan.stages[0].head_owners]
        after = [kv(fleet.nodes[owner], u, position) for u, owner in enumerate(owners)]
        assert after == before
        assert {fleet.nodes[owner].logs.coverage.least(1) for owner in owners} == {position}
    assert fleet.restarts == [0, 0, 0, 0]
    assert position == 60


def alone(folder: Path, *positions: int, keep_inputs: bool = True) -> tuple[Fleet, Node]:
    """A node that owns all has computed so many positions of request 1, step by step."""
    fleet = Fleet(folder, 1, DType.FLOAT32, keep_inputs=keep_inputs)
    fleet.adopt(fleet.members, replicas=0)
    for slot in slots(0, *positions):
        fleet.step(slot)
    return fleet, fleet.nodes[fleet.members[0].node_id]


def test_only_what_lacks_is_made(folder: Path) -> None:
    """Other units stay as they are; what is done when it is broken off counts."""
    fleet, node = alone(folder, 40)
    units, coverage = [KvUnit(SPAN, unit) for unit in range(4)], node.logs.coverage
    before = [kv(node, unit, 35) for unit in range(4)]
    coverage.lose(units[1:3])
    coverage.recomputed(1, units[2], 0, 30)
    spoilt = node.units.read_kv(units[0], 1, 0, 35)
    for unit in units[1:]:
        node.units.write_kv(unit, 1, 0, spoilt)
    left = recompute(node.units, node.logs, (Recompute(request_id=1, position=35, rows=35),))
    next(left)
    left.close()
    assert [coverage.of(1, unit) for unit in units] == [40, 0, 30, 40]
    fleet.recompute(35)
    assert [coverage.of(1, unit) for unit in units] == [40, 35, 35, 40]
    assert [kv(node, unit, 35) == before[unit] for unit in range(4)] == [True, True, True, False]
    assert not list(
        recompute(node.units, node.logs, (Recompute(request_id=1, position=35, rows=9),))
    )


def test_what_is_done_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off in the middle, it goes on from there."""
    monkeypatch.setattr("p2pinfer.core.recompute.CHUNK_ROWS", 16)
    fleet, node = alone(folder, 40)
    unit = KvUnit(SPAN, 3)
    before = kv(node, 3, 40)
    node.logs.coverage.lose((unit,))
    left = recompute(node.units, node.logs, (Recompute(request_id=1, position=40, rows=40),))
    while not node.logs.coverage.of(1, unit):
        next(left)
    left.close()
    assert node.logs.coverage.of(1, unit) == 16
    fleet.recompute(40)
    assert (node.logs.coverage.of(1, unit), kv(node, 3, 40)) == (40, before)


def test_missing_inputs_are_an_error(folder: Path) -> None:
    """Where they were never kept, were lost, or were not written as far as is said."""
    for keep_inputs in (False, True):
        fleet, node = alone(folder, 10, keep_inputs=keep_inputs)
        assert (node.units.kv_inputs_bytes > 0) == keep_inputs
        node.logs.coverage.lose((KvUnit(SPAN, 0),))
        node.logs.inputs.cut(1, 8)
        with pytest.raises(LookupError, match="inputs of 10 positions"):
            fleet.recompute(10)
        node.logs.inputs.hold({SPAN})
        node.logs.inputs.finish(1, 0, 12)
        with pytest.raises(LookupError, match="inputs"):
            fleet.recompute(12)
        node.runner.forget((1,))
        assert node.units.kv_inputs_bytes == 0


def test_inputs_go_with_the_span(folder: Path, tmp_path: Path) -> None:
    """They stay whichever units of it a node owns, and are gone when it computes other layers, or
    nothing, or could not load."""
    model = write_random_model(tmp_path / "model", seed=3)
    base = plan(model)
    keeping = [msgspec.structs.replace(member, keeps_inputs=True) for member in base.members]
    base = msgspec.structs.replace(base, members=tuple(keeping))
    first = msgspec.structs.replace(base.stages[0], end=1, vocab_owners=(), **all_of(base, 0, 2))
    second = msgspec.structs.replace(base.stages[0], start=1, **all_of(base, 1, 3))
    layers = msgspec.structs.replace(base, stages=(first, second))
    for other, kept in (
        (placed(base, "1100"), 9),
        (placed(base, "1111", "01", "11111"), 9),
        (placed(base, "1111", "11", "11111"), 0),
        (layers, 0),
    ):
        node = Node(model)
        node.load(base)
        write(node)
        node.load(other)
        assert node.logs.inputs.of(1, SPAN) == kept
        assert (node.units.kv_inputs_bytes > 0) == (kept > 0)
    node.load(base)
    write(node)
    for file in model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(Exception, match="safetensors"):
        node.load(layers)
    assert (node.logs.inputs.of(1, SPAN), node.units.kv_inputs_bytes) == (0, 0)


def all_of(base: Plan, member: int, kinds: int) -> dict[str, tuple[int, ...]]:
    """A member owns all units of the first `kinds` kinds."""
    owners = base.stages[0].head_owners, base.stages[0].mlp_owners, base.stages[0].vocab_owners
    names = ("head_owners", "mlp_owners", "vocab_owners")
    return {
        name: (member,) * len(each)
        for name, each in zip(names[:kinds], owners[:kinds], strict=True)
    }


def write(node: Node) -> None:
    """The node has computed nine positions of request 1."""
    for slot in slots(0, 9):
        run = node.runner.run((slot,))
        need = next(run)
        try:
            while True:
                need = run.send(torch.ones(9, 64))
        except StopIteration:
            pass
        assert need is not None
        node.write(1, 9)


def test_a_store_keeps_a_beginning(folder: Path) -> None:
    """What comes after a hole is not written; positions may be written again."""
    store = InputStore(Slice(4, 6), 8, torch.float32, CPU)
    store.open(1, 100)
    store.open(1, 7)
    h = torch.arange(48, dtype=torch.float32).view(6, 8)
    runs = [Run(1, 0, 0, 3), Run(2, 3, 0, 2)]
    for layer in range(2):
        store.write(layer, runs, h + layer)
    with pytest.raises(LookupError, match="positions 0 to 3"):
        store.rows(1, 0, 0, 3)
    store.wrote(runs)
    for layer in range(2):
        assert torch.equal(store.rows(1, layer, 1, 3), h[1:3] + layer)
    far = [Run(1, 0, 4, 6)]
    store.write(0, far, h)
    store.wrote(far)
    with pytest.raises(LookupError, match="positions 3 to 6"):
        store.rows(1, 0, 3, 6)
    again = [Run(1, 2, 2, 5)]
    store.write(1, again, h)
    store.wrote(again)
    assert torch.equal(store.rows(1, 1, 2, 5), h[2:5])
    assert store.used_bytes == 2 * 64 * 8 * 4
    store.drop(1)
    store.drop(2)
    assert store.used_bytes == 0
