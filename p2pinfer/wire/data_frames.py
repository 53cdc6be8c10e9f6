"""The bodies of data frames: a fixed little-endian header, a short table, raw tensor bytes.

`LAYOUTS` holds for each kind of frame what its header fields may be; a field that a kind does not
use may only be zero, so "unused" needs no rule of its own. Both directions obey the same table:
what would not be accepted is not sent. Tensors are views into the frame (see `proto_spec.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from struct import Struct, error
from typing import NamedTuple

from p2pinfer.errors import LocalProtocolError, RemoteProtocolError
from p2pinfer.limits import (
    MAX_CANDIDATES,
    MAX_HEAD_DIM,
    MAX_LAYERS,
    MAX_NODES,
    MAX_PARTS,
    MAX_POSITIONS,
    MAX_STAGES,
    MAX_STEP_SLOTS,
    MAX_STEP_TOKENS,
    MAX_UNITS,
    MAX_VOCAB,
    MAX_WIDTH,
)
from p2pinfer.types import Fence
from p2pinfer.wire.messages import Candidates, DataFrame, Hidden, KvDelta, Logits, Partial
from p2pinfer.wire.tensors import ITEM_BYTES, Tensor, WireDType

HEADER = Struct("<qqqqBBHBBHII")
"""term, epoch, step, link_seq, sender, stage, layer, half, dtype, entries, rows, cols."""

KV_HEADER = Struct("<qIHH32s")
"""request_id, start, unit, layers, log_digest: follows the header of a KV_DELTA."""

_MOVING = Struct("<qq")
"""step and link_seq: what alone differs between a step's partials and those of the next step."""

_BEFORE = Struct("<qq").size
_AFTER = _BEFORE + _MOVING.size
_ENTRIES = Struct("<H")
_ENTRIES_AT = Struct("<qqqqBBHBB").size
assert HEADER.format.startswith("<qqqqBBHBBH"), "these are its fields"

HEADS = 4096
"""Heads of partials that are remembered when they are read: they come again with every step."""

ALIGNMENT = 16
"""Tables are padded to this many bytes, so that tensors start aligned within the frame."""

FLOATS = frozenset({WireDType.FLOAT32, WireDType.BFLOAT16, WireDType.FLOAT16})
_DTYPES = {int(dtype): dtype for dtype in WireDType}
_LEVEL_SHIFT = 12
_INDEX_MASK = (1 << _LEVEL_SHIFT) - 1
_ZEROS = bytes(ALIGNMENT)


class Layout(NamedTuple):
    """What the header of one kind of data frame may hold; `rows` and `cols` are at least 1."""

    max_stage: int
    max_layer: int
    max_half: int
    min_entries: int
    max_entries: int
    max_rows: int
    max_cols: int
    dtypes: frozenset[WireDType]


LAYOUTS: dict[type[DataFrame], Layout] = {
    Partial: Layout(
        MAX_STAGES - 1, MAX_LAYERS - 1, 1, 1, MAX_PARTS, MAX_STEP_TOKENS, MAX_WIDTH, FLOATS
    ),
    Hidden: Layout(MAX_STAGES - 1, 0, 0, 0, 0, MAX_STEP_TOKENS, MAX_WIDTH, FLOATS),
    Candidates: Layout(
        0, 0, 0, 1, MAX_UNITS, MAX_STEP_SLOTS, MAX_CANDIDATES, frozenset({WireDType.FLOAT32})
    ),
    Logits: Layout(0, 0, 0, 1, 1, MAX_STEP_SLOTS, MAX_VOCAB, FLOATS),
    KvDelta: Layout(MAX_STAGES - 1, 0, 0, 0, 0, MAX_POSITIONS, MAX_HEAD_DIM, FLOATS),
}


class Header(NamedTuple):
    """The data header as values, in the order of the bytes."""

    term: int
    epoch: int
    step: int
    link_seq: int
    sender: int
    stage: int
    layer: int
    half: int
    dtype: int
    entries: int
    rows: int
    cols: int


def _check_header(kind: type[DataFrame], header: Header) -> WireDType:
    """Return the element type, or raise `RemoteProtocolError` naming the field that is wrong."""
    term, epoch, step, link_seq, sender, stage, layer, half, number, entries, rows, cols = header
    layout = LAYOUTS[kind]
    dtype = _DTYPES.get(number)
    if (
        dtype in layout.dtypes
        and min(term, epoch, step, link_seq) >= 0
        and sender < MAX_NODES
        and stage <= layout.max_stage
        and layer <= layout.max_layer
        and half <= layout.max_half
        and layout.min_entries <= entries <= layout.max_entries
        and 1 <= rows <= layout.max_rows
        and 1 <= cols <= layout.max_cols
    ):
        return dtype
    raise RemoteProtocolError(_explain(header, layout))


