"""The numeric class of a node: equal classes compute equal bits.

A fixed, seeded layer is run on fixed inputs at a few row counts, by the very code that serves, and
its output bits are hashed. CPUs with other vector instructions, another library or version of one,
or another device give another hash; the number of threads does not. Positions that are computed one
by one, or beside others, are compared with those of one long run: where the bits differ, no plan
and no failover keeps them. The same is done with sums as long as those of large models, and with
attention over many keys, which the layer does not have: libraries cut both into pieces, each by its
own rules.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2pinfer.core.blocks import BLOCK_POSITIONS
from p2pinfer.core.planner import Holding
from p2pinfer.core.units import Slice
from p2pinfer.model.attention import Run, StepAttention, make_rows
from p2pinfer.model.config import LlamaConfig, model_spec
from p2pinfer.model.kv_cache import KvCache, KvShape
from p2pinfer.model.llama import TORCH_DTYPES, compute_dtype
from p2pinfer.model.part import Part, empty_cache
from p2pinfer.model.runner import StageRunner, run_alone
from p2pinfer.model.stage_loader import StageLoader, packer_of
from p2pinfer.model.unit_products import Norm, Packer, Rows, Units
from p2pinfer.types import DType, ModelSpec
from p2pinfer.wire.messages import Slot

ROW_COUNTS = (1, 5, 70)
"""A decode step, a padded one, and last, the longest, a prefill that crosses a block of
positions."""

PIECES = ((0, 64), (64, 67), (67, 69), (69, 70))
"""The longest of these runs once more: in even and odd numbers of rows."""

TERMS = 8192
"""Of the longest sums; two libraries that agree up to a thousand part beyond."""

_HIDDEN = 192
SUMS = 256
"""So many of a row, since a sum that is rounded to bfloat16 shows in one of 3,000 cases only that
it was made otherwise. Their weights are one row of numbers, each time moved by one."""

LONG_SUMS = "long_sums"

KEYS = 33 * BLOCK_POSITIONS
"""That positions attend to: libraries cut them into pieces of 512 and more."""

LONG_ATTENTION = "long_attention"

_HEADS, _HEAD_DIM, _WIDTH, _VOCAB = 2, 64, 256, 128


class _SeededSource:
    """Weights drawn from a counter-based generator: the same on every machine."""

    def __init__(self) -> None:
        self._shapes = {
            "q_proj": (2 * _HEADS * _HEAD_DIM, _HIDDEN),
            "k_proj": (_HEADS * _HEAD_DIM, _HIDDEN),
            "v_proj": (_HEADS * _HEAD_DIM, _HIDDEN),
            "o_proj": (_HIDDEN, 2 * _HEADS * _HEAD_DIM),
            "gate_proj": (_WIDTH, _HIDDEN),
            "up_proj": (_WIDTH, _HIDDEN),
            "down_proj": (_HIDDEN, _WIDTH),
            "embed_tokens": (_VOCAB, _HIDDEN),
            "lm_head": (_VOCAB, _HIDDEN),
            LONG_SUMS: (1, TERMS + SUMS),
            LONG_ATTENTION: (2 * _HEADS, KEYS + _HEAD_DIM - 1),
        }

    def whole(self, name: str) -> Tensor:
        kind = name.split(".")[-2]
        if "norm" in kind:
            return torch.ones(self._shapes["embed_tokens"][1])
        if kind == LONG_SUMS:
            return self.drawn(kind).view(-1).unfold(0, TERMS, 1)
        return self.drawn(kind)

    def drawn(self, kind: str) -> Tensor:
        """Numbers around 0, none of them round."""
        shape = self._shapes[kind]
        seed = list(self._shapes).index(kind)
        bits = np.random.Philox(key=seed).random_raw(shape[0] * shape[1])
        centred = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
        return torch.from_numpy(centred.reshape(shape) * np.float32(0.1))

    mapped = whole

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return self.whole(name)[start:end].clone()

    def cols(self, name: str, start: int, end: int) -> Tensor:
        return self.whole(name)[:, start:end].clone()


def _config(dtype: DType) -> LlamaConfig:
    return LlamaConfig(
        architecture="LlamaForCausalLM",
        hidden_size=_HIDDEN,
        intermediate_size=_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2 * _HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD_DIM,
        vocab_size=_VOCAB,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        dtype=dtype,
    )


class Numerics(NamedTuple):
    """How a machine computes: 16 hexadecimal digits, the hash of its bits; whether the bits of a
    position depend on how many are computed together."""

    numeric_class: str
    rows_matter: bool


def numerics(dtype: DType, device: torch.device, quant: str = "none") -> Numerics:
    """How this machine computes in `dtype` on `device`, with weights quantised so."""
    source, config = _SeededSource(), _config(dtype)
    spec = model_spec(config, name="numeric class", model_id="0" * 64, dtype=dtype, quant=quant)
    runner = _runner(source, config, spec, device)
    digest = hashlib.sha256()
    for request_id, rows in enumerate(ROW_COUNTS):
        at_once = run_alone(runner, (_slot(request_id, rows, 0, rows),))
        digest.update(at_once.cpu().numpy().tobytes())
    again, beside, longest = len(ROW_COUNTS), len(ROW_COUNTS) + 1, ROW_COUNTS[-1]
    run_alone(runner, (_slot(beside, longest, 0, 1),))
    for number, (start, end) in enumerate(PIECES, 1):
        other = _slot(beside, longest, number, number + 1)
        # Of two slots the first one's logits come first.
        found = run_alone(runner, (_slot(again, longest, start, end), other))
    long_sums, rows_matter = _long_sums(packer_of(source, spec, device), source, spec, device)
    long_attention, positions_matter = _long_attention(source, spec, device)
    for result in (long_sums, long_attention):
        digest.update(result.cpu().numpy().tobytes())
    matters = rows_matter or positions_matter or not torch.equal(found[0], at_once[0])
    return Numerics(digest.hexdigest()[:16], matters)


def _long_sums(
    packer: Packer[Any, Any], source: _SeededSource, spec: ModelSpec, device: torch.device
) -> tuple[Tensor, bool]:
    """A product with `TERMS` terms of as many rows as are run at most, and whether the bits of a
    row depend on how many there are."""
    name = f"class.{LONG_SUMS}.weight"
    weight = packer.alone(Rows(name, 0, SUMS, SUMS))
    products = packer.fanned(Units((0,)), [weight], Norm(torch.ones(TERMS, device=device), 0.0))
    longest = ROW_COUNTS[-1]
    x = source.whole(name)[-longest:].to(device, compute_dtype(spec)).contiguous()
    at_once = products(x, longest, {0})[0].clone()
    pieces = [
        products(x[start:end].contiguous(), end - start, {0})[0].clone() for start, end in PIECES
    ]
    return at_once, not torch.equal(torch.cat(pieces), at_once)


def _long_attention(
    source: _SeededSource, spec: ModelSpec, device: torch.device
) -> tuple[Tensor, bool]:
    """What the last `BLOCK_POSITIONS` of `KEYS` positions attend to, and whether that depends on
    how many there are."""
    dtype = TORCH_DTYPES[spec.kv_dtype]
    cache = KvCache(KvShape(_HEADS, 1, _HEAD_DIM, dtype, device))
    cache.open(0, KEYS)
    numbers = source.whole(f"class.{LONG_ATTENTION}.weight").view(2, _HEADS, -1)
    moved = numbers.unfold(2, _HEAD_DIM, 1).to(device)
    stored = cache.layers(0, 0, KEYS)
    keys, values = stored.keys[0], stored.values[0]
    keys.copy_(moved[0])
    values.copy_(moved[1])
    # Some keys are to count for more than others.
    queries = 100 * moved[:, :, :BLOCK_POSITIONS].permute(1, 2, 0, 3)

    def attend(start: int, end: int) -> Tensor:
        rows = make_rows([Run(0, 0, start, end)], 2, dtype, device)
        step = StepAttention(cache, end - start, rows, 2, torch.float32)
        own = slice(start - first, end - first)
        return step.attend(0, queries[:, own], keys[:, start:end], values[:, start:end])

    first = KEYS - BLOCK_POSITIONS
    at_once = attend(first, KEYS)
    pieces = [attend(first + start, first + end) for start, end in ((0, 61), (61, 63), (63, 64))]
    return at_once, not torch.equal(torch.cat(pieces, dim=1), at_once)


def _slot(request_id: int, rows: int, start: int, end: int) -> Slot:
    """Positions `[start, end)` of a request of so many tokens, which follow from that number."""
    tokens = tuple((7 * i + rows) % _VOCAB for i in range(start, end))
    return Slot(request_id=request_id, start=start, tokens=tokens, sample=True, capacity=rows)


def _runner(
    source: _SeededSource, config: LlamaConfig, spec: ModelSpec, device: torch.device
) -> StageRunner:
    everything = Holding(
        stage=0,
        span=Slice(0, 1),
        head_units=tuple(range(_HEADS)),
        mlp_units=(0, 1),
        vocab_units=(0, 1),
    )
    loader = StageLoader(source, config, spec, device)
    part = Part(everything, empty_cache(everything, spec, device))
    part.stage = loader.load(everything)
    trunks = {everything.span: loader.trunk(everything.span)}
    return StageRunner((part,), (everything,), trunks, spec, device)
