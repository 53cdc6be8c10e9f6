"""The shared words: values that the wire, the core, the model and the daemon all speak of.

All are immutable. Limits live in `limits.py`; what a plan means is decided in `core/`.
"""

from __future__ import annotations

from enum import StrEnum
from sys import float_info
from typing import Annotated

from msgspec import Meta, Struct

from p2pinfer.errors import InvalidRequestError
from p2pinfer.limits import (
    MAX_ADDRESS_CHARS,
    MAX_GB_S,
    MAX_HEAD_DIM,
    MAX_LAYERS,
    MAX_NAME_CHARS,
    MAX_NODES,
    MAX_POSITIONS,
    MAX_ROUND_TRIP_MS,
    MAX_SCALE,
    MAX_STAGES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TOP_K,
    MAX_UNITS,
    MAX_VOCAB,
    MAX_WIDTH,
)

U8 = Annotated[int, Meta(ge=0, lt=1 << 8)]
U16 = Annotated[int, Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""Non-negative and signed-64-bit safe: terms, epochs, steps, bytes, request ids."""

Identity = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
"""A node id, boot id or cluster id: 64 random bits in hexadecimal."""

Digest = Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
"""A SHA-256 in hexadecimal, or empty where there is none (a witness has no model)."""

Name = Annotated[
    str,
    Meta(min_length=1, max_length=MAX_NAME_CHARS, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z"),
]
"""A node's name: no control characters, since it is shown in terminals and logs."""

Address = Annotated[str, Meta(max_length=MAX_ADDRESS_CHARS, pattern=r"\Atcp://[!-~]+:[0-9]{1,5}\Z")]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Length = Annotated[int, Meta(ge=0, le=MAX_POSITIONS)]
"""A number of tokens or positions of one request."""

Tokens = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_POSITIONS)]
MemberIndex = Annotated[int, Meta(ge=0, lt=MAX_NODES)]

Finite = Annotated[float, Meta(ge=-float_info.max, le=float_info.max)]
"""Any number, neither infinite nor NaN."""

Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]


GigabytesPerSecond = Annotated[float, Meta(ge=0.0, le=MAX_GB_S)]
"""1e9 bytes per second; 0: unknown."""


class UnitKind(StrEnum):
    """What a unit is a slice of; head units are KV heads with their query heads."""

    HEAD = "head"
    MLP = "mlp"
    VOCAB = "vocab"


class DType(StrEnum):
    """The number format that weights are multiplied in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Fence(Struct, frozen=True, order=True):
    """(term, epoch) of a plan, compared in that order; every data frame carries it."""

    term: U63 = 0
    epoch: U63 = 0


class ModelSpec(Struct, frozen=True, kw_only=True):
    """What placing and computing need to know of a model, without its weights.

    `model_id` is the content hash of weights, config and tokenizer. The other names are those of
    `config.json`; `max_positions` is its `max_position_embeddings`. `kv_dtype` and
    `wire_dtype`, in which the sums of half layers are rounded and sent, are part of the number
    format: equal on all nodes.
    """

    name: Annotated[str, Meta(max_length=256)]
    model_id: Digest
    num_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    hidden_size: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    num_attention_heads: Annotated[int, Meta(ge=1, le=MAX_UNITS)]
    num_key_value_heads: Annotated[int, Meta(ge=1, le=MAX_UNITS)]
    head_dim: Annotated[int, Meta(ge=1, le=MAX_HEAD_DIM)]
    intermediate_size: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
    vocab_size: Annotated[int, Meta(ge=1, le=MAX_VOCAB)]
    max_positions: Annotated[int, Meta(ge=1, le=MAX_POSITIONS)]
    dtype: DType
    kv_dtype: DType
    quant: Annotated[str, Meta(pattern=r"\A(none|int8|int4)\Z")] = "none"
    wire_dtype: Annotated[str, Meta(pattern=r"\A(float32|bfloat16)\Z")] = "float32"
    tied: bool = False
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)] = ()


class RoundTrip(Struct, frozen=True, kw_only=True):
    """How long a message to a member and its answer take, in milliseconds, as measured by another
    one; 0: too short to be told from the programs' own time."""

    node_id: Identity
    ms: Annotated[float, Meta(ge=0.0, le=MAX_ROUND_TRIP_MS)]


RoundTrips = Annotated[tuple[RoundTrip, ...], Meta(max_length=MAX_NODES)]


class Member(Struct, frozen=True, kw_only=True):
    """A daemon on the membership list, as it described itself in HELLO.

    `address` is the control address; steps use its port + 1 and bulk its port + 2. `weight` is
    the share of work relative to other members. `memory_bytes` is what it offers for weights
    and KV together, `kv_bytes` for KV at most; 0 is unknown, or no limit of its own.
    `keeps_inputs`: it keeps the inputs of the K and V projections of what it computes.
    `keeps_warm`: of units that it is a standby of it has the weights in no memory of its own, but
    ready to be loaded.
    """

    node_id: Identity
    boot_id: Identity
    name: Name
    address: Address
    pid: U32 = 0
    numeric_class: Annotated[str, Meta(max_length=64)] = ""
    threads: U16 = 1
    weight: Annotated[float, Meta(ge=0.0, le=1e6)] = 1.0
    memory_bytes: U63 = 0
    kv_bytes: U63 = 0
    witness: bool = False
    keeps_inputs: bool = False
    keeps_warm: bool = False
    blank: bool = False
    """No plan in force has named its `memory` a voter yet: it has a say only where one names it."""

    memory: Annotated[str, Meta(pattern=r"\A([0-9a-f]{16})?\Z")] = ""
    """Drawn when the node's stored state began, and kept with it over restarts: who lost its state
    is another voter."""

    product_gb_s: GigabytesPerSecond = 0.0
    """Of weights that its products read for one token."""

    read_gb_s: GigabytesPerSecond = 0.0
    """That all processors of its machine read memory at, together."""

    machine: Annotated[str, Meta(pattern=r"\A([0-9a-f]{16})?\Z")] = ""
    """Members that say the same share one memory, and its bandwidth; empty: unknown."""

    round_trips: RoundTrips = ()
    """To others, as far as measured; told in heartbeats."""


