"""How long one node's part in an exchange takes, and single calls, where caches are cold.

    .venv/bin/python -m tests.cold_exchange

Between two exchanges a node reads tens of megabytes of weights, which leave nothing else in its
caches. Here memory of `TRASH_BYTES` is rewritten instead; beside it, the same without that. Prints
medians, with the quartiles, in microseconds. For a machine that does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles

import msgspec
import numpy as np
import torch

from p2pinfer.core.topology import topology
from p2pinfer.model.runner import NeedSum
from p2pinfer.step_sums import StepSums
from p2pinfer.types import Plan
from p2pinfer.wire.messages import Partial
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.step_pair import Pair
from tests.step_plans import plan_of

HIDDEN = 2048
TRASH_BYTES = 64 << 20
ROUNDS = 200
TRASH = np.zeros(TRASH_BYTES // 8)
HALF = 1


def median_us(prepare: Callable[[], None], measured: Callable[[], object], *, cold: bool) -> str:
    """Median and quartiles of one call; not of the first ones, which make what is kept."""
    taken = []
    for _ in range(ROUNDS):
        prepare()
        if cold:
            np.add(TRASH, 1.0, out=TRASH)
        else:
            measured()
            prepare()
        began = time.perf_counter()
        measured()
        taken.append(1e6 * (time.perf_counter() - began))
    low, median, high = quantiles(taken[ROUNDS // 10 :], n=4)
    return f"{median:6.1f} ({low:.1f} to {high:.1f})"


def exchange(pair: Pair, plan: Plan) -> tuple[Callable[[], None], Callable[[], object]]:
    """What the leader sends, and what the other member does with it and with its own part."""
    leader, follower = pair.nodes
    parts = topology(plan, 1).roles[0].parts[HALF]
    values = np.random.default_rng(0).standard_normal((len(parts[0]), 1, HIDDEN), np.float32)
    partial = Partial(
        fence=plan.fence,
        step=1,
        link_seq=0,
        sender=0,
        stage=0,
        layer=0,
        half=HALF,
        parts=parts[0],
        tensor=Tensor(WireDType.FLOAT32, values.shape, values.data.cast("B")),
    )
    own = {node: torch.randn(1, HIDDEN) for node in parts[1]}
    sums = StepSums(topology(plan, 1), follower)

    def send() -> None:
        while leader.local.glance(0.0):
            while leader.local.receive():
                pass
        leader.send(1, msgspec.structs.replace(partial, link_seq=leader.next_sequence(1)))

    def add() -> torch.Tensor:
        follower.breathe()
        return sums.total(1, NeedSum(0, 0, HALF, own), 1)

    return send, add


def calls() -> dict[str, Callable[[], object]]:
    """Single calls on a row of hidden states, by their names."""
    x, y, z = (torch.randn(1, HIDDEN) for _ in range(3))
    a, b, c = x.numpy(), y.numpy(), np.empty((1, HIDDEN), np.float32)
    return {
        "nothing": lambda: None,
        "torch: a view": lambda: x[:1],
        "torch: a copy": lambda: y.copy_(x),
        "torch: a sum": lambda: torch.add(x, y, out=z),
        "torch: as an array": x.numpy,
        "numpy: a view": lambda: a[:1],
        "numpy: a copy": lambda: np.copyto(b, a),
        "numpy: a sum": lambda: np.add(a, b, out=c),
    }


def main() -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    model = msgspec.structs.replace(plan_of(2).model, hidden_size=HIDDEN)
    pair = Pair(plan=msgspec.structs.replace(plan_of(2), model=model))
    try:
        plan = pair.adopt(1)
        pair.step(plan)
        send, add = exchange(pair, plan)
        cases = {"an exchange": (send, add)}
        cases |= {name: ((lambda: None), call) for name, call in calls().items()}
        print(f"{'':20} {'warm, us':24} cold, us")
        for name, (prepare, measured) in cases.items():
            warm = median_us(prepare, measured, cold=False)
            print(f"{name:20} {warm:24} {median_us(prepare, measured, cold=True)}")
    finally:
        pair.close()


if __name__ == "__main__":
    main()
