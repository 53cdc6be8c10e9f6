"""Worker processes over TCP: right tokens, exact traffic, hostile frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from p2pinfer.core.planner import holding
from p2pinfer.core.topology import topology
from p2pinfer.types import DType, Fence, SamplingParams
from p2pinfer.wire.codec import encode
from p2pinfer.wire.messages import LinkOpen, Partial
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.lockstep import Lockstep
from tests.processes.fleet import Fleet
from tests.random_models import write_random_model

PROMPT = [5, 9, 200, 31, 77, 8, 120]
HEADER, DATA_HEADER = 16, 48


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
        (2, "layers", DType.FLOAT32),
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
        fleet.start(1, PROMPT, params)
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
            layers = mine.holding.span.end - mine.holding.span.start
            hidden = plan.model.hidden_size
            for count in rows:
                for half in (0, 1):
                    parts = mine.parts[half].get(node, ())
                    if parts:
                        messages += layers * len(mine.peers)
                        size = (
                            DATA_HEADER + _padded(2 * len(parts)) + 4 * len(parts) * count * hidden
                        )
                        data_bytes += layers * len(mine.peers) * (HEADER + size)
                messages += len(mine.hidden_to)
                data_bytes += len(mine.hidden_to) * (HEADER + DATA_HEADER + 4 * count * hidden)
                units = len(holding(plan, node).vocab_units)
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
            assert stats.messages_sent == messages


def _padded(size: int) -> int:
    return -(-size // 16) * 16


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
                fleet.start(request_id, PROMPT, params)
            replies.append({request_id: fleet.reply(request_id) for request_id in requests})
    assert replies[0] == replies[1] == replies[2]
    assert len({tuple(reply) for reply in replies[0].values()}) == len(requests)


def test_a_new_plan_replays_what_was_running(folder: Path) -> None:
    """A change of plan in the middle of a reply does not change one token of it."""
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    expected = greedy(folder, 200, DType.FLOAT32)
    with Fleet(folder, 2) as fleet:
        fleet.start(1, PROMPT, params)
        fleet.stats(0, 20)
        fleet.adopt(fleet.plan(Fence(1, 2)))
        fleet.stats(0, 20)
        fleet.layout = "layers"
        fleet.adopt(fleet.plan(Fence(1, 3)))
        assert fleet.reply(1) == expected


@pytest.mark.parametrize(
    ("nodes", "layout", "weights"),
    [
        (2, "layers", (1.0, 3.0)),
        (2, "layers", (0.0, 1.0)),
        (4, "2x2", ()),
        (5, "heads", (1.0, 1.0, 1.0, 1.0, 3.0)),
        (5, "2x2", ()),
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
            fleet.start(request_id, prompt, params)
            assert fleet.reply(request_id) == expected
        for request_id in range(4, 8):
            fleet.start(request_id, prompt[:300] if request_id % 2 else prompt, params)
        assert fleet.reply(4) == fleet.reply(6) == expected
        assert fleet.reply(5) == fleet.reply(7)


def test_hostile_frames_are_dropped_and_counted(folder: Path) -> None:
    """Random bytes, forged senders, shapes and fences do no harm to the reply in flight."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with Fleet(folder, 2) as fleet:
        plan = fleet.plan(Fence(1, 1))
        port = int(fleet.members[1].address.rsplit(":", 1)[1]) + 1
        fleet.start(1, PROMPT, params)
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 1000
        try:
            dealer.connect(f"tcp://127.0.0.1:{port}")
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
