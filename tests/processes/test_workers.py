"""Worker processes over TCP: right tokens, exact traffic, hostile frames."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from p2pinfer.core.events import (
    FenceSettled,
    Halt,
    PlanLoaded,
    Recompute,
    RequestEnded,
    StartRequest,
    StepFailed,
    TokensCommitted,
    WorkerReady,
    WorkerStats,
)
from p2pinfer.core.planner import holdings
from p2pinfer.core.topology import topology
from p2pinfer.core.units import kv_bytes_per_position
from p2pinfer.step_links import STEP_PORT_OFFSET, port_shifted
from p2pinfer.types import DType, Fence, SamplingParams
from p2pinfer.wire.codec import encode
from p2pinfer.wire.messages import LinkOpen, Partial
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.lockstep import Lockstep
from tests.processes.fleet import NEAR, Fleet, boot_id, restart
from tests.random_models import write_random_model

PROMPT = [5, 9, 200, 31, 77, 8, 120]
HEADER, DATA_HEADER, KV_HEADER = 16, 48, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with 3 KV heads: nothing divides evenly."""
    return write_random_model(
        tmp_path_factory.mktemp("model"),
        seed=11,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=4,
        intermediate_size=500,
        vocab_size=700,
    )


def greedy(folder: Path, count: int, dtype: DType) -> list[int]:
    """What one process that holds everything says."""
    return Lockstep(folder, dtype=dtype).greedy(PROMPT, count)[0]


@pytest.mark.parametrize(
    ("nodes", "layout", "dtype"),
    [
        (1, "heads", DType.FLOAT32),
        (2, "heads", DType.BFLOAT16),
        (3, "heads", DType.FLOAT32),
        pytest.param(2, "layers", DType.FLOAT32, marks=pytest.mark.long),
        (4, "2x2", DType.BFLOAT16),
    ],
)
def test_the_messages_and_bytes_of_a_request_are_exactly_these(
    folder: Path, nodes: int, layout: str, dtype: DType
) -> None:
    """Two exchanges per layer and stage: every frame of a request is accounted for."""
    new = 9
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    with Fleet(folder, nodes, layout, dtype) as fleet:
        fleet.submit(1, PROMPT, params)
        assert fleet.reply(1) == greedy(folder, new, dtype)
        plan = fleet.plan(Fence(1, 1))
        rows = [len(PROMPT)] + [1] * (new - 1)
        for node in range(nodes):
            # Two more steps have no slots: the last token, and freeing what the request held.
            steps = len(rows) + 2
            stats = fleet.stats(node, steps)
            assert stats.kv_used_bytes == 0
            mine = topology(plan, node)
            messages, data_bytes = 0, 0
            hidden = plan.model.hidden_size
            for count in rows:
                for role in mine.roles:
                    layers = role.holding.span.end - role.holding.span.start
                    for half in (0, 1):
                        parts = len(role.parts[half].get(node, ()))
                        if parts:
                            messages += layers * len(role.peers)
                            size = DATA_HEADER + _padded(2 * parts) + 4 * parts * count * hidden
                            data_bytes += layers * len(role.peers) * (HEADER + size)
                    messages += len(role.hidden_to)
                    size = DATA_HEADER + 4 * count * hidden
                    data_bytes += len(role.hidden_to) * (HEADER + size)
                units = len(mine.vocab_units)
                if units and not mine.leads:
                    messages += 1
                    data_bytes += HEADER + DATA_HEADER + _padded(2 * units) + units * 12
            if mine.leads:
                messages += steps * (nodes - 1)
                assert stats.bytes_sent > data_bytes or nodes == 1
                assert stats.bytes_sent - data_bytes < 400 * steps * nodes
            else:
                messages += steps
                assert 0 < stats.bytes_sent - data_bytes < 80 * steps
            assert stats.messages_sent == stats.messages_local == messages


def test_tokens_and_frames_are_the_same_over_tcp(folder: Path) -> None:
    """Local links change the way of frames and nothing else."""
    new = 9
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    sent = []
    for local_links in (True, False):
        with Fleet(folder, 3, local_links=local_links) as fleet:
            fleet.submit(1, PROMPT, params)
            assert fleet.reply(1) == greedy(folder, new, DType.FLOAT32)
            stats = fleet.stats(1, new + 2)
            sent.append((stats.messages_sent, stats.bytes_sent))
            assert stats.messages_local == (stats.messages_sent if local_links else 0)
    assert sent[0] == sent[1]


