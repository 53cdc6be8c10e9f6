"""Quantised weights on the disk: made once, found again, and made anew where they are damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model import quantised_copies
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import load_config, model_spec
from p2pinfer.model.quantise import QuantisedWeight, dequantise, quantise
from p2pinfer.model.quantised_copies import UNFINISHED, QuantisedCopies, remove_others
from p2pinfer.model.stage_loader import StageLoader, packer_of
from p2pinfer.model.unit_products import Columns, Rows
from p2pinfer.model.weights import Weights
from tests.lockstep import CPU, Lockstep
from tests.model_specs import SIX_LAYERS
from tests.random_models import write_random_model

ROWS = Rows("model.layers.0.mlp.up_proj.weight", 8, 40, 32)


def copies_of(root: Path, quant: str) -> QuantisedCopies:
    """Those of a model that is quantised so."""
    return QuantisedCopies(root, SIX_LAYERS.__class__(**_fields(quant)))


def _fields(quant: str) -> dict[str, object]:
    return {name: getattr(SIX_LAYERS, name) for name in SIX_LAYERS.__struct_fields__} | {
        "quant": quant
    }


def same(one: QuantisedWeight, other: QuantisedWeight) -> bool:
    """Whether two weights are the same integers, scales and zero points."""
    pairs = [(one.values, other.values), (one.scales, other.scales)]
    if one.zeros is not None and other.zeros is not None:
        pairs.append((one.zeros, other.zeros))
    return one.inputs == other.inputs and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_a_copy_is_what_was_kept(tmp_path: Path, quant: str) -> None:
    """By its slice, and of another slice there is none."""
    form = QUANT_FORMATS[quant]
    weight = quantise(torch.randn(32, 200), form)
    copies = copies_of(tmp_path, quant)
    assert copies.read(ROWS, form) is None
    copies.keep(ROWS, weight)
    found = copies.read(ROWS, form)
    assert found is not None
    assert same(found, weight)
    assert torch.equal(dequantise(found), dequantise(weight))
    assert copies.read(Columns(*ROWS), form) is None
    assert copies.read(ROWS._replace(end=41), form) is None
    assert not list(tmp_path.rglob(f"*{UNFINISHED}"))


@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_a_damaged_copy_is_none(tmp_path: Path, quant: str) -> None:
    """Whichever of its bytes is another one, wherever it ends, and if it is none of ours at all."""
    form = QUANT_FORMATS[quant]
    copies = copies_of(tmp_path, quant)
    copies.keep(ROWS, quantise(torch.randn(4, 130), form))
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        assert copies.read(ROWS, form) is None, place
    for length in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert copies.read(ROWS, form) is None, length
    other = next(f for name, f in QUANT_FORMATS.items() if name != quant)
    file.write_bytes(whole)
    assert copies.read(ROWS, form) is not None
    assert copies.read(ROWS, other) is None


def test_copies_of_other_models_are_removed(tmp_path: Path) -> None:
    """And files that were being written when the node was killed; a model's own copies stay."""
    form = QUANT_FORMATS["int4"]
    weight = quantise(torch.randn(32, 64), form)
    for quant in QUANT_FORMATS:
        copies_of(tmp_path, quant).keep(ROWS, weight)
    folder = next(path for path in tmp_path.iterdir() if "int4" in path.name)
    (folder / f"half{UNFINISHED}").write_bytes(b"half")
    model = SIX_LAYERS.__class__(**_fields("int4"))
    remove_others(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert len(list(folder.iterdir())) == 1
    remove_others(tmp_path, None)
    assert not list(tmp_path.iterdir())
    remove_others(tmp_path / "not there", model)


def test_a_disk_without_room_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written there; nor in a folder that is none."""
    form = QUANT_FORMATS["int8"]
    weight = quantise(torch.randn(32, 64), form)
    (tmp_path / "file").write_bytes(b"")
    copies_of(tmp_path / "file", "int8").keep(ROWS, weight)
    monkeypatch.setattr(quantised_copies, "MIN_FREE_BYTES", 1 << 60)
    copies = copies_of(tmp_path / "full", "int8")
    copies.keep(ROWS, weight)
    assert copies.read(ROWS, form) is None
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_the_second_load_reads_copies_only(tmp_path: Path, quant: str) -> None:
    """And norms, which are not quantised. It has the same bits; and one copy that is damaged is
    made again, and that one alone."""
    folder = write_random_model(tmp_path / "model", seed=2, intermediate_size=300)
    config, root = load_config(folder), tmp_path / "copies"
    spec = model_spec(config, name="m", model_id="ab" * 32, quant=quant)
    held = Lockstep(folder, quant=quant).topologies[0].holdings[0]

    def load() -> tuple[int, np.ndarray]:
        weights = Weights(Checkpoint.open(folder, config))
        packer = packer_of(weights, spec, CPU, root)
        stage = StageLoader(weights, config, spec, CPU, packer).load(held)
        assert stage.vocab is not None
        h = torch.linspace(-1, 1, 2 * spec.hidden_size).view(2, -1)
        logits = stage.vocab.logits(h, len(h), frozenset(held.vocab_units))
        return weights.bytes_taken, torch.cat([logits[u] for u in sorted(logits)], 1).numpy()

    norms = (2 * spec.num_layers + 1) * spec.hidden_size * 4
    taken, first = load()
    assert taken > norms
    taken, second = load()
    assert taken == norms
    assert np.array_equal(first, second)
    victim = max(root.rglob("lm_head*.safetensors"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    taken, third = load()
    assert norms < taken <= norms + 64 * spec.hidden_size * 4
    assert np.array_equal(first, third)
    assert victim.read_bytes() == whole


def test_what_is_prepared_is_loaded_from_copies(tmp_path: Path) -> None:
    """A node that keeps units warm has their quantised copies on its disk."""
    folder = write_random_model(tmp_path / "model", seed=2, attention_bias=True)
    config = load_config(folder)
    spec = model_spec(config, name="m", model_id="ab" * 32, quant="int4")
    held = Lockstep(folder, quant="int4").topologies[0].holdings[0]
    weights = Weights(Checkpoint.open(folder, config))
    packer = packer_of(weights, spec, CPU, tmp_path / "copies")
    loader = StageLoader(weights, config, spec, CPU, packer)
    sizes = list(loader.prepare(held))
    prepared = weights.bytes_taken
    stage = loader.load(held)
    assert sum(sizes) == stage.nbytes
    biases = spec.num_layers * (spec.num_attention_heads + 2 * spec.num_key_value_heads)
    norms = (2 * spec.num_layers + 1) * spec.hidden_size
    assert weights.bytes_taken - prepared == (biases * spec.head_dim + norms) * 4
