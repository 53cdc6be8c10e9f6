"""A serving node by itself: what its clients and its leader see of it."""

from __future__ import annotations

from typing import Any, TypeVar

from p2pinfer.core import events as e
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.requests import Serving
from p2pinfer.types import DType, Member, ModelSpec, SamplingParams
from p2pinfer.wire import messages as m

T = TypeVar("T")
ME = Member(node_id="1" * 16, boot_id="2" * 16, name="me", address="tcp://me:7720")
LEADER, OTHER = "3" * 16, "4" * 16
MODEL = ModelSpec(
    name="toy",
    model_id="ab" * 32,
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    intermediate_size=1024,
    vocab_size=512,
    max_positions=128,
    dtype=DType.FLOAT32,
    kv_dtype=DType.FLOAT32,
)


class Desk:
    """A serving node's replies, whose leader is another node."""

    def __init__(self, leader: str = LEADER, **settings: Any) -> None:
        values = {"member": ME, "model": MODEL, "cluster_id": "5" * 16, **settings}
        self.box = Outbox(ME.node_id, lambda node_id: f"to {node_id}")
        self.serving = Serving(e.NodeConfig(**values), self.box)
        if leader:
            self.serving.leader_found(leader, 1)
        self.outputs: list[e.Output] = []

    def submit(
        self, now: float = 0.0, *, waiting: str = "", route: bytes = b"a", **values: Any
    ) -> Desk:
        fields: dict[str, Any] = {
            "request_id": 1,
            "prompt_ids": (7, 8),
            "received": (),
            "params": SamplingParams(),
            **values,
        }
        self.serving.submit(e.ClientSubmitted(route=route, **fields), waiting, now)
        return self.look(now, ready=not waiting, waiting=waiting)

    def look(
        self, now: float, *, ready: bool = True, waiting: str = "2 more", leaderless: bool = False
    ) -> Desk:
        waiting = "" if ready else waiting
        self.serving.look(ready=ready, waiting=waiting, leaderless=leaderless, now=now)
        self.outputs += self.box.take()
        return self

    def drawn(
        self,
        start: int,
        *tokens: int,
        now: float = 0.0,
        request_id: int = 1,
        interruptions: tuple[m.Interruption, ...] = (),
    ) -> Desk:
        found = tuple(
            m.DrawnToken(request_id=request_id, index=start + i, token=token)
            for i, token in enumerate(tokens)
        )
        self.serving.drawn(m.Drawn(tokens=found, interruptions=interruptions), now)
        return self.look(now)

    def ended(self, total: int, *, now: float = 0.0, **values: Any) -> Desk:
        fields = {"request_id": 1, "reason": "stop", **values}
        self.serving.ended(m.Ended(total_tokens=total, **fields), now)
        return self.look(now)

    def told(self, kind: type[T]) -> list[T]:
        found = [o for o in self.outputs if isinstance(o, kind)]
        self.outputs = [o for o in self.outputs if not isinstance(o, kind)]
        return found

    def messages(self, kind: type[T]) -> list[T]:
        found = [o for o in self.outputs if isinstance(getattr(o, "message", None), kind)]
        self.outputs = [o for o in self.outputs if o not in found]
        return [o.message for o in found]  # type: ignore[attr-defined]
