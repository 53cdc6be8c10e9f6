"""Worker processes: a leader's steps give way to a plan that is to come."""

from __future__ import annotations

from pathlib import Path

from p2pinfer.core.orders import GaveWay, GiveWay
from p2pinfer.types import DType, Fence, SamplingParams
from tests.lockstep import Lockstep
from tests.processes.fleet import Fleet, restart
from tests.random_models import write_random_model

PROMPT = [5, 9, 200, 31, 77, 8, 120]
TOKENS = 150


def test_a_leader_that_gives_way_leaves_nothing_to_be_drawn_again(tmp_path: Path) -> None:
    """What its last step drew is in the log; should no plan come, the reply goes on by itself."""
    folder = write_random_model(tmp_path / "model", seed=11)
    with Fleet(folder, 2, "heads", DType.BFLOAT16) as fleet:
        fleet.submit(1, PROMPT, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
        fleet.some_of(1, 3)
        for epoch in (1, 2):
            gave_way = GaveWay(fence=Fence(1, epoch))
            fleet.workers[0].pipe.send(GiveWay(fence=gave_way.fence))
            fleet.await_report(0, lambda r, told=gave_way: r == told)  # type: ignore[misc]
            if epoch == 1:
                plan = fleet.plan(Fence(1, 2))
                answers = fleet.adopt(plan)
                [log] = answers[0].logs
                assert restart(log, answers, plan) == len(log.tokens) - 1
        whole = Lockstep(folder, dtype=DType.BFLOAT16)
        assert fleet.reply(1) == whole.greedy(PROMPT, TOKENS)[0]
