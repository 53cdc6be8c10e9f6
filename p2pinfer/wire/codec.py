"""Frames to messages and back: the 16-byte header, and which body follows it.

A frame is one ZeroMQ message part. `decode` is total: a message or `RemoteProtocolError`, whatever
the bytes; every length is checked against a named limit before memory is taken for it. `encode`
sends nothing that `decode` would refuse.
"""

from __future__ import annotations

from struct import Struct

import msgspec

from p2pinfer.errors import LocalProtocolError, RemoteProtocolError
from p2pinfer.limits import MAX_BULK_BYTES, MAX_CONTROL_BYTES, MAX_STEP_BYTES
from p2pinfer.wire import data_frames
from p2pinfer.wire.checks import check
from p2pinfer.wire.messages import (
    BY_ID,
    BY_KIND,
    MESSAGES,
    ControlMessage,
    DataFrame,
    Message,
    MessageType,
    Plane,
)

MAGIC = b"P2PI"
MAJOR = 1
MINOR = 0
VERSIONS = (MAJOR,)
"""The majors that this implementation speaks, as HELLO lists them."""

HEADER = Struct("<4sBBHII")
"""magic, major, minor, type id, body length, reserved (zero)."""

_DATA_LIMITS = {Plane.STEPS: MAX_STEP_BYTES, Plane.BULK: MAX_BULK_BYTES}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[type, msgspec.msgpack.Decoder[ControlMessage]] = {
    row.kind: msgspec.msgpack.Decoder(row.kind)
    for row in MESSAGES
    if issubclass(row.kind, ControlMessage)
}
_BAD_BODY = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BAD_VALUE = (RemoteProtocolError, OverflowError, UnicodeEncodeError, TypeError)


def max_frame_bytes(row: MessageType) -> int:
    """The longest frame, header included, that a message of this row may be."""
    if issubclass(row.kind, ControlMessage):
        return MAX_CONTROL_BYTES
    return _DATA_LIMITS[row.plane]


def encode(message: Message) -> bytes:
    """The frame of `message`.

    Raises `LocalProtocolError` when the message breaks its schema, a rule or a limit: a defect of
    this program, since a peer would drop the frame.
    """
    return b"".join(pieces(message))


def pieces(message: Message) -> list[bytes | memoryview]:
    """The pieces of a frame in order, of a data frame the bytes of each tensor last and not copied.

    Raises `LocalProtocolError` as `encode` does.
    """
    row = BY_KIND[type(message)]
    if isinstance(message, DataFrame):
        body = data_frames.pack(message)
    else:
        body = [_pack_control(message, row)]
    length = sum(map(len, body))
    limit = max_frame_bytes(row)
    if HEADER.size + length > limit:
        raise LocalProtocolError(
            f"{row.name} cannot be sent: {HEADER.size + length} bytes are above {limit}"
        )
    return [HEADER.pack(MAGIC, MAJOR, MINOR, row.id, length, 0), *body]


def _pack_control(message: ControlMessage, row: MessageType) -> bytes:
    """The body in MessagePack, read back so that what a peer would refuse is not sent."""
    try:
        body = _ENCODER.encode(message)
        _unpack_control(row, body)
    except _BAD_VALUE as cause:
        raise LocalProtocolError(f"{row.name} cannot be sent: {cause}") from cause
    return body


def decode(frame: bytes | memoryview, plane: Plane | None = None) -> Message:
    """The message that `frame` holds; with `plane`, only one that may arrive there.

    Tensors and nothing else are views into `frame`, which must be one-dimensional bytes. Raises
    `RemoteProtocolError` that says what is wrong, and nothing else.
    """
    view = memoryview(frame)
    row = _check_frame_header(view)
    if plane is not None and not row.allowed_on(plane):
        raise RemoteProtocolError(f"{row.name} does not belong on the {plane} plane")
    body = view[HEADER.size :]
    try:
        if issubclass(row.kind, DataFrame):
            return data_frames.unpack(row.kind, body)
        return _unpack_control(row, body)
    except RemoteProtocolError as cause:
        raise RemoteProtocolError(f"{row.name}: {cause}") from cause


def frame_length(start: bytes | memoryview) -> int:
    """The bytes of the frame, header included, that begins with these (at least a header).

    For frames that follow each other in a stream, before there is memory for the rest. Raises
    `RemoteProtocolError` where that is above the limit, and where no frame begins so. Of a type
    that is not known here it may be the longest of any.
    """
    type_id, length = _read_header(start)
    row = BY_ID.get(type_id)
    limit = max_frame_bytes(row) if row else MAX_STEP_BYTES
    if HEADER.size + length > limit:
        raise RemoteProtocolError(f"a frame of {HEADER.size + length} bytes is above {limit}")
    return HEADER.size + length


def _read_header(view: bytes | memoryview) -> tuple[int, int]:
    """Type and length of body of a frame header, once magic, version and reserved bits are
    right."""
    if len(view) < HEADER.size:
        raise RemoteProtocolError(f"{len(view)} bytes are too few for a frame header")
    magic, major, minor, type_id, length, reserved = HEADER.unpack_from(view)
    if magic != MAGIC:
        raise RemoteProtocolError("the frame does not begin with P2PI: no peer of this protocol")
    if major != MAJOR:
        raise RemoteProtocolError(
            f"the frame is of protocol version {major}.{minor}; this node speaks {MAJOR}.{MINOR}"
        )
    if reserved:
        raise RemoteProtocolError("the reserved field of the header is not zero")
    return type_id, length


def _check_frame_header(view: memoryview) -> MessageType:
    """The row of the message table, once the header and the lengths are right."""
    type_id, length = _read_header(view)
    if length != len(view) - HEADER.size:
        raise RemoteProtocolError(
            f"the header announces {length} bytes of body, but {len(view) - HEADER.size} follow"
        )
    row = BY_ID.get(type_id)
    if row is None:
        raise RemoteProtocolError(f"message type {type_id} is unknown")
    limit = max_frame_bytes(row)
    if len(view) > limit:
        raise RemoteProtocolError(f"{row.name} of {len(view)} bytes is above {limit}")
    return row


def _unpack_control(row: MessageType, body: bytes | memoryview) -> ControlMessage:
    """The message whose MessagePack is `body`, its schema and its rules checked."""
    try:
        message = _DECODERS[row.kind].decode(body)
    except _BAD_BODY as cause:
        raise RemoteProtocolError(str(cause)) from cause
    check(message)
    return message
