"""`bench failover`: what is asked for, what is read from logs, and what it comes to."""

from __future__ import annotations

import json
import random
import statistics
from math import comb
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from p2pinfer.bench import failover as f
from p2pinfer.bench.failover_report import shown, summary_lines, table, write_report
from p2pinfer.bench.following import Following, longest_gap
from p2pinfer.bench.intervals import median_interval
from p2pinfer.bench.protection import cost, halves
from p2pinfer.bench.settling import NEAR, is_protected
from p2pinfer.cli import root
from p2pinfer.cluster import LocalNode
from p2pinfer.errors import ClusterError, UsageError
from p2pinfer.types import Failover


class Reply:
    """A reply that was followed to its end."""

    def __init__(self, times: list[float], rung: str = "replica") -> None:
        self.request_id = 10
        self.times = times
        self.failovers = (
            Failover(position=1, lost=("node2",), rung=rung, detect_s=0, stall_s=0, exact=True),
        )


def followed(*times: float, rung: str = "replica") -> Following:
    """The same, as the functions take it."""
    return cast(Following, Reply(list(times), rung))


def run(stall: float, **values: Any) -> f.Run:
    """One kill with this pause, in seconds."""
    figures = dict.fromkeys((*f.FIGURES, *f.SUMS), 1.0) | {"stall_s": stall}
    fields: dict[str, Any] = {
        "victim": "node2",
        "figures": figures,
        "tokens": (1, 2),
        "tokens_equal": True,
        "gaps": ((-0.1, 0.1), (0.1 + stall, stall), (0.3 + stall, 0.1)),
    }
    return f.Run(**(fields | values))


def result(**values: Any) -> dict[str, Any]:
    """What `bench failover --json` prints."""
    rungs = {
        "replay": f.summary([run(3.0), run(1.0), run(2.0)]),
        "replica": f.summary([run(0.2, tokens_equal=False)]),
    }
    known = {
        "shape": "tiny",
        "nodes": 4,
        "threads_per_node": 1,
        "layout": "auto",
        "dtype": "float32",
        "quant": "none",
        "context": 64,
        "max_tokens": 64,
        "runs": 3,
        "victim": "second",
        "rungs": rungs,
    }
    return known | values


# --- what is asked for ----------------------------------------------------------------------------


def test_rungs_are_named_once_and_must_be_there() -> None:
    """In the order given; one that is unknown, or that nodes have no setting for, is refused."""
    assert f.parse_rungs("replica, replay,replica") == ("replica", "replay")
    assert set(f.available_rungs()) <= set(f.RUNGS)
    assert {"replay", "replica"} <= set(f.available_rungs())
    with pytest.raises(UsageError, match="allowed are replay, recompute, replica"):
        f.parse_rungs("magic")
    for rung in set(f.RUNGS) - set(f.available_rungs()):
        with pytest.raises(UsageError, match=f"no rung {rung}"):
            f.parse_rungs(rung)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"nodes": 1}, "none can be killed"),
        ({"kill_after": 64}, "allowed is 2 to 63"),
        ({"victim": "node5"}, "second, leader, follower, serving, node1, node2"),
    ],
)
def test_what_cannot_be_measured_is_refused(values: dict[str, Any], told: str) -> None:
    """Before anything is started."""
    with pytest.raises(UsageError, match=told):
        f.Settings(**values).check()


@pytest.mark.parametrize(
    "flags",
    [["--rungs", "magic"], ["--victim", "nobody"], ["--dtype", "int3"], ["--quant", "int3"]],
)
def test_wrong_flags_are_told_at_once(flags: list[str]) -> None:
    """By the flag's name."""
    ended = CliRunner().invoke(root, ["bench", "failover", *flags])
    assert isinstance(ended.exception, UsageError)
    assert flags[0] in str(ended.exception)


# --- what nodes and clients say -------------------------------------------------------------------


def test_the_longest_gap_is_the_one_that_spans_the_kill() -> None:
    """Not one before it, nor one after the reply went on."""
    times = [0.0, 3.0, 3.1, 4.0, 4.1, 9.0]
    assert longest_gap(times, since=3.5, until=4.05) == pytest.approx(0.9)
    assert longest_gap(times, since=10.0, until=11.0) == 0.0


