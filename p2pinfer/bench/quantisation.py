"""`p2pinfer bench quant`: how far quantised weights are from the model that they were made of.

The unquantised model in float32 draws sequences at temperature 1; every format then says what it
holds of each position of them. So figures are of text as the model writes it. The same is done with
`OUTLIERS` features of every layer's input a thousand times larger than the others, as real Llamas
have them, and for one product alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pinfer.bench.inputs import Tell
from p2pinfer.core.holdings import Holding
from p2pinfer.core.units import BlockFormat, Slice, unit_count
from p2pinfer.errors import UsageError
from p2pinfer.model.checkpoint import Checkpoint
from p2pinfer.model.config import LlamaConfig, load_config, model_spec, resolve_model
from p2pinfer.model.part import Part, empty_cache
from p2pinfer.model.quantise import quantise
from p2pinfer.model.quantised_products import QuantisedLinear, QuantisedPacker
from p2pinfer.model.runner import StageRunner, run_alone
from p2pinfer.model.stage_loader import StageLoader, packer_of
from p2pinfer.model.unit_products import TensorSource
from p2pinfer.model.weights import Weights
from p2pinfer.types import DType, UnitKind
from p2pinfer.wire.messages import Slot

CPU = torch.device("cpu")

OUTLIERS = 4
OUTLIER = 1000.0

FORMATS = {
    f"int{bits} block {block}": BlockFormat(bits=bits, block=block, zero_points=bits == 4)
    for bits in (8, 4)
    for block in (32, 64, 128, 256)
}

PRODUCT = (512, 2048, 64)
"""Outputs, inputs and rows of the one product."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`sequences` of `tokens` tokens of `model`, a folder or `demo`."""

    model: str = "demo"
    sequences: int = 16
    tokens: int = 128
    seed: int = 0


