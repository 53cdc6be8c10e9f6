"""What benchmarks make of replies and counters."""

from __future__ import annotations

import pytest

from p2pinfer.bench.asking import Timing, Together
from p2pinfer.bench.budget import PARTS, mean, percentages
from p2pinfer.errors import ClusterError


def test_a_reply_has_a_speed_after_its_first_token() -> None:
    """Three more tokens in a second and a half."""
    timing = Timing(100.0, [2.0, 2.5, 3.0, 3.5])
    assert timing.ttft_s == 2.0
    assert timing.decode_tokens_per_s == 2.0
    assert timing.gaps_s == [0.5, 0.5, 0.5]
    assert timing.times[0] == 102.0


def test_requests_at_once_count_while_all_of_them_decode() -> None:
    """From the last one's first token to the first one's last token, by one clock."""
    early = Timing(0.0, [float(n) for n in range(1, 12)])  # decodes from 1 to 11
    late = Timing(4.0, [2.0 + n / 2 for n in range(20)])  # decodes from 6 to 15.5
    together = Together.of([early, late])
    assert together.tokens_per_s == pytest.approx((5 + 10) / 5.0)
    assert sorted(set(together.gaps_s)) == [0.5, 1.0]


def test_requests_that_follow_each_other_are_no_requests_at_once() -> None:
    """An error says what to do."""
    first, second = Timing(0.0, [1.0, 2.0, 3.0, 4.0]), Timing(0.0, [3.0, 4.0, 5.0, 6.0])
    with pytest.raises(ClusterError, match="give more --max-tokens"):
        Together.of([first, second])


def test_shares_are_of_all_parts() -> None:
    """In percent; of nothing they are nothing."""
    row = {part: float(place) for place, part in enumerate(PARTS)}
    shares = percentages(row)
    assert sum(shares.values()) == pytest.approx(100.0, abs=0.1)
    assert shares["attention"] == pytest.approx(100 / 15, abs=0.01)
    assert set(percentages(dict.fromkeys(PARTS, 0.0)).values()) == {0.0}


def test_nodes_are_joined_by_their_mean() -> None:
    """Figure by figure."""
    assert mean([{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 8.0}]) == {"a": 1.5, "b": 6.0}
