"""What `bin/soak` makes of what it saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.faults.load import Ledger
from tests.faults.soak import Life
from tests.faults.soak_report import MIB, live_view, report, table
from tests.faults.vitals import Vitals


def soak(*sizes: Vitals, **changes: Any) -> Any:
    """One node that was looked at every minute, and what else a report is made of."""
    life = Life("node1", 7, [(60.0 * minute, size) for minute, size in enumerate(sizes)])
    seen: dict[str, Any] = {
        "ledger": Ledger(),
        "facts": lambda: (
            {"peer_dead": 1, "leader_lost": 0, "worker_hung": 0, "pair_broken": 0}
            | {"member_slow": 0}
        ),
        "seconds": 60.0 * len(sizes),
        "weather": SimpleNamespace(counts={"kill": 1}, story=["kill node1"], on=lambda name: ""),
        "lives": {7: life},
        "stuck": [],
        "ended": [],
        "wanted": SimpleNamespace(faults=("kill",), minutes=1.0),
        "cluster": SimpleNamespace(nodes=[SimpleNamespace(name="node1", pid=7)]),
    }
    return SimpleNamespace(**(seen | changes))


def test_a_quiet_soak_has_no_failures() -> None:
    """And a report that can be shown."""
    quiet = soak(*[Vitals(300 * MIB, 70, 1000)] * 12)
    quiet.ledger.reply("read", [1.0, 1.5, 3.0], 0.5)
    found = report(quiet)
    assert found["failures"] == []
    assert found["pause_s"] == {"median": 1.5, "p98": 1.5, "worst": 1.5}
    told = {"seed": 1, "commit": "c", "nodes": 1, "dtype": "float32", "replicas": 1}
    assert table(found | told).row_count
    assert live_view(quiet).renderables


def test_what_grows_is_found() -> None:
    """Memory over a long life, open files at rest, and logs."""
    sizes = [Vitals((300 + 50 * n) * MIB, 70 + 5 * n, 3 * MIB * n) for n in range(12)]
    failures = report(soak(*sizes))["failures"]
    assert [text.partition(":")[0] for text in failures] == ["leak", "leak", "log"]


def test_a_death_of_naps_is_a_failure() -> None:
    """Of other faults it is not."""
    sizes = [Vitals(300 * MIB, 70, 1000)] * 12
    naps = SimpleNamespace(faults=("nap",), minutes=1.0)
    assert report(soak(*sizes, wanted=naps))["failures"] == ["peer_dead: 1, of naps"]


def test_a_client_that_waits_too_long_is_found() -> None:
    """Until it hears something, or is done."""
    ledger = Ledger()
    ledger.hears(3, "a reply")
    assert ledger.hanging(60.0) == []
    assert len(ledger.hanging(-1.0)) == 1
    ledger.hears(3, "")
    assert ledger.hanging(-1.0) == []
