"""The codec's edges: views, planes, limits, and what `encode` refuses to send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from p2pinfer.errors import LocalProtocolError, RemoteProtocolError
from p2pinfer.limits import (
    MAX_BULK_BYTES,
    MAX_CONTROL_BYTES,
    MAX_POSITIONS,
    MAX_STEP_BYTES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TEXT_CHARS,
)
from p2pinfer.types import Fence, SamplingParams
from p2pinfer.wire import codec
from p2pinfer.wire.codec import HEADER, MAGIC, decode, encode, frame_length, max_frame_bytes
from p2pinfer.wire.messages import (
    BY_KIND,
    MESSAGES,
    Candidates,
    Credit,
    Failed,
    Heartbeat,
    KvDelta,
    LinkOpen,
    LogEntry,
    Partial,
    Plane,
    StatusRequest,
    Step,
    Submit,
)
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.wire_examples import EXAMPLES, tensor

replace = msgspec.structs.replace


def test_decode_does_not_copy_tensors() -> None:
    """A tensor's data is a view into the frame that it came in, aligned to 16 bytes."""
    frame = bytearray(encode(EXAMPLES["partial"]))
    message = decode(memoryview(frame))
    assert isinstance(message, Partial)
    assert isinstance(message.tensor.data, memoryview)
    assert message.tensor.data[0] == 0
    start = len(frame) - message.tensor.nbytes
    frame[start] = 99
    assert message.tensor.data[0] == 99
    assert start % 16 == 0


def test_a_tensor_takes_the_bytes_of_an_array() -> None:
    """The bytes of a numpy array go out as they lie and come back as the same numbers."""
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    sent = Tensor(WireDType.FLOAT32, (1, 2, 3), memoryview(array).cast("B"))
    frame = encode(replace(EXAMPLES["partial"], parts=(0,), tensor=sent))
    message = decode(frame)
    assert isinstance(message, Partial)
    back = np.frombuffer(message.tensor.data, dtype=np.float32).reshape(message.tensor.shape)
    assert (back == array).all()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (bytes(11), "12 bytes, not 11"),
        (memoryview(np.zeros(3, np.float32)), "view of bytes"),
        (memoryview(np.zeros((3, 4), np.uint8)), "view of bytes"),
    ],
)
def test_a_tensor_checks_its_bytes(data: bytes | memoryview, complaint: str) -> None:
    """A tensor of another size than its shape, or of a view that is not bytes, cannot be made."""
    with pytest.raises(LocalProtocolError, match=complaint):
        Tensor(WireDType.FLOAT32, (3,), data)


@pytest.mark.parametrize("row", MESSAGES, ids=lambda row: row.name)
def test_a_message_arrives_on_its_own_plane_only(row: Any) -> None:
    """Every message is taken on its plane and refused on others; LINK_OPEN is on two."""
    frame = encode(next(e for e in EXAMPLES.values() if type(e) is row.kind))
    for plane in Plane:
        if plane is row.plane or (row.kind is LinkOpen and plane is Plane.BULK):
            assert type(decode(frame, plane)) is row.kind
        else:
            with pytest.raises(RemoteProtocolError, match=f"{row.name} does not belong on the"):
                decode(frame, plane)


@pytest.mark.parametrize(
    ("label", "offset", "value", "complaint"),
    [
        ("credit", 0, b"HTTP", "does not begin with P2PI"),
        ("credit", 4, b"\x02\x03", "version 2.3; this node speaks 1.0"),
        ("credit", 6, b"\xe7\x03", "message type 999 is unknown"),
        ("credit", 8, b"\xff", "announces 255 bytes of body"),
        ("credit", 12, b"\x01", "reserved field"),
        ("partial", 48, b"\x10", "PARTIAL: sender is 16, not within 0 to 15"),
        (
            "partial",
            23,
            b"\x80",
            "term is 9223372036854775811, not within 0 to 9223372036854775807",
        ),
        ("hidden", 53, b"\x09", r"dtype is 9, not one of 1 \(FLOAT32\), 2 \(BFLOAT16\)"),
        ("partial", 64, b"\x00\x18", "0x1800 is no node of a tree"),
        ("logits", 64, b"\x00\x10", "unit 4096 is not below 4096"),
        ("partial", 56, b"\x04", "has 160 bytes, not 120"),
    ],
)
def test_a_refusal_says_what_is_wrong(
    label: str, offset: int, value: bytes, complaint: str
) -> None:
    """The error names the message, the field, its value and what is allowed."""
    frame = bytearray(encode(EXAMPLES[label]))
    frame[offset : offset + len(value)] = value
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode(bytes(frame))


