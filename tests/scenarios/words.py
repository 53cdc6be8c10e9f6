"""Facts, plans and messages of a simulated cluster in short words, for the transcripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from p2pinfer.core import events as e
from p2pinfer.types import Failover, Fence, Plan
from p2pinfer.wire.messages import (
    BY_KIND,
    Ack,
    Activate,
    Drawn,
    Ended,
    Forward,
    LogEntry,
    LogRequest,
    Message,
    Nack,
    PreVoteReply,
    PreVoteRequest,
    Propose,
    Step,
    StepAck,
    VoteReply,
    VoteRequest,
)

Name = Callable[[int], str]
"""The name of a request, by its id."""

ADDRESSED = ("PROPOSE", "ACTIVATE", "LOG_REQUEST", "PreVote", "VoteRe", "it speaks")
"""Dropped messages that a play tells of: those of elections and plans."""


def fence_in_words(fence: Fence) -> str:
    """`2.5` for epoch 5 of term 2."""
    return f"{fence.term}.{fence.epoch}" if fence != Fence() else "no plan"


def names_in_words(names: Iterable[str]) -> str:
    """Names one after the other."""
    return " ".join(names) or "nobody"


def plan_in_words(plan: Plan, ids: Mapping[str, str]) -> str:
    """Who leads, who votes (and who voted before), who owns which head units, and who keeps
    replicas of which; `ids` are the names of all nodes by their ids."""
    names = [member.name for member in plan.members]
    voters = sorted(names[index] for index in plan.voters)
    text = f"plan {fence_in_words(plan.fence)} of {names[plan.leader]}: voters {' '.join(voters)}"
    before = sorted(ids[node_id] for node_id in plan.old_voters)
    if before != voters:
        text += f" (before: {' '.join(before)})"
    for stage in plan.stages:
        owned = {
            names[index]: [unit for unit, owner in enumerate(stage.head_owners) if owner == index]
            for index in sorted(set(stage.head_owners))
        }
        kept = {
            name: [unit for unit, copies in enumerate(stage.head_standbys) if index in copies]
            for index, name in enumerate(names)
        }
        layers = f"layers {stage.start}-{stage.end - 1} " if len(plan.stages) > 1 else ""
        text += f"; {layers}heads {_by_name(owned)}"
        if any(kept.values()):
            text += f"; replicas {_by_name(kept)}"
        idle = [name for index, name in enumerate(names) if index not in stage.head_owners]
        if idle and len(plan.stages) == 1:
            text += f"; nothing {' '.join(sorted(idle))}"
    return text


def _by_name(held: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {_units(units)}" for name, units in sorted(held.items()) if units)


def _units(units: Iterable[int]) -> str:
    return "+".join(map(str, units))


def failover_in_words(failover: Failover, prompt_tokens: int) -> str:
    """What interrupted a reply, and where."""
    how = {
        "replay": "all computed again",
        "recompute": "KV made of inputs",
        "replica": "KV of replicas",
        "none": "KV kept",
    }
    came = how[failover.rung]
    token = failover.position - prompt_tokens
    return (
        f"interrupted after token {token}: lost {names_in_words(failover.lost)}, {came}, "
        f"stalled {failover.stall_s:.1f} s"
    )


def fact_in_words(fact: e.Fact, own_name: str, name: Name) -> str:  # noqa: PLR0911, PLR0912
    """What a node says became true; empty where a transcript does not tell of it."""
    match fact:
        case e.PeerSuspected():
            return f"suspects {fact.name} ({fact.reason})"
        case e.PeerDead():
            return f"{fact.name} is dead ({fact.reason})"
        case e.PeerLeft():
            return f"{fact.name} has left"
        case e.PeerRefused():
            way = "refuses" if fact.by_us else "is refused by"
            return f"{way} a node ({fact.code})"
        case e.LeaderElected():
            return f"leads in term {fact.term}" if fact.name == own_name else ""
        case e.LeaderLost():
            return f"leads no longer ({fact.reason})" if fact.name == own_name else ""
        case e.ElectionStarted():
            return f"stands for election in term {fact.term}"
        case e.WorkerHung():
            return "its worker hangs" if fact.hung else "its worker moves again"
        case e.PairBroken():
            return f"{' and '.join(fact.names)} do not hear each other: {fact.loses} gives way"
        case e.MemberSlow():
            return f"{fact.name} is slow"
        case e.PlanProposed():
            whom = names_in_words(fact.members)
            return f"proposes {fence_in_words(fact.fence)} to {whom} ({fact.why})"
        case e.PlanAdopted():
            return f"obeys {fence_in_words(fact.fence)}"
        case e.PlanFailed():
            return f"plan {fence_in_words(fact.fence)} failed ({fact.reason})"
        case e.RequestRestored():
            which = name(fact.request_id)
            came = {"replica": " (replicas)", "recompute": " (made of inputs)"}.get(fact.rung, "")
            kept = f"KV for {fact.restart}{came}"
            return f"{which} goes on: its log has {fact.length} tokens, {kept}"
        case e.FrameDropped() if fact.reason.startswith(ADDRESSED):
            return f"drops {fact.reason}"
        case e.JoinWaiting():
            return "waits for a cluster to join"
        case _:
            return ""


def message_in_words(message: Message, name: Name) -> str:  # noqa: PLR0911
    """A message with what matters of it in a play."""
    kind = BY_KIND[type(message)].name
    match message:
        case PreVoteRequest() | VoteRequest():
            return f"{kind} in term {message.term}, has plan {fence_in_words(message.plan_fence)}"
        case PreVoteReply() | VoteReply():
            return f"{kind} in term {message.term}: {'yes' if message.granted else 'no'}"
        case Propose():
            return f"{kind} {fence_in_words(message.plan.fence)}"
        case Ack():
            return f"{kind} {fence_in_words(message.fence)}{_holds(message, name)}"
        case Nack():
            return f"{kind} {fence_in_words(message.fence)} ({message.message})"
        case LogRequest():
            wanted = names_in_words(map(name, message.request_ids))
            return f"{kind} {fence_in_words(message.fence)} of {wanted}"
        case LogEntry():
            end = message.start + len(message.tokens)
            return f"{kind} of {name(message.request_id)}, tokens {message.start} to {end - 1}"
        case Activate():
            logs = "".join(
                f"; {name(log.request_id)} of {log.length} tokens, KV for {log.restart}"
                f"{f', {log.recompute} of inputs' if log.recompute else ''}"
                for log in message.logs
            )
            return f"{kind} {fence_in_words(message.fence)}{logs}"
        case Forward():
            return f"{kind} {name(message.request_id)} with {len(message.received)} reply tokens"
        case Drawn():
            told = " ".join(f"{name(t.request_id)}[{t.index}]" for t in message.tokens)
            return f"{kind} {told}"
        case Ended():
            return f"{kind} {name(message.request_id)} ({message.code or message.reason})"
        case Step():
            return f"{kind} {message.step} of {fence_in_words(message.fence)}"
        case StepAck():
            return f"{kind} {message.step} of {fence_in_words(message.fence)}"
        case _:
            return kind


def _holds(message: Ack, name: Name) -> str:
    return "".join(
        f"; {name(log.request_id)} of {log.length} tokens (term {log.term}), "
        f"KV for {_covered(message, log.request_id)}{_inputs(message, log.request_id)}"
        for log in message.logs
    )


def _inputs(message: Ack, request_id: int) -> str:
    """Of how many positions it keeps the inputs, if it keeps any."""
    runs = [run for run in message.inputs if run.request_id == request_id]
    return "".join(f", inputs for {run.positions}" for run in runs)


def _covered(message: Ack, request_id: int) -> str:
    """How many positions, and of which head units; others have none."""
    runs = [run for run in message.coverage if run.request_id == request_id]
    return ", ".join(f"{run.positions} of heads {_units(run.units)}" for run in runs) or "0"
