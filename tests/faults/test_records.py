"""What `bin/kills` keeps of its runs, and makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.cases import BY_NAME, CASES
from tests.faults.records import append, done, groups, percentile, read, summary, table

RUN: dict[str, Any] = {
    "commit": "c",
    "case": "follower",
    "shape": "demo",
    "context": 0,
    "dtype": "float32",
    "nodes": 4,
    "replicas": 1,
    "cpu_quota": None,
    "keep_inputs": False,
}


def run(pause_s: float | None, *failures: str, **changes: Any) -> dict[str, Any]:
    """A record."""
    seen = {"pause_s": pause_s, "failures": list(failures), "rungs": ["replica"], "replies": 2}
    return RUN | seen | changes


def test_runs_of_one_commit_add_up(tmp_path: Path) -> None:
    """A suite that was stopped in the middle of a line goes on after the last whole one."""
    file = tmp_path / "kills.jsonl"
    assert read(file) == []
    old = run(0.1)
    del old["keep_inputs"]  # not yet known when it was written
    append(file, old)
    append(file, run(0.2, commit="another"))
    with file.open("a") as broken:
        broken.write('{"commit": "c", "ca')
    assert len(read(file)) == 2
    append(file, run(0.3))
    assert [record["pause_s"] for record in read(file)] == [0.1, 0.2, 0.3]
    assert done(read(file), RUN) == 2


def test_a_percentile_is_a_value_that_so_many_keep_to() -> None:
    """The 98th of a hundred, and of one the one."""
    assert percentile(range(100, 0, -1), 0.98) == 98
    assert percentile([3.0], 0.98) == 3.0


def test_a_summary_counts_what_did_not_happen_as_the_slowest() -> None:
    """Where there is a target; failures and rungs are counted."""
    runs = [run(0.1), run(0.2), run(None, "wrong reply: ...", rungs=["replay"])]
    found = summary(runs)
    assert (found["runs"], found["failed"], found["replies"]) == (3, 1, 6)
    assert found["rungs"] == {"replay": 1, "replica": 2}
    pause = found["times"]["pause_s"]
    assert (pause["median"], pause["worst"], pause["within"]) == (0.2, None, 2)
    assert not pause["kept"]


def test_a_table_has_a_row_for_each_thing_that_was_run() -> None:
    """By commit, case and settings."""
    runs = [run(0.1), run(0.2), run(0.3, dtype="bfloat16")]
    assert len(groups(runs)) == 2
    assert table(runs).row_count == 2


def test_every_case_has_a_name_of_its_own() -> None:
    """And enough nodes for those that are struck."""
    assert len(BY_NAME) == len(CASES)
    for case in CASES:
        assert len(case.struck) + (case.before is not None) < case.nodes
        assert (case.before is None) == (case.moment in ("decode", "prefill"))
