"""Text to ids and back, whole and piece by piece, for both kinds of tokenizer."""

from __future__ import annotations

import functools
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from p2pinfer.demo import MODEL_DIR
from p2pinfer.errors import InvalidRequestError, ModelError
from p2pinfer.model.config import LlamaConfig, load_config
from p2pinfer.model.tokenizer import IncrementalDetokenizer, Tokenizer, byte_alphabet

CORPUS = [
    "Once upon a time there was a small fox who lived in a wood.",
    "The fox said: hello, world! And then\n\nit slept, and slept, and slept.",
    "Grüße aus Köln, señor; 日本語の文章 and 你好 as well 🎉🎉.",
    "def main():\n    return 1 + 2\n",
] * 8

BOS, EOS = "<s>", "</s>"
VOCAB = 512
TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from([" ", "  ", "\n", "fox", "é", "日本", "🎉", "👩‍👩‍👧", "\u2581", "\x00", "<s>"]),
    max_size=20,
).map("".join)


def config(vocab_size: int = VOCAB, **fields: Any) -> LlamaConfig:
    """The bundled model's configuration with another vocabulary."""
    fields = {"eos_token_ids": (2,), "bos_token_id": 1} | fields
    return msgspec.structs.replace(load_config(MODEL_DIR), vocab_size=vocab_size, **fields)


# --- the kinds of tokenizers ----------------------------------------------------------------------


def byte_level_bpe(folder: Path) -> Path:
    """A byte-level BPE as Llama 3 has it, trained on the corpus."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", BOS, EOS],
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    library.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    """A `tokenizer.model` as Llama 2 has it: BPE with byte fallback, spaces kept."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **(settings | options)
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def metaspace_bpe(folder: Path) -> Path:
    """The `tokenizer.json` that `transformers` makes of a Llama 2 `tokenizer.model`."""
    sentencepiece_model(folder)
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.model").unlink()
    pieces = [library.IdToPiece(i) for i in range(library.GetPieceSize())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [
        (vocab[p[:cut] + p[cut:]], p[:cut], p[cut:])
        for p in pieces
        for cut in range(1, len(p))
        if p[:cut] in vocab and p[cut:] in vocab
    ]
    merges = [(left, right) for _, left, right in sorted(pairs)]
    fast = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<unk>", BOS, EOS])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    fast.save(str(folder / "tokenizer.json"))
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "byte_level": byte_level_bpe,
    "metaspace": metaspace_bpe,
    "sentencepiece": sentencepiece_model,
}


@functools.cache
def made(kind: str) -> tuple[Tokenizer, Any]:
    """Our tokenizer of a kind, and the library's for the same file."""
    with tempfile.TemporaryDirectory() as name:
        folder = MAKERS[kind](Path(name))
        ours = Tokenizer.load(folder, config())
        library: Any
        if kind == "sentencepiece":
            library = sentencepiece.SentencePieceProcessor()
            library.LoadFromSerializedProto((folder / "tokenizer.model").read_bytes())
            return ours, library.Decode
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return ours, lambda ids: library.decode(ids, skip_special_tokens=True)


@pytest.fixture(params=sorted(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of tokenizer."""
    return str(request.param)


KINDS = st.sampled_from(sorted(MAKERS))


# --- whole texts ----------------------------------------------------------------------------------


@given(KINDS, TEXTS.filter(lambda text: "<s>" not in text))
def test_any_text_comes_back(kind: str, text: str) -> None:
    """Encoding and decoding give the text again, its spaces and newlines included."""
    tokenizer, _ = made(kind)
    ids = tokenizer.encode(text)
    assert max(ids) < VOCAB
    expected = text if kind == "byte_level" else text.replace("\u2581", " ")
    assert tokenizer.decode(ids) == expected


@given(KINDS, TEXTS)
def test_decoding_is_that_of_the_library(kind: str, text: str) -> None:
    """For the tokens of a text, `decode` says what the file's own library says."""
    tokenizer, library_decode = made(kind)
    ids = list(tokenizer.encode(text))
    assert tokenizer.decode(ids) == library_decode(ids)


def test_a_text_begins_by_bos_exactly_once(kind: str) -> None:
    """BOS is added once, and a BOS that the text already has is not doubled."""
    tokenizer, _ = made(kind)
    ids = tokenizer.encode("the fox")
    assert tokenizer.bos_id == 1
    assert ids[0] == 1
    assert 1 not in ids[1:]
    assert tokenizer.encode("")[0] == 1
    if kind != "sentencepiece":
        assert list(tokenizer.encode(f"{BOS}the fox")).count(1) == 1
        assert list(tokenizer.encode(f"{BOS}{BOS}the fox")).count(1) == 1


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_settings_decide_about_bos(tmp_path: Path, kind: str, add_bos: bool) -> None:
    """`add_bos_token` of `tokenizer_config.json` wins over the tokenizer's own habit."""
    MAKERS[kind](tmp_path)
    settings = {"add_bos_token": add_bos, "bos_token": {"content": BOS}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = Tokenizer.load(tmp_path, config()).encode("the fox")
    assert (ids[0] == 1) is add_bos
    assert 1 not in ids[1:]


def test_special_and_unknown_ids_have_no_text(kind: str) -> None:
    """BOS, EOS and ids beyond the tokenizer (a padded vocabulary) are skipped."""
    tokenizer, _ = made(kind)
    ids = tokenizer.encode("the fox")
    assert tokenizer.size <= 511
    assert tokenizer.decode([1, 511, *ids, 2, 1 << 30]) == "the fox"
    assert tokenizer.eos_ids == (2,)


def test_a_configured_end_of_text_has_no_text(tmp_path: Path) -> None:
    """An id that ends replies is not printed, even if its file calls it an ordinary token."""
    byte_level_bpe(tmp_path)
    plain = Tokenizer.load(tmp_path, config())
    token = plain.encode("fox")[-1]
    ending = Tokenizer.load(tmp_path, config(eos_token_ids=(token,)))
    assert plain.decode([token])
    assert ending.decode([token]) == ""


def test_text_that_is_no_unicode_is_refused(kind: str) -> None:
    """A lone surrogate is the request's fault and named so."""
    with pytest.raises(InvalidRequestError, match="not valid Unicode"):
        made(kind)[0].encode("a\ud800b")


def test_the_byte_alphabet_is_that_of_byte_level_bpe() -> None:
    """256 printable characters, the same set as the library's."""
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert alphabet[ord("a")] == "a"
    assert alphabet[ord(" ")] == "Ġ"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"add_dummy_prefix": False}, "  two spaces"),
        ({"add_dummy_prefix": True}, "  two spaces"),
        ({"remove_extra_whitespaces": True}, "no spaces"),
    ],
)
def test_sentencepiece_settings_are_respected(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    """Leading spaces are taken off as the library does, whatever the model's settings."""
    sentencepiece_model(tmp_path, **options)
    tokenizer = Tokenizer.load(tmp_path, config())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text


def test_the_metaspace_decoder_is_understood(tmp_path: Path) -> None:
    """The other spelling of a sentencepiece decoder gives the same text."""
    metaspace_bpe(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.decoder = decoders.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, config())
    ids = list(tokenizer.encode("the fox  said"))
    assert tokenizer.decode(ids) == library.decode(ids) == "the fox  said"


# --- a reply piece by piece -----------------------------------------------------------------------


def groups(draw: st.DrawFn, ids: list[int]) -> Iterator[list[int]]:
    """Cut `ids` into random groups, empty ones among them."""
    while ids:
        size = draw(st.integers(0, 4))
        yield ids[:size]
        ids = ids[size:]


@st.composite
def replies(draw: st.DrawFn) -> tuple[str, list[int], list[list[int]]]:
    """A kind, the ids of a reply (a text's, or any at all), and the pushes it comes in."""
    kind = draw(KINDS)
    if draw(st.booleans()):
        ids = list(made(kind)[0].encode(draw(TEXTS)))
    else:
        ids = draw(st.lists(st.integers(0, VOCAB - 1), max_size=40))
    return kind, ids, list(groups(draw, ids))


@given(replies())
def test_pieces_add_up_to_the_whole(reply: tuple[str, list[int], list[list[int]]]) -> None:
    """Whatever the ids, invalid UTF-8 too, and however grouped: pieces equal `decode(all)`."""
    kind, ids, pushes = reply
    tokenizer, _ = made(kind)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(push) for push in pushes]
    whole = tokenizer.decode(ids)
    assert whole.startswith("".join(pieces))
    assert "".join(pieces) + detokenizer.finish() == whole
    assert not detokenizer.stopped


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The specification of stop strings: read character by character until one is complete."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(replies(), st.lists(st.text("fox aé日🎉\n", min_size=1, max_size=3), max_size=3).map(tuple))
def test_a_reply_is_cut_before_the_first_stop_string(
    reply: tuple[str, list[int], list[list[int]]], stop: tuple[str, ...]
) -> None:
    """Nothing of a stop string is ever given out, whatever tokens it lies across."""
    kind, ids, pushes = reply
    tokenizer, _ = made(kind)
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    text = "".join(detokenizer.push(push) for push in pushes) + detokenizer.finish()
    assert (text, detokenizer.stopped) == cut_at_stop(tokenizer.decode(ids), stop)


