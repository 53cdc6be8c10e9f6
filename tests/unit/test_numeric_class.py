"""The hash by which nodes know that they compute the same bits."""

from __future__ import annotations

import torch

from p2pinfer.model.numeric_class import numeric_class
from p2pinfer.types import DType

CPU = torch.device("cpu")


def test_the_class_is_the_same_however_many_threads_compute() -> None:
    """Threads are no part of a node's numeric class; the number format is."""
    before = torch.get_num_threads()
    try:
        classes = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            classes.append(numeric_class(DType.BFLOAT16, CPU))
    finally:
        torch.set_num_threads(before)
    assert len(set(classes)) == 1
    assert numeric_class(DType.FLOAT32, CPU) not in classes


def test_each_quantisation_is_a_class_of_its_own() -> None:
    """The products of quantised weights are part of the hash, and give it again."""
    classes = [numeric_class(DType.BFLOAT16, CPU, quant) for quant in ("none", "int8", "int4")]
    assert len(set(classes)) == 3
    assert numeric_class(DType.BFLOAT16, CPU, "int4") == classes[2]
