"""Where the parts of a node put what they want done; a message to oneself takes the same way.

A leader also serves and owns units, so it proposes to itself, forwards to itself and so on: its
own messages go through the same handlers as everybody's, without the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from p2pinfer.core.events import AnyOrder, Output, ReplyTo, Send, TellWorker
from p2pinfer.limits import MAX_REASON_CHARS
from p2pinfer.wire.messages import ControlMessage, Failed


class Outbox:
    """Collects outputs in order. `address_of` gives the link to a node, or "" where there is none.

    A message to a node without a link is dropped: whoever needs an answer sends again.
    """

    def __init__(self, node_id: str, address_of: Callable[[str], str]) -> None:
        self.node_id = node_id
        self.to_self: deque[ControlMessage] = deque()
        self._address_of = address_of
        self._outputs: list[Output] = []

    def add(self, output: Output) -> None:
        """Put one output, or fact, at the end."""
        self._outputs.append(output)

    def order(self, order: AnyOrder) -> None:
        """Tell this node's worker."""
        self.add(TellWorker(order=order))

    def send(self, node_id: str, message: ControlMessage) -> None:
        """Send to a member by its id; to oneself it is handled after the present message."""
        if node_id == self.node_id:
            self.to_self.append(message)
        elif address := self._address_of(node_id):
            self.add(Send(address=address, message=message))

    def refuse(self, route: bytes, request_id: int, code: str, reason: str) -> None:
        """Answer a client that its request is not done; all but a wrong one it may repeat."""
        failed = Failed(
            request_id=request_id,
            code=code,
            message=reason[:MAX_REASON_CHARS],
            retryable=code != "invalid_request",
        )
        self.add(ReplyTo(route=route, message=failed))

    def take(self) -> list[Output]:
        """All outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs
