"""`bench decode`, `net` and `scaling` with true nodes: fields and invariants, no speeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.bench.budget import PARTS
from p2pinfer.cluster import LocalCluster, free_base_port

pytestmark = pytest.mark.xdist_group("clusters")

DEADLINE_S = 600.0
LAYERS = 4
"""Of the shape `tiny`."""

FEW = 3.0
"""Messages per token, of so few tokens: steps that only commit come where nodes are late."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model is made once, and all else is written."""
    return tmp_path_factory.mktemp("bench")


def bench(home: Path, verb: str, *flags: str) -> dict[str, Any]:
    """What one call prints; models lie in `home`."""
    done = subprocess.run(
        [sys.executable, "-m", "p2pinfer", "bench", verb, "--json", *flags],
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def local(nodes: int) -> list[str]:
    """Flags for a cluster of its own."""
    return ["--shape", "tiny", "--base-port", str(free_base_port(nodes))]


def has_spread(row: dict[str, Any], name: str) -> bool:
    """Whether a median lies between its least and greatest value."""
    found: bool = 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
    return found


@pytest.mark.timeout(DEADLINE_S)
def test_decode_says_where_a_token_went(home: Path) -> None:
    """The parts of computing add up, the shares are of the whole, and messages are the plan's."""
    report = home / "decode"
    flags = ["--nodes", "2", "--runs", "1", "--concurrent", "2", "--no-reference"]
    flags += ["--max-tokens", "8"]
    found = bench(home, "decode", *local(2), *flags, "--report", str(report))
    for row in (found["per_token"], *found["per_token_by_node"]):
        parts = row["products_ms"] + row["attention_ms"] + row["other_ms"]
        assert parts == pytest.approx(row["compute_ms"], abs=0.01)
        assert set(PARTS) < set(row)
    for shares in (found["per_token_percent"], found["per_prompt_percent"]):
        assert sum(shares.values()) == pytest.approx(100, abs=0.1)
    # Two exchanges a layer; then the leader announces steps, the other acknowledges and offers.
    for row in found["per_token_by_node"]:
        assert row["messages"] == pytest.approx(2 * LAYERS + 1.5, abs=FEW)
    assert has_spread(found["together"], "tokens_per_s")
    assert {path.name for path in report.iterdir()} == {"decode.md", "decode.json", "decode.png"}


@pytest.mark.timeout(DEADLINE_S)
def test_net_measures_every_link_of_a_cluster_of_its_own(home: Path) -> None:
    """Both ways; what the plan says is sent is what is sent."""
    report = home / "net"
    flags = ["--nodes", "3", "--echoes", "4", "--rounds", "1", "--max-tokens", "4"]
    found = bench(home, "net", *local(3), *flags, "--report", str(report))
    names = ["node1", "node2", "node3"]
    assert found["nodes"] == names
    assert not found["busy"]
    pairs = [(row["from"], row["to"]) for row in found["links"]]
    assert pairs == [(a, b) for a in names for b in names if a != b]
    for row in found["links"]:
        assert row["echoes"] + row["disturbed"] + row["lost"] <= 4 + 4 + 8
        assert has_spread(row, "round_trip_ms") and has_spread(row, "mb_s")
    # Long sums are added by shares of rows, in two exchanges.
    for rows, each, step in ((1, 2, found["decode"]), (128, 4, found["prefill"])):
        assert step["rows"] == rows
        assert step["expected"]["exchanges"] == each * LAYERS
        assert step["expected"]["expected_ms"] > 0
    decode = found["decode"]
    mean = sum(decode["messages"]) / len(names)
    assert decode["measured"]["messages"] == pytest.approx(mean, abs=FEW)
    sent = sum(decode["tensor_bytes"]) / len(names)
    assert sent / 2 < decode["measured"]["bytes"] < 2 * sent
    assert (report / "net.png").exists()


@pytest.mark.timeout(DEADLINE_S)
def test_net_measures_a_cluster_that_runs(home: Path) -> None:
    """`--to` any of its nodes; the bundled model, as stages of layers: there is no exchange."""
    with LocalCluster(
        2, base_port=free_base_port(2), threads=1, options={"layout": "layers"}
    ) as two:
        flags = ["--echoes", "4", "--rounds", "1", "--max-tokens", "4", "--prompt-tokens", "16"]
        found = bench(home, "net", "--to", two.nodes[1].address, *flags)
    assert (found["model"], found["layout"], found["local"]) == ("demo", "layers", False)
    assert found["decode"]["expected"]["exchanges"] == 0
    assert found["decode"]["expected"]["hidden_ms"] > 0
    mean = sum(found["decode"]["messages"]) / 2
    assert found["decode"]["measured"]["messages"] == pytest.approx(mean, abs=FEW)


@pytest.mark.timeout(DEADLINE_S)
def test_scaling_compares_one_axis_at_a_time(home: Path) -> None:
    """The base is the first point of each; all nodes together have the same threads."""
    report = home / "scaling"
    axes = ["--nodes", "1,2", "--contexts", "8,32", "--requests", "1,3"]
    flags = ["--threads", "2", "--max-tokens", "4", "--runs", "2", "--report", str(report)]
    found = bench(home, "scaling", *local(2), *axes, *flags)
    assert found["base"] == {"nodes": 1, "context": 8, "requests": 1}
    values = {
        axis: [(row["nodes"], row["context"], row["requests"]) for row in rows]
        for axis, rows in found["axes"].items()
    }
    assert values == {
        "nodes": [(1, 8, 1), (2, 8, 1)],
        "contexts": [(1, 8, 1), (1, 32, 1)],
        "requests": [(1, 8, 1), (1, 8, 3)],
    }
    for rows in found["axes"].values():
        assert rows[0]["decode_tokens_per_s_ratio"] == rows[0]["prefill_tokens_per_s_ratio"] == 1.0
        for row in rows:
            assert row["nodes"] * row["threads_per_node"] == 2
            for name in ("decode_tokens_per_s", "prefill_tokens_per_s"):
                assert has_spread(row, name) and has_spread(row, f"{name}_ratio")
            assert 0 <= row["inter_token_ms_min"] <= row["inter_token_ms_max"]
    assert "| context |" in (report / "scaling.md").read_text()
    assert (report / "scaling.png").exists()
