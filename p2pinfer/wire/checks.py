"""Rules of control messages that a schema cannot state: how their fields must agree.

Only what a message alone can break is checked here. Whether it fits the plan, the sender or the
request is for `core/`. Each rule is stated with its message in `proto_spec.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_POSITIONS, MAX_STEP_TOKENS
from p2pinfer.types import Plan, Stage
from p2pinfer.wire.messages import (
    Activate,
    Chunk,
    ControlMessage,
    Forward,
    KvRequest,
    LogEntry,
    PreVoteReply,
    Propose,
    Step,
    Submit,
)


def check(message: ControlMessage) -> None:
    """Raise `RemoteProtocolError` naming the first rule that `message` breaks."""
    rule = _RULES.get(type(message))
    if rule is not None:
        rule(message)


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise RemoteProtocolError(complaint)


def _check_span(start: int, length: int, what: str) -> None:
    end = start + length
    _require(end <= MAX_POSITIONS, f"{what} end at {end}, beyond {MAX_POSITIONS}")


def _check_submit(message: Submit) -> None:
    _require(not (message.text and message.prompt_ids), "both text and prompt_ids are given")
    _check_span(len(message.prompt_ids), len(message.received), "prompt and received tokens")


def _check_forward(message: Forward) -> None:
    _check_span(len(message.prompt_ids), len(message.received), "prompt and received tokens")


def _check_chunk(message: Chunk) -> None:
    _check_span(message.start, len(message.tokens), "tokens")


def _check_log_entry(message: LogEntry) -> None:
    _check_span(message.start, len(message.tokens), "tokens of a log")


def _check_activate(message: Activate) -> None:
    for log in message.logs:
        _require(
            log.restart <= log.length,
            f"a log of {log.length} tokens restarts at {log.restart}",
        )
        _require(
            log.recompute <= log.restart,
            f"of {log.restart} positions before a restart {log.recompute} are recomputed",
        )


def _check_step(message: Step) -> None:
    positions = sum(len(slot.tokens) for slot in message.slots)
    _require(
        positions <= MAX_STEP_TOKENS, f"{positions} positions in a step, above {MAX_STEP_TOKENS}"
    )
    for slot in message.slots:
        _check_span(slot.start, len(slot.tokens), "positions of a slot")


def _check_kv_request(message: KvRequest) -> None:
    _require(message.start < message.end, f"start {message.start} is not below {message.end}")
    _check_span(message.end, 0, "positions")


def _check_propose(message: Propose) -> None:
    _check_plan(message.plan)


def _check_pre_vote_reply(message: PreVoteReply) -> None:
    if message.plan is not None:
        _check_plan(message.plan)


def _check_plan(plan: Plan) -> None:
    node_ids = {member.node_id for member in plan.members}
    _require(len(node_ids) == len(plan.members), "two members have the same node_id")
    count = len(plan.members)
    highest = max(_indices(plan))
    _require(highest < count, f"member {highest} is named in a plan of {count} members")
    for stage in plan.stages:
        _check_stage(stage)


def _indices(plan: Plan) -> Iterator[int]:
    """Every member index that a plan speaks of."""
    yield plan.leader
    yield from plan.voters
    for stage in plan.stages:
        for owners, standbys in _kinds(stage):
            yield from owners
            yield from chain.from_iterable(standbys)


def _kinds(stage: Stage) -> tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]:
    """Owners and standbys of each kind of unit."""
    return (
        (stage.head_owners, stage.head_standbys),
        (stage.mlp_owners, stage.mlp_standbys),
        (stage.vocab_owners, stage.vocab_standbys),
    )


def _check_stage(stage: Stage) -> None:
    _require(stage.start < stage.end, f"a stage has layers {stage.start} to {stage.end}")
    for owners, standbys in _kinds(stage):
        _require(
            len(standbys) in (0, len(owners)),
            f"standbys are given for {len(standbys)} of {len(owners)} units",
        )


_RULES: dict[type[ControlMessage], Callable[[Any], None]] = {
    Submit: _check_submit,
    Forward: _check_forward,
    Chunk: _check_chunk,
    LogEntry: _check_log_entry,
    Activate: _check_activate,
    Step: _check_step,
    KvRequest: _check_kv_request,
    Propose: _check_propose,
    PreVoteReply: _check_pre_vote_reply,
}
