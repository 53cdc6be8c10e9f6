"""Candidates by way of the wire: what the leader draws from, and what it does not take."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.candidates import joined, unpacked
from p2pinfer.core.units import Slice
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.model.sampling import (
    SlotCandidates,
    draw,
    gather,
    no_candidates,
    places,
    stacked,
    unit_candidates,
)
from p2pinfer.step_tensors import to_wire
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import Candidates, Plane

UNITS = [Slice(*edges) for edges in pairwise([0, 60, 120, 130, 200])]
BOUNDS = np.array(UNITS, np.int32)
WIDTHS = BOUNDS[:, 1] - BOUNDS[:, 0]
VOCAB = 200
POSITION = 9
ASKED = [SamplingParams(temperature=1.0, top_k=3), SamplingParams()]


def received(units: tuple[int, ...], offers: SlotCandidates) -> Candidates:
    """The frame of a member's candidates, as it is decoded."""
    sent = Candidates(
        fence=Fence(1, 1),
        step=1,
        link_seq=0,
        sender=1,
        units=units,
        ids=to_wire(offers.ids),
        logits=to_wire(offers.scores),
        lse=to_wire(offers.lse),
    )
    frame = decode(bytes(encode(sent)), Plane.STEPS)
    assert isinstance(frame, Candidates)
    return frame


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8]),
    top_k=st.sampled_from([0, 1, 7, 100]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 100),
)


@settings(deadline=None, max_examples=100)
@given(
    params=st.lists(params_strategy, min_size=1, max_size=4),
    seed=st.integers(0, 100),
    owner=st.lists(st.integers(0, 2), min_size=len(UNITS), max_size=len(UNITS)),
)
def test_what_is_drawn_does_not_depend_on_who_owns_the_units(
    params: list[SamplingParams], seed: int, owner: list[int]
) -> None:
    """Slots with few and with many candidates go in one frame per owner; each draws what it would
    draw where one node owns all."""
    logits = np.random.default_rng(seed).standard_normal((len(params), VOCAB)).astype(np.float32)
    offers = []
    for member in set(owner):
        own = tuple(unit for unit, whose in enumerate(owner) if whose == member)
        bounds = [UNITS[unit] for unit in own]
        mine = np.concatenate([logits[:, start:end] for start, end in bounds], axis=1)
        rows = [
            unit_candidates(row, bounds, each, POSITION)
            for row, each in zip(mine, params, strict=True)
        ]
        offers.append((own, unpacked(received(own, stacked(rows)), params, BOUNDS)))
    whole = joined(offers, len(params), len(UNITS))
    for row, each, found in zip(logits, params, whole, strict=True):
        alone = gather(unit_candidates(row, UNITS, each, POSITION), WIDTHS)
        offer = gather(found, WIDTHS)
        assert draw(offer, each, POSITION) == draw(alone, each, POSITION)
        assert (offer.lse, offer.unseen) == (alone.lse, alone.unseen)


def good_offer() -> SlotCandidates:
    """Of units 1 and 3, for two slots: three candidates of the one and two of the other."""
    offer = no_candidates(2, 3)
    offer.ids[:] = [[70, 60, 119], [130, 199, -1]]
    return stacked([offer, offer])


def test_a_good_offer_is_taken_as_it_is() -> None:
    """And where no slot samples, a row of nothing, which says that the step is done."""
    taken = unpacked(received((1, 3), good_offer()), ASKED, BOUNDS)
    assert taken.ids.tolist() == good_offer().ids.tolist()
    nothing = stacked([no_candidates(2, 1)])
    assert joined([((1, 3), unpacked(received((1, 3), nothing), [], BOUNDS))], 0, 4) == []


@pytest.mark.parametrize(
    ("place", "token"),
    [
        ((0, 0, 0), 120),
        ((0, 0, 0), 59),
        ((1, 1, 1), 200),
        ((0, 1, 0), -1),
        ((1, 0, 1), -1),
        ((0, 0, 2), 2**31 - 1),
    ],
)
def test_ids_of_other_units_and_holes_are_not_taken(
    place: tuple[int, int, int], token: int
) -> None:
    """An id below or above its unit, a unit without any, a hole among them."""
    offer = good_offer()
    offer.ids[place] = token
    with pytest.raises(RemoteProtocolError, match="outside their unit"):
        unpacked(received((1, 3), offer), ASKED, BOUNDS)


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_other_slots_than_were_asked_are_not_taken(slots: int) -> None:
    """Neither more nor fewer."""
    with pytest.raises(RemoteProtocolError, match="another number of slots"):
        unpacked(received((1, 3), good_offer()), ASKED[:1] * slots, BOUNDS)


@pytest.mark.parametrize(
    "asked", [[], ASKED[1:] * 2, [SamplingParams(temperature=1.0, top_k=2)] * 2]
)
def test_more_candidates_than_are_wanted_are_not_taken(asked: list[SamplingParams]) -> None:
    """One member's wide frame must not make the arrays of all wide."""
    offer = good_offer() if asked else stacked([no_candidates(2, 2)])
    with pytest.raises(RemoteProtocolError, match="more candidates"):
        unpacked(received((1, 3), offer), asked, BOUNDS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_told_apart(value: float) -> None:
    """Their sender's products are broken, rather than its frames."""
    for array in (good_offer().scores, good_offer().lse):
        array[(0,) * array.ndim] = value
        offer = good_offer()._replace(**{"scores" if array.ndim == 3 else "lse": array})
        with pytest.raises(ArithmeticError, match="not finite"):
            unpacked(received((1, 3), offer), ASKED, BOUNDS)


def test_units_lie_one_after_the_other() -> None:
    """Whatever their bounds in the vocabulary are."""
    assert places([UNITS[3], UNITS[0]]) == [Slice(0, 70), Slice(70, 130)]
    assert places([]) == []
