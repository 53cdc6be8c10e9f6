"""`bench decode`: what a reply reached of the memory's limit."""

from __future__ import annotations

import pytest

from p2pinfer.bench.decode import limit_figures


def test_a_run_is_compared_with_the_readings_around_it() -> None:
    """So a memory that becomes faster while runs go on changes no run's fraction."""
    found = limit_figures([8.0, 24.0, 6.0], [10.0, 30.0, 30.0, 10.0], token_bytes=1_000_000_000)
    assert found["fraction_of_limit"] == pytest.approx(8 / 20)
    assert found["fraction_of_limit_min"] == pytest.approx(6 / 20)
    assert found["fraction_of_limit_max"] == pytest.approx(24 / 30)
    assert found["limit_tokens_per_s"] == 20.0
    assert (found["read_bandwidth_gb_s_min"], found["read_bandwidth_gb_s_max"]) == (10.0, 30.0)
