"""Standbys whose weights lie in the page cache: ready without memory, and loaded when promoted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from p2pinfer.core.holdings import Holding
from p2pinfer.core.topology import topology, weight_bytes
from p2pinfer.core.units import Slice
from p2pinfer.device import HEADROOM_BYTES, offered_memory
from p2pinfer.errors import ModelError
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.model.page_cache import Extent, PageReader, joined
from p2pinfer.model.part import Part, empty_cache
from p2pinfer.model.stage_loader import Read, StageLoader
from p2pinfer.model.weights import Weights
from p2pinfer.standby_loader import StandbyLoader
from p2pinfer.types import DType, Plan
from tests.holder_bench import CPU, DEADLINE_S, Fleet, Node, copies, placed, plan, slots
from tests.random_models import write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model: 4 head units, 2 MLP units, 5 vocab units, 2 layers."""
    return write_random_model(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def mutual(folder: Path) -> Plan:
    """Each of two members keeps all that the other owns: five units and six."""
    return placed(
        plan(folder),
        "0011",
        head_standbys=copies([1], [1], [0], [0]),
        mlp_standbys=copies([1], [0]),
        vocab_standbys=copies([1], [0], [1], [0], [1]),
    )


def owned_bytes(plan: Plan) -> int:
    """Weights of what member 0 owns."""
    return weight_bytes(plan.model, *topology(plan, 0).holdings)


def prepared(node: Node) -> tuple[int, int]:
    """The plan is in force: how many standby units are ready at the end, and how many warm."""
    node.units.start_standbys()
    ready, wanted = node.units.await_standbys(DEADLINE_S)
    assert ready == wanted
    return ready, node.units.standby_units_warm


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_promoted_warm_standbys_go_on_bit_by_bit(folder: Path, dtype: DType) -> None:
    """They load what they take over, and each reply goes on where it was, with the same logits."""
    fleet = Fleet(folder, 3, dtype, standby="warm")
    alive = fleet.members
    fleet.adopt(alive)
    position = 0
    while True:
        fleet.ready()
        for slot in slots(position, 9, 1, 3):
            fleet.step(slot)
        position += 13
        if len(alive) == 1:
            break
        alive = alive[1:]
        fleet.adopt(alive)
        assert any(fleet.nodes[member.node_id].told for member in alive)
    assert fleet.restarts == [0, 13, 26]
    for node in fleet.nodes.values():
        node.units.close()


def test_warm_weights_take_no_memory(folder: Path) -> None:
    """Until they are promoted."""
    node, base = Node(folder, "warm"), mutual(folder)
    node.load(base)
    assert node.units.standby_ready == (0, 5)
    assert prepared(node) == (5, 5)
    assert node.units.weight_bytes == owned_bytes(base)
    assert (node.units.standby_weight_bytes, node.units.standby_reason) == (0, "")
    alone = placed(base, "0000", "00", "00000")
    node.load(alone)
    assert node.told
    assert node.units.weight_bytes == owned_bytes(alone)
    assert (node.units.standby_ready, node.units.standby_units_warm) == ((0, 0), 0)
    node.units.close()


def test_who_gives_everything_away_keeps_it_warm(folder: Path) -> None:
    """Its weights are freed once the plan is in force."""
    node, base = Node(folder, "warm"), mutual(folder)
    node.load(base)
    prepared(node)
    every = [[0]] * 5
    given = placed(
        base,
        "1111",
        "11",
        "11111",
        head_standbys=copies(*every[:4]),
        mlp_standbys=copies(*every[:2]),
        vocab_standbys=copies(*every),
    )
    node.load(given)
    assert not node.told
    assert prepared(node) == (11, 11)
    assert node.units.weight_bytes == 0
    node.units.close()


def test_what_is_given_away_in_part_is_warm_and_the_rest_loaded_anew(folder: Path) -> None:
    """So that the weights of what was given away are freed."""
    node = Node(folder, "warm")
    node.load(placed(plan(folder), "0011"))
    shared = placed(plan(folder), "0111", head_standbys=copies([], [0], [], []))
    node.load(shared)
    assert prepared(node) == (1, 0)
    assert node.units.trim()
    assert node.units.standby_ready == (1, 1)
    assert node.units.standby_units_warm == 1
    assert node.units.weight_bytes == owned_bytes(shared)
    node.units.close()


def test_by_memory(folder: Path) -> None:
    """Hot where what is left is enough; what is warm is loaded by the next plan that finds more."""
    left = [0]
    node, base = Node(folder, "auto", lambda _: left[0]), mutual(folder)
    node.load(base)
    assert prepared(node) == (5, 5)
    assert node.units.standby_reason.startswith("0 MiB are left of the memory, and the weights")
    left[0] = 1 << 40
    assert prepared(node) == (5, 0)
    assert node.units.standby_reason == ""
    assert node.units.standby_weight_bytes > 0
    left[0] = 0
    assert prepared(node) == (5, 0)
    node.units.close()


def test_no_more_is_loaded_than_is_offered(folder: Path) -> None:
    """However much the machine has."""
    base = mutual(folder)
    offer = owned_bytes(base) + 1
    members = tuple(msgspec.structs.replace(m, memory_bytes=offer) for m in base.members)
    node = Node(folder, "auto", lambda _: 1 << 40)
    node.load(msgspec.structs.replace(base, members=members))
    assert prepared(node) == (5, 5)
    assert node.units.weight_bytes <= offer
    node.units.close()


def test_what_cannot_be_read_is_not_warm(tmp_path: Path) -> None:
    """The reason is told, and the next plan tries again."""
    model = write_random_model(tmp_path / "model", seed=3)
    node, base = Node(model, "warm"), mutual(model)
    node.load(base)
    files = list(model.glob("*.safetensors"))
    for file in files:
        file.rename(file.with_suffix(".away"))
    node.units.start_standbys()
    assert node.units.await_standbys(DEADLINE_S) == (0, 5)
    assert "safetensors" in node.units.standby_error
    for file in files:
        file.with_suffix(".away").rename(file)
    assert prepared(node) == (5, 5)
    assert node.units.standby_error == ""
    node.units.close()


def test_files_that_were_read_take_no_memory(tmp_path: Path) -> None:
    """Of what a control group uses, pages that the system would drop first do not count."""
    for name, text in (
        ("memory.max", f"{HEADROOM_BYTES + 900}"),
        ("memory.current", "800\n"),
        ("memory.stat", "anon 100\ninactive_file 600\nactive_file 100\n"),
    ):
        (tmp_path / name).write_text(text)
    assert offered_memory(CPU, tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert offered_memory(CPU, tmp_path) > 700


# --- the parts of it ------------------------------------------------------------------------------

HELD = Holding(stage=0, span=Slice(0, 2), head_units=(0,), mlp_units=(0,), vocab_units=(0,))


def a_part(folder: Path) -> Part:
    """One unit of each kind, not loaded."""
    spec = model_spec(load_config(folder), name="t", model_id="0" * 64)
    return Part(HELD, empty_cache(HELD, spec, CPU))


def test_a_part_is_warm_when_all_was_read(folder: Path) -> None:
    """Not before, and no more when reading it again has failed."""
    part = a_part(folder)
    lives = iter([iter([3, 4]), iter([3, 4]), broken()])

    def pages(_: Holding) -> Iterator[int]:
        return next(lives)

    def read() -> list[tuple[int | None, bool]]:
        return [(part.warm_piece(pages), part.warm) for _ in range(3)]

    assert read() == [(3, False), (4, False), (None, True)]
    assert read() == [(3, True), (4, True), (None, True)]
    with pytest.raises(ModelError, match="gone"):
        part.warm_piece(pages)
    assert (part.warm, part.error) == (False, "gone")


def broken() -> Iterator[int]:
    """Pages that cannot be read."""
    raise ModelError("gone\nfor good")
    yield 0


def test_what_is_warm_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From time to time until stopped, since the system drops what nobody reads."""
    monkeypatch.setattr("p2pinfer.standby_loader.WARM_AGAIN_S", 0.0)
    times = threading.Semaphore(0)

    def pages(_: Holding) -> Iterator[int]:
        times.release()
        yield 1

    part = a_part(folder)
    loader = StandbyLoader((), never, (part,), pages)
    assert loader.wait(DEADLINE_S)
    assert part.warm
    for _ in range(3):
        assert times.acquire(timeout=DEADLINE_S)
    loader.stop()


def never() -> None:  # type: ignore[misc]
    """Nothing is loaded."""
    raise AssertionError


class Asked(Weights):
    """Weights that note what they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.reads: set[Read] = set()

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Just these."""
        self.reads.add(Read(name, start, end))
        return super().rows(name, start, end)

    def cols(self, name: str, start: int, end: int) -> torch.Tensor:
        """The pages of all rows."""
        self.reads.add(Read(name, 0, self.checkpoint.tensors[name].shape[0]))
        return super().cols(name, start, end)


def test_pages_are_those_that_loading_reads(folder: Path) -> None:
    """All units' are all products of the model; one unit's are fewer."""
    config = load_config(folder)
    spec = model_spec(config, name="t", model_id="0" * 64)
    read = PageReader(folder, config, spec).read
    whole = topology(plan(folder, 1), 0).holdings[0]
    for held in (whole, HELD):
        asked = Asked(Checkpoint.open(folder, config))
        loader = StageLoader(asked, config, spec, CPU)
        loader.load(held)
        assert {*loader.reads(held)} == asked.reads
    inner = ("norm", "embed_tokens", "o_proj.bias", "down_proj.bias")
    checkpoint = Checkpoint.open(folder, config)
    products = sum(
        info.end - info.begin
        for name, info in checkpoint.tensors.items()
        if not any(
            each in name for each in (inner if not config.tie_word_embeddings else inner[:1])
        )
    )
    assert sum(read(whole)) == sum(read(whole)) == products
    assert 0 < sum(read(HELD)) < products


def test_runs_neither_touch_nor_overlap() -> None:
    """What lies together is read as one."""
    one, other = Path("one"), Path("other")
    asked = [Extent(one, 5, 9), Extent(other, 9, 10), Extent(one, 0, 5), Extent(one, 2, 7)]
    assert joined([*asked, Extent(one, 10, 12)]) == (
        Extent(one, 0, 9),
        Extent(one, 10, 12),
        Extent(other, 9, 10),
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "shorter"),
        (lambda file: file.unlink(), "cannot be read"),
    ],
)
def test_files_that_change_are_told(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    """A file that has become shorter, or is gone, is named."""
    model = write_random_model(tmp_path / "model", seed=3)
    config = load_config(model)
    spec = model_spec(config, name="t", model_id="0" * 64)
    read = PageReader(model, config, spec).read
    assert sum(read(HELD)) > 0
    for file in model.glob("*.safetensors"):
        spoil(file)
    with pytest.raises(ModelError, match=message):
        sum(read(HELD))
