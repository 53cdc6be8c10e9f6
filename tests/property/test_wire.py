"""Properties of the wire: round trips, totality, and agreement with the second decoder."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from p2pinfer.errors import RemoteProtocolError
from p2pinfer.limits import MAX_UNITS
from p2pinfer.types import Fence, Member, ModelSpec, Plan, Stage
from p2pinfer.wire import messages as m
from p2pinfer.wire.codec import HEADER, MAGIC, decode, encode
from p2pinfer.wire.data_frames import FLOATS
from p2pinfer.wire.tensors import ITEM_BYTES, Tensor, WireDType
from tests import spec_decoder as spec
from tests.wire_examples import plain, vectors

VALID = [(entry["label"], bytes.fromhex(entry["hex"])) for entry in vectors("valid.json")]
MUTATIONS = 60
"""Mutated frames of each vector in one run; the seeds are fixed, so a failure can be repeated."""

frames_of_vectors = pytest.mark.parametrize(
    "frame", [frame for _, frame in VALID], ids=[label for label, _ in VALID]
)

# --- strategies -----------------------------------------------------------------------------------


identities = st.integers(0, (1 << 64) - 1).map("{:016x}".format)
digests = st.integers(0, (1 << 256) - 1).map("{:064x}".format)
HEXADECIMAL = {
    r"\A[0-9a-f]{16}\Z": identities,
    r"\A([0-9a-f]{16})?\Z": st.just("") | identities,
    r"\A([0-9a-f]{64})?\Z": st.just("") | digests,
}
"""Much faster than strings from a regular expression."""


def strategy(kind: inspect.Type) -> st.SearchStrategy[Any]:  # noqa: PLR0911 - one per kind
    """Any value of a schema; lists stay short."""
    match kind:
        case inspect.Metadata():
            return strategy(kind.type)
        case inspect.IntType():
            low = kind.ge if kind.ge is not None else kind.gt + 1
            high = kind.le if kind.le is not None else kind.lt - 1
            return st.integers(low, high)
        case inspect.FloatType():
            return st.floats(kind.ge, kind.le)
        case inspect.StrType() if kind.pattern in HEXADECIMAL:
            return HEXADECIMAL[kind.pattern]
        case inspect.StrType() if kind.pattern:
            return st.from_regex(kind.pattern).filter(
                lambda s: (kind.min_length or 0) <= len(s) <= (kind.max_length or 256)
            )
        case inspect.StrType():
            return st.text(max_size=min(kind.max_length, 20))
        case inspect.BytesType():
            return st.binary(max_size=20)
        case inspect.VarTupleType():
            low = kind.min_length or 0
            items = st.lists(strategy(kind.item_type), min_size=low, max_size=low + 2)
            return items.map(tuple)
        case inspect.EnumType():
            return st.sampled_from(list(kind.cls))
        case inspect.UnionType():
            return st.one_of(*map(strategy, kind.types))
        case inspect.StructType():
            return st.deferred(
                lambda: SPECIAL[kind.cls] if kind.cls in SPECIAL else struct(kind.cls)
            )
        case inspect.NoneType():
            return st.none()
    assert isinstance(kind, inspect.BoolType), kind
    return st.booleans()


def struct(cls: type, **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A structure; fields with a default are sometimes left out."""
    required, optional = {}, {}
    for field in msgspec.structs.fields(cls):
        known = field.name in given
        chosen = given[field.name] if known else strategy(inspect.type_info(field.type))
        (required if field.required or field.name in given else optional)[field.name] = chosen
    fields = st.fixed_dictionaries(required, optional=optional)
    return fields.map(lambda values: cls(**values))


