"""Quantised products: bits that depend on nothing but their row and their weight."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from p2pinfer.core import tree
from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model.product_graph import KEPT_ROWS
from p2pinfer.model.quantise import dequantise, quantise, stacked
from p2pinfer.model.quantised_products import QuantisedLinear, QuantisedPacker
from p2pinfer.model.rope import Angles
from p2pinfer.model.unit_products import Columns, Heads, Norm, Rows, Turned, Units
from tests.random_models import TensorTable

SHAPES = ((48, 16), (64, 80), (96, 33), (200, 72), (224, 192), (256, 2048), (2048, 1536))
"""(in, out) of small models and of one unit of a large one."""

ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 100, 128, 257)

OUTLIER = 1000.0

MEMORY = """
import ctypes, gc, torch
from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model.quantise import quantise
from p2pinfer.model.quantised_products import QuantisedLinear

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Anonymous:")))

torch.set_num_threads(1)
form = QUANT_FORMATS["{quant}"]
weights = [quantise(torch.randn(8192, 2048), form) for _ in range(4)]
first = QuantisedLinear(weights[0])
before = anonymous()
kept = [QuantisedLinear(weight) for weight in weights[1:]]
print((anonymous() - before) / sum(product.nbytes for product in kept))
"""

THREADS = """
import hashlib, torch
from p2pinfer.device import use_threads
from p2pinfer.model.numeric_class import numerics
from p2pinfer.types import DType
from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model.quantise import quantise
from p2pinfer.model.quantised_products import QuantisedPacker
from p2pinfer.model.unit_products import Norm, Units

use_threads({threads}, "{quant}")
assert torch.get_num_threads() == 1
torch.manual_seed(0)
form = QUANT_FORMATS["{quant}"]
packer = QuantisedPacker(None, form)
down = [quantise(torch.randn(512, 320), form) for _ in range(3)]
norm = Norm(torch.randn(512), 1e-5)
gate_up = quantise(torch.randn(1920, 512), form)
mlp = packer.gated(Units((0, 1, 2)), gate_up, down, [320] * 3, norm)
computes = numerics(DType.BFLOAT16, torch.device("cpu"), "{quant}")
digest = hashlib.sha256(computes.numeric_class.encode())
for rows in (2, 64, 130):
    x = torch.randn(rows, 512)
    for _ in range(3):
        for partial in mlp(x, rows, {{0, 1, 2}}).values():
            digest.update(partial.numpy().tobytes())
print(digest.hexdigest())
"""


def run(code: str) -> str:
    """What a process of its own prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100
    ).stdout.strip()


def inputs_of(width: int) -> torch.Tensor:
    """Rows with a feature that is a thousand times larger than the others."""
    torch.manual_seed(width)
    x = torch.randn(max(ROWS) + 1, width)
    x[:, 3] *= OUTLIER
    return x


