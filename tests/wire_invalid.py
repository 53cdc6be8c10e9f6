"""Frames that every decoder must refuse, each for one reason: its label."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from p2pinfer.limits import MAX_GB_S, MAX_POSITIONS, MAX_STEP_TOKENS
from p2pinfer.wire.codec import encode
from p2pinfer.wire.messages import BY_KIND, ControlMessage
from tests.wire_examples import EXAMPLES, plain


def control(label: str, **changes: Any) -> bytes:
    """The frame of an example with other values in its body, unchecked."""
    message = EXAMPLES[label]
    assert isinstance(message, ControlMessage)
    return raw(BY_KIND[type(message)].id, msgspec.msgpack.encode(plain(message) | changes))


def raw(type_id: int, body: bytes) -> bytes:
    """A frame with a good header around any body."""
    return struct.pack("<4sBBHII", b"P2PI", 1, 0, type_id, len(body), 0) + body


def patched(label: str, offset: int, new: bytes) -> bytes:
    """The frame of an example with some bytes replaced."""
    frame = encode(EXAMPLES[label])
    return frame[:offset] + new + frame[offset + len(new) :]


def fitted(label: str, offset: int, new: bytes, size: int) -> bytes:
    """As `patched`, with the body cut or filled to `size` bytes and its length made right."""
    frame = patched(label, offset, new)
    type_id = int.from_bytes(frame[6:8], "little")
    return raw(type_id, frame[16 : 16 + size].ljust(size, b"\0"))


def plan(**changes: Any) -> bytes:
    """A PROPOSE whose plan has other values."""
    return control("propose", plan=plain(EXAMPLES["propose"])["plan"] | changes)


def stage(**changes: Any) -> bytes:
    """A PROPOSE whose first stage has other values."""
    first, second = plain(EXAMPLES["propose"])["plan"]["stages"]
    return plan(stages=[first | changes, second])


U63_TOO_LARGE = b"\0" * 7 + b"\x80"
MEMBERS = plain(EXAMPLES["propose"])["plan"]["members"]
SLOT = plain(EXAMPLES["step"])["slots"][1]
PARAMS = plain(EXAMPLES["submit of text"])["params"]
LOG = plain(EXAMPLES["activate"])["logs"][0]
COVERAGE = plain(EXAMPLES["ack"])["coverage"][0]
INPUTS = plain(EXAMPLES["ack"])["inputs"][0]
TRIP = plain(EXAMPLES["heartbeat"])["round_trips"][0]
FINAL = plain(EXAMPLES["step"])["finals"][0]

INVALID: dict[str, bytes] = {
    "nothing": b"",
    "a header that is cut": encode(EXAMPLES["credit"])[:15],
    "another magic": patched("credit", 0, b"P2PX"),
    "another major": patched("credit", 4, b"\x02"),
    "major 0": patched("credit", 4, b"\x00"),
    "a pre-vote reply with a plan led by no member": control(
        "pre-vote reply to an older plan", plan=plain(EXAMPLES["propose"])["plan"] | {"leader": 9}
    ),
    "an unknown type": patched("credit", 6, b"\xff\x00"),
    "a length that is too long": patched("credit", 8, b"\xff"),
    "a length that is too short": patched("credit", 8, b"\x01"),
    "bytes after the body": encode(EXAMPLES["credit"]) + b"\0",
    "a reserved field that is not zero": patched("credit", 12, b"\x01"),
    "a body that is empty": raw(41, b""),
    "a body that is no map": raw(41, b"\x91\x01"),
    "a key that is a number": raw(41, b"\x81\x01\x01"),
    "a key that is bytes": raw(41, b"\x81\xc4\x01a\x01"),
    "bytes after the map": raw(41, msgspec.msgpack.encode({"request_id": 1}) + b"\xc0"),
    "a missing field": raw(41, b"\x80"),
    "a byte that is no MessagePack": raw(41, b"\x82\xaarequest_id\x01\xa1x\xc1"),
    "an unknown field that is cut": raw(41, b"\x82\xaarequest_id\x01\xa1x\xdb\xff\xff\xff\xff"),
    "a field given twice, first of the wrong type": raw(
        41, b"\x82\xaarequest_id\xc0\xaarequest_id\x01"
    ),
    "an array that announces too much": raw(38, b"\x81\xaaprompt_ids\xdd\xff\xff\xff\xff"),
    "an integer that is negative": control("status request", request_id=-1),
    "an integer above 2^63 - 1": control("status request", request_id=1 << 63),
    "an integer that is a float": control("status request", request_id=1.0),
    "an integer that is a boolean": control("status request", request_id=True),
    "an integer that is nil": control("status request", request_id=None),
    "a float that is NaN": control("finished", ttft_s=float("nan")),
    "a float that is infinite": control("submit of text", params=PARAMS | {"top_p": float("inf")}),
    "a float that is negative": control("finished", ttft_s=-1.0),
    "a float that is a boolean": control("finished", ttft_s=True),
    "a boolean that is a number": control("failed", retryable=1),
    "text that is bytes": control("failed", message=b"x"),
    "text that is not UTF-8": raw(37, b"\x82\xaarequest_id\x01\xa6reason\xa1\xff"),
    "text that is too long": control("failed", message="x" * 4097),
    "bytes that are text": control("status reply", body="{}"),
    "an extension": raw(41, b"\x81\xaarequest_id\xd6\xff\0\0\0\1"),
    "a reason that is unknown": control("cancel", reason="whim"),
    "a state that is unknown": control(
        "heartbeat", rumours=[plain(EXAMPLES["heartbeat"])["rumours"][0] | {"state": "tired"}]
    ),
    "an identity that is too short": control("leave", node_id="0123456789abcde"),
    "an identity with a newline": control("leave", node_id="0123456789abcdef\n"),
    "a name with a control character": control("drain", name="\x1b[2J"),
    "a name that is empty": plan(members=[MEMBERS[0] | {"name": ""}, MEMBERS[1]]),
    "a memory that is no identity": plan(members=[MEMBERS[0] | {"memory": "anna"}, MEMBERS[1]]),
    "a machine that is no identity": plan(members=[MEMBERS[0] | {"machine": "b"}, MEMBERS[1]]),
    "a speed below 0": plan(members=[MEMBERS[0] | {"product_gb_s": -1.0}, MEMBERS[1]]),
    "a speed above all": plan(members=[MEMBERS[0] | {"product_gb_s": MAX_GB_S + 1}, MEMBERS[1]]),
    "a bandwidth that is NaN": plan(members=[MEMBERS[0] | {"read_gb_s": float("nan")}, MEMBERS[1]]),
    "a round trip that is endless": control("heartbeat", round_trips=[TRIP | {"ms": 1e300}]),
    "a round trip below 0": control("heartbeat", round_trips=[TRIP | {"ms": -0.5}]),
    "a round trip to nobody": control("heartbeat", round_trips=[TRIP | {"node_id": ""}]),
    "too many round trips": control("heartbeat", round_trips=[TRIP] * 17),
    "an attempt below 0": control("forward", attempt=-1),
    "an address without a port": plan(members=[MEMBERS[0] | {"address": "tcp://h"}, MEMBERS[1]]),
    "a list that is too long": control("heartbeat", hears_steps=["0" * 16] * 17),
    "a list that is empty": control("hello", versions=[]),
    "both text and tokens": control("submit of text", prompt_ids=[1]),
    "tokens beyond the positions": control("chunk", start=MAX_POSITIONS, tokens=[0]),
    "a slot beyond the positions": control("step", slots=[SLOT | {"start": MAX_POSITIONS}]),
    "a slot without tokens": control("step", slots=[SLOT | {"tokens": []}]),
    "more positions than a step has": control(
        "step", slots=[SLOT | {"tokens": [1] * MAX_STEP_TOKENS}, SLOT]
    ),
    "a final token beyond the positions": control(
        "step", finals=[FINAL | {"position": MAX_POSITIONS}]
    ),
    "a log that restarts beyond its end": control("activate", logs=[LOG | {"restart": 11}]),
    "a log recomputed beyond its restart": control("activate", logs=[LOG | {"recompute": 10}]),
    "a log beyond the positions": control("activate", logs=[LOG | {"length": MAX_POSITIONS + 1}]),
    "an entry of a log beyond the positions": control("log entry", start=MAX_POSITIONS),
    "a prompt beyond the positions": control("log entry", prompt_tokens=MAX_POSITIONS + 1),
    "a digest that is cut": control("activate", logs=[LOG | {"digest": "ab" * 31}]),
    "a request for no logs": control("log request", request_ids=[]),
    "coverage beyond the positions": control(
        "ack", coverage=[COVERAGE | {"positions": MAX_POSITIONS + 1}]
    ),
    "inputs beyond the positions": control(
        "ack", inputs=[INPUTS | {"positions": MAX_POSITIONS + 1}]
    ),
    "a KV request for nothing": control("kv request", end=0),
    "a KV request beyond the positions": control("kv request", end=MAX_POSITIONS + 1),
    "a leader who is no member": plan(leader=2),
    "a voter who is no member": plan(voters=[0, 2]),
    "a voter before who has no identity": plan(old_voters=[""]),
    "a quorum that is unknown": plan(quorum="everybody"),
    "a plan without members": plan(members=[]),
    "a member twice": plan(members=[MEMBERS[0], MEMBERS[0]]),
    "a stage without layers": stage(start=1),
    "an owner who is no member": stage(head_owners=[0, 2]),
    "a standby who is no member": stage(head_standbys=[[2], []]),
    "standbys for some units": stage(mlp_standbys=[[1]]),
    "a data header that is cut": raw(66, bytes(47)),
    "a term above 2^63 - 1": patched("partial", 16, U63_TOO_LARGE),
    "an epoch above 2^63 - 1": patched("partial", 24, U63_TOO_LARGE),
    "a step above 2^63 - 1": patched("partial", 32, U63_TOO_LARGE),
    "a link_seq above 2^63 - 1": patched("partial", 40, U63_TOO_LARGE),
    "a sender beyond the members": patched("partial", 48, b"\x10"),
    "a stage beyond the stages": patched("partial", 49, b"\x10"),
    "a layer beyond the layers": patched("partial", 50, b"\x00\x02"),
    "a third half": patched("partial", 52, b"\x02"),
    "an unknown element type": patched("partial", 53, b"\x05"),
    "a partial of integers": patched("partial", 53, b"\x04"),
    "candidates in bfloat16": patched("candidates", 53, b"\x02"),
    "a partial without parts": fitted("partial", 54, b"\0\0", 48),
    "more parts than there may be": patched("partial", 54, b"\x41"),
    "no rows": fitted("hidden", 56, bytes(4), 48),
    "more rows than a step has": fitted("hidden", 56, b"\x01\x04\0\0", 48 + 1025 * 6),
    "no columns": fitted("hidden", 60, bytes(4), 48),
    "a tensor that would not fit the memory": patched("hidden", 60, b"\0\0\x10\0"),
    "a tensor that is cut": fitted("partial", 0, b"", 100),
    "a tensor that is too long": fitted("partial", 0, b"", 188),
    "candidates that are cut": fitted("candidates", 0, b"", 200),
    "a table that is cut": fitted("partial", 0, b"", 50),
    "padding that is not zero": patched("partial", 68, b"\x01"),
    "a tree node twice": patched("partial", 64, b"\x01\x00\x01\x00"),
    "a tree node that no tree has": patched("partial", 64, b"\x00\x18"),
    "a unit twice": patched("candidates", 64, b"\x01\x00\x01\x00"),
    "a unit beyond the units": patched("logits", 64, b"\x00\x10"),
    "a layer where none is used": patched("hidden", 50, b"\x01"),
    "a half where none is used": patched("logits", 52, b"\x01"),
    "a table where none is used": fitted("hidden", 54, b"\x01", 64 + 12),
    "a KV header that is cut": fitted("kv delta", 0, b"", 95),
    "a KV request id above 2^63 - 1": patched("kv delta", 64, b"\xff" * 8),
    "a KV position beyond the positions": patched("kv delta", 72, b"\xff\xff\x0f\x00"),
    "a KV unit beyond the units": patched("kv delta", 76, b"\x00\x10"),
    "KV of no layers": patched("kv delta", 78, b"\x00\x00"),
}
