"""Drawing tokens from slices of the vocabulary."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from p2pinfer.core.units import Slice
from p2pinfer.model.sampling import (
    Offer,
    candidates_wanted,
    draw,
    gather,
    gumbel_noise,
    penalise,
    unit_candidates,
    whole_offer,
)
from p2pinfer.types import SamplingParams

VOCAB = 1000


def split_offer(
    logits: np.ndarray, bounds: list[int], params: SamplingParams, position: int
) -> Offer:
    """What the leader gets when the vocabulary is cut at `bounds`."""
    units = [Slice(*edges) for edges in pairwise([0, *bounds, len(logits)])]
    widths = np.array([end - start for start, end in units], np.int32)
    return gather(unit_candidates(logits, units, params, position), widths)


def draw_whole(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    """The token drawn by a node that holds the whole vocabulary as one unit."""
    token = draw(split_offer(logits, [], params, position), params, position)
    if token is None:
        token = draw(whole_offer(logits, params), params, position)
    assert token is not None
    return token


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 40, 900]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**63 - 1),
)


@settings(deadline=None, max_examples=200)
@given(params=params_strategy, seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 15)))
def test_a_token_does_not_depend_on_how_the_vocabulary_is_cut(
    params: SamplingParams, seed: int, cuts: set[int]
) -> None:
    """Any split into units of 64 draws the token of the whole, or asks for the whole logits."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(VOCAB) * rng.choice([0.1, 3.0])).astype(np.float32)
    offer = split_offer(logits, sorted(c * 64 for c in cuts), params, 17)
    token = draw(offer, params, 17)
    if token is None:
        assert params.top_k == 0
        token = draw(whole_offer(logits, params), params, 17)
    assert token == draw_whole(logits, params, 17)


@settings(deadline=None, max_examples=200)
@given(params=params_strategy, seed=st.integers(0, 1000), position=st.integers(0, 10**6))
def test_only_tokens_that_transformers_would_allow_are_drawn(
    params: SamplingParams, seed: int, position: int
) -> None:
    """Top-k, then top-p, then min-p rule out what transformers' warpers rule out."""
    logits = (np.random.default_rng(seed).standard_normal(VOCAB) * 2).astype(np.float32)
    token = draw_whole(logits, params, position)
    if params.temperature == 0:
        assert token == int(logits.argmax())
        return
    scores = torch.from_numpy(logits.copy())[None]
    scores = TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        # transformers' min-p works on what top-p left; both thresholds are relative to the best.
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    assert torch.isfinite(scores[0, token])


def test_the_draw_follows_the_softmax() -> None:
    """Over many positions tokens come as often as their probabilities say (chi-squared)."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, 1.5, -3.0], np.float32)
    params = SamplingParams(temperature=0.7, seed=5)
    draws = 20_000
    counts = np.zeros(len(logits))
    for position in range(draws):
        counts[draw_whole(logits, params, position)] += 1
    scaled = np.exp(logits.astype(np.float64) / 0.7)
    expected = draws * scaled / scaled.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 24.3  # 0.1 % point of chi-squared with 7 degrees of freedom


def test_the_filtered_draw_follows_the_renormalised_softmax() -> None:
    """Among the top 3 the odds are those of the softmax over these three."""
    logits = np.array([2.0, 1.0, 0.0, -1.0, 0.5, 0.5, 1.5, -3.0], np.float32)
    params = SamplingParams(temperature=1.0, top_k=3, seed=6)
    counts = np.zeros(len(logits))
    for position in range(10_000):
        counts[draw_whole(logits, params, position)] += 1
    assert set(np.flatnonzero(counts)) == {0, 1, 6}
    scaled = np.exp(logits[[0, 1, 6]].astype(np.float64))
    expected = 10_000 * scaled / scaled.sum()
    statistic = ((counts[[0, 1, 6]] - expected) ** 2 / expected).sum()
    assert statistic < 13.8  # 0.1 % point, 2 degrees of freedom


def test_noise_is_the_stream_of_splitmix64() -> None:
    """The noise of id n is output n of SplitMix64, started as the module says."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = mix((mix(42) + 7) & mask)
    expected = []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) & mask
        expected.append((mix(state) >> 11) * 2.0**-53 + 2.0**-54)
    noise = gumbel_noise(42, 7, np.arange(5))
    assert np.allclose(np.exp(-np.exp(-noise)), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_equal_logits_the_lower_id_wins(temperature: float) -> None:
    """Greedy and top-k of 1 take the lowest id among equals, however the vocabulary is cut."""
    logits = np.zeros(VOCAB, np.float32)
    logits[[300, 130, 700]] = 5.0
    params = SamplingParams(temperature=temperature, top_k=1 if temperature else 0)
    for bounds in ([], [128], [192, 256, 640]):
        assert draw(split_offer(logits, bounds, params, 3), params, 3) == 130


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Tokens of the log are pushed down (or up) as transformers does, unit by unit."""
    logits = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
    history = [1, 5, 5, 999, 400, 64]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([history]), torch.from_numpy(logits.copy())[None]
    )[0].numpy()
    got = np.concatenate(
        [penalise(logits[a : a + 250], a, history, penalty) for a in range(0, VOCAB, 250)]
    )
    assert np.array_equal(got, expected)


def test_a_flat_nucleus_asks_for_the_whole_logits() -> None:
    """Where the candidates cannot settle the nucleus, nothing is guessed."""
    logits = np.zeros(VOCAB, np.float32)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    assert draw(split_offer(logits, [500], params, 1), params, 1) is None
    assert draw(whole_offer(logits, params), params, 1) is not None


def test_candidates_are_as_many_as_the_request_needs() -> None:
    """One for greedy and plain temperature, top_k for top-k."""
    assert candidates_wanted(SamplingParams()) == 1
    assert candidates_wanted(SamplingParams(temperature=1.0)) == 1
    assert candidates_wanted(SamplingParams(temperature=1.0, top_k=40)) == 40
    assert candidates_wanted(SamplingParams(top_k=40)) == 1
