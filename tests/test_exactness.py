"""The split model against `transformers`, and against itself under every plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from p2pinfer.model.kv_cache import KvCache
from p2pinfer.types import DType, Plan
from p2pinfer.wire.messages import Slot
from tests.lockstep import Lockstep
from tests.random_models import LINEAR_ROPE, LLAMA3_ROPE, write_random_model
from tests.step_plans import inherited

NEW_TOKENS = 64
LOGIT_TOLERANCE = 1e-4
"""Of the largest absolute logit."""

PLANS = (
    (1, "heads", 1, False),
    (2, "heads", 2, True),
    (3, "heads", 1, False),
    (4, "heads", 2, False),
    (5, "heads", 1, False),
    (6, "heads", 1, False),
    (2, "layers", 3, False),
    (3, "layers", 1, False),
    (4, "2x2", 1, True),
)
"""Nodes and layout, in how many parts each node holds its units, and whether with others'."""


FORMATS = (
    (DType.FLOAT32, "none"),
    (DType.BFLOAT16, "none"),
    (DType.BFLOAT16, "int8"),
    (DType.BFLOAT16, "int4"),
)
"""Number formats whose bits depend on nothing but the tokens, and quantisations."""


@dataclass(frozen=True)
class Case:
    """One random small model."""

    name: str
    shape: dict[str, Any] = field(default_factory=dict)


def _case(name: str, **shape: Any) -> Case:
    return Case(name, {"num_hidden_layers": 3, **shape})