def test_text_is_given_out_as_early_as_it_is_certain(kind: str) -> None:
    """Each finished character comes with its last byte; only what may change is held back."""
    tokenizer, _ = made(kind)
    detokenizer = IncrementalDetokenizer(tokenizer, ("STOP",))
    ids = tokenizer.encode("fox ŷ")
    assert len([i for i in ids if i > 2]) >= 3, "the last character must be several byte tokens"
    assert "".join(detokenizer.push([i]) for i in ids[:-1]) == "fox "
    assert detokenizer.push(ids[-1:]) == "ŷ"
    partial = [i for i in tokenizer.encode("aST") if i > 2]
    # Sentencepiece begins a text of its own by a space.
    assert "".join(detokenizer.push([i]) for i in partial).strip() == "a"
    assert detokenizer.finish() == "ST"


def test_an_unfinished_character_ends_as_a_replacement(kind: str) -> None:
    """A reply cut inside a character says so instead of losing it."""
    tokenizer, _ = made(kind)
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("fox ŷ")[:-1]
    assert detokenizer.push(ids) == "fox "
    assert detokenizer.finish() == "\ufffd"


def test_nothing_follows_a_stop_string() -> None:
    """After a stop string, pushes and the end give nothing more."""
    tokenizer, _ = made("byte_level")
    detokenizer = IncrementalDetokenizer(tokenizer, ("upon",))
    assert detokenizer.push(tokenizer.encode("Once upon a")) == "Once "
    assert detokenizer.stopped
    assert detokenizer.push(tokenizer.encode(" time")) == ""
    assert detokenizer.finish() == ""


# --- files that do not do -------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    """Both file names that are looked for are given."""
    words = r"holds no tokenizer: neither tokenizer\.json nor tokenizer\.model"
    with pytest.raises(ModelError, match=words):
        Tokenizer.load(tmp_path, config())


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00nonsense"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    """What the library cannot read is refused with the file's name."""
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{file} (is damaged|has no tokens)"):
        Tokenizer.load(tmp_path, config())


def test_a_truncated_tokenizer_is_named(tmp_path: Path, kind: str) -> None:
    """Half a file is damaged."""
    MAKERS[kind](tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=rf"{path.name} is damaged"):
        Tokenizer.load(tmp_path, config())


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    """The largest id and vocab_size stand in the message; an exact fit is good."""
    MAKERS[kind](tmp_path)
    size = made(kind)[0].size
    words = rf"largest token id is {size - 1}, but config\.json's vocab_size is {size - 1}"
    with pytest.raises(ModelError, match=words):
        Tokenizer.load(tmp_path, config(vocab_size=size - 1))
    assert Tokenizer.load(tmp_path, config(vocab_size=size)).size == size


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()])
def test_a_decoder_of_another_family_is_refused_by_name(tmp_path: Path, decoder: Any) -> None:
    """Tokens that are no fixed bytes are not guessed at."""
    byte_level_bpe(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["decoder"] = (
        None if decoder is None else {"type": "WordPiece", "prefix": "#", "cleanup": True}
    )
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"tokenizer\.json: decoder (None|'WordPiece') is not"):
        Tokenizer.load(tmp_path, config())


def test_damaged_settings_are_named(tmp_path: Path, kind: str) -> None:
    """A `tokenizer_config.json` that is no JSON is refused by name."""
    MAKERS[kind](tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path, config())


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    """Settings meant for training do not cut or fill a prompt."""
    byte_level_bpe(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(path)
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(path)
    tokenizer = Tokenizer.load(tmp_path, config())
    long = "the fox and the fox and the fox"
    assert tokenizer.decode(tokenizer.encode(long)) == long
    assert len(tokenizer.encode("a")) == 2


def test_the_bundled_model_has_a_tokenizer() -> None:
    """The demo's tokenizer loads and gives its own text back."""
    tokenizer = Tokenizer.load(MODEL_DIR, load_config(MODEL_DIR))
    assert tokenizer.decode(tokenizer.encode("Once upon a time, 🎉!")) == "Once upon a time, 🎉!"


def test_the_tokenizer_json_is_taken_first(tmp_path: Path) -> None:
    """A folder with both files uses `tokenizer.json`, as `transformers` does."""
    sentencepiece_model(byte_level_bpe(tmp_path))
    assert Tokenizer.load(tmp_path, config()).kind == "tokenizer.json"
    shutil.move(tmp_path / "tokenizer.json", tmp_path / "elsewhere")
    assert Tokenizer.load(tmp_path, config()).kind == "tokenizer.model"
