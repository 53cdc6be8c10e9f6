"""What the messages are made of: planes, the two kinds of body, and bounded field types."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from p2pinfer.limits import (
    MAX_ECHO_BYTES,
    MAX_NAME_CHARS,
    MAX_REASON_CHARS,
    MAX_STAGES,
    MAX_TEXT_CHARS,
    MAX_UNITS,
)
from p2pinfer.types import U63, Fence, MemberIndex

Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
Code = Annotated[str, Meta(max_length=64, pattern=r"\A[a-z_]*\Z")]
Label = Annotated[str, Meta(max_length=MAX_NAME_CHARS, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
"""A node's name, or empty."""

MaybeIdentity = Annotated[str, Meta(pattern=r"\A([0-9a-f]{16})?\Z")]
Rate = Annotated[float, Meta(ge=0.0, le=1e9)]
Unit = Annotated[int, Meta(ge=0, lt=MAX_UNITS)]
EchoBytes = Annotated[int, Meta(ge=0, le=MAX_ECHO_BYTES)]
StageIndex = Annotated[int, Meta(ge=0, lt=MAX_STAGES)]


class Plane(StrEnum):
    """Which pair of sockets carries a message."""

    CONTROL = "control"
    STEPS = "steps"
    BULK = "bulk"


class ControlMessage(Struct, frozen=True, kw_only=True):
    """A message whose body is MessagePack."""


class DataFrame(Struct, frozen=True, kw_only=True):
    """A message whose body is a fixed header and raw tensor bytes.

    `link_seq` numbers the frames of one directed step link from 0 in every fence, so that a lost
    frame is seen as a gap. `sender` is the index of the sending member in the plan of `fence`.
    """

    fence: Fence
    step: U63
    link_seq: U63
    sender: MemberIndex
