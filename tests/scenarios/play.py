"""Plays a transcript: obeys its commands in order, and puts below each what came of it.

A command is a line that begins in the first column; what is indented below it was recorded; lines
that begin with `#`, and empty ones, are for the reader. `README.md` lists the commands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from p2pinfer.core import events as e
from p2pinfer.core.node import Node
from p2pinfer.types import Plan
from p2pinfer.wire.messages import Drain, Pause, Plane
from tests.scenarios.stage import Stage
from tests.scenarios.words import fence_in_words, names_in_words, plan_in_words
from tests.simulation.cluster import Setting

INDENT = "    "
_PLANES = {None: tuple(Plane), **{plane.value: (plane,) for plane in Plane}}


@dataclass(frozen=True)
class Command:
    """A pattern, and what to do with its groups."""

    pattern: re.Pattern[str]
    act: Callable[..., str | None]


COMMANDS: list[Command] = []
Act = Callable[..., str | None]


def command(pattern: str) -> Callable[[Act], Act]:
    """Register what a line that matches `pattern` as a whole does; its groups are arguments."""

    def register(act: Act) -> Act:
        COMMANDS.append(Command(re.compile(pattern), act))
        return act

    return register


class Play:
    """One transcript being played."""

    def __init__(self) -> None:
        self.setting = Setting()
        self.witness = ""
        self.built: Stage | None = None
        self.cuts: list[tuple[int, int, Plane]] = []

    @property
    def stage(self) -> Stage:
        """The cluster, once `nodes` has named its machines."""
        if self.built is None:
            raise ValueError("name the nodes first: nodes a b c")
        return self.built

    def obey(self, line: str) -> list[str]:
        """Obey one command; the lines that came of it. Raises ValueError for one it cannot."""
        for known in COMMANDS:
            if match := known.pattern.fullmatch(line):
                said = known.act(self, *match.groups())
                told = self.built.take() if self.built else []
                return told + (said.splitlines() if said else [])
        raise ValueError(f"there is no such command: {line}")


def played(text: str) -> str:
    """The transcript as it is now. Raises ValueError that names the line that cannot be obeyed."""
    play = Play()
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(INDENT):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            try:
                lines += [INDENT + told for told in play.obey(line)]
            except ValueError as error:
                raise ValueError(f"line {number}, {line}: {error}") from error
    return "\n".join(lines) + "\n"


# --- the cluster ----------------------------------------------------------------------------------


@command(r"with (min nodes|layout|quorum|orphan timeout|replicas) (\S+)")
def _with(play: Play, what: str, value: str) -> None:
    field = what.replace(" ", "_")
    kind = type(getattr(play.setting, field))
    play.setting = msgspec.structs.replace(play.setting, **{field: kind(value)})


@command(r"with inputs kept")
def _with_inputs(play: Play) -> None:
    play.setting = msgspec.structs.replace(play.setting, keep_inputs=(True,))


@command(r"with witness (\w+)")
def _with_witness(play: Play, name: str) -> None:
    play.witness = name


@command(r"nodes ([\w ]+)")
def _nodes(play: Play, names: str) -> None:
    play.built = Stage(names.split(), play.setting)
    if play.witness:
        play.stage.machine(play.witness).witness = True


@command(r"start (\w+) with the identity of (\w+)")
def _start_impostor(play: Play, name: str, other: str) -> None:
    stage = play.stage
    machine = stage.machine(name)
    machine.node_id = stage.machine(other).node_id
    machine.join = tuple(m.address for m in stage.cluster.machines if m is not machine)
    stage.cluster.boot(machine)


@command(r"start ([\w ]+?)(?: asking (\w+))?")
def _start(play: Play, names: str, asked: str | None) -> None:
    stage = play.stage
    known = [m for m in stage.cluster.machines if m.boots]
    for name in names.split():
        machine = stage.machine(name)
        other = stage.machine(asked) if asked else known[0] if known else None
        if other is not None and (asked or not machine.boots):
            machine.join = (other.address,)
        machine.gone = False
        known = known or [machine]
        stage.cluster.boot(machine)


@command(r"form ([\w ]+)")
def _form(play: Play, names: str) -> str | None:
    cluster = play.stage.cluster
    cluster.setting = msgspec.structs.replace(
        cluster.setting, min_nodes=sum(not play.stage.machine(n).witness for n in names.split())
    )
    _start(play, names, None)
    play.stage.until(play.stage.at_rest)
    play.stage.advance(1.0)
    cluster.setting = play.setting
    play.stage.take()
    return _show_plan(play)


@command(r"(kill|power off|wipe) ([\w ]+)")
def _kill(play: Play, how: str, names: str) -> None:
    for name in names.split():
        machine = play.stage.machine(name)
        join = machine.join
        play.stage.cluster.crash(machine, silent=how == "power off", wipe=how == "wipe")
        machine.join = join or machine.join


@command(r"(hang|free) the worker of (\w+)")
def _hang(play: Play, how: str, name: str) -> None:
    worker = play.stage.process(name).worker
    if how == "hang":
        worker.hang()
    else:
        worker.move()


@command(r"(stop|continue) (\w+)")
def _stop(play: Play, how: str, name: str) -> None:
    process = play.stage.process(name)
    if how == "stop":
        process.stall(frozen=True)
    else:
        process.go_on()


@command(r"slow (\w+) (\d+) times")
def _slow(play: Play, name: str, factor: str) -> None:
    play.stage.machine(name).pace = float(factor)


@command(r"slow the disk of (\w+) by ([\d.]+)s")
def _slow_disk(play: Play, name: str, seconds: str) -> None:
    play.stage.machine(name).disk.slow_s = float(seconds)


@command(r"drain (\w+) through (\w+)")
def _drain(play: Play, name: str, through: str) -> None:
    message = Drain(request_id=99, name=name)
    play.stage.process(through).take(e.Received(message=message, route=b"cdrain"))


@command(r"(pause|resume) node (\w+) through (\w+)")
def _pause(play: Play, how: str, name: str, through: str) -> None:
    message = Pause(request_id=99, name=name, resume=how == "resume")
    play.stage.process(through).take(e.Received(message=message, route=b"cpause"))


@command(r"leave (\w+)")
def _leave(play: Play, name: str) -> None:
    play.stage.process(name).take(e.ShutdownAsked())


# --- the network ----------------------------------------------------------------------------------


@command(r"cut(?: (control|steps|bulk))? ([\w ]+) (from|>) ([\w ]+)")
def _cut(play: Play, plane: str | None, these: str, how: str, those: str) -> None:
    stage = play.stage
    for one in these.split():
        for other in those.split():
            a, b = stage.machine(one).number, stage.machine(other).number
            for way in ((a, b),) if how == ">" else ((a, b), (b, a)):
                for each in _PLANES[plane]:
                    stage.network.cut(*way, each)
                    play.cuts.append((*way, each))


@command(r"heal")
def _heal(play: Play) -> None:
    for cut in play.cuts:
        play.stage.network.heal(*cut, reset=True)
    play.cuts = []


@command(
    r"reset (control|steps|bulk) between (\w+) and (\w+)"
    r"(?:, frames in flight come within ([\d.]+)s)?"
)
def _reset(play: Play, plane: str, one: str, other: str, late: str | None) -> None:
    stage = play.stage
    pair = {stage.machine(one).number, stage.machine(other).number}
    for connection in stage.network.connections(*pair):
        ends = {connection.forth.sender.number, connection.forth.receiver.number}
        if ends == pair and connection.plane in _PLANES[plane]:
            stage.network.break_connection(connection, late_s=float(late or 0))


@command(r"lose next(?: (\d+))? ([A-Z_]+) from (\w+) to (\w+)")
def _lose(play: Play, count: str | None, kind: str, source: str, target: str) -> None:
    play.stage.network.to_lose[kind, source, target] += int(count or 1)


@command(r"delay(?: (control|steps|bulk))? (\w+) > (\w+) by ([\d.]+)s")
def _delay(play: Play, plane: str | None, source: str, target: str, seconds: str) -> None:
    stage = play.stage
    a, b = stage.machine(source).number, stage.machine(target).number
    for each in _PLANES[plane]:
        stage.network.slow[a, b, each] = float(seconds)


# --- clients --------------------------------------------------------------------------------------


@command(r"submit (\w+) through (\w+): (\d+) tokens")
def _submit(play: Play, name: str, through: str, tokens: str) -> None:
    play.stage.submit(name, through, int(tokens))


@command(r"resume (\w+) through (\w+)( with a wrong token)?")
def _resume(play: Play, name: str, through: str, wrong: str | None) -> None:
    play.stage.resume(name, through, wrong=bool(wrong))


@command(r"hang up (\w+)")
def _hang_up(play: Play, name: str) -> None:
    play.stage.clients.vanish(play.stage.requests[name], for_good=True)


# --- time -----------------------------------------------------------------------------------------


@command(r"advance ([\d.]+)s")
def _advance(play: Play, seconds: str) -> None:
    play.stage.advance(float(seconds))


@command(r"until at rest")
def _until_rest(play: Play) -> None:
    play.stage.until(play.stage.cluster.agreed, 20.0)


@command(r"until all vote")
def _until_all_vote(play: Play) -> None:
    play.stage.until(play.stage.at_rest, 20.0)


@command(r"until plan in force")
def _until_plan(play: Play) -> None:
    stage, before = play.stage, play.stage.adoptions
    stage.until(lambda: stage.adoptions > before)


@command(r"until (\w+) ends")
def _until_end(play: Play, name: str) -> None:
    client = play.stage.requests[name]
    play.stage.until(lambda: bool(client.end))


@command(r"until (\w+) has (\d+) tokens")
def _until_tokens(play: Play, name: str, tokens: str) -> None:
    client, count = play.stage.requests[name], int(tokens)
    play.stage.until(lambda: len(client.shown) >= count)


@command(r"until (\w+) leads")
def _until_leads(play: Play, name: str) -> None:
    machine, cluster = play.stage.machine(name), play.stage.cluster
    play.stage.until(lambda: cluster.leader() is machine)


@command(r"until next ([A-Z_]+) from (\w+) to (\w+)")
def _until_message(play: Play, kind: str, source: str, target: str) -> None:
    recent, where = play.stage.recent, (kind, source, target)
    before = recent[where]
    play.stage.until(lambda: recent[where] > before)


@command(r"until (\w+) is gone")
def _until_gone(play: Play, name: str) -> None:
    machine = play.stage.machine(name)
    play.stage.until(lambda: not machine.running)


# --- what is there --------------------------------------------------------------------------------


@command(r"(tell|hush) ([A-Z_ ]+)")
def _tell(play: Play, how: str, kinds: str) -> None:
    if how == "tell":
        play.stage.told_kinds |= set(kinds.split())
    else:
        play.stage.told_kinds -= set(kinds.split())


def _plans(play: Play) -> Iterator[tuple[str, Plan | None]]:
    for process in play.stage.cluster.living():
        topology = process.worker.active
        yield process.machine.name, topology.plan if topology else None


@command(r"show plan")
def _show_plan(play: Play) -> str:
    plans: dict[str, list[str]] = {}
    ids = {m.node_id: m.name for m in reversed(play.stage.cluster.machines)}
    for name, plan in _plans(play):
        plans.setdefault(plan_in_words(plan, ids) if plan else "no plan", []).append(name)
    return "\n".join(f"{' '.join(names)}: {text}" for text, names in plans.items())


@command(r"show roles")
def _show_roles(play: Play) -> str:
    lines = []
    for machine in play.stage.cluster.machines:
        process = machine.process
        if process is None or not process.alive:
            if machine.boots:
                lines.append(f"{machine.name}: {'gone' if machine.gone else 'dead'}")
            continue
        status = _status(play, machine.name)
        leader = status["leader"]
        role = (
            f"leads in term {status['term']}"
            if leader == machine.name
            else f"follows {leader} in term {status['term']}"
            if leader
            else f"has no leader, in term {status['term']}"
        )
        topology = process.worker.active
        obeys = fence_in_words(topology.plan.fence) if topology else "no plan"
        lines.append(f"{machine.name}: {role}, obeys {obeys}")
    return "\n".join(lines)


def _status(play: Play, name: str) -> dict[str, object]:
    process = play.stage.process(name)
    assert isinstance(process.node, Node)
    return process.node.status(process.machine.seconds())


@command(r"show status of (\w+)")
def _show_status(play: Play, name: str) -> str:
    status = _status(play, name)
    tolerates, voters = status["tolerates"], status["voters"]
    assert isinstance(tolerates, list)
    assert isinstance(voters, list)
    if not status["ready"]:
        return f"{name}: not ready, waits for {status['waiting']}"
    return (
        f"{name}: ready; voters {names_in_words(voters)}; "
        f"survives the death of {names_in_words(tolerates)}"
    )


@command(r"show members of (\w+)")
def _show_members(play: Play, name: str) -> str:
    members = _status(play, name)["members"]
    assert isinstance(members, list)
    others = [f"{m['name']} {m['state']}" for m in members if m["name"] != name]
    return f"{name}: {', '.join(others)}"


@command(r"show disk of (\w+)")
def _show_disk(play: Play, name: str) -> str:
    state = play.stage.machine(name).disk.state
    if state is None:
        return f"{name}: nothing"
    plan = f"plan {fence_in_words(state.plan.fence)}" if state.plan else "no plan"
    known = " in force" if state.active else ""
    vote = next((m.name for m in play.stage.cluster.machines if m.node_id == state.voted_for), "-")
    blank = ", blank" if state.blank else ""
    return f"{name}: term {state.term}, voted for {vote}, {plan}{known}{blank}"


@command(r"show logs of (\w+)")
def _show_logs(play: Play, name: str) -> str:
    client = play.stage.requests[name]
    lengths = []
    for process in play.stage.cluster.living():
        logs = process.worker.logs
        held = len(logs.tokens(client.request_id)) if client.request_id in logs else 0
        lengths.append(f"{process.machine.name} {max(0, held - len(client.prompt))}")
    return f"reply tokens of {name}: {', '.join(lengths)}; its client {len(client.shown)}"


@command(r"show reply (\w+)")
def _show_reply(play: Play, name: str) -> str:
    return play.stage.reply(name)


@command(r"show dropped frames of (\w+)")
def _show_dropped(play: Play, name: str) -> str:
    dropped = play.stage.process(name).worker.links.dropped
    return f"{name} has dropped {'some' if dropped else 'no'} step frames"