def _explain(header: Header, layout: Layout) -> str:
    """Say which field of a refused header is out of its range (the first, in wire order)."""
    huge = (1 << 63) - 1
    ranges = {
        "term": (0, huge),
        "epoch": (0, huge),
        "step": (0, huge),
        "link_seq": (0, huge),
        "sender": (0, MAX_NODES - 1),
        "stage": (0, layout.max_stage),
        "layer": (0, layout.max_layer),
        "half": (0, layout.max_half),
        "entries": (layout.min_entries, layout.max_entries),
        "rows": (1, layout.max_rows),
        "cols": (1, layout.max_cols),
    }
    values = header._asdict()
    for name, (low, high) in ranges.items():
        if not low <= values[name] <= high:
            return f"{name} is {values[name] % (1 << 64)}, not within {low} to {high}"
    allowed = ", ".join(f"{dtype.value} ({dtype.name})" for dtype in sorted(layout.dtypes))
    return f"dtype is {header.dtype}, not one of {allowed}"


@cache
def _table(count: int) -> Struct:
    """`count` u16, then zeros up to a multiple of `ALIGNMENT` (cached: at most MAX_UNITS sizes)."""
    return Struct(f"<{count}H{-2 * count % ALIGNMENT}x")


def _read_table(body: memoryview, count: int) -> tuple[int, ...]:
    """The table's numbers, which must not repeat; raises when the body ends in it."""
    layout = _table(count)
    end = HEADER.size + layout.size
    if len(body) < end:
        raise RemoteProtocolError(f"a table of {count} entries does not fit the {len(body)} bytes")
    padding = bytes(body[HEADER.size + 2 * count : end])
    if padding != _ZEROS[: len(padding)]:
        raise RemoteProtocolError("the padding of the table is not zero")
    return layout.unpack_from(body, HEADER.size)


def _check_parts(parts: tuple[int, ...]) -> None:
    """Tree nodes: each one once, and each within a tree over at most MAX_UNITS units."""
    if len(set(parts)) != len(parts):
        raise RemoteProtocolError("a tree node is given twice")
    for part in parts:
        if (part & _INDEX_MASK) << (part >> _LEVEL_SHIFT) >= MAX_UNITS:
            raise RemoteProtocolError(f"{part:#06x} is no node of a tree over {MAX_UNITS} units")


def _check_units(units: tuple[int, ...]) -> None:
    """Units: each one once and below MAX_UNITS."""
    if len(set(units)) != len(units):
        raise RemoteProtocolError("a unit is given twice")
    if max(units) >= MAX_UNITS:
        raise RemoteProtocolError(f"unit {max(units)} is not below {MAX_UNITS}")