def owners(indices: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    """Owners of each kind of unit, with standbys for all of them or none."""

    def of_kind(count: int, with_standbys: bool) -> st.SearchStrategy[tuple[Any, Any]]:
        several = st.lists(indices, max_size=2).map(tuple)
        rows = count if with_standbys else 0
        return st.tuples(
            st.lists(indices, min_size=count, max_size=count).map(tuple),
            st.lists(several, min_size=rows, max_size=rows).map(tuple),
        )

    pairs = st.tuples(st.integers(0, 4), st.booleans()).flatmap(lambda drawn: of_kind(*drawn))
    return st.tuples(pairs, pairs, pairs).map(
        lambda kinds: {
            f"{name}_{what}": kinds[i][j]
            for i, name in enumerate(("head", "mlp", "vocab"))
            for j, what in enumerate(("owners", "standbys"))
        }
    )


any_member, any_model, any_fence = struct(Member), struct(ModelSpec), struct(Fence)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan whose indices are all of members, each with its own id."""
    members = draw(
        st.lists(any_member, min_size=1, max_size=4, unique_by=lambda member: member.node_id)
    )
    indices = st.integers(0, len(members) - 1)
    ends = draw(st.lists(st.integers(1, 512), min_size=1, max_size=3, unique=True).map(sorted))
    stages = tuple(
        Stage(start=start, end=end, **draw(owners(indices)))
        for start, end in zip([0, *ends], ends, strict=False)
    )
    return Plan(
        fence=draw(any_fence),
        cluster_id=draw(identities),
        leader=draw(indices),
        members=tuple(members),
        voters=tuple(draw(st.lists(indices, max_size=3))),
        old_voters=tuple(draw(st.lists(identities, max_size=3))),
        quorum=draw(st.sampled_from(("majority", "last-man"))),
        model=draw(any_model),
        stages=stages,
        layout=draw(st.text(max_size=16)),
    )


small = st.integers(0, 1 << 19)
SPECIAL: dict[type, st.SearchStrategy[Any]] = {Plan: plans()}
"""Kinds whose fields must agree with each other."""

SPECIAL[m.Slot] = struct(m.Slot, start=small)
SPECIAL[m.LogEntry] = struct(m.LogEntry, start=small)
SPECIAL[m.AgreedLog] = struct(
    m.AgreedLog, length=st.just(1 << 20), restart=st.just(1 << 19), recompute=small
)
SPECIAL[m.Chunk] = struct(m.Chunk, start=small)
SPECIAL[m.KvRequest] = struct(m.KvRequest, start=small, end=st.integers((1 << 19) + 1, 1 << 20))
SPECIAL[m.Submit] = st.one_of(
    struct(m.Submit, text=st.just("")), struct(m.Submit, prompt_ids=st.just(()))
)


FLOAT_TYPES = tuple(sorted(FLOATS))


@st.composite
def tensors(draw: st.DrawFn, *shape: int, dtypes: Any = FLOAT_TYPES) -> Tensor:
    """Any bytes as a tensor of this shape."""
    dtype = draw(st.sampled_from(dtypes))
    size = ITEM_BYTES[dtype]
    for length in shape:
        size *= length
    return Tensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


dims = st.integers(1, 4)
units = st.lists(st.integers(0, MAX_UNITS - 1), min_size=1, max_size=9, unique=True).map(tuple)
nodes = st.integers(0, 12).flatmap(
    lambda level: st.integers(0, (MAX_UNITS >> level) - 1).map(lambda index: level << 12 | index)
)


@st.composite
def data_frames(draw: st.DrawFn, kind: type) -> m.DataFrame:
    """A data frame of this kind with tensors that fit it."""
    rows, cols = draw(dims), draw(dims)
    if kind is m.Partial:
        parts = tuple(draw(st.lists(nodes, min_size=1, max_size=9, unique=True)))
        tensor = tensors(len(parts), rows, cols)
        return draw(struct(kind, parts=st.just(parts), tensor=tensor))
    if kind is m.Candidates:
        held = draw(units)
        shape = (rows, len(held), cols)
        float32 = (WireDType.FLOAT32,)
        return draw(
            struct(
                kind,
                units=st.just(held),
                ids=tensors(*shape, dtypes=(WireDType.INT32,)),
                logits=tensors(*shape, dtypes=float32),
                lse=tensors(*shape[:2], dtypes=float32),
            )
        )
    if kind is m.KvDelta:
        tensor = tensors(draw(dims), 2, rows, cols)
        return draw(struct(kind, start=small, log_digest=digests, tensor=tensor))
    return draw(struct(kind, tensor=tensors(rows, cols)))


def messages(kind: type) -> st.SearchStrategy[m.Message]:
    """Any valid message of this kind."""
    if issubclass(kind, m.DataFrame):
        return data_frames(kind)
    return SPECIAL[kind] if kind in SPECIAL else struct(kind)


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [row.kind for row in m.MESSAGES], ids=lambda kind: kind.__name__)
def test_what_is_encoded_is_decoded(kind: type) -> None:
    """`decode(encode(message))` is the message, and both decoders give the same values."""

    @settings(max_examples=max(20, settings.default.max_examples // 3))
    @given(messages(kind))
    def check(message: m.Message) -> None:
        frame = encode(message)
        assert decode(frame, m.BY_KIND[kind].plane) == message
        assert spec.decode(frame) == (m.BY_KIND[kind].name, plain(message))

    check()


def agree(frame: bytes) -> bool:
    """Whether both decoders take the frame; asserts that they do the same with it."""
    try:
        message = decode(frame)
    except RemoteProtocolError:
        with pytest.raises(spec.Refused):
            spec.decode(frame)
        return False
    assert spec.decode(frame) == (m.BY_KIND[type(message)].name, plain(message))
    return True


@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes_are_refused_or_read(frame: bytes) -> None:
    """Whatever the bytes: a message or `RemoteProtocolError`, the same from both decoders."""
    agree(frame)


@given(st.sampled_from([row.id for row in m.MESSAGES]), st.binary(max_size=200))
def test_any_body_is_refused_or_read(type_id: int, body: bytes) -> None:
    """As for any bytes, but behind a good header, so that the bodies' decoders see them."""
    agree(HEADER.pack(MAGIC, 1, 0, type_id, len(body), 0) + body)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 63) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(VALID), json_like, st.data())
