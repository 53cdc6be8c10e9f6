"""What a soak shows while it runs, and says at its end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from tests.faults.records import percentile

if TYPE_CHECKING:
    from tests.faults.soak import Life, Soak

MIB = 1 << 20
LONG_LIFE_S = 300.0
"""A younger process still grows into its work."""

GROWTH = 0.25
GROWTH_BYTES = 48 * MIB
"""Of a long life, the last sixth may have this share and so much more than the second sixth."""

MORE_FDS = 24
"""At rest a node may have so many more open files than any had at the beginning."""

LOG_BYTES_PER_MINUTE = 2 * MIB

FALSE_DEATHS = ("peer_dead", "leader_lost", "worker_hung", "pair_broken", "member_slow")
"""What no node may say of another where all that happens is naps."""


def live_view(soak: Soak) -> Group:
    """The nodes, the clients, and the last that was done to them."""
    ledger, weather = soak.ledger, soak.weather
    nodes = Table(title=f"{soak.seconds / 60:.1f} of {soak.wanted.minutes:g} min")
    for name in ("node", "pid", "MiB", "files", "log KiB", "now"):
        nodes.add_column(name, justify="left" if name in ("node", "now") else "right")
    for node in soak.cluster.nodes:
        life = soak.lives.get(node.pid)
        now = life.seen[-1][1] if life and life.seen else None
        shown = (str(now.rss_bytes // MIB), str(now.fds), str(now.log_bytes >> 10)) if now else ()
        nodes.add_row(node.name, str(node.pid), *(shown or ("-",) * 3), weather.on(node.name))
    said = Table(show_header=False, box=None)
    said.add_row("replies", " ".join(f"{key} {n}" for key, n in sorted(ledger.counts.items())))
    said.add_row("faults", " ".join(f"{key} {n}" for key, n in sorted(weather.counts.items())))
    said.add_row("wrong", str(len(ledger.wrong)))
    said.add_row("errors", str(len(ledger.errors)))
    said.add_row("moved", str(ledger.moves))
    for line in (*weather.story[-6:], *ledger.errors[-2:], *ledger.wrong[-2:], *soak.ended[-2:]):
        said.add_row("", line)
    return Group(nodes, said)


def report(soak: Soak) -> dict[str, Any]:
    """The whole run as one object for JSON; `failures` is what makes it a bad one."""
    ledger, facts = soak.ledger, soak.facts()
    found: dict[str, Any] = {
        "seconds": round(soak.seconds, 1),
        "counts": dict(ledger.counts),
        "tokens": ledger.tokens,
        "moves": ledger.moves,
        "struck": dict(soak.weather.counts),
        "facts": facts,
        "pause_s": _spread(ledger.pauses),
        "first_token_s": _spread(ledger.first),
        "lives": [_life(life) for life in soak.lives.values()],
        "story": soak.weather.story,
    }
    failures = [f"wrong reply: {text}" for text in ledger.wrong]
    failures += [f"error: {text}" for text in ledger.errors]
    failures += [f"hang: {text}" for text in soak.stuck]
    failures += [f"ended by itself: {text}" for text in soak.ended]
    failures += _leaks(soak)
    if set(soak.wanted.faults) == {"nap"}:
        failures += [f"{name}: {facts[name]}, of naps" for name in FALSE_DEATHS if facts[name]]
    return found | {"failures": failures}


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 3),
        "p98": round(percentile(values, 0.98), 3),
        "worst": round(max(values), 3),
    }


def _life(life: Life) -> dict[str, Any]:
    (began, first), (ended, last) = life.seen[0], life.seen[-1]
    minutes = max((ended - began) / 60, 1e-3)
    return {
        "name": life.name,
        "pid": life.pid,
        "minutes": round(minutes, 2),
        "rss_bytes": last.rss_bytes,
        "rss_growth": list(_growth(life)),
        "fds": last.fds,
        "log_bytes_per_minute": round((last.log_bytes - first.log_bytes) / minutes),
    }


def _growth(life: Life) -> tuple[int, int]:
    """The median of the bytes resident in the second and in the last sixth of a life."""
    sizes = [size.rss_bytes for _, size in life.seen]
    sixth = max(1, len(sizes) // 6)
    early, late = sizes[sixth : 2 * sixth] or sizes[:1], sizes[-sixth:]
    return int(statistics.median(early)), int(statistics.median(late))


def _leaks(soak: Soak) -> list[str]:
    found = []
    first = max(life.seen[0][1].fds for life in soak.lives.values())
    running = {node.pid for node in soak.cluster.nodes}
    for life in soak.lives.values():
        minutes = (life.seen[-1][0] - life.seen[0][0]) / 60
        early, late = _growth(life)
        if 60 * minutes >= LONG_LIFE_S and late > (1 + GROWTH) * early + GROWTH_BYTES:
            found.append(f"leak: {life.name} grew from {early >> 20} to {late >> 20} MiB")
        if life.pid in running and life.seen[-1][1].fds > first + MORE_FDS:
            found.append(f"leak: {life.name} has {life.seen[-1][1].fds} files open, at rest")
        logged = life.seen[-1][1].log_bytes - life.seen[0][1].log_bytes
        if logged > LOG_BYTES_PER_MINUTE * max(minutes, 1):
            found.append(f"log: {life.name} wrote {logged >> 10} KiB in {minutes:.1f} min")
    return found


def table(found: dict[str, Any]) -> Table:
    """The report for people."""
    shown = Table(title=f"soak of {found['seconds'] / 60:.1f} min, seed {found['seed']}")
    shown.add_column("what")
    shown.add_column("found", overflow="fold")
    rows: dict[str, object] = {
        "commit": found["commit"],
        "cluster": f"{found['nodes']} nodes, {found['dtype']}, {found['replicas']} replicas",
        "clients": _listed(found["counts"]),
        "tokens": found["tokens"],
        "went on elsewhere": found["moves"],
        "faults": _listed(found["struck"]),
        "longest pause of a reply, s": _listed(found["pause_s"]),
        "first token, s": _listed(found["first_token_s"]),
        "the nodes said": _listed(found["facts"]),
        "processes": len(found["lives"]),
        "largest, MiB": max(life["rss_bytes"] for life in found["lives"]) >> 20,
        "most open files": max(life["fds"] for life in found["lives"]),
        "failures": len(found["failures"]),
    }
    for name, value in rows.items():
        shown.add_row(name, str(value))
    return shown


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
