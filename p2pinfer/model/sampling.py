"""Drawing a token from vocabulary slices that lie on several nodes, the same on every plan.

One rule: of the allowed ids the one with the largest `logit / temperature + g` is drawn, where `g`
is Gumbel noise (the Gumbel-max trick: Gumbel, 1954; Maddison et al., 2014), which samples the
softmax exactly. The noise is counter-based in (seed, position, token id), so a vocab unit can
perturb its own logits, and any leader draws the same token again. Filters decide what is allowed:
top-k, then nucleus (top-p, Holtzman et al., 2019), then min-p. Of equal values the lower id wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2pinfer.core.units import Slice
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


class SlotCandidates(NamedTuple):
    """What some vocab units offer for one slot, a row each: `ids` [units, k] int32, best first and
    -1 where a unit has no more; their `scores` [units, k] float32; and `lse` [units] float32.

    For a filtered draw the scores are logits and `lse` is the log-sum-exp of a unit's
    logits / temperature; for an unfiltered one there is a single id with its score as drawn
    (perturbed if the temperature is above 0), and `lse` is 0.
    """

    ids: I32
    scores: F32
    lse: F32


def no_candidates(units: int, most: int) -> SlotCandidates:
    """Room for at most so many candidates of each of some vocab units."""
    shape = units, most
    return SlotCandidates(
        np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.zeros(units, np.float32)
    )


def unit_candidates(
    logits: F32, units: Sequence[Slice], params: SamplingParams, position: int
) -> SlotCandidates:
    """What the owner of some vocab units sends for one slot. `logits` [width of them all], unit
    after unit, are after penalty; `units` are their bounds in the vocabulary."""
    spans = places(units)
    if not is_filtered(params):
        scores = logits
        if params.temperature > 0:
            ids = np.concatenate([np.arange(*bounds) for bounds in units])
            scores = perturbed(logits, ids, params, position)
        best = _best(scores, spans)
        starts = [start for start, _ in spans]
        found = no_candidates(len(units), 1)
        found.ids[:, 0] = [first + at for (first, _), at in zip(units, best, strict=True)]
        found.scores[:, 0] = scores[np.add(starts, best)]
        return found
    wanted = candidates_wanted(params)
    found = no_candidates(len(units), min(wanted, max(end - start for start, end in units)))
    for row, ((first, _), (start, end)) in enumerate(zip(units, spans, strict=True)):
        own = logits[start:end]
        best_first = _largest(own, wanted)
        found.ids[row, : len(best_first)] = best_first + first
        found.scores[row, : len(best_first)] = own[best_first]
        scaled = own.astype(np.float64) / params.temperature
        top = float(scaled.max())
        found.lse[row] = top + float(np.log(np.exp(scaled - top).sum()))
    return found


def _best(scores: F32, spans: Sequence[Slice]) -> list[int]:
    """The place within each span of its highest score, of equal ones the first."""
    widths = {end - start for start, end in spans}
    if len(widths) == 1:  # of all at once: between two tokens the first call of each kind is dear
        best: list[int] = scores.reshape(len(spans), -1).argmax(axis=1).tolist()
        return best
    return [int(scores[start:end].argmax()) for start, end in spans]


def places(units: Sequence[Slice]) -> list[Slice]:
    """Where each of some units begins and ends, where they lie one after the other."""
    ends = list(accumulate(end - start for start, end in units))
    return [Slice(*edges) for edges in pairwise([0, *ends])]


def stacked(offers: Sequence[SlotCandidates]) -> SlotCandidates:
    """Those of several slots as one, with an axis for them before the others; at least one."""
    most = max(offer.ids.shape[1] for offer in offers)
    return SlotCandidates(*map(np.stack, zip(*(_with_room(o, most) for o in offers), strict=True)))


def _with_room(offer: SlotCandidates, most: int) -> SlotCandidates:
    units, count = offer.ids.shape
    if count == most:
        return offer
    wide = no_candidates(units, most)
    wide.ids[:, :count], wide.scores[:, :count] = offer.ids, offer.scores
    return wide._replace(lse=offer.lse)


def perturbed(logits: F32, ids: NDArray[np.int64], params: SamplingParams, position: int) -> F32:
    """logit / temperature + Gumbel noise, [n], rounded to float32 so that all compare alike."""
    noise = gumbel_noise(params.seed, position, ids)
    return (logits.astype(np.float64) / params.temperature + noise).astype(np.float32)


def _ids(first: int, count: int) -> NDArray[np.int64]:
    return np.arange(first, first + count, dtype=np.int64)


def _largest(values: F32, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, of equal ones the lower index."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > least)
        equal = np.flatnonzero(values == least)[: count - len(above)]
        found = np.concatenate([above, equal])
    else:
        found = np.arange(len(values))
    order = np.lexsort((found, -values[found]))
    return found[order].astype(np.int64)


class Offer(NamedTuple):
    """Candidates of all vocab units for one slot: `ids`, `logits` [n]; `lse` of all; the highest
    logit that might be missing (`-inf` when nothing is)."""

    ids: NDArray[np.int64]
    logits: F32
    lse: float
    unseen: float


def gather(offered: SlotCandidates, widths: I32) -> Offer:
    """Join the offers of all vocab units, in unit order; `widths` [units] are the units' sizes."""
    ids, scores, lse = offered
    there = ids >= 0
    counts = there.sum(axis=1)
    cut = np.flatnonzero(counts < widths)
    parts = lse.astype(np.float64)
    top = float(parts.max())
    return Offer(
        ids[there].astype(np.int64),
        scores[there],
        top + float(np.log(np.exp(parts - top).sum())),
        float(scores[cut, counts[cut] - 1].max(initial=-np.inf)),
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