def _tensor(body: memoryview, start: int, dtype: WireDType, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose bytes are exactly the rest of the body from `start`."""
    expected = ITEM_BYTES[dtype]
    for size in shape:
        expected *= size
    if len(body) - start != expected:
        raise RemoteProtocolError(
            f"a tensor {dtype.name} {shape} has {expected} bytes, not {len(body) - start}"
        )
    return Tensor(dtype, shape, body[start:])


# --- reading --------------------------------------------------------------------------------------


def unpack(kind: type[DataFrame], body: memoryview) -> DataFrame:
    """The frame that `body` (all after the frame header) holds; tensors are views into it.

    Raises `RemoteProtocolError` when a field is out of range or the length does not fit.
    """
    if len(body) < HEADER.size:
        raise RemoteProtocolError(f"{len(body)} bytes are too few for a data header")
    return _READERS[kind](body)


def _read_header(kind: type[DataFrame], body: memoryview) -> tuple[Header, WireDType]:
    header = Header._make(HEADER.unpack_from(body))
    return header, _check_header(kind, header)


class _PartialHead(NamedTuple):
    """A partial but for its step, its number on the link and the bytes of its tensor."""

    fence: Fence
    sender: int
    stage: int
    layer: int
    half: int
    parts: tuple[int, ...]
    dtype: WireDType
    shape: tuple[int, int, int]


def partial_head_bytes(entries: int) -> int:
    """Bytes of the body of a partial before its tensor."""
    return HEADER.size + 2 * entries + -2 * entries % ALIGNMENT


def _read_partial(body: memoryview) -> Partial:
    step, link_seq = _MOVING.unpack_from(body, _BEFORE)
    if step < 0 or link_seq < 0:
        _read_header(Partial, body)
    (entries,) = _ENTRIES.unpack_from(body, _ENTRIES_AT)
    start = partial_head_bytes(entries)
    head = _partial_head(body[:_BEFORE].tobytes(), body[_AFTER:start].tobytes())
    return Partial(
        fence=head.fence,
        step=step,
        link_seq=link_seq,
        sender=head.sender,
        stage=head.stage,
        layer=head.layer,
        half=head.half,
        parts=head.parts,
        tensor=_tensor(body, start, head.dtype, head.shape),
    )


@lru_cache(maxsize=HEADS)
def _partial_head(before: bytes, after: bytes) -> _PartialHead:
    """What header and table say, without step and link_seq, which lie between these bytes."""
    body = memoryview(b"".join((before, bytes(_MOVING.size), after)))
    header, dtype = _read_header(Partial, body)
    parts = _read_table(body, header.entries)
    _check_parts(parts)
    fence, shape = Fence(header.term, header.epoch), (header.entries, header.rows, header.cols)
    return _PartialHead(
        fence, header.sender, header.stage, header.layer, header.half, parts, dtype, shape
    )


def _read_hidden(body: memoryview) -> Hidden:
    header, dtype = _read_header(Hidden, body)
    return Hidden(
        fence=Fence(header.term, header.epoch),
        step=header.step,
        link_seq=header.link_seq,
        sender=header.sender,
        stage=header.stage,
        tensor=_tensor(body, HEADER.size, dtype, (header.rows, header.cols)),
    )


def _read_candidates(body: memoryview) -> Candidates:
    header, dtype = _read_header(Candidates, body)
    units = _read_table(body, header.entries)
    _check_units(units)
    start = HEADER.size + _table(header.entries).size
    lists = header.rows * header.entries
    block = 4 * lists * header.cols
    if len(body) - start != 2 * block + 4 * lists:
        raise RemoteProtocolError(
            f"candidates of {header.rows} slots, {header.entries} units, {header.cols} places "
            f"have {2 * block + 4 * lists} bytes, not {len(body) - start}"
        )
    shape = (header.rows, header.entries, header.cols)
    return Candidates(
        fence=Fence(header.term, header.epoch),
        step=header.step,
        link_seq=header.link_seq,
        sender=header.sender,
        units=units,
        ids=Tensor(WireDType.INT32, shape, body[start : start + block]),
        logits=Tensor(dtype, shape, body[start + block : start + 2 * block]),
        lse=Tensor(dtype, shape[:2], body[start + 2 * block :]),
    )


def _read_logits(body: memoryview) -> Logits:
    header, dtype = _read_header(Logits, body)
    units = _read_table(body, header.entries)
    _check_units(units)
    start = HEADER.size + _table(header.entries).size
    return Logits(
        fence=Fence(header.term, header.epoch),
        step=header.step,
        link_seq=header.link_seq,
        sender=header.sender,
        unit=units[0],
        tensor=_tensor(body, start, dtype, (header.rows, header.cols)),
    )


def _check_kv(request_id: int, start: int, unit: int, layers: int, rows: int) -> None:
    """What the KV header may hold, and that the positions end within MAX_POSITIONS."""
    if request_id < 0:
        raise RemoteProtocolError("request_id is above 2^63 - 1")
    if unit >= MAX_UNITS:
        raise RemoteProtocolError(f"unit {unit} is not below {MAX_UNITS}")
    if not 1 <= layers <= MAX_LAYERS:
        raise RemoteProtocolError(f"layers is {layers}, not within 1 to {MAX_LAYERS}")
    if start + rows > MAX_POSITIONS:
        raise RemoteProtocolError(f"positions end at {start + rows}, beyond {MAX_POSITIONS}")


def _read_kv_delta(body: memoryview) -> KvDelta:
    header, dtype = _read_header(KvDelta, body)
    if len(body) < HEADER.size + KV_HEADER.size:
        raise RemoteProtocolError(f"{len(body)} bytes are too few for a KV header")
    request_id, start, unit, layers, digest = KV_HEADER.unpack_from(body, HEADER.size)
    _check_kv(request_id, start, unit, layers, header.rows)
    shape = (layers, 2, header.rows, header.cols)
    return KvDelta(
        fence=Fence(header.term, header.epoch),
        step=header.step,
        link_seq=header.link_seq,
        sender=header.sender,
        request_id=request_id,
        stage=header.stage,
        unit=unit,
        start=start,
        log_digest=digest.hex(),
        tensor=_tensor(body, HEADER.size + KV_HEADER.size, dtype, shape),
    )


_READERS: dict[type[DataFrame], Callable[[memoryview], DataFrame]] = {
    Partial: _read_partial,
    Hidden: _read_hidden,
    Candidates: _read_candidates,
    Logits: _read_logits,
    KvDelta: _read_kv_delta,
}

# --- writing --------------------------------------------------------------------------------------


class _Fields(NamedTuple):
    """What differs between most kinds: header fields, bytes before the tensors, the tensors."""

    stage: int
    entries: int
    rows: int
    cols: int
    prefix: bytes
    tensors: tuple[Tensor, ...]
    dtype: WireDType


def pack(frame: DataFrame) -> list[bytes | memoryview]:
    """The pieces of the body, in order; the tensors' bytes are not copied.

    Raises `LocalProtocolError` when a field is one that `unpack` would refuse.
    """
    kind = type(frame)
    try:
        return _WRITERS[kind](frame)
    except (RemoteProtocolError, error, ValueError) as cause:
        raise LocalProtocolError(f"{kind.__name__} cannot be sent: {cause}") from cause


def _written(
    frame: DataFrame, fields: _Fields, layer: int = 0, half: int = 0
) -> list[bytes | memoryview]:
    header = Header(
        frame.fence.term,
        frame.fence.epoch,
        frame.step,
        frame.link_seq,
        frame.sender,
        fields.stage,
        layer,
        half,
        fields.dtype,
        fields.entries,
        fields.rows,
        fields.cols,
    )
    _check_header(type(frame), header)
    return [HEADER.pack(*header), fields.prefix, *(t.data for t in fields.tensors)]


def _write_partial(frame: Partial) -> list[bytes | memoryview]:
    _check_parts(frame.parts)
    count, rows, cols = frame.tensor.shape
    if count != len(frame.parts):
        raise ValueError(f"{len(frame.parts)} parts but a tensor of {count}")
    prefix = _table(count).pack(*frame.parts)
    fields = _Fields(frame.stage, count, rows, cols, prefix, (frame.tensor,), frame.tensor.dtype)
    return _written(frame, fields, frame.layer, frame.half)


def _write_hidden(frame: Hidden) -> list[bytes | memoryview]:
    rows, cols = frame.tensor.shape
    return _written(
        frame, _Fields(frame.stage, 0, rows, cols, b"", (frame.tensor,), frame.tensor.dtype)
    )


def _write_candidates(frame: Candidates) -> list[bytes | memoryview]:
    _check_units(frame.units)
    shape = frame.ids.shape
    rows, count, cols = shape
    if count != len(frame.units) or frame.logits.shape != shape or frame.lse.shape != shape[:2]:
        raise ValueError(
            f"{len(frame.units)} units, ids {shape}, logits {frame.logits.shape} and "
            f"lse {frame.lse.shape} do not fit together"
        )
    if frame.ids.dtype is not WireDType.INT32 or frame.lse.dtype is not frame.logits.dtype:
        raise ValueError("ids must be INT32, logits and lse FLOAT32")
    prefix = _table(count).pack(*frame.units)
    tensors = (frame.ids, frame.logits, frame.lse)
    return _written(frame, _Fields(0, count, rows, cols, prefix, tensors, frame.logits.dtype))


def _write_logits(frame: Logits) -> list[bytes | memoryview]:
    _check_units((frame.unit,))
    rows, cols = frame.tensor.shape
    prefix = _table(1).pack(frame.unit)
    return _written(frame, _Fields(0, 1, rows, cols, prefix, (frame.tensor,), frame.tensor.dtype))


def _write_kv_delta(frame: KvDelta) -> list[bytes | memoryview]:
    layers, pair, rows, cols = frame.tensor.shape
    digest = bytes.fromhex(frame.log_digest)
    if pair != 2 or len(digest) != 32:
        raise ValueError("the tensor must be [layers, 2, rows, head_dim], the digest 32 bytes")
    prefix = KV_HEADER.pack(frame.request_id, frame.start, frame.unit, layers, digest)
    _check_kv(frame.request_id, frame.start, frame.unit, layers, rows)
    return _written(
        frame, _Fields(frame.stage, 0, rows, cols, prefix, (frame.tensor,), frame.tensor.dtype)
    )


_WRITERS: dict[type[DataFrame], Callable[..., list[bytes | memoryview]]] = {
    Partial: _write_partial,
    Hidden: _write_hidden,
    Candidates: _write_candidates,
    Logits: _write_logits,
    KvDelta: _write_kv_delta,
}