def _padded(size: int) -> int:
    return -(-size // 16) * 16


def test_delta_kv_is_each_row_once(folder: Path) -> None:
    """Of every head unit to its standby, but for those of the last steps before a reply ends; where
    no standbys are named there is none."""
    new = 80
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    with Fleet(folder, 3, replicas=1) as fleet:
        plan = fleet.plan(Fence(1, 1))
        # Before the first request is over, all have been granted credit.
        fleet.submit(1, PROMPT, params)
        fleet.reply(1)
        before = [fleet.deltas(node) for node in range(3)]
        fleet.submit(2, PROMPT, params)
        assert fleet.reply(2) == greedy(folder, new, DType.FLOAT32)
        after = [fleet.deltas(node) for node in range(3)]
        rows, row = len(PROMPT) + new - 1, kv_bytes_per_position(plan.model, plan.model.num_layers)
        for node in range(3):
            units = sum(len(held.head_units) for held in holdings(plan, node))
            sent = after[node].delta_bytes_sent - before[node].delta_bytes_sent
            heads = HEADER + DATA_HEADER + KV_HEADER
            assert units * (rows - new // 2) * row < sent <= units * (rows * row + new * heads)
        received = sum(stats.delta_bytes_received for stats in after)
        assert received == sum(stats.delta_bytes_sent for stats in after)
        fleet.replicas = 0
        fleet.adopt(fleet.plan(Fence(1, 2)))
        before = [fleet.deltas(node) for node in range(3)]
        fleet.submit(3, PROMPT, params)
        fleet.reply(3)
        after = [fleet.deltas(node) for node in range(3)]
        assert [s.delta_bytes_sent for s in after] == [s.delta_bytes_sent for s in before]


def test_sampling_is_the_same_on_every_plan(folder: Path) -> None:
    """Seeded draws with every filter, the flat nucleus included, do not depend on the plan."""
    requests = {
        1: SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True),
        2: SamplingParams(max_tokens=12, temperature=0.9, top_k=20, seed=4, ignore_eos=True),
        3: SamplingParams(max_tokens=12, temperature=50.0, top_p=0.95, seed=5, ignore_eos=True),
        4: SamplingParams(max_tokens=12, temperature=0.7, min_p=0.1, seed=6, ignore_eos=True),
        5: SamplingParams(
            max_tokens=12, temperature=1.0, repetition_penalty=1.5, seed=7, ignore_eos=True
        ),
    }
    replies = []
    for nodes, layout in ((1, "heads"), (3, "heads"), (2, "layers")):
        with Fleet(folder, nodes, layout) as fleet:
            for request_id, params in requests.items():
                fleet.submit(request_id, PROMPT, params)
            replies.append({request_id: fleet.reply(request_id) for request_id in requests})
    assert replies[0] == replies[1] == replies[2]
    assert len({tuple(reply) for reply in replies[0].values()}) == len(requests)


def covered(answers: list[PlanLoaded]) -> list[int]:
    """Positions of the only request that each node has KV of, in all its units."""
    return [min((run.positions for run in answer.coverage), default=0) for answer in answers]


def test_a_new_plan_goes_on_where_kv_ends(folder: Path) -> None:
    """A change of plan in the middle of a reply does not change one token of it.

    With the same units all KV stays but that of the step in hand; with others, none.
    """
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    expected = greedy(folder, 300, DType.FLOAT32)
    with Fleet(folder, 2) as fleet:
        fleet.submit(1, PROMPT, params)
        fleet.some_of(1, 20)
        answers = fleet.adopt(fleet.plan(Fence(1, 2)))
        lengths = [len(answer.logs[0].tokens) for answer in answers]
        assert all(
            0 <= length - positions <= 2
            for length, positions in zip(lengths, covered(answers), strict=True)
        )
        fleet.await_report(0, lambda r: isinstance(r, FenceSettled) and r.fence == Fence(1, 2))
        fleet.some_of(1, 40 + max(lengths) - len(PROMPT))
        fleet.layout = "layers"
        answers = fleet.adopt(fleet.plan(Fence(1, 3)))
        assert covered(answers) == [0, 0]
        assert fleet.reply(1) == expected


@pytest.mark.parametrize(
    ("nodes", "layout", "lost"),
    [
        pytest.param(3, "heads", (2,), marks=pytest.mark.long),
        pytest.param(4, "2x2", (3,), marks=pytest.mark.long),
        (4, "heads", (1, 3)),
    ],
)
def test_standbys_go_on_where_lost_owners_stopped(
    folder: Path, nodes: int, layout: str, lost: tuple[int, ...]
) -> None:
    """Killed in the middle of a reply: all but the last few positions are there, and right."""
    params = SamplingParams(max_tokens=1500, ignore_eos=True)
    with Fleet(folder, nodes, layout, replicas=len(lost)) as fleet:
        plan = fleet.plan(Fence(1, 1))
        fleet.submit(1, PROMPT, params)
        for count, node in enumerate(lost, 1):
            fleet.some_of(1, 20 * count)
            fleet.await_standbys(plan)
            os.kill(fleet.workers[node].pid, signal.SIGKILL)
            plan = fleet.plan_without(plan, Fence(1, 1 + count), *lost[:count])
            answers = fleet.adopt(plan)
            length = len(answers[plan.leader].logs[0].tokens)
            assert length - fleet.started[1].computed <= NEAR
        length += 10 - len(PROMPT)
        assert fleet.some_of(1, length) == greedy(folder, length, DType.FLOAT32)


@pytest.mark.parametrize(
    ("nodes", "layout", "lost"),
    [
        pytest.param(3, "heads", (2, 1), marks=pytest.mark.long),
        (4, "2x2", (3,)),
        (4, "heads", (1, 3)),
    ],
)
def test_lost_kv_is_made_of_inputs(
    folder: Path, nodes: int, layout: str, lost: tuple[int, ...]
) -> None:
    """Killed in the middle of a reply: those who take over make the KV of all positions but the
    last, and the reply is what it would have been."""
    params = SamplingParams(max_tokens=1500, ignore_eos=True)
    with Fleet(folder, nodes, layout, keep_inputs=True) as fleet:
        plan = fleet.plan(Fence(1, 1))
        fleet.submit(1, PROMPT, params)
        for count, node in enumerate(lost, 1):
            fleet.some_of(1, 20 * count)
            os.kill(fleet.workers[node].pid, signal.SIGKILL)
            plan = fleet.plan_without(plan, Fence(1, 1 + count), *lost[:count])
            answers = fleet.adopt(plan)
            log = answers[plan.leader].logs[0]
            assert restart(log, answers, plan) == 0 or count > 1
            length = len(log.tokens)
            assert length - fleet.started[1].computed <= 2
        assert fleet.stats(0, 1).kv_inputs_bytes > 0
        length += 10 - len(PROMPT)
        assert fleet.some_of(1, length) == greedy(folder, length, DType.FLOAT32)


def test_kv_that_cannot_be_made_is_a_failed_step(folder: Path) -> None:
    """Nothing is computed with what is not there; the next plan begins with what is."""
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    with Fleet(folder, 2) as fleet:
        fleet.submit(1, PROMPT, params)
        fleet.some_of(1, 20)
        os.kill(fleet.workers[1].pid, signal.SIGKILL)
        plan = fleet.plan_without(fleet.plan(Fence(1, 1)), Fence(1, 2), 1)
        logs = fleet.load(plan)[0].logs
        fleet.activate(plan, logs, [Recompute(request_id=1, position=20, rows=20)])
        assert "the inputs of 20 positions" in fleet.failure(0).reason
        fleet.adopt(msgspec.structs.replace(plan, fence=Fence(1, 3)))
        assert fleet.started[1].computed == 0
        assert fleet.reply(1) == greedy(folder, 100, DType.FLOAT32)


def test_a_new_standby_catches_up(folder: Path) -> None:
    """Named in the middle of a long reply, it asks for all that it has missed."""
    prompt = [2 + (i * i + 7 * i) % 600 for i in range(400)]
    params = SamplingParams(max_tokens=1500, ignore_eos=True)
    with Fleet(folder, 3) as fleet:
        fleet.submit(1, prompt, params)
        fleet.some_of(1, 10)
        fleet.replicas = 1
        plan = fleet.plan(Fence(1, 2))
        fleet.adopt(plan)
        fleet.await_standbys(plan)
        os.kill(fleet.workers[1].pid, signal.SIGKILL)
        plan = fleet.plan_without(plan, Fence(1, 3), 1)
        answers = fleet.adopt(plan)
        length = len(answers[plan.leader].logs[0].tokens)
        assert length - fleet.started[1].computed <= NEAR
        length += 10 - len(prompt)
        assert fleet.some_of(1, length) == Lockstep(folder).greedy(prompt, length)[0]


def test_logs_are_cut_and_extended_to_what_was_agreed(folder: Path) -> None:
    """Whoever has too much or too little, the reply goes on as if nothing had been."""
    new, told = 300, 30
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    expected = greedy(folder, new, DType.FLOAT32)
    with Fleet(folder, 2) as fleet:
        fleet.submit(1, PROMPT, params)
        for epoch, change in ((2, -7), (3, 11)):
            fleet.some_of(1, told)
            answers = fleet.load(fleet.plan(Fence(1, epoch)))
            log = answers[0].logs[0]
            length = len(log.tokens) + change
            tokens = (*PROMPT, *expected)[:length]
            assert log.tokens[:length] == tokens[: len(log.tokens)]
            agreed = msgspec.structs.replace(log, term=1, tokens=tokens)
            fleet.activate(fleet.plan(Fence(1, epoch)), (agreed,))
            fleet.workers[0].pipe.send(
                StartRequest(
                    request_id=1,
                    prompt_ids=tuple(PROMPT),
                    received=tokens[len(PROMPT) :],
                    params=params,
                    computed=min(*covered(answers), length - 1),
                )
            )
            told = length - len(PROMPT) + 20
        ended = fleet.await_report(0, lambda r: isinstance(r, RequestEnded))
        assert isinstance(ended, RequestEnded)
        assert (ended.fence, ended.reason, ended.total_tokens) == (Fence(1, 3), "length", new)
        drawn = {
            token.index: token.token
            for report in fleet.reports[0]
            if isinstance(report, TokensCommitted)
            for token in report.tokens
        }
        assert drawn == {index: expected[index] for index in (*drawn, new - 1)}


def test_a_halted_worker_keeps_its_logs(folder: Path) -> None:
    """Without a leader no step is computed; what was is still there for the next plan."""
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    with Fleet(folder, 2) as fleet:
        fleet.submit(1, PROMPT, params)
        fleet.some_of(1, 20)
        for worker in fleet.workers:
            worker.pipe.send(Halt())
        fleet.stats(0, 0)
        fleet.await_report(0, lambda r: isinstance(r, WorkerStats) and r.steps == 0)
        assert not any(isinstance(report, StepFailed) for report in fleet.reports[0])
        answers = fleet.adopt(fleet.plan(Fence(2, 2)))
        assert min(covered(answers)) > len(PROMPT)
        assert fleet.reply(1) == greedy(folder, 200, DType.FLOAT32)


@pytest.mark.parametrize(
    ("way", "reason"), [(signal.SIGKILL, "broke"), (signal.SIGSTOP, "overdue")]
)
def test_a_step_that_a_member_leaves_fails_soon(
    folder: Path, way: signal.Signals, reason: str
) -> None:
    """Killed: at once, since its link breaks; standing still: after ten times a step's time."""
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    with Fleet(folder, 2, least_step_s=2.0) as fleet:
        fleet.submit(1, PROMPT, params)
        fleet.some_of(1, 20)
        os.kill(fleet.workers[1].pid, way)
        began = time.monotonic()
        failed = fleet.failure(0)
        assert time.monotonic() - began < 15.0
        assert (failed.fence, failed.node_id) == (Fence(1, 1), fleet.members[1].node_id)
        assert reason in failed.reason
        assert not failed.broken
        os.kill(fleet.workers[1].pid, signal.SIGKILL)


def test_a_link_that_is_opened_again_breaks_the_step(folder: Path) -> None:
    """What the connection before still held may be lost: a new epoch is the cure."""
    with Fleet(folder, 2) as fleet:
        fleet.submit(1, PROMPT, SamplingParams(max_tokens=3000, ignore_eos=True))
        fleet.stats(1, 20)
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        try:
            dealer.connect(port_shifted(fleet.members[1].address, STEP_PORT_OFFSET))
            again = LinkOpen(node_id="0" * 16, boot_id=boot_id(0), fence=Fence(1, 1))
            dealer.send(encode(again))
            failed = fleet.failure(1)
            assert failed.node_id == "0" * 16
            assert "came back" in failed.reason
        finally:
            dealer.close(0)
            context.term()


def test_a_witness_has_the_logs_and_no_model(folder: Path) -> None:
    """It acknowledges what it writes down, and breaks no step when it is gone."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with Fleet(folder, 3, witnesses=1) as fleet:
        ready = fleet.await_report(2, lambda r: isinstance(r, WorkerReady))
        assert isinstance(ready, WorkerReady)
        assert ready.numeric_class == ""
        fleet.submit(1, PROMPT, params)
        assert fleet.reply(1) == greedy(folder, 60, DType.FLOAT32)
        fleet.submit(2, PROMPT, SamplingParams(max_tokens=300, ignore_eos=True))
        fleet.some_of(2, 10)
        answers = fleet.adopt(fleet.plan(Fence(1, 2)))
        length = len(PROMPT) + 8
        assert all(answer.logs[0].request_id == 2 for answer in answers)
        assert answers[2].logs[0].tokens[:length] == answers[0].logs[0].tokens[:length]
        os.kill(fleet.workers[2].pid, signal.SIGKILL)
        assert fleet.reply(2) == greedy(folder, 300, DType.FLOAT32)
        assert not any(isinstance(report, StepFailed) for report in fleet.reports[0])


@pytest.mark.parametrize(
    ("nodes", "layout", "weights"),
    [
        pytest.param(2, "layers", (1.0, 3.0), marks=pytest.mark.long),
        pytest.param(2, "layers", (0.0, 1.0), marks=pytest.mark.long),
        (4, "2x2", ()),
        (5, "heads", (1.0, 1.0, 1.0, 1.0, 3.0)),
        pytest.param(5, "2x2", (), marks=pytest.mark.long),
    ],
)
def test_a_prompt_of_many_steps_is_right_on_every_layout(
    folder: Path, nodes: int, layout: str, weights: tuple[float, ...]
) -> None:
    """Chunks that sample nothing do not overtake a later stage; requests follow each other, also
    with a leader, or a spare member, that holds nothing, and members without heads."""
    prompt = [2 + (i * i + 7 * i) % 600 for i in range(1100)]
    lockstep = Lockstep(folder)
    expected, _ = lockstep.greedy(prompt, 5, chunk=300)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with Fleet(folder, nodes, layout, weights=weights) as fleet:
        for request_id in range(1, 4):
            fleet.submit(request_id, prompt, params)
            assert fleet.reply(request_id) == expected
        for request_id in range(4, 8):
            fleet.submit(request_id, prompt[:300] if request_id % 2 else prompt, params)
        assert fleet.reply(4) == fleet.reply(6) == expected
        assert fleet.reply(5) == fleet.reply(7)


def test_hostile_frames_are_dropped_and_counted(folder: Path) -> None:
    """Random bytes, forged senders, shapes and fences do no harm to the reply in flight."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with Fleet(folder, 2) as fleet:
        plan = fleet.plan(Fence(1, 1))
        fleet.submit(1, PROMPT, params)
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 1000
        try:
            dealer.connect(port_shifted(fleet.members[1].address, STEP_PORT_OFFSET))
            hidden = plan.model.hidden_size

            def forged(fence: Fence, columns: int) -> bytes:
                tensor = Tensor(WireDType.FLOAT32, (1, 1, columns), bytes(4 * columns))
                return encode(
                    Partial(
                        fence=fence,
                        step=1,
                        link_seq=0,
                        sender=0,
                        stage=0,
                        layer=0,
                        half=0,
                        parts=(0,),
                        tensor=tensor,
                    )
                )

            for frame in (
                b"",
                b"P2PI" + b"\xff" * 60,
                bytes(range(256)) * 20,
                forged(plan.fence, hidden),
                forged(Fence(9, 9), hidden),
                forged(plan.fence, 16),
            ):
                dealer.send(frame)
            outsider = LinkOpen(node_id="f" * 16, boot_id="f" * 16, fence=plan.fence)
            dealer.send(encode(outsider))
            dealer.send(forged(plan.fence, hidden))
            fleet.await_report(1, lambda r: getattr(r, "dropped_frames", 0) >= 7)
            assert fleet.reply(1) == greedy(folder, 60, DType.FLOAT32)
        finally:
            dealer.close()
            context.term()
