"""The harness's cases: which rungs a run may show."""

from __future__ import annotations

import pytest

from tests.faults.cases import BY_NAME


@pytest.mark.parametrize(
    ("name", "replicas", "keep_inputs", "rungs"),
    [
        ("follower", 1, False, {"none", "replica"}),
        ("follower", 0, False, {"none", "replay"}),
        ("follower", 0, True, {"none", "replay", "recompute"}),
        ("two-followers", 1, False, {"none", "replica", "replay"}),
        ("two-followers", 1, True, {"none", "replica", "replay", "recompute"}),
        # What moves is copied first, also where no replicas are kept.
        ("drain", 0, False, {"none", "replica"}),
        ("join", 0, True, {"none", "replica"}),
        ("drain-follower", 0, True, {"none", "replica", "replay", "recompute"}),
    ],
)
def test_a_run_may_show_the_rungs_that_its_case_makes_possible(
    name: str, replicas: int, keep_inputs: bool, rungs: set[str]
) -> None:
    """By the case, what is kept, and whether a node comes or goes."""
    assert BY_NAME[name].possible_rungs(replicas, keep_inputs=keep_inputs) == rungs
