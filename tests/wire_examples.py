"""Messages of every kind, from which the test vectors are made, and their plain form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from p2pinfer.limits import MAX_POSITIONS
from p2pinfer.types import (
    DType,
    Failover,
    Fence,
    Member,
    ModelSpec,
    Plan,
    RoundTrip,
    SamplingParams,
    Stage,
)
from p2pinfer.wire import messages as m
from p2pinfer.wire.tensors import ITEM_BYTES, Tensor, WireDType

VECTORS = Path(__file__).parent / "vectors"


def plain(value: Any) -> Any:
    """Dicts, lists, numbers, text and bytes: what a decoder of another make would give."""
    if isinstance(value, Tensor):
        data = bytes(value.data)
        return {"dtype": int(value.dtype), "shape": list(value.shape), "data": data}
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def to_json(value: Any) -> Any:
    """Plain values with bytes as `{"hex": ...}`."""
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def vectors(name: str) -> list[dict[str, Any]]:
    """The entries of `valid.json` or `invalid.json`."""
    entries: list[dict[str, Any]] = json.loads((VECTORS / name).read_text(encoding="utf-8"))
    return entries


def tensor(dtype: WireDType, *shape: int) -> Tensor:
    """A tensor whose bytes count up, so that no two are alike."""
    count = prod(shape) * ITEM_BYTES[dtype]
    return Tensor(dtype, shape, bytes(i % 251 for i in range(count)))


ANNA, BERT = "00000000000000aa", "00000000000000bb"
BOOT, CLUSTER = "0123456789abcdef", "fedcba9876543210"
MEMORY = "00112233445566ff"
MACHINE = "ffeeddccbbaa9988"
MODEL_ID = "5f" * 32
FENCE = Fence(3, 7)
HUGE = (1 << 63) - 1

MEMBER = Member(
    node_id=ANNA,
    boot_id=BOOT,
    name="anna",
    address="tcp://192.0.2.1:7720",
    pid=4711,
    numeric_class="avx512-1c0ffee",
    threads=8,
    weight=1.5,
    memory_bytes=16 << 30,
    kv_bytes=4 << 30,
    keeps_inputs=True,
    keeps_warm=True,
    memory=MEMORY,
    product_gb_s=22.5,
    read_gb_s=31.75,
    machine=MACHINE,
    round_trips=(RoundTrip(node_id=BERT, ms=1.41),),
)
WITNESS = Member(
    node_id=BERT,
    boot_id=BOOT,
    name="bert é",
    address="tcp://[2001:db8::1]:65535",
    witness=True,
    blank=True,
)
MODEL = ModelSpec(
    name="stories",
    model_id=MODEL_ID,
    num_layers=4,
    hidden_size=128,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=300,
    vocab_size=2000,
    max_positions=512,
    dtype=DType.BFLOAT16,
    kv_dtype=DType.BFLOAT16,
    quant="int8",
    wire_dtype="bfloat16",
    tied=True,
    eos_token_ids=(2, 3),
)
PLAN = Plan(
    fence=FENCE,
    cluster_id=CLUSTER,
    leader=1,
    members=(MEMBER, WITNESS),
    voters=(0, 1),
    old_voters=(ANNA,),
    quorum="last-man",
    model=MODEL,
    stages=(
        Stage(start=0, end=1, head_owners=(0, 0), mlp_owners=(0, 0, 0), head_standbys=((1,), ())),
        Stage(start=1, end=4, head_owners=(1, 1), mlp_owners=(1, 1, 1), vocab_owners=(1,) * 3),
    ),
    layout="2x1",
    layout_auto=True,
    use_nodes="auto",
)
PARAMS = SamplingParams(
    max_tokens=64,
    temperature=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.05,
    repetition_penalty=1.1,
    seed=HUGE,
    stop=("\n\n", "Ende — fin"),
    ignore_eos=True,
)
FAILOVER = Failover(
    position=17, lost=("anna", "bert é"), rung="replica", detect_s=0.25, stall_s=0.5, exact=False
)

EXAMPLES: dict[str, m.Message] = {
    "hello": m.Hello(
        versions=(1, 2),
        member=MEMBER,
        cluster_id=CLUSTER,
        model_id=MODEL_ID,
        dtype="bfloat16",
        quant="none",
        wire_dtype="bfloat16",
        layout="heads",
    ),
    "hello of a witness": m.Hello(versions=(1,), member=WITNESS, model_id="", dtype="", quant=""),
    "welcome": m.Welcome(
        version=1, member=MEMBER, cluster_id=CLUSTER, leader_id=ANNA, members=(MEMBER, WITNESS)
    ),
    "refused": m.Refused(
        code="wrong_model", message="this cluster serves stories (id 5f5f)", retryable=False
    ),
    "heartbeat": m.Heartbeat(
        node_id=ANNA,
        boot_id=BOOT,
        incarnation=2,
        term=3,
        fence=FENCE,
        leader_id=BERT,
        steps=100,
        owes_step=101,
        rumours=(
            m.Rumour(node_id=ANNA, boot_id=BOOT, state=m.MemberState.ALIVE, incarnation=2),
            m.Rumour(node_id=BERT, boot_id=BOOT, state=m.MemberState.SUSPECT, incarnation=0),
        ),
        hears_control=(BERT,),
        hears_steps=(BERT,),
        sent_at_ms=123456,
        echo_ms=123400,
        tokens_per_s=12.5,
        kv_used_bytes=1 << 20,
        kv_limit_bytes=1 << 30,
        kv_inputs_bytes=1 << 19,
        hung=True,
        draining=True,
        compute_ms=7.25,
        paused=True,
        standby_fence=FENCE,
        standby_units=9,
        standby_units_ready=4,
        standby_behind=17,
        standby_error="no memory",
        standby_units_warm=3,
        round_trips=(RoundTrip(node_id=BERT, ms=0.0), RoundTrip(node_id=ANNA, ms=23.5)),
    ),
    "heartbeat of an idle node": m.Heartbeat(
        node_id=ANNA, boot_id=BOOT, incarnation=0, term=0, fence=Fence()
    ),
    "leave": m.Leave(node_id=ANNA, boot_id=BOOT, reason="told to stop"),
    "pre-vote request": m.PreVoteRequest(term=4, candidate_id=ANNA, plan_fence=FENCE),
    "pre-vote reply": m.PreVoteReply(term=4, voter_id=BERT, granted=True),
    "pre-vote reply to an older plan": m.PreVoteReply(
        term=4, voter_id=BERT, granted=False, plan=PLAN
    ),
    "vote request": m.VoteRequest(term=4, candidate_id=ANNA, plan_fence=FENCE),
    "vote reply": m.VoteReply(term=4, voter_id=BERT, granted=False),
    "propose": m.Propose(plan=PLAN),
    "ack": m.Ack(
        fence=FENCE,
        node_id=ANNA,
        logs=(m.LogDigest(request_id=HUGE, term=3, length=9, digest="ab" * 32),),
        coverage=(m.CoverageRun(request_id=5, stage=1, units=(0, 4095), positions=8),),
        inputs=(m.InputsRun(request_id=5, stage=1, positions=7),),
    ),
    "ack without requests": m.Ack(fence=FENCE, node_id=ANNA),
    "nack": m.Nack(
        fence=FENCE, node_id=ANNA, code="internal", message="no frame in 0.5 s", about=BERT
    ),
    "log request": m.LogRequest(fence=FENCE, request_ids=(5, HUGE)),
    "log entry": m.LogEntry(
        fence=FENCE, request_id=5, term=2, prompt_tokens=8, params=PARAMS, tokens=(1, 2, 3)
    ),
    "log entry from the middle": m.LogEntry(
        fence=FENCE,
        request_id=5,
        term=3,
        prompt_tokens=8,
        params=SamplingParams(),
        start=8,
        tokens=(4, 5),
    ),
    "activate": m.Activate(
        fence=FENCE,
        logs=(m.AgreedLog(request_id=5, length=10, digest="cd" * 32, restart=9, recompute=4),),
    ),
    "activate without requests": m.Activate(fence=FENCE),
    "submit of text": m.Submit(request_id=HUGE, text="Es war einmal …", params=SamplingParams()),
    "submit of tokens": m.Submit(
        request_id=1,
        prompt_ids=(1, 2000, (1 << 31) - 1),
        params=PARAMS,
        received=(7, 8),
        attempt=HUGE,
    ),
    "accepted": m.Accepted(
        request_id=1, served_by="anna", prompt_ids=(1, 2), waiting="1 more node"
    ),
    "accepted, and who else is there": m.Accepted(
        request_id=1,
        served_by="anna",
        prompt_ids=(1, 2),
        others=(m.Contact(name="bert", address="tcp://10.0.0.2:7720"),),
    ),
    "chunk": m.Chunk(request_id=1, start=2, tokens=(9, 10), text=" tämä"),
    "finished": m.Finished(
        request_id=1,
        reason="stop",
        total_tokens=12,
        text=".",
        ttft_s=0.125,
        tokens_per_s=33.5,
        failovers=(FAILOVER,),
    ),
    "failed": m.Failed(
        request_id=1, code="node_lost", message="the node anna is gone", retryable=True
    ),
    "cancel": m.Cancel(request_id=1, reason="stop"),
    "forward": m.Forward(
        request_id=1, serving_id=BERT, prompt_ids=(1, 2), received=(3,), params=PARAMS, attempt=2
    ),
    "drawn": m.Drawn(
        tokens=(
            m.DrawnToken(request_id=1, index=0, token=5),
            m.DrawnToken(request_id=HUGE, index=4_000_000_000, token=0),
        ),
        interruptions=(m.Interruption(request_id=1, failover=FAILOVER),),
    ),
    "ended": m.Ended(
        request_id=1,
        reason="error",
        total_tokens=3,
        code="node_lost",
        message="the node anna is gone",
        retryable=True,
    ),
    "status request": m.StatusRequest(request_id=1),
    "status reply": m.StatusReply(request_id=1, body=b'{"ready": true}'),
    "drain": m.Drain(request_id=1, name="anna"),
    "pause": m.Pause(request_id=1, name="anna"),
    "resume of the asked node": m.Pause(request_id=1, name="", resume=True),
    "done": m.Done(request_id=1),
    "plan request": m.PlanRequest(request_id=1, without="bert é"),
    "measure link": m.MeasureLink(request_id=1, name="anna", there=8256, back=0, count=32),
    "link open": m.LinkOpen(node_id=ANNA, boot_id=BOOT, fence=FENCE),
    "step": m.Step(
        fence=FENCE,
        step=1,
        link_seq=0,
        slots=(
            m.Slot(
                request_id=1,
                start=0,
                tokens=(1, 2, 3),
                capacity=512,
                params=PARAMS,
                prompt_tokens=300,
            ),
            m.Slot(request_id=2, start=40, tokens=(9,), sample=True),
        ),
        ended=(3, 4),
        finals=(m.FinalToken(request_id=4, position=MAX_POSITIONS - 1, token=2),),
    ),
    "step that only commits": m.Step(fence=FENCE, step=2, link_seq=1, slots=()),
    "partial": m.Partial(
        fence=FENCE,
        step=1,
        link_seq=2,
        sender=1,
        stage=1,
        layer=511,
        half=1,
        parts=(0x1000, 0x0002),
        tensor=tensor(WireDType.FLOAT32, 2, 3, 5),
    ),
    "hidden": m.Hidden(
        fence=Fence(HUGE, HUGE),
        step=HUGE,
        link_seq=HUGE,
        sender=15,
        stage=15,
        tensor=tensor(WireDType.BFLOAT16, 2, 3),
    ),
    "candidates": m.Candidates(
        fence=FENCE,
        step=1,
        link_seq=2,
        sender=0,
        units=(0, 1, 31),
        ids=tensor(WireDType.INT32, 2, 3, 4),
        logits=tensor(WireDType.FLOAT32, 2, 3, 4),
        lse=tensor(WireDType.FLOAT32, 2, 3),
    ),
    "logits request": m.LogitsRequest(fence=FENCE, step=1, link_seq=4, slots=(0, 3)),
    "logits": m.Logits(
        fence=FENCE,
        step=1,
        link_seq=2,
        sender=0,
        unit=4095,
        tensor=tensor(WireDType.FLOAT16, 1, 7),
    ),
    "step ack": m.StepAck(fence=FENCE, step=1, link_seq=0),
    "echo request": m.EchoRequest(number=3, back=1 << 20, filler=b"\0\1\2"),
    "echo reply": m.EchoReply(number=3, late=True, filler=b""),
    "kv delta": m.KvDelta(
        fence=FENCE,
        step=9,
        link_seq=2,
        sender=0,
        request_id=HUGE,
        stage=1,
        unit=7,
        start=64,
        log_digest="0f" * 32,
        tensor=tensor(WireDType.BFLOAT16, 3, 2, 2, 4),
    ),
    "kv request": m.KvRequest(
        fence=FENCE, request_id=5, stage=0, unit=1, start=0, end=64, credit=1 << 20
    ),
    "credit": m.Credit(fence=FENCE, bytes=1 << 20),
}