def test_any_value_in_any_field(vector: tuple[str, bytes], value: Any, data: st.DataObject) -> None:
    """A field somewhere in a message with any value, left out, or of another name."""
    frame = vector[1]
    body = frame[HEADER.size :]
    row = m.BY_ID[HEADER.unpack_from(frame)[3]]
    if issubclass(row.kind, m.DataFrame):
        return
    tree = at = msgspec.msgpack.decode(body)
    while True:
        place = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        inner = at[place]
        if not (isinstance(inner, dict | list) and inner and data.draw(st.booleans())):
            break
        at = inner
    match data.draw(st.sampled_from(["replace", "remove", "rename"])):
        case "replace":
            at[place] = value
        case "remove":
            del at[place]
        case "rename" if isinstance(at, dict):
            at["x" + place] = at.pop(place)
    new = msgspec.msgpack.encode(tree)
    agree(HEADER.pack(MAGIC, 1, 0, row.id, len(new), 0) + new)


@frames_of_vectors
def test_a_frame_cut_at_any_byte_is_refused(frame: bytes) -> None:
    """No beginning of a frame is a frame, not even with its length made right."""
    for end in range(len(frame)):
        cut = frame[:end]
        assert not agree(cut)
        if end >= HEADER.size:
            magic, major, minor, type_id, _, reserved = HEADER.unpack_from(frame)
            fixed = HEADER.pack(magic, major, minor, type_id, end - HEADER.size, reserved)
            assert not agree(fixed + cut[HEADER.size :])


def mutate(frame: bytes, rng: random.Random) -> bytes:
    """A frame with a few bits and bytes changed, removed or inserted, mostly of right length."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xCB, 0xDD, 0xFF))
            case 3:
                del data[at : at + rng.randint(1, 4)]
            case 4:
                data[at:at] = rng.randbytes(rng.randint(1, 4))
    if len(data) >= HEADER.size and rng.random() < 0.9:
        data[8:12] = (len(data) - HEADER.size).to_bytes(4, "little")
    return bytes(data)


def test_both_decoders_agree_on_mutated_frames() -> None:
    """Both take a mutated frame with equal values, or both refuse it; some of each are seen."""
    rng = random.Random(20)
    taken = [agree(mutate(frame, rng)) for _, frame in VALID for _ in range(MUTATIONS)]
    assert 0.02 < sum(taken) / len(taken) < 0.9
