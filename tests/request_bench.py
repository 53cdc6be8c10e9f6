"""The leader's log of requests under one plan after another, with a client's words as calls."""

from __future__ import annotations

from typing import Any

from p2pinfer.core import events as e
from p2pinfer.core.agreement import Agreed
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.request_log import RequestLog
from p2pinfer.types import Fence, Member, SamplingParams
from p2pinfer.wire import messages as m

LEADER, OTHER, THIRD = "3" * 16, "4" * 16, "5" * 16
ME = Member(node_id=LEADER, boot_id="2" * 16, name="me", address="tcp://me:7720")
PROMPT = (7, 8)
PARAMS = SamplingParams()


class Ledger:
    """A leader's log under plans (1, 1), (1, 2) and so on; messages to every node are seen."""

    def __init__(self) -> None:
        self.box = Outbox("6" * 16, lambda node_id: node_id)
        config = e.NodeConfig(member=ME, model=None, cluster_id="5" * 16, orphan_timeout=10.0)
        self.log = RequestLog(config, self.box)
        self.epoch = 1

    @property
    def fence(self) -> Fence:
        """Of the plan in force, or of the next one."""
        return Fence(1, self.epoch)

    def forward(self, now: float = 0.0, serving: str = OTHER, **values: Any) -> Ledger:
        fields: dict[str, Any] = {
            "request_id": 1,
            "prompt_ids": PROMPT,
            "params": PARAMS,
            **values,
        }
        self.log.forward(m.Forward(serving_id=serving, **fields), now)
        return self

    def cancel(self, sender: str = OTHER, request_id: int = 1, reason: str = "client") -> Ledger:
        self.log.cancel(m.Cancel(request_id=request_id, reason=reason), sender)
        return self

    def committed(self, start: int, *tokens: int, request_id: int = 1, epoch: int = 0) -> Ledger:
        found = tuple(
            m.DrawnToken(request_id=request_id, index=start + i, token=token)
            for i, token in enumerate(tokens)
        )
        fence = Fence(1, epoch or self.epoch)
        self.log.committed(e.TokensCommitted(fence=fence, tokens=found))
        return self

    def settled(self, epoch: int = 0) -> Ledger:
        self.log.settled(e.FenceSettled(fence=Fence(1, epoch or self.epoch)))
        return self

    def ended(self, total: int, *, now: float = 0.0, epoch: int = 0, **values: Any) -> Ledger:
        fields = {"request_id": 1, "reason": "stop", **values}
        fence = Fence(1, epoch or self.epoch)
        self.log.ended(e.RequestEnded(fence=fence, total_tokens=total, **fields), now)
        return self

    def adopt(
        self,
        *agreed: Agreed,
        lost: tuple[str, ...] = (),
        now: float = 0.0,
        exact: bool = True,
        detect_s: float = 0.5,
    ) -> Ledger:
        """The next plan is activated."""
        self.log.adopt(agreed, lost, detect_s, exact, now)
        self.epoch += 1
        return self

    def start(self) -> list[Any]:
        """The orders that the worker gets when the plan is in force."""
        self.box.take()
        self.log.start_all(self.fence)
        return self.orders()

    def started(self) -> Ledger:
        self.start()
        return self

    def orders(self) -> list[Any]:
        return self.take()[0]

    def sent(self) -> list[tuple[str, Any]]:
        return self.take()[1]

    def drawn(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """(node, [(index, token)]) of every DRAWN sent."""
        return [
            (to, [(t.index, t.token) for t in message.tokens])
            for to, message in self.sent()
            if isinstance(message, m.Drawn)
        ]

    def take(self) -> tuple[list[Any], list[tuple[str, Any]]]:
        """Orders to the worker, and messages with their receivers."""
        outputs = self.box.take()
        orders = [o.order for o in outputs if isinstance(o, e.TellWorker)]
        sent = [(o.address, o.message) for o in outputs if isinstance(o, e.Send)]
        return orders, sent


def agreed(*tokens: int, restart: int = 0, prompt_tokens: int = 2, **values: Any) -> Agreed:
    """A log that the members agreed on: PROMPT, then these."""
    request_id = values.pop("request_id", 1)
    log = e.TokenLog(
        request_id=request_id,
        term=1,
        prompt_tokens=prompt_tokens,
        params=values.pop("params", PARAMS),
        tokens=(*values.pop("prompt", PROMPT), *tokens),
    )
    rung = values.pop("rung", "none")
    assert not values
    return Agreed(request_id=request_id, log=log, restart=restart, rung=rung)


def started(orders: list[Any]) -> list[tuple[int, tuple[int, ...], int]]:
    """(request, reply tokens, position it is computed from) of each start."""
    return [(o.request_id, o.received, o.computed) for o in orders if isinstance(o, e.StartRequest)]
