"""What members offer the leader to draw from: taken off the wire, checked, and put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2pinfer.errors import RemoteProtocolError
from p2pinfer.model.sampling import SlotCandidates, candidates_wanted, no_candidates
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Candidates


def unpacked(
    frame: Candidates, sampling: Sequence[SamplingParams], bounds: NDArray[np.int32]
) -> SlotCandidates:
    """A member's candidates for the slots that sample, by their parameters, as `sampling.stacked`
    has them; their memory is the frame's. `bounds` [units, 2] are those of all vocab units.

    A unit has at least one, all of its own ids, before the places that are not used, of which there
    are no more than the slots want; where no slot samples there is a row that nobody looks at.
    Raises `RemoteProtocolError` for anything else, and `ArithmeticError` for numbers that are not
    finite.
    """
    ids = np.frombuffer(frame.ids.data, np.int32).reshape(frame.ids.shape)
    scores = np.frombuffer(frame.logits.data, np.float32).reshape(frame.logits.shape)
    lse = np.frombuffer(frame.lse.data, np.float32).reshape(frame.lse.shape)
    if not (np.isfinite(scores).all() and np.isfinite(lse).all()):
        raise ArithmeticError("candidates that are not finite")
    if len(ids) != max(len(sampling), 1):
        raise RemoteProtocolError("candidates for another number of slots")
    if ids.shape[2] > max(map(candidates_wanted, sampling), default=1):
        raise RemoteProtocolError("more candidates than the slots want")
    own, used = bounds[list(frame.units), None], ids >= 0
    within = (ids >= own[..., 0]) & (ids < own[..., 1])
    good = (used == within).all() and used[..., 0].all() and (used[..., 1:] <= used[..., :-1]).all()
    if sampling and not good:
        raise RemoteProtocolError("candidates outside their unit")
    return SlotCandidates(ids, scores, lse)


def joined(
    offers: Sequence[tuple[Iterable[int], SlotCandidates]], slots: int, units: int
) -> list[SlotCandidates]:
    """By slot, the candidates of all vocab units in order, of what each owner offers of its own."""
    most = max((offered.ids.shape[2] for _, offered in offers), default=1)
    whole = [no_candidates(units, most) for _ in range(slots)]
    for own, offered in offers:
        rows, wide = list(own), offered.ids.shape[2]
        # One row comes where no slot samples, too.
        for slot, ids, scores, lse in zip(whole, *offered, strict=False):
            slot.ids[rows, :wide], slot.scores[rows, :wide], slot.lse[rows] = ids, scores, lse
    assert all((slot.ids[:, 0] >= 0).all() for slot in whole), "every unit has an owner"
    return whole