def test_the_phases_are_put_beside_the_kill() -> None:
    """Detection ends where the leader's own phases begin."""
    resumed = {"at": 10.5, "propose_s": 0.1, "agree_s": 0.2, "restore_s": 0.25}
    times = f.times_of(resumed, 10.0, followed(9.0, 9.1, 9.2, 10.51, 10.6))
    assert times == pytest.approx(
        {
            "detect_s": 0.05,
            "propose_s": 0.1,
            "agree_s": 0.2,
            "restore_s": 0.25,
            "stall_s": 1.31,
            "step_s": 0.1,
        }
    )


def test_another_rung_than_asked_for_is_an_error() -> None:
    """Be it by the leader's word or by what the client was told, if it was told of that loss."""
    resumed = {"rung": "replica", "lost": ["node2"]}
    f.check_rung("replica", resumed, followed())
    with pytest.raises(ClusterError, match="by replay, not by replica"):
        f.check_rung("replica", resumed | {"rung": "replay"}, followed())
    with pytest.raises(ClusterError, match="its client was told: none"):
        f.check_rung("replica", resumed, followed(rung="none"))
    f.check_rung("replica", resumed | {"lost": ["node3"]}, followed(rung="none"))
    with pytest.raises(ClusterError, match="its client was told: nothing"):
        f.check_rung("replay", resumed | {"lost": ["node3"]}, followed())


def test_facts_are_read_from_a_log(tmp_path: Path) -> None:
    """By their kind, with their moment; a line that is not whole yet is left."""
    fact = {"event": "request_resumed", "timestamp": "1970-01-01T00:00:02.500000+00:00"}
    other = fact | {"event": "plan_adopted"}
    lines = ["noise", json.dumps(other), json.dumps(fact), json.dumps(fact)]
    log = tmp_path / "node1.log"
    log.write_text("\n".join(lines))
    node = LocalNode(name="node1", address="", process=cast(Any, None), log=log)
    assert [each["at"] for each in f.logged(node, "request_resumed")] == [2.5]


def row(**values: Any) -> dict[str, Any]:
    """A node's counters."""
    return {
        "standby_units_wanted": 4,
        "standby_units_ready": 4,
        "standby_lacks": 4 * NEAR,
        "replicas_held": False,
        "delta_bytes_sent": 10,
        "bytes_sent": 100,
    } | values


def test_protected_is_what_has_all_replicas_up_to_date() -> None:
    """With weights ready, hardly a position lacking, and nothing held; and with any at all."""
    idle = row(standby_units_wanted=0, standby_units_ready=0, standby_lacks=0)
    assert is_protected({"a": row(), "b": idle})
    assert not is_protected({"b": idle})
    for lack in ({"standby_units_ready": 3}, {"standby_lacks": 65}, {"replicas_held": True}):
        assert not is_protected({"a": row(), "b": row(**lack)})


def test_bytes_of_the_victim_count_up_to_its_end() -> None:
    """And those of the others up to the end of the reply."""
    start = {"a": row(), "b": row()}
    before = {"a": row(bytes_sent=150), "b": row(bytes_sent=160, delta_bytes_sent=15)}
    after = {"a": row(bytes_sent=200, delta_bytes_sent=30)}
    assert f.moved(start, before, after) == {"delta_bytes": 25, "step_bytes": 160}


def test_protection_takes_weights_kv_and_inputs() -> None:
    """All three are memory of one node."""
    kept = {"standby_weight_bytes": 1, "kv_standby_bytes": 20, "inputs_bytes": 300}
    assert f.protection_bytes(kept) == 321


# --- what it comes to -----------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (8, 1), (9, 2), (20, 6), (30, 10), (100, 40)])
def test_the_interval_of_a_median_is_that_of_the_tables(count: int, rank: int) -> None:
    """The ranks of the sign test's 95 % intervals, as statistics books print them."""
    assert median_interval(range(1, count + 1)) == (rank, count + 1 - rank)
    missed = 2 * sum(comb(count, k) for k in range(rank)) / 2**count
    assert missed <= 0.05 < missed + 2 * comb(count, rank) / 2**count


