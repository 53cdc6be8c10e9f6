"""The messages of the data plane: steps and their tensors, and the bulk transfer of KV.

`messages.py` numbers them and gives them out together with those of the control plane.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from p2pinfer.limits import (
    MAX_ECHO_BYTES,
    MAX_LAYERS,
    MAX_PARTS,
    MAX_POSITIONS,
    MAX_REQUESTS,
    MAX_STEP_SLOTS,
    MAX_STEP_TOKENS,
    MAX_UNITS,
)
from p2pinfer.types import U16, U32, U63, Digest, Fence, Identity, Length, SamplingParams, TokenId
from p2pinfer.wire.fields import ControlMessage, DataFrame, EchoBytes, StageIndex, Unit
from p2pinfer.wire.tensors import Tensor

# --- steps --------------------------------------------------------------------------------------


class LinkOpen(ControlMessage, frozen=True, kw_only=True):
    """First message on a step or bulk link: whose it is and which plan it serves."""

    node_id: Identity
    boot_id: Identity
    fence: Fence


class Slot(Struct, frozen=True, kw_only=True):
    """A request's run of positions `[start, start + len(tokens))` in one step.

    `capacity` (positions to reserve), `params` and `prompt_tokens` (how many of its tokens are the
    prompt) come with the first slot of a request in a fence. KV from `start` on is void before.
    `sample` asks for candidates after the last position.
    """

    request_id: U63
    start: U32
    tokens: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]
    sample: bool = False
    capacity: Length = 0
    params: SamplingParams | None = None
    prompt_tokens: Length = 0


class FinalToken(Struct, frozen=True, kw_only=True):
    """The last token of a log, at `position`: written down without being computed. That of a reply
    which ends, or what was drawn just before another plan."""

    request_id: U63
    position: Annotated[int, Meta(ge=0, lt=MAX_POSITIONS)]
    token: TokenId


class Step(ControlMessage, frozen=True, kw_only=True):
    """Leader to every node: compute these slots, and write their tokens down: they are the log.

    `finals` are tokens to write down only; of requests that `ended` all is forgotten. Answered by
    STEP_ACK before anything is computed.
    """

    fence: Fence
    step: U63
    link_seq: U63
    slots: Annotated[tuple[Slot, ...], Meta(max_length=MAX_STEP_SLOTS)]
    ended: Annotated[tuple[U63, ...], Meta(max_length=MAX_REQUESTS)] = ()
    finals: Annotated[tuple[FinalToken, ...], Meta(max_length=MAX_STEP_SLOTS)] = ()


class StepAck(ControlMessage, frozen=True, kw_only=True):
    """The tokens of this step, and of all before it, are in the sender's log."""

    fence: Fence
    step: U63
    link_seq: U63


Filler = Annotated[bytes, Meta(max_length=MAX_ECHO_BYTES)]


class EchoRequest(ControlMessage, frozen=True, kw_only=True):
    """Send so many bytes `back`, so that I see how long it takes; of no plan, and not numbered."""

    number: U32
    back: EchoBytes
    filler: Filler


class EchoReply(ControlMessage, frozen=True, kw_only=True):
    """Answer to the ECHO_REQUEST of that number; `late` where a step had to end before."""

    number: U32
    late: bool
    filler: Filler


class Partial(DataFrame, frozen=True, kw_only=True):
    """Subtree sums of one half layer. `parts` are tree nodes; `tensor` is [parts, rows, hidden]."""

    stage: StageIndex
    layer: Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]
    half: Annotated[int, Meta(ge=0, le=1)]
    parts: Annotated[tuple[U16, ...], Meta(min_length=1, max_length=MAX_PARTS)]
    tensor: Tensor


class Hidden(DataFrame, frozen=True, kw_only=True):
    """Hidden states [rows, hidden] leaving `stage` for the next one."""

    stage: StageIndex
    tensor: Tensor


class Candidates(DataFrame, frozen=True, kw_only=True):
    """Best candidates of some vocab units for every sampling slot, in the order of the step.

    `ids` and `logits` are [slots, units, k] (unused places: id -1), `lse` is [slots, units]: the
    log-sum-exp of the unit's logits. What they are for each kind of draw: `proto_spec.md`, 10.3.
    """

    units: Annotated[tuple[Unit, ...], Meta(min_length=1, max_length=MAX_UNITS)]
    ids: Tensor
    logits: Tensor
    lse: Tensor


class LogitsRequest(ControlMessage, frozen=True, kw_only=True):
    """Leader to vocab owners: send the whole logits of these sampling slots of `step`."""

    fence: Fence
    step: U63
    link_seq: U63
    slots: Annotated[tuple[U16, ...], Meta(min_length=1, max_length=MAX_STEP_SLOTS)]


class Logits(DataFrame, frozen=True, kw_only=True):
    """Whole logits, after penalty, of one vocab unit for the asked slots: [slots, unit width]."""

    unit: Unit
    tensor: Tensor


# --- bulk ---------------------------------------------------------------------------------------


class KvDelta(DataFrame, frozen=True, kw_only=True):
    """New K and V rows of one unit for positions [start, start + rows), all layers of the span.

    `tensor` is [layers, 2, rows, head_dim]; `log_digest` is the SHA-256 of
    tokens[0 : start + rows], in hexadecimal; here it must not be empty.
    """

    request_id: U63
    stage: StageIndex
    unit: Unit
    start: U32
    log_digest: Digest
    tensor: Tensor


class KvRequest(ControlMessage, frozen=True, kw_only=True):
    """A standby asks for the KV of a unit by position, and grants credit in bytes."""

    fence: Fence
    request_id: U63
    stage: StageIndex
    unit: Unit
    start: U32
    end: U32
    credit: U63


class Credit(ControlMessage, frozen=True, kw_only=True):
    """The receiver of bulk frames grants that many more bytes."""

    fence: Fence
    bytes: U63
