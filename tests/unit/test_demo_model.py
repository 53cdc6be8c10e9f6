"""Tests of the bundled demo model: its files, its tokenizer, its stories and what it says."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest

from p2pinfer.demo import MODEL_DIR
from p2pinfer.demo.stories import stories, tell

LARGEST_FILE = 8_000_000
PROMPTS = ("Once upon a time", "One morning, Mia", "The little fox")


def words_of(text: str) -> set[str]:
    """Return the distinct words of a text in lower case."""
    return set(re.findall(r"[a-z]+", text.lower()))


def test_the_package_imports_nothing_heavy() -> None:
    """Asking where the model lies loads neither torch nor numpy."""
    code = "import sys, p2pinfer.demo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_are_there_and_small() -> None:
    """The folder is complete, and the weights are within their limit."""
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= LARGEST_FILE
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (MODEL_DIR / name).is_file()


def test_configuration_can_be_split_eight_ways() -> None:
    """Eight KV heads: up to eight nodes can share the model."""
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == 8
    assert config["num_attention_heads"] == 16
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"


def test_tensors_are_float16_under_hugging_face_names() -> None:
    """The checkpoint has the names and the format that its card says."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(MODEL_DIR / "model.safetensors", framework="numpy") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert "model.embed_tokens.weight" in names
    assert "model.layers.3.self_attn.q_proj.weight" in names
    assert "lm_head.weight" not in names


def test_stories_are_deterministic() -> None:
    """A seed gives the same story each time."""
    assert [tell(seed) for seed in range(50)] == [tell(seed) for seed in range(50)]
    assert list(itertools.islice(stories(7), 3)) == [tell(7), tell(8), tell(9)]


def test_stories_are_varied_and_complete() -> None:
    """Many seeds give many different stories, each told to its end."""
    told = [tell(seed) for seed in range(1000)]
    assert len(set(told)) > 990
    assert len({text.split(".")[0] for text in told}) > 900
    for text in told:
        assert not set(text) & set("{}[]")
        assert text.count('"') % 2 == 0
        assert text[-1] in '.!"'
        assert 300 < len(text) < 2000


@pytest.mark.parametrize(
    "text", ["Once upon a time", "naïve café", "狐狸 and a 🦊👨‍👩‍👧", "  two  spaces\n\n\ttab", ""]
)
def test_tokenizer_round_trips_any_text(text: str) -> None:
    """Any text comes back from its tokens unchanged."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<|begin_of_text|>")
    assert tokenizer.decode(ids) == text


def test_tokenizer_knows_the_special_tokens() -> None:
    """Begin and end of text are tokens of their own."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|begin_of_text|>") == config["bos_token_id"]
    assert tokenizer.token_to_id("<|end_of_text|>") == config["eos_token_id"]


def test_model_tells_a_story_in_words_of_the_stories() -> None:
    """What the model says is made of the stories' words."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.float32
    vocabulary = words_of(" ".join(itertools.islice(stories(), 3000)))
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
        text = tokenizer.decode(output, skip_special_tokens=True)
        assert text.startswith(prompt)
        # The last word may be cut off.
        said = words_of(text[len(prompt) :].rsplit(" ", 1)[0])
        assert len(said) > 15
        assert said <= vocabulary