class WithOutliers:
    """A model's weights, with the norms of some features a thousand times larger."""

    def __init__(self, weights: TensorSource) -> None:
        self._weights = weights
        self.rows, self.cols, self.mapped = weights.rows, weights.cols, weights.mapped

    def whole(self, name: str) -> Tensor:
        """A copy of all of a tensor."""
        values = self._weights.whole(name)
        if "layernorm" in name:
            step = len(values) // OUTLIERS
            values[step // 2 :: step][:OUTLIERS] *= OUTLIER
        return values


class Reader:
    """A whole model in one process, by one format; None: unquantised, in `dtype`."""

    def __init__(
        self, weights: TensorSource, config: LlamaConfig, form: BlockFormat | None, dtype: DType
    ) -> None:
        quant = "none" if form is None else f"int{form.bits}"
        spec = model_spec(config, name="measured", model_id="", dtype=dtype, quant=quant)
        packer = packer_of(weights, spec, CPU) if form is None else QuantisedPacker(weights, form)
        loader = StageLoader(weights, config, spec, CPU, packer)
        heads, mlp, vocab = (tuple(range(unit_count(spec, kind))) for kind in UnitKind)
        held = Holding(
            stage=0,
            span=Slice(0, spec.num_layers),
            head_units=heads,
            mlp_units=mlp,
            vocab_units=vocab,
        )
        part = Part(held, empty_cache(held, spec, CPU))
        part.stage = loader.load(held)
        trunks = {held.span: loader.trunk(held.span)}
        self._runner = StageRunner((part,), (held,), trunks, spec, CPU)

    def step(self, position: int, tokens: Sequence[int], capacity: int) -> NDArray[np.float64]:
        """Log-probabilities [sequences, vocabulary] after the sequences' next tokens, which have
        this position."""
        slots = tuple(
            Slot(
                request_id=number,
                start=position,
                tokens=(token,),
                sample=True,
                capacity=0 if position else capacity,
            )
            for number, token in enumerate(tokens)
        )
        logits = run_alone(self._runner, slots).double()
        return logits.log_softmax(dim=1).numpy()


def measure(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Everything that `bench quant --json` prints."""
    folder = resolve_model(settings.model)
    config = load_config(folder)
    if settings.tokens > config.max_position_embeddings:
        raise UsageError(
            f"--tokens {settings.tokens}: the model has {config.max_position_embeddings} positions"
        )
    weights = Weights(Checkpoint.open(folder, config))
    # Small products: more threads would only wait for each other.
    torch.set_num_threads(1)
    sources: dict[str, TensorSource] = {"as it is": weights, "outliers": WithOutliers(weights)}
    rows = []
    with torch.no_grad():
        for name, source in sources.items():
            tell(f"{name}: the unquantised model writes")
            tokens, said = _written(source, config, settings)
            for label, form in {"bfloat16": None, **FORMATS}.items():
                tell(f"{name}: {label}")
                reader = Reader(source, config, form, DType.BFLOAT16)
                rows.append({"model": name, "format": label, **_compared(reader, tokens, said)})
        products = [{"format": label, **_product(form)} for label, form in FORMATS.items()]
    return {
        "model": settings.model,
        "sequences": settings.sequences,
        "tokens": settings.tokens,
        "formats": rows,
        "product": products,
    }


def _written(
    source: TensorSource, config: LlamaConfig, settings: Settings
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Tokens [tokens, sequences] that the float32 model draws at temperature 1, and its
    log-probabilities after each."""
    reader = Reader(source, config, None, DType.FLOAT32)
    draw = np.random.Generator(np.random.Philox(key=settings.seed))
    first = 0 if config.bos_token_id is None else config.bos_token_id
    tokens, said = [np.full(settings.sequences, first)], []
    for position in range(settings.tokens):
        said.append(reader.step(position, tokens[-1].tolist(), settings.tokens))
        # Gumbel-max: the greatest of the log-probabilities with such noise is a draw.
        tokens.append((said[-1] + draw.gumbel(size=said[-1].shape)).argmax(axis=1))
    return np.stack(tokens[:-1]), said


def _compared(
    reader: Reader, tokens: NDArray[np.int64], said: Sequence[NDArray[np.float64]]
) -> dict[str, float]:
    """Kullback-Leibler divergence of a format from the float32 model, in nats per token, and how
    often both hold the same token to be the likeliest."""
    divergences, same = [], []
    for position, (row, exact) in enumerate(zip(tokens, said, strict=True)):
        other = reader.step(position, row.tolist(), len(tokens))
        divergences.append((np.exp(exact) * (exact - other)).sum(axis=1))
        same.append(exact.argmax(axis=1) == other.argmax(axis=1))
    every = np.concatenate(divergences)
    return {
        "kl_mean": float(every.mean()),
        "kl_median": float(np.median(every)),
        "kl_p99": float(np.quantile(every, 0.99)),
        "same_greedy": float(np.concatenate(same).mean()),
    }


def _product(form: BlockFormat) -> dict[str, float]:
    """Error of one product of normal weights and inputs, relative to its size: of all its rows, and
    of those beside a row with outliers."""
    outputs, inputs, rows = PRODUCT
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    x[::2, 7 :: inputs // OUTLIERS] *= OUTLIER
    exact = x.double() @ weight.double().T
    off = QuantisedLinear(quantise(weight, form))(x).double() - exact

    def error(part: slice) -> float:
        return float(off[part].norm() / exact[part].norm())

    return {"with_outliers": error(slice(0, None, 2)), "beside_them": error(slice(1, None, 2))}


def summary_lines(result: dict[str, Any]) -> list[str]:
    """For people: a table of formats."""
    lines = [
        f"{result['model']}, {result['sequences']} sequences of {result['tokens']} tokens",
        f"{'model':<10} {'format':<15} {'KL mean':>9} {'median':>9} {'99 %':>9} "
        f"{'same greedy':>12}",
    ]
    lines += [
        f"{row['model']:<10} {row['format']:<15} {row['kl_mean']:9.5f} {row['kl_median']:9.5f} "
        f"{row['kl_p99']:9.4f} {100 * row['same_greedy']:10.2f} %"
        for row in result["formats"]
    ]
    lines.append(f"{'one product':<26} {'rows with outliers':>18} {'rows beside':>12}")
    lines += [
        f"{'':<10} {row['format']:<15} {100 * row['with_outliers']:16.2f} % "
        f"{100 * row['beside_them']:10.2f} %"
        for row in result["product"]
    ]
    return lines