def test_too_few_values_have_no_interval() -> None:
    """Even from the least to the greatest of five is not enough."""
    assert median_interval([1, 2, 3, 4, 5]) is None
    assert median_interval([]) is None


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """Of values of any kind: 95 of 100 times and a little more."""
    draw = random.Random(5)
    inside = 0
    for _ in range(1000):
        found = median_interval([draw.expovariate(1.0) for _ in range(20)])
        assert found
        inside += found.low <= 0.6931471805599453 <= found.high
    assert 940 <= inside <= 985


def test_halves_take_turns_in_who_begins() -> None:
    """With, without; without, with; and so on, also where a reply begins anew between."""
    assert list(halves(0, 3)) == [False, True, True, False, False, True]
    assert list(halves(1, 2)) == [True, False]


def test_the_cost_is_that_of_pairs() -> None:
    """A drift that both halves of a pair share does not count."""
    speeds = [10.0 + number for number in range(20)]
    found = cost(*([[1 / (part * speed)] * 3 for speed in speeds] for part in (0.98, 1.0)))
    assert found["cost"] == found["cost_whole"] == pytest.approx(0.02)
    assert found["cost_95"] == found["cost_whole_95"] == pytest.approx([0.02, 0.02])
    assert found["decode_tokens_per_s_without"] == pytest.approx(statistics.median(speeds))
    assert found["pairs"] == 20
    assert cost([[0.1]], [[0.1]])["cost_95"] is None


def test_the_cost_is_that_of_the_median_token() -> None:
    """One token that something else held up says nothing of replication; the whole half tells."""
    found = cost([[0.1, 0.1, 0.7]], [[0.1, 0.1, 0.1]])
    assert (found["cost"], found["cost_whole"]) == pytest.approx((0.0, 2 / 3), abs=1e-5)


def test_a_rung_is_summed_up_by_medians() -> None:
    """With their spread, and the trace of the run in the middle."""
    found = f.summary([run(3.0), run(1.0), run(2.0)])
    assert (found["stall_s"], found["stall_s_min"], found["stall_s_max"]) == (2.0, 1.0, 3.0)
    assert found["gaps"][1] == [2.1, 2.0]
    long = tuple((at / 10, 0.1) for at in range(-100, 100))
    kept = f.summary([run(1.0, gaps=long)])["gaps"]
    assert (kept[0], kept[-1], len(kept)) == ([-6.3, 0.1], [6.4, 0.1], 2 * f.GAPS_KEPT)
    assert (found["tokens_equal"], found["victims"]) == (True, ["node2"])


def test_the_table_has_a_row_for_each_rung() -> None:
    """Spread only where there is one; other tokens are shouted."""
    header, replay, replica = table(result())
    assert (replay[0], replica[0]) == ("replay", "replica")
    assert len(header) == len(replay) == len(replica)
    assert replay[4] == "2.000 (1.000 to 3.000)"
    assert (replay[-1], replica[-1]) == ("the same", "OTHERS")
    assert shown({"moved_bytes": 1e6, "moved_bytes_min": 1, "moved_bytes_max": 2e6}, "moved_bytes")
    assert "OTHER TOKENS" in summary_lines(result())[2]


@pytest.mark.parametrize("pairs", [0, 3, 20])
def test_a_report_is_written(tmp_path: Path, pairs: int) -> None:
    """Markdown, HTML, JSON and two pictures, with or without the cost of protection."""
    whole = result(protection=cost([[0.125]] * pairs, [[0.1125]] * pairs)) if pairs else result()
    page = write_report(whole, tmp_path / "new")
    assert page.name == "failover.md"
    text = page.read_text()
    assert ("costs 10.00%" in text) == bool(pairs)
    assert ("95 %" in text) == (pairs > 5)
    for name in ("failover-tokens.png", "failover-phases.png"):
        assert name in text
        assert name in (page.parent / "failover.html").read_text()
        assert (page.parent / name).stat().st_size > 5000
    assert json.loads((page.parent / "failover.json").read_text()) == json.loads(json.dumps(whole))