Owners = Annotated[tuple[MemberIndex, ...], Meta(max_length=MAX_UNITS)]
Standbys = Annotated[
    tuple[Annotated[tuple[MemberIndex, ...], Meta(max_length=MAX_NODES)], ...],
    Meta(max_length=MAX_UNITS),
]


class Stage(Struct, frozen=True, kw_only=True):
    """Layers `[start, end)` and, for each unit by its number, the index of the member that owns it.

    `vocab_owners` is empty in every stage but the last. `*_standbys` are empty, or name for each
    unit the members that keep a replica.
    """

    start: Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
    end: Annotated[int, Meta(ge=0, le=MAX_LAYERS)]
    head_owners: Owners
    mlp_owners: Owners
    vocab_owners: Owners = ()
    head_standbys: Standbys = ()
    mlp_standbys: Standbys = ()
    vocab_standbys: Standbys = ()


class Plan(Struct, frozen=True, kw_only=True):
    """The cluster's one agreed value. `leader`, `voters`, owners are indices into `members`.

    `old_voters` are the node ids of the voters of the plan that this one takes the place of: until
    this plan is known to be in force, a quorum is needed among them too (Raft's joint consensus,
    section 6 of Ongaro and Ousterhout, 2014). `quorum` is `majority` or `last-man`.
    """

    fence: Fence
    cluster_id: Identity
    leader: MemberIndex
    members: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=MAX_NODES)]
    voters: Annotated[tuple[MemberIndex, ...], Meta(max_length=MAX_NODES)]
    old_voters: Annotated[tuple[Identity, ...], Meta(max_length=MAX_NODES)] = ()
    quorum: Annotated[str, Meta(pattern=r"\A(majority|last-man)\Z")] = "majority"
    model: ModelSpec
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1, max_length=MAX_STAGES)]
    layout: Annotated[str, Meta(max_length=16)] = "heads"
    layout_auto: bool = False
    """The layout was chosen by prediction, and may be chosen anew."""

    use_nodes: Annotated[str, Meta(pattern=r"\A(auto|all)\Z")] = "all"
    """`auto`: members that would make the whole slower own nothing."""


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How tokens are drawn, as in vLLM. `temperature` 0 is greedy; `top_k` 0 is off.

    Random numbers are counter-based in `(seed, position)`, so any leader draws the same token.
    """

    max_tokens: U32 = 256
    temperature: Finite = 0.0
    top_k: U32 = 0
    top_p: Finite = 1.0
    min_p: Finite = 0.0
    repetition_penalty: Finite = 1.0
    seed: U63 = 0
    stop: Annotated[
        tuple[Annotated[str, Meta(max_length=MAX_STOP_CHARS)], ...],
        Meta(max_length=MAX_STOP_STRINGS),
    ] = ()
    ignore_eos: bool = False

    def check(self) -> None:
        """Raise `InvalidRequestError` naming the first value that no sampler could obey."""
        least, most = 1 / MAX_SCALE, MAX_SCALE
        scale = f"from {least:g} to {most:g}"
        rules = (
            (
                1 <= self.max_tokens < 1 << 32,
                f"max_tokens must be at least 1 and below 2^32, not {self.max_tokens}",
            ),
            (
                self.temperature == 0.0 or least <= self.temperature <= most,
                f"temperature must be 0 (greedy) or {scale}, not {self.temperature}",
            ),
            (
                0 <= self.top_k <= MAX_TOP_K,
                f"top_k must be 0 (off) to {MAX_TOP_K}, not {self.top_k}",
            ),
            (0.0 < self.top_p <= 1.0, f"top_p must be above 0 and at most 1, not {self.top_p}"),
            (0.0 <= self.min_p <= 1.0, f"min_p must be between 0 and 1, not {self.min_p}"),
            (
                least <= self.repetition_penalty <= most,
                f"repetition_penalty must be {scale}, not {self.repetition_penalty}",
            ),
            (0 <= self.seed < 1 << 63, f"seed must be 0 to 2^63 - 1, not {self.seed}"),
            (
                len(self.stop) <= MAX_STOP_STRINGS,
                f"there may be {MAX_STOP_STRINGS} stop strings, not {len(self.stop)}",
            ),
            (
                all(0 < len(text) <= MAX_STOP_CHARS for text in self.stop),
                f"a stop string must not be empty, nor longer than {MAX_STOP_CHARS} characters",
            ),
        )
        for holds, message in rules:
            if not holds:
                raise InvalidRequestError(message)


class Failover(Struct, frozen=True, kw_only=True):
    """One interruption that a reply survived (see `proto_spec.md`, epoch change)."""

    position: U32
    lost: Annotated[tuple[Name, ...], Meta(max_length=MAX_NODES)]
    rung: Annotated[str, Meta(max_length=16)]
    detect_s: Seconds
    stall_s: Seconds
    exact: bool = True
