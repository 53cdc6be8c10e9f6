"""Norms whose bits depend on nothing but their row."""

from __future__ import annotations

import pytest
import torch

from p2pinfer.model import zendnn
from p2pinfer.model.norms import rms_norm_of

ROWS = (1, 2, 3, 5, 16, 64, 130)


@pytest.mark.parametrize("hidden", [96, 100, 2048, 16384])
@pytest.mark.parametrize("library", ["torch", "zendnn"])
def test_a_row_is_normed_the_same_in_any_number_of_rows(library: str, hidden: int) -> None:
    """With one thread and with three; and it is what the paper says, up to rounding."""
    if library == "zendnn" and zendnn.missing():
        pytest.skip(f"ZenDNN cannot norm here: {zendnn.missing()}")
    norm, threads = rms_norm_of(library), torch.get_num_threads()
    torch.manual_seed(hidden)
    x, weight = 3 * torch.randn(max(ROWS), hidden), torch.rand(hidden) + 0.5
    before = x.clone()
    whole = norm(x, weight, 1e-5)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in ROWS:
                assert torch.equal(norm(x[:rows].contiguous(), weight, 1e-5), whole[:rows])
    finally:
        torch.set_num_threads(threads)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.allclose(whole.double(), exact, atol=1e-5)
    assert torch.equal(x, before)