CASES = (
    _case("defaults"),
    _case("one query head per KV head", num_attention_heads=4, num_key_value_heads=4),
    _case(
        "two per KV head, three KV heads",
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
    ),
    _case("four per KV head, tied", num_attention_heads=8, num_key_value_heads=2, tie=True),
    _case("eight per KV head", num_attention_heads=16, num_key_value_heads=2),
    _case("one KV head", num_attention_heads=8, num_key_value_heads=1),
    _case(
        "five KV heads, uneven MLP",
        hidden_size=80,
        num_attention_heads=5,
        num_key_value_heads=5,
        intermediate_size=333,
    ),
    _case(
        "seven KV heads",
        hidden_size=112,
        num_attention_heads=14,
        num_key_value_heads=7,
        vocab_size=1001,
    ),
    _case("head_dim 24", head_dim=24),
    _case("head_dim 32, tied", head_dim=32, tie=True),
    _case("head_dim 64", head_dim=64, num_attention_heads=4, num_key_value_heads=2),
    _case("head_dim 80", head_dim=80, num_attention_heads=4, num_key_value_heads=4),
    _case("head_dim 128", head_dim=128, num_attention_heads=4, num_key_value_heads=2, files=3),
    _case(
        "head_dim implied",
        head_dim=None,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
    _case("attention biases", attention_bias=True),
    _case("MLP biases", mlp_bias=True, intermediate_size=500),
    _case("all biases, tied, many files", attention_bias=True, mlp_bias=True, tie=True, files=3),
    _case("llama3 scaling", rope=LLAMA3_ROPE, rope_theta=500_000.0),
    _case("llama3 scaling, new spelling", rope=LLAMA3_ROPE, new_rope_spelling=True, tie=True),
    _case("linear scaling", rope=LINEAR_ROPE),
    _case("many MLP units", intermediate_size=1500, vocab_size=2500, num_key_value_heads=8),
    _case("hidden 200, tiny vocabulary", hidden_size=200, vocab_size=300, files=3),
)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def reference(folder: Path, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """`transformers`' greedy tokens and logits [NEW_TOKENS, vocab], in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = None
    ids = torch.tensor([prompt])
    tokens: list[int] = []
    rows = []
    for _ in range(NEW_TOKENS):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].numpy())
        tokens.append(int(rows[-1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, np.stack(rows)


def prompt_of(vocab: int, length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(2, vocab, length).tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_plan_says_what_transformers_says(case: Case, tmp_path: Path) -> None:
    """64 greedy tokens are identical, logits within 1e-4, and their bits the same by any plan."""
    seed = CASES.index(case)
    folder = write_random_model(tmp_path / "model", seed=seed, **case.shape)
    prompt = prompt_of(300, 40 + 7 * (seed % 5), seed)
    expected, logits = reference(folder, prompt)
    first: np.ndarray | None = None
    for place, (nodes, layout, parts, spare) in enumerate(PLANS):
        lockstep = Lockstep(folder, nodes=nodes, layout=layout, parts=parts, spare=spare)
        tokens, rows = lockstep.greedy(prompt, NEW_TOKENS, chunk=(1000, 7, 33)[place % 3])
        assert tokens == expected, PLANS[place]
        assert np.abs(rows - logits).max() <= LOGIT_TOLERANCE * np.abs(logits).max()
        if first is None:
            first = rows
        assert np.array_equal(first, rows), f"bits differ: {PLANS[place]}"
    assert len(set(expected)) > 8, "a constant continuation would prove nothing"


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dtype", "quant"), FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": 700,
        },
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie": True},
        {"head_dim": 24, "hidden_size": 200, "vocab_size": 1001, "attention_bias": True},
        {"intermediate_size": 500, "mlp_bias": True},
        {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 512},
    ],
)
def test_bits_depend_on_the_tokens_alone(
    shape: dict[str, Any], dtype: DType, quant: str, wire_dtype: str, tmp_path: Path
) -> None:
    """Plans, weights, parts, chunk sizes and replay as one prefill give the same logit bits, also
    where the sums of half layers are rounded."""
    folder = write_random_model(tmp_path / "model", seed=3, num_hidden_layers=2, **shape)
    prompt = prompt_of(300, 150)
    runs: tuple[tuple[int, str, tuple[float, ...] | None, int, int], ...] = (
        (1, "heads", None, 1000, 1),
        (1, "heads", None, 1, 1),
        (1, "heads", None, 100, 4),
        (2, "heads", (1.0, 3.0), 64, 1),
        (3, "heads", None, 100, 2),
        (4, "heads", (1.0, 1.0, 1.0, 2.0), 36, 1),
        (2, "layers", None, 50, 3),
        (4, "2x2", None, 149, 1),
    )
    expected: np.ndarray | None = None
    for nodes, layout, weights, chunk, parts in runs:
        lockstep = Lockstep(
            folder,
            nodes=nodes,
            layout=layout,
            dtype=dtype,
            quant=quant,
            wire_dtype=wire_dtype,
            weights=weights,
            parts=parts,
        )
        tokens, rows = lockstep.greedy(prompt, 12, chunk=chunk)
        if expected is None:
            expected = rows
        assert np.array_equal(rows, expected), (nodes, layout, chunk, parts)
        replay = lockstep.prefill(prompt + tokens[:-1], request_id=2, chunk=70)
        assert np.array_equal(replay[0], expected[-1]), "replayed as one prefill"


def test_sums_in_bfloat16_are_rounded_everywhere(tmp_path: Path) -> None:
    """One node alone rounds as several do, and comes close to what is not rounded."""
    folder = write_random_model(tmp_path / "model", seed=9, num_hidden_layers=3)
    prompt = prompt_of(300, 60)
    whole = Lockstep(folder).prefill(prompt)
    rounded = [
        Lockstep(folder, nodes=nodes, layout=layout, wire_dtype="bfloat16").prefill(prompt)
        for nodes, layout in ((1, "heads"), (2, "heads"), (3, "heads"), (2, "layers"), (4, "2x2"))
    ]
    assert all(np.array_equal(rounded[0], each) for each in rounded)
    apart = np.abs(rounded[0] - whole).max() / np.abs(whole).max()
    assert 1e-5 < apart < 0.05


@pytest.mark.parametrize(("dtype", "quant"), FORMATS)
def test_bits_are_the_same_where_a_member_owns_several_stages(
    dtype: DType, quant: str, tmp_path: Path
) -> None:
    """Whoever inherited which stages of whom: neighbouring ones, others, whole or in part."""
    folder = write_random_model(tmp_path / "model", seed=8, num_hidden_layers=4)
    prompt = prompt_of(300, 90)
    tokens, expected = Lockstep(folder, dtype=dtype, quant=quant).greedy(prompt, 8)
    cases: tuple[tuple[int, str, dict[int, tuple[int, ...]]], ...] = (
        (2, "layers", {0: (1,)}),
        (3, "layers", {1: (0,)}),
        (3, "layers", {2: (0,)}),
        (4, "layers", {0: (2,), 1: (3,)}),
        (4, "layers", {1: (0, 3)}),
        (4, "2x2", {0: (1,), 1: (2, 3)}),
        (4, "2x2", {3: (2,), 2: (1,)}),
        (4, "2x2", {0: (1, 2)}),
    )
    for nodes, layout, heirs in cases:

        def change(plan: Plan, heirs: dict[int, tuple[int, ...]] = heirs) -> Plan:
            for gone, those in heirs.items():
                plan = inherited(plan, gone, *those)
            return plan

        lockstep = Lockstep(
            folder, nodes=nodes, layout=layout, dtype=dtype, quant=quant, parts=2, change=change
        )
        assert max(len(mine.roles) for mine in lockstep.topologies) > 1
        again, rows = lockstep.greedy(prompt, 8, chunk=40)
        assert again == tokens, (layout, heirs)
        assert np.array_equal(rows, expected), (layout, heirs)


@pytest.mark.parametrize(("dtype", "quant"), FORMATS)
def test_bits_do_not_depend_on_the_batch(dtype: DType, quant: str, tmp_path: Path) -> None:
    """A request alone and one among prefills and decodes of others give the same logit bits."""
    folder = write_random_model(tmp_path / "model", seed=4, head_dim=32)
    prompts = [prompt_of(300, 20 + 31 * i, seed=i) for i in range(4)]
    lockstep = Lockstep(folder, nodes=2, dtype=dtype, quant=quant)
    alone = [lockstep.prefill(p, request_id=10 + i)[0] for i, p in enumerate(prompts)]
    step = tuple(
        Slot(request_id=i, start=0, tokens=tuple(p), sample=True, capacity=256)
        for i, p in enumerate(prompts)
    )
    together = lockstep.step(step)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    nexts = [int(row.argmax()) for row in alone]
    single = [
        lockstep.step((Slot(request_id=10 + i, start=len(p), tokens=(nexts[i],), sample=True),))[0]
        for i, p in enumerate(prompts)
    ]
    mixed = lockstep.step(
        (
            *(
                Slot(request_id=i, start=len(p), tokens=(nexts[i],), sample=True)
                for i, p in enumerate(prompts)
            ),
            Slot(request_id=99, start=0, tokens=tuple(prompts[3]), sample=True, capacity=256),
        )
    )
    assert all(np.array_equal(a, b) for a, b in zip(single, mixed[:4], strict=True))
    assert np.array_equal(mixed[4], alone[3])


def test_what_was_foreseen_serves_that_step_alone(tmp_path: Path) -> None:
    """Nodes prepare the step that probably follows. A request that is freed, and comes again with
    the KV of others as a standby's does, has other memory at the same position; and another step
    may follow."""
    folder = write_random_model(tmp_path / "model", seed=4, head_dim=32)
    one, other = prompt_of(300, 70, seed=1), prompt_of(300, 70, seed=2)
    lockstep, source = Lockstep(folder, nodes=2), Lockstep(folder, nodes=2)
    following = (Slot(request_id=1, start=70, tokens=(5,), sample=True),)
    source.prefill(other)
    lockstep.prefill(one)  # and now each node has prepared position 70
    for runner, its in zip(lockstep.runners.values(), source.runners.values(), strict=True):
        runner.forget((1,))
        runner.open(1, 512)
        for part, other_part in zip(runner._parts, its._parts, strict=True):
            for unit in range(part.cache.shape.units):
                part.cache.copy(unit, other_part.cache, unit)
    expected = source.step(following)
    assert np.array_equal(lockstep.step(following), expected)
    # Position 71 is prepared; two positions at once, and another request, are other steps.
    twice = (Slot(request_id=1, start=71, tokens=(6, 7), sample=True),)
    assert np.array_equal(lockstep.step(twice), source.step(twice))
    lockstep.prefill(one, request_id=2)
    source.prefill(one, request_id=2)
    both = tuple(
        Slot(request_id=i, start=at, tokens=(8,), sample=True) for i, at in ((2, 70), (1, 73))
    )
    assert np.array_equal(lockstep.step(both), source.step(both))


def test_what_was_foreseen_is_forgotten_where_kv_moves(tmp_path: Path) -> None:
    """Parts that are loaded anew have other memory for the KV that they had."""
    folder = write_random_model(tmp_path / "model", seed=4, head_dim=32)
    prompt = prompt_of(300, 70, seed=1)
    lockstep, source = Lockstep(folder, nodes=2), Lockstep(folder, nodes=2)
    for each in (lockstep, source):
        each.prefill(prompt)
    for runner in lockstep.runners.values():
        for part in runner._parts:
            before, part.cache = part.cache, KvCache(part.cache.shape)
            part.cache.open(1, 512)
            for unit in range(before.shape.units):
                part.cache.copy(unit, before, unit)
            before.layers(1, 0, 70).keys[0].zero_()
        runner.rearrange(runner._parts)
    for position in (70, 71):
        following = (Slot(request_id=1, start=position, tokens=(5,), sample=True),)
        assert np.array_equal(lockstep.step(following), source.step(following))


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_bits_do_not_depend_on_threads(dtype: DType, tmp_path: Path) -> None:
    """One, two and three threads give the same logit bits."""
    folder = write_random_model(
        tmp_path / "model", seed=5, hidden_size=256, intermediate_size=1100, head_dim=64
    )
    prompt = prompt_of(300, 200)
    before = torch.get_num_threads()
    rows = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows.append(Lockstep(folder, dtype=dtype).greedy(prompt, 8)[1])
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])


def test_a_node_reads_the_bytes_of_its_own_units_only(tmp_path: Path) -> None:
    """What all nodes take from the file adds up to the model, less the embedding table, and twice
    the norms: the trunk has them, and the products that norm what they are given."""
    folder = write_random_model(
        tmp_path / "model", num_key_value_heads=8, intermediate_size=1024, vocab_size=2048
    )
    whole = Lockstep(folder)
    total = whole.weights.bytes_taken
    stored = sum(i.end - i.begin for i in whole.weights.checkpoint.tensors.values())
    table = whole.weights.mapped("model.embed_tokens.weight").nbytes
    norms = (2 * 2 + 1) * whole.model.hidden_size * 4
    assert total == stored - table + norms
    split = Lockstep(folder, nodes=4)
    assert split.weights.bytes_taken == total + 3 * 2 * norms


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_says_what_transformers_says(tmp_path: Path) -> None:
    """The same greedy tokens on an accelerator, in float32."""
    folder = write_random_model(tmp_path / "model", seed=6)
    prompt = prompt_of(300, 50)
    expected, _ = reference(folder, prompt)
    tokens, _ = Lockstep(folder, nodes=2, device=torch.device("cuda")).greedy(prompt, NEW_TOKENS)
    assert tokens == expected


def test_float16_weights_are_computed_with_too(tmp_path: Path) -> None:
    """float16 logits are those of float32 up to rounding."""
    folder = write_random_model(tmp_path / "model", seed=7, dtype="float16")
    prompt = prompt_of(300, 40)
    exact = Lockstep(folder, dtype=DType.FLOAT32).prefill(prompt)
    for nodes in (1, 3):
        half = Lockstep(folder, nodes=nodes).prefill(prompt)
        assert np.abs(half - exact).max() < 0.05 * np.abs(exact).max()
