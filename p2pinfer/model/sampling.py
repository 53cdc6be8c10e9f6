"""Drawing a token from vocabulary slices that lie on several nodes, the same on every plan.

One rule: of the allowed ids the one with the largest `logit / temperature + g` is drawn, where `g`
is Gumbel noise (the Gumbel-max trick: Gumbel, 1954; Maddison et al., 2014), which samples the
softmax exactly. The noise is counter-based in (seed, position, token id), so a vocab unit can
perturb its own logits, and any leader draws the same token again. Filters decide what is allowed:
top-k, then nucleus (top-p, Holtzman et al., 2019), then min-p. Of equal values the lower id wins.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2pinfer.types import SamplingParams

NUCLEUS_CANDIDATES = 64
"""Candidates per vocab unit when a nucleus is asked for without top-k."""

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_UNIT = 2.0**-53


def _mix(x: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gumbel_noise(seed: int, position: int, ids: NDArray[np.int64]) -> F64:
    """Standard Gumbel noise for token `ids` [n] at a position: output `id` of a SplitMix64 stream.

    The stream starts at mix(mix(seed) + position).
    """
    start = _mix(_mix(np.array([seed], np.uint64)) + np.array([position], np.uint64))
    bits = _mix(start + (ids.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * _UNIT
    return -np.log(-np.log(uniform))


def is_filtered(params: SamplingParams) -> bool:
    """Whether some ids are ruled out before the draw."""
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)


def candidates_wanted(params: SamplingParams) -> int:
    """How many candidates of each vocab unit the leader needs for this request."""
    if not is_filtered(params):
        return 1
    return params.top_k or NUCLEUS_CANDIDATES


def penalise(logits: F32, first_id: int, history: Iterable[int], penalty: float) -> F32:
    """The repetition penalty of CTRL (Keskar et al., 2019) on a unit's logits [width].

    `first_id` is the unit's first token id, `history` the request's tokens so far.
    """
    if penalty == 1.0:
        return logits
    seen = np.unique(np.fromiter(history, dtype=np.int64)) - first_id
    seen = seen[(seen >= 0) & (seen < len(logits))]
    changed = logits.copy()
    old = changed[seen]
    changed[seen] = np.where(old > 0, old / np.float32(penalty), old * np.float32(penalty))
    return changed


class UnitCandidates(NamedTuple):
    """One vocab unit's offer for one slot: `ids` [k] best first, their `scores` [k], and `lse`.

    For a filtered draw the scores are logits and `lse` is the log-sum-exp of the unit's
    logits / temperature; for an unfiltered one there is a single id with its score as drawn
    (perturbed if the temperature is above 0), and `lse` is 0.
    """

    ids: I32
    scores: F32
    lse: float


def unit_candidates(
    logits: F32, first_id: int, params: SamplingParams, position: int
) -> UnitCandidates:
    """What the owner of a vocab unit sends for one slot. `logits` [width] are after penalty."""
    if not is_filtered(params):
        scores = logits
        if params.temperature > 0:
            scores = perturbed(logits, _ids(first_id, len(logits)), params, position)
        best = int(np.argmax(scores))
        return UnitCandidates(
            np.array([first_id + best], np.int32), scores[best : best + 1].astype(np.float32), 0.0
        )
    best_first = _largest(logits, candidates_wanted(params))
    scaled = logits.astype(np.float64) / params.temperature
    top = float(scaled.max())
    lse = top + float(np.log(np.exp(scaled - top).sum()))
    ids = (best_first + first_id).astype(np.int32)
    return UnitCandidates(ids, logits[best_first], np.float32(lse).item())


def perturbed(logits: F32, ids: NDArray[np.int64], params: SamplingParams, position: int) -> F32:
    """logit / temperature + Gumbel noise, [n], rounded to float32 so that all compare alike."""
    noise = gumbel_noise(params.seed, position, ids)
    return (logits.astype(np.float64) / params.temperature + noise).astype(np.float32)


def _ids(first: int, count: int) -> NDArray[np.int64]:
    return np.arange(first, first + count, dtype=np.int64)


def _largest(values: F32, count: int) -> NDArray[np.int64]:
    """Places of the `count` largest values, largest first, of equal ones the lower place."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > least)
        equal = np.flatnonzero(values == least)[: count - len(above)]
        places = np.concatenate([above, equal])
    else:
        places = np.arange(len(values))
    order = np.lexsort((places, -values[places]))
    return places[order].astype(np.int64)


class Offer(NamedTuple):
    """Candidates of all vocab units for one slot: `ids`, `logits` [n]; `lse` of all; the highest
    logit that might be missing (`-inf` when nothing is)."""

    ids: NDArray[np.int64]
    logits: F32
    lse: float
    unseen: float


def gather(offers: list[UnitCandidates], widths: list[int]) -> Offer:
    """Join the offers of all vocab units, in unit order; `widths` are the units' sizes."""
    cut = [float(o.scores[-1]) for o, w in zip(offers, widths, strict=True) if len(o.ids) < w]
    parts = np.array([o.lse for o in offers], np.float64)
    top = float(parts.max())
    return Offer(
        np.concatenate([o.ids for o in offers]).astype(np.int64),
        np.concatenate([o.scores for o in offers]),
        top + float(np.log(np.exp(parts - top).sum())),
        max(cut, default=float("-inf")),
    )


def draw(offer: Offer, params: SamplingParams, position: int) -> int | None:
    """The token at `position`, or None when the candidates do not settle what is allowed.

    Then the whole logits are needed: `draw(whole_offer(logits, params), ...)` always settles.
    """
    if not is_filtered(params):
        best = np.lexsort((offer.ids, -offer.logits))[0]
        return int(offer.ids[best])
    order = np.lexsort((offer.ids, -offer.logits))
    ids, logits = offer.ids[order], offer.logits[order]
    if params.top_k:
        ids, logits = ids[: params.top_k], logits[: params.top_k]
    kept = _allowed(logits, params, None if params.top_k else offer)
    if kept is None:
        return None
    scores = perturbed(logits[:kept], ids[:kept], params, position)
    return int(ids[:kept][np.lexsort((ids[:kept], -scores))[0]])


def _allowed(logits: F32, params: SamplingParams, offer: Offer | None) -> int | None:
    """How many of the best-first `logits` pass top-p and min-p; None when that cannot be told.

    With `offer` the probabilities are of the whole vocabulary, else of `logits` alone.
    """
    scaled = logits.astype(np.float64) / params.temperature
    lse = offer.lse if offer else scaled[0] + float(np.log(np.exp(scaled - scaled[0]).sum()))
    unseen = offer.unseen if offer else float("-inf")
    certain = int(np.count_nonzero(logits > unseen))
    kept = len(logits)
    if params.top_p < 1.0:
        reached = np.cumsum(np.exp(scaled - lse)) >= params.top_p
        kept = int(np.argmax(reached)) + 1 if reached.any() else kept + 1
    if params.min_p > 0.0:
        likely = scaled - scaled[0] >= np.log(params.min_p)
        enough = int(np.count_nonzero(likely))
        kept = min(kept, enough if enough < len(logits) else kept)
    if kept > certain:
        return min(kept, len(logits)) if unseen == float("-inf") else None
    return kept


def whole_offer(logits: F32, params: SamplingParams) -> Offer:
    """An offer of the whole vocabulary's logits (after penalty), in id order."""
    scaled = logits.astype(np.float64) / params.temperature
    top = float(scaled.max())
    lse = top + float(np.log(np.exp(scaled - top).sum()))
    return Offer(_ids(0, len(logits)), logits, lse, float("-inf"))
