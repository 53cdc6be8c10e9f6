"""The hash by which nodes know that they compute the same bits."""

from __future__ import annotations

import pytest
import torch

from p2pinfer.core.units import QUANT_FORMATS
from p2pinfer.model import kernels, linear, product_graph, zendnn
from p2pinfer.model.llama import TORCH_DTYPES
from p2pinfer.model.numeric_class import numerics
from p2pinfer.model.quantise import quantise
from p2pinfer.model.quantised_products import QuantisedLinear
from p2pinfer.types import DType

CPU = torch.device("cpu")


def test_the_class_is_the_same_however_many_threads_compute() -> None:
    """Threads are no part of a node's numeric class; the number format is."""
    before = torch.get_num_threads()
    try:
        classes = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            classes.append(numerics(DType.BFLOAT16, CPU).numeric_class)
    finally:
        torch.set_num_threads(before)
    assert len(set(classes)) == 1
    assert numerics(DType.FLOAT32, CPU).numeric_class not in classes


def test_each_quantisation_is_a_class_of_its_own() -> None:
    """The products of quantised weights are part of the hash, and give it again."""
    classes = [
        numerics(DType.BFLOAT16, CPU, quant).numeric_class for quant in ("none", "int8", "int4")
    ]
    assert len(set(classes)) == 3
    assert numerics(DType.BFLOAT16, CPU, "int4").numeric_class == classes[2]


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_libraries_whose_long_sums_differ_are_of_two_classes(dtype: DType) -> None:
    """Sums that agree up to a thousand terms do not make one class of two libraries."""
    if zendnn.missing():
        pytest.skip(f"there is one library: {zendnn.missing()}")
    classes, products = [], []
    torch.manual_seed(0)
    weight, x = (torch.randn(rows, 8192, dtype=TORCH_DTYPES[dtype]) for rows in (512, 64))
    try:
        for library in ("onednn", "zendnn"):
            kernels.use(library)
            classes.append(numerics(dtype, CPU).numeric_class)
            products.append(linear.pack(weight)(x))
    finally:
        kernels.use("auto")
    assert classes[0] != classes[1] or torch.equal(*products)


@pytest.mark.parametrize("quant", ["none", *QUANT_FORMATS])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
def test_rows_do_not_matter(dtype: DType, quant: str) -> None:
    """What the documents promise of CPUs holds on this one."""
    assert not numerics(dtype, CPU, quant).rows_matter


def test_it_is_seen_where_rows_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a row that makes their number even, odd ones of int4 have other bits, if the kernels
    are those of a CPU where that is so."""
    monkeypatch.setattr(product_graph, "ROWS_TOGETHER", 1)
    product = QuantisedLinear(quantise(torch.randn(64, 192), QUANT_FORMATS["int4"]))
    x = torch.randn(2, 192)
    alone = product(x[:1]).clone()
    differ = not torch.equal(alone, product(x)[:1])
    assert numerics(DType.BFLOAT16, CPU, "int4").rows_matter == differ
