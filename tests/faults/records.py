"""What came of many faults: JSON lines that can be added to, and the table of what they say."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, inf
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.faults.cases import BY_NAME
from tests.faults.timeline import TIMES

Record = dict[str, Any]

ADDED: Record = {"keep_inputs": False}
"""What older records do not say, with what was so."""

IDENTITY = (
    *("commit", "case", "shape", "context", "dtype", "nodes", "replicas", "cpu_quota"),
    *ADDED,
)
"""Records that agree in these are runs of the same thing."""


def commit(root: Path) -> str:
    """The commit that changed the program last, with a `+` where its files differ from it. One that
    changes only tests or documents is none: what is run stays the same."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "p2pinfer")
    last = git("log", "-1", "--format=%h", "--abbrev=12", "--", "p2pinfer")
    return last + ("+" if changed else "")


def read(path: Path) -> list[Record]:
    """The records of a file, none where it does not exist yet. A last line that was not written to
    its end is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [ADDED | json.loads(line) for line in whole.splitlines()]


def append(path: Path, record: Record) -> None:
    """Add a record."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # it was stopped in the middle of a line
                kept = path.read_bytes().rpartition(b"\n")
                file.truncate(len(kept[0]) + len(kept[1]))
        file.write(json.dumps(record).encode() + b"\n")


def done(records: Iterable[Record], identity: Mapping[str, Any]) -> int:
    """How many runs of one thing there are already."""
    return sum(all(each.get(key) == identity[key] for key in IDENTITY) for each in records)


def percentile(values: Sequence[float], share: float) -> float:
    """The least of some values that is not exceeded by that share of them."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def groups(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Records by what they are runs of, in the order in which these came first."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in IDENTITY), []).append(record)
    return found


def summary(runs: Sequence[Record]) -> Record:
    """Of runs of one thing: how many failed, and how; median, 98th and 99th percentile and worst of
    each time; the rungs that were used, and how often.

    Where there is a target, a run in which that did not happen counts as the slowest, and is shown
    as null.
    """
    found: Record = {key: runs[0].get(key) for key in IDENTITY}
    failures = [failure for run in runs for failure in run["failures"]]
    found |= {"runs": len(runs), "failed": sum(bool(run["failures"]) for run in runs)}
    found["moves"] = sum(run.get("moves", 0) for run in runs)
    found |= {"failures": failures, "replies": sum(run.get("replies", 0) for run in runs)}
    rungs = [rung for run in runs for rung in run.get("rungs", ())]
    found["rungs"] = {rung: rungs.count(rung) for rung in sorted(set(rungs))}
    targets = BY_NAME[runs[0]["case"]].targets
    found["times"] = {}
    for key in (*TIMES, "step_s", "pause_s", "added_s", "excess_s", "back_s"):
        values = [run.get(key) for run in runs]
        known = [value for value in values if value is not None]
        if key in targets:
            known += [inf] * (len(values) - len(known))
        if known:
            found["times"][key] = _times(known, targets.get(key))
    found["rss_bytes"] = max((run.get("rss_bytes", 0) for run in runs), default=0)
    return found


def _times(known: Sequence[float], target: float | None) -> Record:
    shown: Record = {
        "runs": len(known),
        "median": _shown(statistics.median(known)),
        "p98": _shown(percentile(known, 0.98)),
        "p99": _shown(percentile(known, 0.99)),
        "worst": _shown(max(known)),
    }
    if target is not None:
        within = sum(value <= target for value in known)
        shown |= {"target": target, "within": within, "kept": within >= 0.99 * len(known)}
    return shown


def _shown(seconds: float) -> float | None:
    return None if seconds == inf else round(seconds, 3)


def table(records: Iterable[Record]) -> Table:
    """A row per thing that was run."""
    shown = Table()
    for name in ("commit", "case", "model", "dtype", "nodes"):
        shown.add_column(name)
    columns = ("runs", "failed", "step", "median", "98 %", "worst", "noticed", "plan", "back")
    for name in columns:
        shown.add_column(name, justify="right")
    shown.add_column("rungs")
    for runs in groups(records).values():
        found = summary(runs)
        times = found["times"]
        pause = times.get("pause_s", {})
        shown.add_row(
            *(found["commit"], found["case"], _model(found), found["dtype"], str(found["nodes"])),
            *(
                str(found["runs"]),
                str(found["failed"]),
                _cell(times.get("step_s", {}).get("median")),
            ),
            *(_cell(pause.get(key)) for key in ("median", "p98", "worst")),
            *(
                _cell(times.get(key, {}).get("median"))
                for key in ("noticed_s", "adopted_s", "back_s")
            ),
            " ".join(f"{rung} {count}" for rung, count in found["rungs"].items()),
        )
    return shown


def _model(found: Record) -> str:
    """The model's shape, and how many tokens prompts had."""
    return f"{found['shape']} +{found['context']}" if found["context"] else str(found["shape"])


def _cell(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"