@pytest.mark.parametrize("quant", QUANT_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_rows_or_slices(shape: tuple[int, int], quant: str) -> None:
    """A row's result is the same alone, in any batch, at any place of it, and by any slice."""
    inputs, outputs = shape
    x, form = inputs_of(inputs), QUANT_FORMATS[quant]
    weight = torch.randn(outputs, inputs)
    product = QuantisedLinear(quantise(weight, form))
    expected = product(x).clone()
    for rows in ROWS:
        for first in (0, 1):
            batch = x[first : first + rows]
            assert torch.equal(product(batch), expected[first : first + rows]), rows
    for start, end in ((0, 16), (0, outputs // 2), (outputs // 2, outputs)):
        part = QuantisedLinear(quantise(weight[start:end], form))
        assert torch.equal(part(x[:6]), expected[:6, start:end]), (start, end)


@pytest.mark.parametrize("quant", QUANT_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_that_of_what_the_integers_stand_for(
    shape: tuple[int, int], quant: str
) -> None:
    """Up to the rounding of the inputs to int8 within a block; an outlier spoils its own block
    only."""
    x, form = inputs_of(shape[0])[:9], QUANT_FORMATS[quant]
    weight = quantise(torch.randn(shape[1], shape[0]), form)
    bias = torch.randn(shape[1])
    got = QuantisedLinear(stacked([weight], bias))(x)
    exact = x @ dequantise(weight).T + bias
    blocks = torch.nn.functional.pad(x, (0, -shape[0] % form.block)).view(9, -1, form.block)
    steps = blocks.abs().amax(-1) / 127
    sizes = torch.nn.functional.pad(dequantise(weight), (0, -shape[0] % form.block))
    bound = 0.51 * steps @ sizes.view(shape[1], -1, form.block).abs().sum(-1).T
    assert ((got - exact).abs() <= bound + 1e-3 * exact.abs().amax()).all()


@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_a_graph_computes_what_its_products_do(quant: str) -> None:
    """Norm, gate, up, silu and down of three units in one graph, with biases, whichever are
    wanted."""
    widths, form = [64, 128, 64], QUANT_FORMATS[quant]
    table = TensorTable(
        gate=torch.randn(250, 96), up=torch.randn(250, 96), down=torch.randn(80, 250)
    )
    packer = QuantisedPacker(table, form)
    bounds = [(0, 64), (64, 192), (192, 250)]
    reads = [
        Rows(name, a, b, width)
        for name in ("gate", "up")
        for (a, b), width in zip(bounds, widths, strict=True)
    ]
    bias = torch.randn(512)
    gate_up = packer.stack([packer.piece(read) for read in reads], bias)
    down = [
        packer.alone(Columns("down", a, b, w)) for (a, b), w in zip(bounds, widths, strict=True)
    ]
    norm = Norm(torch.randn(96), 1e-5)
    units = Units((4, 5, 6), tuple(tree.plan_additions((4, 5, 6), 8)))
    together = packer.gated(units, gate_up, down, widths, norm)
    for rows in (2, KEPT_ROWS + 2):
        x = torch.randn(rows, 96)
        normed = torch.nn.functional.rms_norm(x, (96,), *norm)
        gate, up = QuantisedLinear(gate_up)(normed).clone().split(256, dim=1)
        active = torch.nn.functional.silu(gate) * up
        partials = {unit: sums.clone() for unit, sums in together(x, rows, {4, 6}).items()}
        assert partials.keys() == {4, 6}
        for place, start in ((0, 0), (2, 192)):
            own, got = QuantisedLinear(down[place]), partials[4 + place]
            exact = own(active[:, start : start + 64].contiguous())
            assert torch.allclose(got, exact, rtol=1e-2, atol=0.05 * exact.abs().max())
        partials |= {5: together(x, rows, {5})[5].clone()}
        added = together(x, rows, {4, 5, 6})
        # Of eight units, these are two of a subtree and one of the next.
        assert added.keys() == {6, 1 << tree.INDEX_BITS | 2}
        assert torch.equal(added[1 << tree.INDEX_BITS | 2], partials[4] + partials[5])
        assert torch.equal(added[6], partials[6])


@pytest.mark.parametrize("quant", QUANT_FORMATS)
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(2, 4, 16)], ids=str)
def test_a_projection_norms_multiplies_and_turns(heads: Heads, quant: str) -> None:
    """Queries, keys and values as they are by separate calls; a row's bits are the same alone and
    in any batch, wherever its position lies in it."""
    units, group, dim = heads
    form, norm = QUANT_FORMATS[quant], Norm(torch.randn(96), 1e-5)
    weight = quantise(torch.randn(units * (group + 2) * dim, 96), form)
    projection = QuantisedPacker(TensorTable(), form).projection(weight, heads, norm)
    x = inputs_of(96)[: KEPT_ROWS + 5]
    turns = torch.rand(len(x), dim // 2)
    angles = Angles(turns.cos(), turns.sin())
    whole = [each.clone() for each in projection(x, angles)]
    normed = torch.nn.functional.rms_norm(x, (96,), *norm)
    apart = Turned(QuantisedLinear(weight), heads)(normed, angles)
    for got, expected in zip(whole, apart, strict=True):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=1e-2, atol=0.05 * expected.abs().max())
    for start, end in ((0, 1), (7, 8), (3, 10), (1, KEPT_ROWS + 2)):
        some = projection(x[start:end], Angles(angles.cos[start:end], angles.sin[start:end]))
        assert all(torch.equal(a, b[:, start:end]) for a, b in zip(some, whole, strict=True))


@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_bits_do_not_depend_on_threads(quant: str) -> None:
    """One thread, and a pool of two or three, give the same bits, again and again."""
    hashes = {run(THREADS.format(threads=threads, quant=quant)) for threads in (1, 2, 3)}
    assert len(hashes) == 1


@pytest.mark.parametrize("quant", QUANT_FORMATS)
def test_weights_take_the_memory_that_is_counted(quant: str) -> None:
    """A product's private memory grows by `nbytes`, within 5 %."""
    assert float(run(MEMORY.format(quant=quant))) == pytest.approx(1.0, rel=0.05)
