"""Products whose bits depend on nothing but their row and their weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from p2pinfer.model.linear import MIN_ROWS, PlainLinear, PrepackedLinear, pack, padded_rows

SHAPES = ((48, 16), (64, 80), (96, 33), (224, 192), (256, 2048), (1024, 512), (2048, 1536))
"""(in, out) of small models and of one unit of a large one."""

ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 100, 128, 257)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_rows_slices_or_threads(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """A row's result is the same alone, in any batch, by any slice, on one thread or three."""
    inputs, outputs = shape
    torch.manual_seed(inputs)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype)
    x = torch.randn(max(ROWS), inputs, dtype=dtype)
    torch.set_num_threads(1)
    product = pack(weight, bias)
    assert isinstance(product, PrepackedLinear)
    expected = product(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            assert torch.equal(product(x[:rows].contiguous()), expected[:rows]), (threads, rows)
    for start, end in ((0, 16), (0, outputs // 2), (outputs // 2, outputs)):
        part = pack(weight[start:end].clone(), bias[start:end].clone())
        assert torch.equal(part(x[:5].contiguous()), expected[:5, start:end]), (start, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fallback_multiplies_alike(dtype: torch.dtype) -> None:
    """Where oneDNN cannot serve, the plain product gives the same values up to rounding."""
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 128, dtype=dtype), torch.randn(96, dtype=dtype)
    x = torch.randn(2, 128, dtype=dtype)
    plain = PlainLinear(weight, bias)
    assert plain(x).shape == (2, 96)
    exact = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(plain(x).double(), exact, atol=0.1, rtol=0.02)
    assert torch.allclose(pack(weight, bias)(x).double(), exact, atol=0.1, rtol=0.02)
    assert plain.nbytes == weight.nbytes


def test_few_rows_are_padded() -> None:
    """A batch is computed with at least MIN_ROWS rows."""
    assert [padded_rows(n) for n in (1, MIN_ROWS, 9)] == [MIN_ROWS, MIN_ROWS, 9]
    assert [padded_rows(n, "int8") for n in (1, 2, 9)] == [1, 2, 9]
    assert [padded_rows(n, "int4") for n in (1, 2, 9)] == [1, 2, 9]
