"""`bench quant`: figures of a true model by every format."""

from __future__ import annotations

import pytest
import torch

from p2pinfer.bench.quantisation import FORMATS, Settings, measure, summary_lines
from p2pinfer.errors import UsageError


def test_more_bits_and_smaller_blocks_are_nearer() -> None:
    """int8 is nearer to the model than int4, by divergence and by the error of a product, and a row
    of outliers does not reach the rows beside it."""
    before = torch.get_num_threads()
    try:
        result = measure(Settings(sequences=4, tokens=6), lambda _: None)
    finally:
        torch.set_num_threads(before)
    by_name = {(row["model"], row["format"]): row for row in result["formats"]}
    assert len(by_name) == 2 * (1 + len(FORMATS))
    int4_as_it_is = by_name["as it is", "int4 block 64"]
    for model in ("as it is", "outliers"):
        int8, int4 = by_name[model, "int8 block 64"], by_name[model, "int4 block 64"]
        assert 0 < int8["kl_mean"] < int4["kl_mean"]
    assert int4_as_it_is["kl_mean"] < 0.05
    products = {row["format"]: row for row in result["product"]}
    for bits, most in ((8, 0.02), (4, 0.13)):
        errors = [products[f"int{bits} block {block}"] for block in (32, 64, 128)]
        for kind in ("with_outliers", "beside_them"):
            assert [row[kind] for row in errors] == sorted(row[kind] for row in errors)
            assert errors[-1][kind] < most
    assert len(summary_lines(result)) == 3 + 2 * (1 + len(FORMATS)) + len(FORMATS)


def test_no_more_tokens_than_the_model_has_positions() -> None:
    """That is told with the flag."""
    with pytest.raises(UsageError, match="--tokens 4096"):
        measure(Settings(tokens=4096), lambda _: None)