def test_a_bad_field_is_named_by_its_path() -> None:
    """A schema error says where in the message it is."""
    body = msgspec.msgpack.encode({"request_id": -1})
    frame = HEADER.pack(MAGIC, 1, 0, 41, len(body), 0) + body
    with pytest.raises(RemoteProtocolError, match=r"STATUS_REQUEST: .*\$\.request_id"):
        decode(frame)


@pytest.mark.parametrize("label", EXAMPLES)
def test_a_frame_says_in_its_header_how_long_it_is(label: str) -> None:
    """So frames can follow each other in a stream."""
    frame = encode(EXAMPLES[label])
    assert frame_length(frame[: HEADER.size]) == frame_length(frame) == len(frame)


@pytest.mark.parametrize(
    ("kind", "most"),
    [(65, MAX_CONTROL_BYTES), (66, MAX_STEP_BYTES), (96, MAX_BULK_BYTES), (999, MAX_STEP_BYTES)],
)
def test_no_frame_of_a_stream_is_longer_than_its_kind_may_be(kind: int, most: int) -> None:
    """Of a kind that is not known, than any."""
    body = most - HEADER.size
    assert frame_length(HEADER.pack(MAGIC, 1, 0, kind, body, 0)) == most
    with pytest.raises(RemoteProtocolError, match=f"{most + 1} bytes is above {most}"):
        frame_length(HEADER.pack(MAGIC, 1, 0, kind, body + 1, 0))


@pytest.mark.parametrize(
    ("start", "complaint"),
    [
        (bytes(15), "too few"),
        (b"HTTP" + bytes(12), "does not begin with P2PI"),
        (HEADER.pack(MAGIC, 2, 3, 66, 1, 0), "version 2.3"),
        (HEADER.pack(MAGIC, 1, 0, 66, 1, 1), "reserved field"),
    ],
)
def test_what_begins_no_frame_has_no_length(start: bytes, complaint: str) -> None:
    """Nothing after it could be understood."""
    with pytest.raises(RemoteProtocolError, match=complaint):
        frame_length(start)


def test_nesting_without_end_is_refused() -> None:
    """A body nested a million deep neither crashes nor exhausts the stack."""
    body = b"\x82\xaarequest_id\x01\xa1x" + b"\x91" * 1_000_000 + b"\xc0"
    with pytest.raises(RemoteProtocolError, match="recursion"):
        decode(HEADER.pack(MAGIC, 1, 0, 41, len(body), 0) + body)


def test_an_oversize_control_frame_is_refused_before_it_is_read() -> None:
    """The limit counts the whole frame; not a byte of the body is looked at."""
    body = bytes(MAX_CONTROL_BYTES - HEADER.size + 1)
    with pytest.raises(RemoteProtocolError, match="CREDIT of 8388609 bytes is above 8388608"):
        decode(HEADER.pack(MAGIC, 1, 0, 98, len(body), 0) + body)


def test_a_frame_of_the_limit_is_read() -> None:
    """A control frame may be as long as the limit, unknown fields included."""
    body = b"\x82\xaarequest_id\x01\xa1x\xc6"
    room = MAX_CONTROL_BYTES - HEADER.size - len(body) - 4
    body += room.to_bytes(4, "big") + bytes(room)
    frame = HEADER.pack(MAGIC, 1, 0, 41, len(body), 0) + body
    assert len(frame) == MAX_CONTROL_BYTES
    assert decode(frame) == StatusRequest(request_id=1)


def test_the_largest_request_fits() -> None:
    """Text of the greatest length, four bytes a character, is within the frame's limit."""
    message = Submit(request_id=1, text="𝄞" * MAX_TEXT_CHARS, params=SamplingParams())
    assert decode(encode(message)) == message


