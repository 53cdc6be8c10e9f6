"""What members offer the leader to draw from: taken off the wire, checked, and put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2pinfer.errors import RemoteProtocolError
from p2pinfer.model.sampling import SlotCandidates, no_candidates
from p2pinfer.wire.messages import Candidates


def unpacked(frame: Candidates, slots: int, bounds: NDArray[np.int32]) -> SlotCandidates:
    """A member's candidates for so many slots that sample, as `sampling.stacked` has them; their
    memory is the frame's. `bounds` [units, 2] are those of all vocab units.

    A unit has at least one, all of its own ids, before the places that are not used; where no slot
    samples there is a row that nobody looks at. Raises `RemoteProtocolError` for anything else, and
    `ArithmeticError` for numbers that are not finite.
    """
    ids = np.frombuffer(frame.ids.data, np.int32).reshape(frame.ids.shape)
    scores = np.frombuffer(frame.logits.data, np.float32).reshape(frame.logits.shape)
    lse = np.frombuffer(frame.lse.data, np.float32).reshape(frame.lse.shape)
    if not (np.isfinite(scores).all() and np.isfinite(lse).all()):
        raise ArithmeticError("candidates that are not finite")
    if len(ids) != max(slots, 1):
        raise RemoteProtocolError("candidates for another number of slots")
    own, used = bounds[list(frame.units), None], ids >= 0
    within = (ids >= own[..., 0]) & (ids < own[..., 1])
    good = (used == within).all() and used[..., 0].all() and (used[..., 1:] <= used[..., :-1]).all()
    if slots and not good:
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
