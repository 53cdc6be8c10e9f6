"""The pipe between the control process and the worker."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import msgspec
import pytest

from p2pinfer import pipe as pipe_module
from p2pinfer.core.events import (
    ActivatePlan,
    AnyOrder,
    AnyReport,
    CancelRequest,
    Covered,
    FenceSettled,
    Halt,
    LinkLost,
    LoadPlan,
    PlanLoaded,
    StartRequest,
    StopWorker,
    TokenLog,
    TokensCommitted,
    WorkerReady,
)
from p2pinfer.core.orders import GiveWay
from p2pinfer.errors import LocalProtocolError
from p2pinfer.pipe import DaemonPipe, PipeClosed, WorkerConfig, WorkerPipe, daemon_side, worker_side
from p2pinfer.types import DType, Fence, Member, ModelSpec, Plan, SamplingParams, Stage
from p2pinfer.wire.messages import DrawnToken

MODEL = ModelSpec(
    name="tiny",
    model_id="ab" * 32,
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=256,
    max_positions=512,
    dtype=DType.FLOAT32,
    kv_dtype=DType.FLOAT32,
    eos_token_ids=(2,),
)
MEMBER = Member(node_id="0" * 16, boot_id="1" * 16, name="a", address="tcp://127.0.0.1:7720")
PLAN = Plan(
    fence=Fence(1, 2),
    cluster_id="2" * 16,
    leader=0,
    members=(MEMBER,),
    voters=(0,),
    model=MODEL,
    stages=(Stage(start=0, end=2, head_owners=(0, 0), mlp_owners=(0,), vocab_owners=(0, 0, 0, 0)),),
)
CONFIG = WorkerConfig(
    node_id="0" * 16,
    boot_id="1" * 16,
    name="a",
    model_folder="/models/tiny",
    model=MODEL,
    listen_host="127.0.0.1",
    step_port=7721,
    bulk_port=7722,
    device="cpu",
    threads=1,
)
WITNESS = WorkerConfig(
    node_id="0" * 16,
    boot_id="1" * 16,
    name="a",
    listen_host="127.0.0.1",
    step_port=7721,
    bulk_port=7722,
    device="cpu",
    threads=1,
)
LOG = TokenLog(
    request_id=7, term=1, prompt_tokens=2, params=SamplingParams(seed=9), tokens=(1, 2, 3)
)
ORDERS: tuple[AnyOrder | WorkerConfig, ...] = (
    CONFIG,
    WITNESS,
    LoadPlan(plan=PLAN, me=0),
    ActivatePlan(fence=Fence(1, 2), logs=(LOG,), listeners=(0, 2)),
    Halt(),
    GiveWay(fence=Fence(1, 2)),
    StartRequest(request_id=7, prompt_ids=(1, 2), received=(3,), params=SamplingParams(seed=9)),
    CancelRequest(request_id=7),
    StopWorker(),
)
READY = WorkerReady(numeric_class="avx2", device="cpu", threads=1, memory_bytes=0)

Ends = tuple[DaemonPipe, WorkerPipe]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of one pipe."""
    here, there = socket.socketpair()
    daemon, worker = daemon_side(here), worker_side(there.detach())
    yield daemon, worker
    daemon.close()
    worker.close()


def receive_orders(worker: WorkerPipe, count: int) -> list[AnyOrder | WorkerConfig]:
    """The next `count` orders, waiting for each at most ten seconds."""
    orders: list[AnyOrder | WorkerConfig] = []
    while len(orders) < count:
        order = worker.receive()
        if order is not None:
            orders.append(order)
        else:
            assert select.select((worker,), (), (), 10)[0]
    return orders


def test_orders_and_reports_come_out_as_they_went_in(ends: Ends) -> None:
    """Every kind of order, and reports, cross the pipe unchanged and in order."""
    daemon, worker = ends
    for order in ORDERS:
        daemon.send(order)
    assert tuple(receive_orders(worker, len(ORDERS))) == ORDERS
    assert worker.receive() is None
    fence = Fence(1, 2)
    token = DrawnToken(request_id=7, index=0, token=42)
    reports: list[AnyReport] = [
        READY,
        PlanLoaded(
            fence=fence,
            logs=(LOG,),
            coverage=(Covered(request_id=7, stage=1, units=(0, 2), positions=3),),
        ),
        FenceSettled(fence=fence),
        TokensCommitted(fence=fence, tokens=(token,)),
    ]
    for report in reports:
        worker.send(report)
    assert select.select((daemon,), (), (), 10)[0]
    assert [daemon.receive() for _ in range(5)] == [*reports, None]


def test_the_daemon_never_waits_for_a_busy_worker(ends: Ends) -> None:
    """What a worker does not read yet is kept, and arrives whole once it reads."""
    daemon, worker = ends
    order = StartRequest(
        request_id=1, prompt_ids=tuple(range(1 << 17)), received=(), params=SamplingParams()
    )
    for _ in range(4):
        daemon.send(order)
    assert daemon.unsent
    got: list[AnyOrder | WorkerConfig] = []
    while len(got) < 4:
        daemon.flush()
        received = worker.receive()
        if received is not None:
            got.append(received)
    assert got == [order] * 4
    assert not daemon.unsent


def test_a_closed_end_is_told_after_all_that_was_sent(ends: Ends) -> None:
    """The last reports of a worker that ended are still read; then the pipe is closed."""
    daemon, worker = ends
    worker.send(READY)
    worker.send(LinkLost(node_id="3" * 16))
    worker.close()
    assert daemon.receive() == READY
    assert daemon.receive() == LinkLost(node_id="3" * 16)
    with pytest.raises(PipeClosed, match="closed the pipe"):
        daemon.receive()
    with pytest.raises(PipeClosed, match="the pipe is closed"):
        daemon.send(StopWorker())


def test_an_end_reset_with_unread_orders_counts_as_closed(ends: Ends) -> None:
    """A worker killed before it read its orders looks like one that ended."""
    daemon, worker = ends
    daemon.send(CONFIG)
    worker.close()
    with pytest.raises(PipeClosed):
        daemon.receive()


def test_too_large_an_order_is_refused(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A struct over the limit is not sent, and a length over the limit is not believed."""
    daemon, worker = ends
    daemon.send(CONFIG)
    monkeypatch.setattr(pipe_module, "MAX_PIPE_BYTES", 16)
    with pytest.raises(LocalProtocolError, match=r"WorkerConfig of [0-9]+ bytes is too large"):
        daemon.send(CONFIG)
    assert select.select((worker,), (), (), 10)[0]
    with pytest.raises(LocalProtocolError, match="a message of"):
        worker.receive()


def test_foreign_bytes_are_refused() -> None:
    """A body that is no order raises `LocalProtocolError`."""
    here, there = socket.socketpair()
    worker = worker_side(there.detach())
    body = msgspec.msgpack.encode({"type": "FormatDisk"})
    here.sendall(len(body).to_bytes(4, "little") + body)
    assert select.select((worker,), (), (), 10)[0]
    with pytest.raises(LocalProtocolError, match="FormatDisk"):
        worker.receive()
    worker.close()
    here.close()