def test_the_largest_log_fits() -> None:
    """A token log of the greatest length, of the largest tokens, is within the frame's limit."""
    message = LogEntry(
        fence=Fence(1, 1),
        request_id=1,
        term=1,
        prompt_tokens=1,
        params=SamplingParams(stop=("𝄞" * MAX_STOP_CHARS,) * MAX_STOP_STRINGS),
        tokens=((1 << 31) - 1,) * MAX_POSITIONS,
    )
    assert decode(encode(message)) == message


LIMITED: list[tuple[str, Callable[[], Any], str]] = [
    ("a length", lambda: Failed(code="internal", message="x" * 5000), "length <= 4096"),
    ("a pattern", lambda: Failed(code="NOT A CODE", message=""), "regex"),
    ("a huge number", lambda: StatusRequest(request_id=1 << 70), "serialize"),
    ("a lone surrogate", lambda: Failed(code="", message="\udcff"), "surrogate"),
    ("no number", lambda: StatusRequest(request_id=object()), "object"),  # type: ignore[arg-type]
    (
        "a rule",
        lambda: Submit(request_id=1, text="x", prompt_ids=(1,), params=SamplingParams()),
        "both text and prompt_ids",
    ),
    ("an infinity", lambda: replace(EXAMPLES["finished"], ttft_s=float("inf")), "float"),
    ("a term", lambda: replace(EXAMPLES["hidden"], step=1 << 63), "Hidden cannot be sent"),
    ("a sender", lambda: replace(EXAMPLES["hidden"], sender=16), "sender is 16"),
    ("a layer", lambda: replace(EXAMPLES["partial"], layer=1 << 16), "Partial cannot be sent"),
    ("parts that do not fit", lambda: replace(EXAMPLES["partial"], parts=(1,)), "1 parts"),
    ("a part twice", lambda: replace(EXAMPLES["partial"], parts=(1, 1)), "twice"),
    (
        "a shape",
        lambda: replace(EXAMPLES["hidden"], tensor=tensor(WireDType.FLOAT32, 1, 2, 3)),
        "too many values",
    ),
    (
        "integers",
        lambda: replace(EXAMPLES["hidden"], tensor=tensor(WireDType.INT32, 1, 2)),
        "dtype is 4",
    ),
    ("units that do not fit", lambda: replace(EXAMPLES["candidates"], units=(1,)), "fit together"),
    (
        "ids of another type",
        lambda: replace(EXAMPLES["candidates"], ids=tensor(WireDType.FLOAT32, 2, 3, 4)),
        "ids must be INT32",
    ),
    ("a digest", lambda: replace(EXAMPLES["kv delta"], log_digest="0f"), "32 bytes"),
    ("no digest", lambda: replace(EXAMPLES["kv delta"], log_digest="?" * 64), "hexadecimal"),
    ("a unit", lambda: replace(EXAMPLES["logits"], unit=4096), "4096 is not below"),
]


@pytest.mark.parametrize(
    ("build", "complaint"),
    [pytest.param(build, complaint, id=label) for label, build, complaint in LIMITED],
)
def test_encode_refuses_what_a_peer_would_drop(build: Callable[[], Any], complaint: str) -> None:
    """A message that breaks its schema, a rule or a limit is a defect here, not a frame there."""
    with pytest.raises(LocalProtocolError, match=complaint):
        encode(build())


def test_encode_refuses_a_frame_above_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame above the limit of its body and plane is not sent."""
    monkeypatch.setitem(codec._DATA_LIMITS, Plane.STEPS, 100)
    monkeypatch.setattr(codec, "MAX_CONTROL_BYTES", 50)
    with pytest.raises(LocalProtocolError, match="PARTIAL cannot be sent: 200 bytes are above 100"):
        encode(EXAMPLES["partial"])
    with pytest.raises(LocalProtocolError, match=r"STEP cannot be sent: .* bytes are above 50"):
        encode(EXAMPLES["step"])


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (Heartbeat, 8 << 20),
        (Step, 8 << 20),
        (Credit, 8 << 20),
        (Candidates, 256 << 20),
        (KvDelta, 64 << 20),
    ],
)
def test_limits_go_by_body_and_plane(kind: type, limit: int) -> None:
    """Control bodies have one limit on all planes, data frames that of their plane."""
    assert max_frame_bytes(BY_KIND[kind]) == limit
