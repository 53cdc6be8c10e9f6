"""`bench net`: what a plan's steps send, what that should cost, and how a result is shown."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from p2pinfer.bench.net import Settings
from p2pinfer.bench.net_report import link_rows, step_rows, tables, write_report
from p2pinfer.bench.traffic import Link, expected_step_ms, largest_frame, plan_of, step_traffic
from p2pinfer.cli import root
from p2pinfer.core.holdings import holdings
from p2pinfer.core.planner import make_plan
from p2pinfer.core.preview import units_by_stage
from p2pinfer.errors import ClusterError, UsageError
from p2pinfer.types import Fence, Plan
from tests.model_specs import SIX_LAYERS
from tests.plan_bench import member

HIDDEN = 4 * SIX_LAYERS.hidden_size
LAYERS = SIX_LAYERS.num_layers


def planned(count: int, layout: str) -> Plan:
    """A plan of so many members, of whom the first leads."""
    members = [member(n) for n in range(1, count + 1)]
    return make_plan(
        members=members,
        model=SIX_LAYERS,
        layout=layout,
        fence=Fence(1, 1),
        cluster_id="c" * 16,
        leader_id=members[0].node_id,
    )


def links(count: int, **values: Any) -> dict[tuple[int, int], Link]:
    """Links of one kind between all of them: 1 ms, and 1 MB/s beyond a frame of a hidden state."""
    fields = {"small_ms": 1.0, "frame_bytes": HIDDEN, "frame_ms": 1.5, "mb_s": 1.0, **values}
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return {pair: Link(**fields) for pair in pairs}


def status(plan: Plan, **values: Any) -> dict[str, Any]:
    """What `status --json` says of it, as far as it matters here."""
    rows = [
        {
            "name": each.name,
            "node_id": each.node_id,
            "boot_id": each.boot_id,
            "address": each.address,
            "witness": each.witness,
            "state": "alive",
            "owned": units_by_stage(holdings(plan, index)),
        }
        for index, each in enumerate(plan.members)
    ]
    gone = rows[0] | {"name": "gone", "state": "left", "owned": []}
    return {
        "ready": True,
        "term": 1,
        "epoch": 1,
        "cluster_id": plan.cluster_id,
        "leader": plan.members[plan.leader].name,
        "layout": plan.layout,
        "model": msgspec.to_builtins(plan.model) | {"num_units": {}},
        "members": [gone, *rows],
        **values,
    }


@pytest.mark.parametrize("layout", ["heads", "layers", "2x2"])
def test_the_plan_is_read_from_the_status(layout: str) -> None:
    """Its stages and owners, as JSON has them; members that are gone are not in it."""
    plan = planned(4, layout)
    found = plan_of(json.loads(json.dumps(status(plan))))
    assert found.stages == plan.stages
    assert found.model == plan.model
    assert [m.name for m in found.members] == [m.name for m in plan.members]
    assert found.leader == plan.leader


def test_without_a_plan_there_is_nothing_to_measure() -> None:
    """What the cluster waits for is told."""
    with pytest.raises(ClusterError, match="it waits for 1 more node"):
        plan_of({"ready": False, "waiting": "1 more node"})


def test_two_nodes_send_each_other_every_sum() -> None:
    """One frame in each half layer; the leader announces the step, the other one acknowledges it
    and offers candidates."""
    plan = planned(2, "heads")
    leads, other = step_traffic(plan, 0, 1), step_traffic(plan, 1, 1)
    assert leads["messages"] == 2 * LAYERS + 1
    assert other["messages"] == 2 * LAYERS + 2
    assert leads["tensor_bytes"] >= 2 * LAYERS * HIDDEN
    assert step_traffic(plan, 0, 7)["tensor_bytes"] == 7 * leads["tensor_bytes"]


def test_stages_of_one_node_pass_hidden_states_only() -> None:
    """One message to the next stage; there is no exchange."""
    plan = planned(3, "layers")
    assert [step_traffic(plan, i, 2)["tensor_bytes"] for i in range(3)] == [2 * HIDDEN] * 2 + [0]
    expected = expected_step_ms(plan, 1, links(3))
    assert (expected["exchanges"], expected["exchange_ms"]) == (0, 0.0)
    assert expected["hidden_ms"] == 2 * 1.5
    assert largest_frame(plan, 1) == HIDDEN


def test_long_sums_are_added_by_shares() -> None:
    """Two exchanges in a half layer, and less than every sum to everybody."""
    plan = planned(4, "heads")
    short, long = step_traffic(plan, 0, 1), step_traffic(plan, 0, 400)
    assert long["messages"] == 2 * (short["messages"] - 3) + 3
    assert long["tensor_bytes"] < 400 * short["tensor_bytes"]
    assert expected_step_ms(plan, 400, links(4))["exchanges"] == 4 * LAYERS
    assert largest_frame(plan, 400) < 400 * largest_frame(plan, 1)


def test_sums_in_bfloat16_are_half_as_long() -> None:
    """Hidden states are not."""
    for layout, times in (("heads", 2), ("layers", 1)):
        plan = planned(3, layout)
        model = msgspec.structs.replace(plan.model, wire_dtype="bfloat16")
        short = msgspec.structs.replace(plan, model=model)
        sent = [step_traffic(each, 0, 5)["tensor_bytes"] for each in (plan, short)]
        assert sent[0] == times * sent[1] > 0


def test_one_node_sends_nothing() -> None:
    """And nothing is to be waited for."""
    plan = planned(1, "heads")
    assert step_traffic(plan, 0, 9) == {"messages": 0, "tensor_bytes": 0}
    assert expected_step_ms(plan, 9, {})["expected_ms"] == 0.0
    assert largest_frame(plan, 1) == 0


def test_an_exchange_takes_latency_and_all_that_is_sent() -> None:
    """Of three nodes each sends to two; the slowest link counts; the step's announcement and the
    candidates are small."""
    plan = planned(3, "heads")
    slow = links(3) | {(1, 2): Link(4.0, HIDDEN, 4.5, 1.0)}
    expected = expected_step_ms(plan, 1, slow)
    assert expected["exchanges"] == 2 * LAYERS
    assert expected["exchange_ms"] >= 4.0 + 2 * 0.5
    assert expected["step_and_candidates_ms"] == 2.0
    parts = ("hidden_ms", "step_and_candidates_ms")
    total = expected["exchanges"] * expected["exchange_ms"] + sum(expected[p] for p in parts)
    assert expected["expected_ms"] == pytest.approx(total, abs=0.01)


def test_large_frames_take_as_long_as_the_bandwidth_says() -> None:
    """Small ones as was measured."""
    link = Link(small_ms=1.0, frame_bytes=100, frame_ms=2.0, mb_s=10.0)
    assert link.transfer_ms(50) == 0.5
    assert link.transfer_ms(100) == 1.0
    assert link.transfer_ms(1_000_000) == 100.0


def result(**values: Any) -> dict[str, Any]:
    """What `bench net --json` prints."""
    names = ("round_trip_ms", "mb_s")
    spread = {f"{name}{end}": 1.0 for name in names for end in ("", "_min", "_max")}
    link = {"echoes": 9, "disturbed": 0, "lost": 0, **spread, "frame_round_trip_ms": None}
    step = {"messages": [9, 10], "tensor_bytes": [8, 8], "expected": {"expected_ms": 1.25}}
    measured = {"exchange_ms": 2.0, "wait_ms": 3.0}
    return {
        "model": "m",
        "dtype": "float32",
        "layout": "heads",
        "nodes": ["a", "b"],
        "frame_bytes": 8,
        "busy": False,
        "links": [
            link | {"from": "a", "to": "b"},
            link | {"from": "b", "to": "a", "disturbed": 2, "lost": 1},
        ],
        "decode": {"rows": 1, **step, "measured": measured},
        "prefill": {"rows": 64, **step, "measured": measured},
        **values,
    }


def test_a_result_is_shown_and_written(tmp_path: Path) -> None:
    """A row for each link and each kind of step; a dash where nothing was measured."""
    found = result()
    first, second = link_rows(found)
    assert first == ("a to b", "1.00 (1.00-1.00)", "-", "1.00 (1.00-1.00)", "9", "0")
    assert second[-1] == "2, 1 lost"
    assert step_rows(found)[0] == ("decode, rows: 1", "9 to 10", "8", "1.250", "2.000", "3.000")
    page = write_report(found, tmp_path / "new").read_text()
    assert "| a to b | 1.00 (1.00-1.00) |" in page
    assert json.loads((tmp_path / "new" / "net.json").read_text()) == found
    assert (tmp_path / "new" / "net.png").stat().st_size > 0


def test_a_busy_cluster_is_told(tmp_path: Path) -> None:
    """Nothing is said of steps, and why."""
    nothing = {"expected": None, "measured": None}
    unmeasured = {"rows": 1, "messages": [1], "tensor_bytes": [1], **nothing}
    found = result(busy=True, decode=unmeasured, prefill=unmeasured)
    assert step_rows(found)[0][3:] == ("-", "-", "-")
    console = Console(width=100, file=StringIO())
    with console.capture() as shown:
        console.print(tables(found))
    assert "Requests were running" in shown.get()
    assert write_report(found, tmp_path).exists()


def test_one_node_is_refused() -> None:
    """It has no links; a running cluster's size is its own matter."""
    with pytest.raises(UsageError, match="has no links"):
        Settings(nodes=1).check()
    Settings(nodes=1, to=("127.0.0.1:7720",)).check()
    told = CliRunner().invoke(root, ["bench", "net", "--to", "nowhere:x"])
    assert told.exit_code == 2
    assert "'--to'" in told.output
