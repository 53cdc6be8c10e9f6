"""Models made to measure with: true shapes, whole folders, any text, and what is refused."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from p2pinfer.errors import ModelError, UsageError
from p2pinfer.model import shapes as shapes_module
from p2pinfer.model.checkpoint import Checkpoint, content_id
from p2pinfer.model.config import load_config, resolve_model, tensor_shapes
from p2pinfer.model.shapes import SHAPES, inspect_model, make_model, write_byte_tokenizer
from p2pinfer.model.tokenizer import Tokenizer
from p2pinfer.types import DType


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape `tiny`, made once; read only."""
    return make_model("tiny", tmp_path_factory.mktemp("made") / "tiny")


def small(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> str:
    """Register a shape that is made in no time."""
    fields = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1} | fields
    monkeypatch.setitem(SHAPES, "small", SHAPES["tiny"] | fields)
    return "small"


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_shapes_have_the_published_sizes(tmp_path: Path, shape: str, parameters: int) -> None:
    """A shape's tensors hold as many numbers as the model's card says."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape]))
    config = load_config(tmp_path)
    assert sum(prod(size) for size in tensor_shapes(config).values()) == parameters
    assert config.dtype is DType.BFLOAT16


def test_a_made_model_is_whole(tiny: Path) -> None:
    """Configuration, checkpoint and tokenizer open, and weights are noise around norms of 1."""
    config = load_config(tiny)
    checkpoint = Checkpoint.open(tiny, config)
    tensors = load_file(tiny / "model.safetensors")
    assert tensors.keys() == checkpoint.tensors.keys()
    assert all(info.begin % 8 == 0 for info in checkpoint.tensors.values())
    assert torch.equal(tensors["model.norm.weight"], torch.ones(256))
    projection = tensors["model.layers.3.mlp.down_proj.weight"]
    assert projection.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(projection.mean().item()) < 0.005
    assert not torch.equal(projection, tensors["model.layers.2.mlp.down_proj.weight"])
    tokenizer = Tokenizer.load(tiny, config)
    assert tokenizer.size == config.vocab_size
    assert config.num_key_value_heads == 8


@pytest.mark.parametrize("dtype", list(DType))
def test_the_format_and_the_files_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: DType
) -> None:
    """Small shards give many files with an index, in the format asked for."""
    monkeypatch.setattr(shapes_module, "SHARD_BYTES", 60_000)
    seen: list[tuple[int, int]] = []
    folder = make_model(
        small(monkeypatch),
        tmp_path / "new" / "model",
        dtype=dtype,
        progress=lambda *state: seen.append(state),
    )
    config = load_config(folder)
    checkpoint = Checkpoint.open(folder, config)
    assert len(checkpoint.files) > 1
    assert config.dtype is dtype
    for path in checkpoint.files:
        tensors = load_file(path)
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
        assert sum(t.nbytes for t in tensors.values()) <= 60_000 or len(tensors) == 1
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert seen == sorted(seen)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """Our bits are those of a conversion by torch: to nearest, ties to even."""
    values = np.random.default_rng(1).standard_normal(10_000, dtype=np.float32)
    values[:4] = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x0], np.uint32).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    stored = shapes_module._as_stored(values, DType.BFLOAT16)
    assert np.array_equal(stored.view(np.int16), expected)


def test_the_seed_decides_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arguments give the same bytes, another seed others."""
    shape = small(monkeypatch)
    folders = [
        make_model(shape, tmp_path / name, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, again, other = (content_id(folder, tmp_path / "cache") for folder in folders)
    assert first == again != other


def test_making_twice_is_making_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds exactly this model is left as it is."""
    shape = small(monkeypatch)
    folder = tmp_path / "model"
    folder.mkdir()
    make_model(shape, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make_model(shape, folder) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("change", ["seed", "dtype", "truncate", "marker", "foreign", "config"])
def test_a_folder_that_is_not_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Another model, a damaged one or foreign files are neither taken nor overwritten."""
    shape = small(monkeypatch)
    folder = make_model(shape, tmp_path / "model")
    arguments: dict[str, Any] = {}
    if change == "seed":
        arguments["seed"] = 1
    elif change == "dtype":
        arguments["dtype"] = DType.FLOAT16
    elif change == "truncate":
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(10_000)
    elif change == "marker":
        (folder / "made_by_p2pinfer.json").unlink()
    elif change == "config":
        (folder / "config.json").write_text("{")
    else:
        folder = tmp_path
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match="is not empty and does not hold the model small of seed"):
        make_model(shape, folder, **arguments)
    assert sorted(folder.iterdir()) == before


def test_an_unknown_shape_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    """The message lists every shape."""
    with pytest.raises(UsageError, match=r"no shape 'gpt-5'; there are tiny, llama-3\.2-1b"):
        make_model("gpt-5", tmp_path / "model")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file in the way, as target or as parent, is named, and nothing stays behind."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="file is a file; give a folder"):
        make_model("tiny", file)
    with pytest.raises(UsageError, match="model cannot be written: Not a directory"):
        make_model("tiny", file / "model")
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_making_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder appears whole or not at all."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_model(small(monkeypatch), tmp_path / "model", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=50))
def test_any_text_round_trips_through_a_made_tokenizer(tiny: Path, text: str) -> None:
    """The byte-level tokenizer is whole: any text comes back, special tokens apart."""
    tokenizer = Tokenizer.load(tiny, load_config(tiny))
    ids = tokenizer.encode(text)
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_id_of_a_made_tokenizer_is_printable(tmp_path: Path) -> None:
    """Specials keep their ids wherever they are, and ids above the bytes name themselves."""
    write_byte_tokenizer(tmp_path, 600, bos_id=300, eos_id=5)
    (tmp_path / "config.json").write_text(
        json.dumps(SHAPES["tiny"] | {"vocab_size": 600, "bos_token_id": 300, "eos_token_id": 5})
    )
    tokenizer = Tokenizer.load(tmp_path, load_config(tmp_path))
    assert (tokenizer.size, tokenizer.bos_id) == (600, 300)
    assert tokenizer.encode("a")[0] == 300
    assert tokenizer.decode([300, 5]) == ""
    named = [i for i in range(257, 600) if i != 300]
    assert all(tokenizer.decode([i]) == f" t{i}" for i in named)


def test_inspect_tells_what_a_folder_holds(tiny: Path, tmp_path: Path) -> None:
    """Name, sizes, units, tokenizer and content hash, ready for JSON."""
    facts = inspect_model(tiny, cache_dir=tmp_path)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["name"] == "tiny"
    assert facts["model_id"] == content_id(tiny, tmp_path)
    assert (facts["parameters"], facts["bytes"]) == (4_458_752, 4 * 4_458_752)
    assert facts["units"] == {"head": 8, "mlp": 8, "vocab": 16}
    assert facts["tokenizer"] == {"kind": "tokenizer.json", "size": 1024}
    assert (facts["dtype"], facts["stored_as"], facts["files"]) == ("float32", ["F32"], 1)


def test_inspect_knows_the_bundled_model(tmp_path: Path) -> None:
    """The bundled model is called `demo`, though its folder is not."""
    assert inspect_model(resolve_model("demo"), cache_dir=tmp_path)["name"] == "demo"


def test_inspect_refuses_what_a_node_would_refuse(tmp_path: Path) -> None:
    """A folder without a configuration is named."""
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        inspect_model(tmp_path)
