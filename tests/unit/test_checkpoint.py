"""Checkpoint files: one or many, whole or damaged; slices of them; and the content hash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from p2pinfer.errors import ModelError
from p2pinfer.model import checkpoint as checkpoint_module
from p2pinfer.model.checkpoint import Checkpoint, content_id
from p2pinfer.model.config import load_config
from p2pinfer.model.safetensors_file import MAX_HEADER_BYTES, read_header
from p2pinfer.model.weights import Weights
from tests.random_models import save_tensors, write_random_model

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in one file; tests copy it before they break it."""
    return write_random_model(tmp_path_factory.mktemp("pristine"), num_hidden_layers=1)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the whole model."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def three_files(tmp_path: Path) -> Path:
    """A whole model dealt out over three files."""
    return write_random_model(tmp_path / "three", num_hidden_layers=1, files=3)


def opened(folder: Path) -> Checkpoint:
    """The folder's checkpoint, checked against its configuration."""
    return Checkpoint.open(folder, load_config(folder))


def stored(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors as the library reads them, copied: the file may be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors file's header and leave its tensors' bytes alone."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def change_index(folder: Path, **changes: str | None) -> None:
    """Point tensors to other files in the index; None takes the tensor out."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    table = index["weight_map"] | changes
    index["weight_map"] = {name: file for name, file in table.items() if file is not None}
    path.write_text(json.dumps(index))


def change_config(folder: Path, **changes: Any) -> None:
    """Change fields of `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_tensor_is_read_as_safetensors_reads_it(
    tmp_path: Path, dtype: str, files: int
) -> None:
    """Whole tensors, views, rows and columns have the library's own values, bit for bit."""
    write_random_model(tmp_path, files=files, dtype=dtype, attention_bias=True)
    expected = {k: v for f in tmp_path.glob("*.safetensors") for k, v in stored(f).items()}
    checkpoint = opened(tmp_path)
    weights = Weights(checkpoint)
    assert checkpoint.tensors.keys() == expected.keys()
    assert len(checkpoint.files) == files
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.num_parameters == sum(tensor.numel() for tensor in expected.values())
    for name, tensor in expected.items():
        assert weights.whole(name).dtype is getattr(torch, dtype)
        assert torch.equal(weights.whole(name), tensor)
        assert torch.equal(weights.mapped(name), tensor)
        assert torch.equal(weights.rows(name, 3, 7), tensor[3:7])
        if tensor.dim() == 2:
            assert torch.equal(weights.cols(name, 5, 6), tensor[:, 5:6])


def test_copies_are_contiguous_and_counted(model: Path) -> None:
    """Only the bytes of the slices asked for are taken, and views cost none."""
    weights = Weights(opened(model))
    weights.mapped("model.embed_tokens.weight")
    assert weights.bytes_taken == 0
    rows = weights.rows(Q_PROJ, 0, 16)
    cols = weights.cols(Q_PROJ, 8, 16)
    assert weights.bytes_taken == rows.nbytes + cols.nbytes == 4 * (16 * 64 + 128 * 8)
    assert rows.untyped_storage().nbytes() == rows.nbytes
    assert cols.is_contiguous()
    assert cols.untyped_storage().nbytes() == cols.nbytes
    rows.zero_()
    assert weights.mapped(Q_PROJ)[:16].any()


def private_kib() -> int:
    """Private memory of this process in KiB (RssAnon)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_what_is_only_read_is_no_private_memory(tmp_path: Path) -> None:
    """Reading every byte of a 32 MiB tensor by its mapping leaves no private memory behind."""
    write_random_model(tmp_path, vocab_size=65536, hidden_size=128, tie=True, num_hidden_layers=1)
    weights = Weights(opened(tmp_path))
    view = weights.mapped("model.embed_tokens.weight")
    assert view.nbytes == 32 << 20
    before = private_kib()
    assert all(view[row : row + 1024].any() for row in range(0, 65536, 1024))
    assert private_kib() - before < 8 << 10


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, 129)])
def test_a_slice_beyond_the_tensor_is_refused(model: Path, start: int, end: int) -> None:
    """A slice that torch would quietly shorten raises and names the tensor."""
    with pytest.raises(IndexError, match=Q_PROJ):
        Weights(opened(model)).rows(Q_PROJ, start, end)


def test_misaligned_tensors_are_read_too(model: Path) -> None:
    """A file of an old writer, whose bytes begin at an odd place, gives the same values."""
    expected = stored(model / FILE)
    metadata = {"pad": ""}
    while (model / FILE).stat().st_size % 2 == 0:
        metadata["pad"] += "x"
        rewrite_header(model / FILE, lambda header: header.update(__metadata__=metadata))
    weights = Weights(opened(model))
    assert torch.equal(weights.mapped(Q_PROJ), expected[Q_PROJ])
    assert torch.equal(weights.rows(Q_PROJ, 1, 3), expected[Q_PROJ][1:3])


def test_tied_embeddings_need_no_head_and_ignore_one(tmp_path: Path) -> None:
    """A tied checkpoint is complete with and without `lm_head.weight`."""
    write_random_model(tmp_path, tie=True)
    assert "lm_head.weight" not in opened(tmp_path).tensors
    tensors = stored(tmp_path / FILE)
    save_tensors(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    assert "lm_head.weight" not in opened(tmp_path).tensors


def test_buffers_of_old_checkpoints_are_ignored(model: Path) -> None:
    """`rotary_emb.inv_freq` does not make a checkpoint unknown."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_tensors(model, stored(model / FILE) | {name: torch.ones(8)})
    assert name not in opened(model).tensors


# --- damaged --------------------------------------------------------------------------------------


def test_a_truncated_file_is_named_wherever_it_ends(model: Path) -> None:
    """A file cut anywhere, header or tensors, is refused by name."""
    data = (model / FILE).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for end in (0, 7, 8, 100, header - 1, header, len(data) // 2, len(data) - 1):
        (model / FILE).write_bytes(data[:end])
        with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
            opened(model)


def test_a_truncated_tensor_is_named(model: Path) -> None:
    """The message names the first tensor that the file no longer holds."""
    last = max(read_header(model / FILE).items(), key=lambda item: item[1].end)[0]
    data = (model / FILE).read_bytes()
    (model / FILE).write_bytes(data[:-1])
    with pytest.raises(
        ModelError, match=rf"{last} ends at byte {len(data)}, but .* {len(data) - 1}"
    ):
        opened(model)


def test_a_header_beyond_the_limit_is_not_read(model: Path) -> None:
    """A length over the format's limit is refused before memory is taken for it."""
    with (model / FILE).open("r+b") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(ModelError, match=r"model\.safetensors has a header of 100000001 bytes"):
        opened(model)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"nonsense"])
def test_a_header_that_is_no_json_object_is_refused(model: Path, text: bytes) -> None:
    """The message names the file."""
    (model / FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match=r"model\.safetensors has a header that is (not|no) JSON"):
        opened(model)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F128"}, "unknown element type 'F128'"),
        ({"dtype": ["F32"]}, "unknown element type"),
        ({"dtype": "F16"}, "takes 16384 bytes, but lies in"),
        ({"shape": [128, 65]}, "takes 33280 bytes"),
        ({"shape": [-1, 64]}, "impossible shape"),
        ({"shape": [1.5, 64]}, "impossible shape"),
        ({"shape": [1] * 9}, "impossible shape"),
        ({"shape": 5}, "malformed"),
        ({"data_offsets": [5]}, "malformed"),
        ({"data_offsets": [32768, 0]}, "takes 32768 bytes"),
        ({"data_offsets": [1 << 60, (1 << 60) + 32768]}, "truncated"),
    ],
)
def test_a_wrong_entry_of_the_header_is_named(
    model: Path, entry: dict[str, Any], words: str
) -> None:
    """File and tensor are named, whatever is wrong with an entry."""
    rewrite_header(model / FILE, lambda header: header[Q_PROJ].update(entry))
    with pytest.raises(ModelError, match=rf"model\.safetensors.*{words}") as caught:
        opened(model)
    assert Q_PROJ in str(caught.value)


def test_overlapping_tensors_are_named(model: Path) -> None:
    """Two tensors in the same bytes are refused, and both are named."""
    other = "model.layers.0.self_attn.o_proj.weight"

    def overlap(header: dict[str, Any]) -> None:
        begin, end = header[Q_PROJ]["data_offsets"]
        header[other]["data_offsets"] = [begin + 4, end + 4]

    rewrite_header(model / FILE, overlap)
    with pytest.raises(ModelError, match=rf"model\.safetensors: {other} overlaps {Q_PROJ}"):
        opened(model)


# --- not what config.json calls for ---------------------------------------------------------------


def test_a_missing_tensor_is_named(model: Path) -> None:
    """A tensor that the model needs and the checkpoint lacks is named."""
    rewrite_header(model / FILE, lambda header: header.pop(Q_PROJ))
    with pytest.raises(ModelError, match=rf"has no tensor {Q_PROJ}"):
        opened(model)


def test_untied_embeddings_need_a_head(tmp_path: Path) -> None:
    """Without `lm_head.weight` the message says how a tied model would be written."""
    write_random_model(tmp_path, tie=True)
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"no tensor lm_head\.weight.*tie_word_embeddings"):
        opened(tmp_path)


def test_a_wrong_shape_is_named_with_both_shapes(model: Path) -> None:
    """Found and expected shapes stand in the message."""
    tensors = stored(model / FILE)
    save_tensors(model, tensors | {Q_PROJ: torch.zeros(64, 128)})
    words = rf"{Q_PROJ} has the shape \[64, 128\], but config\.json calls for \[128, 64\]"
    with pytest.raises(ModelError, match=words):
        opened(model)


def test_integer_weights_are_refused(model: Path) -> None:
    """A quantised tensor is named with its element type."""
    tensors = stored(model / FILE)
    save_tensors(model, tensors | {Q_PROJ: torch.zeros(128, 64, dtype=torch.int8)})
    with pytest.raises(ModelError, match=rf"{Q_PROJ} is I8; weights must be one of F32, BF16, F16"):
        opened(model)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.weight"]
)
def test_tensors_that_would_be_lost_silently_are_refused(model: Path, name: str) -> None:
    """A bias or a layer that config.json denies is named."""
    save_tensors(model, stored(model / FILE) | {name: torch.zeros(128)})
    with pytest.raises(ModelError, match=rf"model\.safetensors: {name} has no place"):
        opened(model)


def test_a_folder_without_weights_says_what_is_missing(model: Path) -> None:
    """The two names that are looked for are given, and what could be converted."""
    (model / FILE).rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"neither {FILE} nor {INDEX} \(it has pytorch_model.bin"):
        opened(model)


def test_a_missing_file_of_the_index_is_named(three_files: Path) -> None:
    """A file that the index names and the folder lacks is named, for opening and for hashing."""
    name = "model-00002-of-00003.safetensors"
    (three_files / name).unlink()
    with pytest.raises(ModelError, match=rf"{name} is missing"):
        opened(three_files)
    with pytest.raises(ModelError, match=rf"{name} is missing"):
        content_id(three_files, three_files / "cache")


def test_an_index_that_names_the_wrong_file_is_refused(three_files: Path) -> None:
    """The tensor and the file that does not hold it are named."""
    change_index(three_files, **{Q_PROJ: "model-00001-of-00003.safetensors"})
    held = Q_PROJ in read_header(three_files / "model-00001-of-00003.safetensors")
    assert not held
    with pytest.raises(ModelError, match=rf"00001-of-00003\.safetensors does not hold {Q_PROJ}"):
        opened(three_files)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "", "..", "a/b"])
def test_an_index_cannot_leave_its_folder(three_files: Path, file: str) -> None:
    """A path instead of a file name is refused."""
    change_index(three_files, **{Q_PROJ: file})
    with pytest.raises(ModelError, match=r"index\.json: weight_map names"):
        opened(three_files)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "["])
def test_a_damaged_index_is_named(three_files: Path, content: str) -> None:
    """An index without a weight map is refused by name."""
    (three_files / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        opened(three_files)


def test_a_tensor_missing_from_the_index_is_named(three_files: Path) -> None:
    """What the index does not name does not exist."""
    change_index(three_files, **{Q_PROJ: None})
    with pytest.raises(ModelError, match=rf"no tensor {Q_PROJ}"):
        opened(three_files)


# --- content hash ---------------------------------------------------------------------------------


def test_the_content_id_follows_the_content_alone(model: Path, tmp_path: Path) -> None:
    """A copy has the same id; any changed byte or added file another one; other files none."""
    cache = tmp_path / "cache"
    first = content_id(model, cache)
    assert len(first) == 64
    copy = Path(shutil.copytree(model, tmp_path / "other-name"))
    assert content_id(copy, cache) == first
    (copy / "README.md").write_text("hello")
    assert content_id(copy, cache) == first
    (copy / "generation_config.json").write_text("{}")
    assert content_id(copy, cache) != first
    for name in ("config.json", "tokenizer.json", FILE):
        changed = Path(shutil.copytree(model, tmp_path / f"changed-{name}"))
        data = (changed / name).read_bytes()
        (changed / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert content_id(changed, cache) != first


def test_every_file_of_a_large_checkpoint_counts(three_files: Path, tmp_path: Path) -> None:
    """Each of several weights files is part of the id."""
    seen = {content_id(three_files, tmp_path)}
    for path in sorted(three_files.glob("*.safetensors")):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        seen.add(content_id(three_files, tmp_path))
    assert len(seen) == 4


@pytest.fixture
def small_files_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every file as large enough to be remembered."""
    monkeypatch.setattr(checkpoint_module, "CACHED_FROM_BYTES", 0)


@pytest.mark.usefixtures("small_files_are_cached")
def test_the_cache_is_used_while_a_file_keeps_its_stat(model: Path, tmp_path: Path) -> None:
    """A remembered digest is taken for the same inode, size and time, and only then."""
    cache = tmp_path / "cache"
    first = content_id(model, cache)
    assert content_id(model, cache) == first
    data = (model / FILE).read_bytes()
    stat = (model / FILE).stat()
    (model / FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(model / FILE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_id(model, cache) == first, "the digest was computed again, not remembered"
    os.utime(model / FILE, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert content_id(model, cache) != first


@pytest.mark.usefixtures("small_files_are_cached")
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"sha256": 5}', b"\xff"])
def test_a_damaged_cache_is_ignored(model: Path, tmp_path: Path, damage: bytes) -> None:
    """Entries that cannot be trusted are computed again and replaced."""
    cache = tmp_path / "cache"
    first = content_id(model, cache)
    entries = list(cache.iterdir())
    assert entries
    for entry in entries:
        entry.write_bytes(damage)
    assert content_id(model, cache) == first
    assert all(len(json.loads(entry.read_bytes())["sha256"]) == 64 for entry in entries)
    assert sorted(cache.iterdir()) == sorted(entries), "no temporary file stays behind"


@pytest.mark.usefixtures("small_files_are_cached")
def test_a_cache_that_cannot_be_written_is_ignored(model: Path, tmp_path: Path) -> None:
    """A file where the cache's folder should be does not stop anybody."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    assert content_id(model, blocked / "cache") == content_id(model, tmp_path / "cache")


def test_hashing_reports_its_progress(model: Path, tmp_path: Path) -> None:
    """Progress rises to the sum of all sizes, from the cache too."""
    total = sum(path.stat().st_size for path in model.iterdir())
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        content_id(model, tmp_path / "cache", lambda *state, seen=seen: seen.append(state))
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)
