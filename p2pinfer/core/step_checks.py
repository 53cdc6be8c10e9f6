"""What a plan lets a member send within a step, and whether a step follows from those before it.

The wire has checked that a frame is well formed; here its sender, its shape and its contents are
held against the plan, so that whatever passes can be computed with.
"""

from __future__ import annotations

from p2pinfer.core.token_log import TokenLogs
from p2pinfer.core.topology import Topology
from p2pinfer.core.units import unit_bounds
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_STEP_TOKENS
from p2pinfer.types import ModelSpec, UnitKind
from p2pinfer.wire.messages import (
    Candidates,
    Hidden,
    Logits,
    LogitsRequest,
    Partial,
    Step,
    StepAck,
)
from p2pinfer.wire.tensors import WireDType

SUM_DTYPES = {"float32": WireDType.FLOAT32, "bfloat16": WireDType.BFLOAT16}
"""By `ModelSpec.wire_dtype`."""

StepMessage = Step | StepAck | Partial | Hidden | Candidates | LogitsRequest | Logits


def check_frame(topology: Topology, sender: int, message: StepMessage) -> None:
    """Raise `RemoteProtocolError` for what the plan does not let member `sender` send to me."""
    if not _fits(topology, sender, message):
        raise RemoteProtocolError(
            f"{type(message).__name__}: the plan does not let this member send that"
        )


def _fits(topology: Topology, sender: int, message: StepMessage) -> bool:
    plan = topology.plan
    hidden_size = plan.model.hidden_size
    match message:
        case Step():
            return sender == plan.leader and _computable(plan.model, message)
        case LogitsRequest():
            return sender == plan.leader
        case StepAck():
            return topology.leads
        case Partial(tensor=tensor):
            role = topology.role(message.stage)
            return (
                role is not None
                and sender in role.peers
                and role.holding.span.start <= message.layer < role.holding.span.end
                and (
                    message.parts == role.parts[message.half].get(sender)
                    or topology.is_whole(message.stage, message.half, message.parts)
                )
                and tensor.shape[1] <= MAX_STEP_TOKENS
                and tensor.shape[2] == hidden_size
                and tensor.dtype == SUM_DTYPES[plan.model.wire_dtype]
            )
        case Hidden(tensor=tensor):
            role = topology.role(message.stage + 1)
            return (
                role is not None
                and sender == role.hidden_from
                and tensor.shape[0] <= MAX_STEP_TOKENS
                and tensor.shape[1] == hidden_size
                and tensor.dtype == WireDType.FLOAT32
            )
        case Candidates():
            return topology.leads and message.units == topology.vocab.get(sender)
        case _:
            return (
                topology.leads
                and message.unit in topology.vocab.get(sender, ())
                and message.tensor.shape[1] == _width(plan.model, message.unit)
                and message.tensor.dtype == WireDType.FLOAT32
            )


def write_down(topology: Topology, logs: TokenLogs, newest: int, step: Step) -> None:
    """Write a step's tokens in the logs, and forget what ended; `newest` is the step before it.

    Raises `RemoteProtocolError` when it does not follow from the steps before: what a slot reads
    below its start must have been computed here.
    """
    if step.step <= newest:
        raise RemoteProtocolError("a step that was there before")
    logs.take(step)
    if not any(held.head_units for held in topology.holdings):
        return
    if any(logs.coverage.least(slot.request_id) < slot.start for slot in step.slots):
        raise RemoteProtocolError("a slot beyond the positions that have their KV here")


def _width(model: ModelSpec, vocab_unit: int) -> int:
    start, end = unit_bounds(model, UnitKind.VOCAB, vocab_unit)
    return end - start


def _computable(model: ModelSpec, step: Step) -> bool:
    """Whether every position and every token of a step exists in the model."""
    rows = sum(len(slot.tokens) for slot in step.slots)
    return (
        rows <= MAX_STEP_TOKENS
        and all(
            slot.start + len(slot.tokens) <= model.max_positions
            and max(slot.tokens) < model.vocab_size
            and (not slot.capacity or slot.start + len(slot.tokens) <= slot.capacity)
            for slot in step.slots
        )
        and all(
            final.position < model.max_positions and final.token < model.vocab_size
            for final in step.finals
        )
    )
