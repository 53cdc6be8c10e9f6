"""What clients ask of a node besides replies: its view of the cluster, its plan, a member to leave
or pause, a link to measure; and the answers.

`messages.py` numbers them and gives them out together with the others.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from p2pinfer.limits import MAX_ECHOES, MAX_STATUS_BYTES
from p2pinfer.types import U63, Name
from p2pinfer.wire.fields import ControlMessage, EchoBytes, Label


class StatusRequest(ControlMessage, frozen=True, kw_only=True):
    """A client asks for the node's view of the cluster."""

    request_id: U63


class StatusReply(ControlMessage, frozen=True, kw_only=True):
    """The `status --json` object as UTF-8 JSON."""

    request_id: U63
    body: Annotated[bytes, Meta(max_length=MAX_STATUS_BYTES)]


class Drain(ControlMessage, frozen=True, kw_only=True):
    """An operator asks that a member's units be handed over, and that it leave.

    An empty name is the asked node's, which is to leave for good; another one's node is told by the
    asked one. Answered by DONE when the member has left, or by FAILED.
    """

    request_id: U63
    name: Label


class Pause(ControlMessage, frozen=True, kw_only=True):
    """An operator asks that a member own no units until it is resumed, or started again.

    An empty name is the asked node's; another one's node is told by the asked one. Answered by DONE
    when the plan in force gives it none (or, with `resume`, when it says that it may own some), or
    by FAILED.
    """

    request_id: U63
    name: Label
    resume: bool = False


class Done(ControlMessage, frozen=True, kw_only=True):
    """What a command of a client asked for is done."""

    request_id: U63


class PlanRequest(ControlMessage, frozen=True, kw_only=True):
    """A client asks who holds what, or would if `without` were gone; answered by STATUS_REPLY."""

    request_id: U63
    without: Label = ""


class MeasureLink(ControlMessage, frozen=True, kw_only=True):
    """A client asks how long `count` echoes from the asked node to the member `name` take, which
    carry `there` bytes to it and `back` bytes back; answered by STATUS_REPLY or FAILED."""

    request_id: U63
    name: Name
    there: EchoBytes
    back: EchoBytes
    count: Annotated[int, Meta(ge=1, le=MAX_ECHOES)]
