"""`proto_spec.md` says what the code does: its tables against the code, its vectors against both.

With `P2PINFER_WRITE_VECTORS=1` in the environment the vectors are written anew from the examples;
what changed is then for a person to read.
"""

from __future__ import annotations

import ast
import json
import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from p2pinfer import limits, replicator
from p2pinfer.core import agreement, replication
from p2pinfer.core.events import NodeConfig
from p2pinfer.core.requests import REPLY_KEPT_S
from p2pinfer.core.timing import PRESETS
from p2pinfer.errors import ERROR_CODES, RemoteProtocolError
from p2pinfer.limits import MAX_NODES
from p2pinfer.wire import codec, data_frames
from p2pinfer.wire.messages import BY_ID, BY_KIND, MESSAGES, ControlMessage, Plane
from p2pinfer.wire.tensors import ITEM_BYTES, WireDType
from tests import spec_decoder as spec
from tests.wire_examples import EXAMPLES, VECTORS, plain, to_json, vectors
from tests.wire_invalid import INVALID

PACKAGE = Path(codec.__file__).parent.parent
LOCAL_LIMITS = {"MAX_PENDING_CLIENTS"}
"""Limits of one node that no peer needs to know."""

CODE_ARGUMENT = {"ClusterError": 0, "PlacementError": 0, "InvalidRequestError": 1}
"""Where an error's code stands in a call, if it has no name there."""


# --- tables ---------------------------------------------------------------------------------------


def of_schema(kind: inspect.Type) -> spec.Type:  # noqa: PLR0911 - one per kind
    """A type of the code in the specification's terms."""
    match kind:
        case inspect.Metadata():
            return of_schema(kind.type)
        case inspect.IntType():
            low = kind.ge if kind.ge is not None else kind.gt + 1
            high = kind.le if kind.le is not None else kind.lt - 1
            return spec.Type("int", low, high)
        case inspect.FloatType():
            return spec.Type("float", kind.ge, kind.le)
        case inspect.StrType():
            pattern = (kind.pattern or "").removeprefix(r"\A").removesuffix(r"\Z")
            low = kind.min_length or 0
            if kind.max_length is None:
                assert pattern, "text must be bounded by a length or a pattern"
                return spec.Type("str", low, pattern=pattern)
            return spec.Type("str", low, kind.max_length, pattern)
        case inspect.BytesType():
            return spec.Type("bytes", kind.min_length or 0, kind.max_length)
        case inspect.VarTupleType():
            inner = of_schema(kind.item_type)
            return spec.Type("list", kind.min_length or 0, kind.max_length, inner=inner)
        case inspect.EnumType():
            return spec.Type("word", words=tuple(word.value for word in kind.cls))
        case inspect.StructType():
            row = BY_KIND.get(kind.cls)
            return spec.Type("map", inner=row.name if row else kind.cls.__name__)
        case inspect.UnionType():
            (inner,) = (t for t in kind.types if not isinstance(t, inspect.NoneType))
            return spec.Type("optional", inner=of_schema(inner))
    assert isinstance(kind, inspect.BoolType), kind
    return spec.Type("bool")


def structures(kind: type) -> dict[str, type]:
    """The structures that a message is made of, itself included, by the specification's names."""
    found: dict[str, type] = {}

    def visit(t: inspect.Type) -> None:
        if isinstance(t, inspect.StructType):
            name = of_schema(t).inner
            if name not in found:
                found[name] = t.cls
                for field in t.fields:
                    visit(field.type)
        for attribute in ("type", "item_type"):
            if isinstance(inner := getattr(t, attribute, None), inspect.Type):
                visit(inner)
        for inner in getattr(t, "types", ()):
            visit(inner)

    visit(inspect.type_info(kind))
    return found


CONTROL_KINDS = [row.kind for row in MESSAGES if issubclass(row.kind, ControlMessage)]
STRUCTURES = {name: cls for kind in CONTROL_KINDS for name, cls in structures(kind).items()}


def test_message_table_is_the_codes_table() -> None:
    """Ids, names, planes, directions, bodies and versions are equal, in the order of the ids."""
    code = [
        {
            "id": str(row.id),
            "name": row.name,
            "plane": ", ".join(plane.value for plane in Plane if row.allowed_on(plane)),
            "direction": row.direction,
            "body": "MessagePack" if issubclass(row.kind, ControlMessage) else "data",
            "since": str(row.since),
        }
        for row in MESSAGES
    ]
    assert code == spec.MESSAGE_TABLE
    assert sorted(BY_ID) == [row.id for row in MESSAGES]


def test_every_message_has_its_own_heading() -> None:
    """Each message is described once, and no heading speaks of one that does not exist."""
    titles = [section.title for section in spec.SECTIONS]
    assert all(titles.count(row.name) == 1 for row in MESSAGES)
    shouted = {title for title in titles if title.isupper()}
    assert shouted == {row.name for row in MESSAGES}


def test_field_tables_are_those_of_the_code() -> None:
    """No structure or message is missing on either side."""
    assert set(spec.FIELD_TABLES) == set(STRUCTURES)


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_fields(name: str) -> None:
    """Names, order, types, bounds, patterns and defaults of the fields are equal."""
    code = {}
    for field in inspect.type_info(STRUCTURES[name]).fields:
        default = spec.NO_DEFAULT if field.required else plain(field.default)
        code[field.name] = (of_schema(field.type), default)
    assert code == spec.SCHEMAS[name]
    assert list(code) == list(spec.SCHEMAS[name])


def test_limits_are_those_of_the_code() -> None:
    """Every limit that peers share has one value, and no limit of the code is left out."""
    code = {name: value for name, value in vars(limits).items() if name.startswith("MAX_")}
    shared = {name: value for name, value in code.items() if name not in LOCAL_LIMITS}
    assert shared == spec.LIMITS


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_timers_are_those_of_the_code(preset: str) -> None:
    """Every timer has the value of the table, in both presets, and none is left out."""
    table = {row["timer"]: float(row[preset]) for row in spec.TIMER_TABLE}
    assert table == msgspec.structs.asdict(PRESETS[preset])
    assert set(spec.TIMER_TABLE[0]) == {"timer", *PRESETS, "formula or reason"}


def test_settings_are_the_defaults_of_the_code() -> None:
    """The settings that are times have the defaults of the table."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(NodeConfig)}
    for row in spec.SETTING_TABLE:
        code = REPLY_KEPT_S if row["setting"] == "reply_kept" else defaults[row["setting"]]
        assert float(row["default"]) == code, row["setting"]


def test_constants_of_replicas_are_those_of_the_code() -> None:
    """Each has the value of the table; the window is the limit of credit."""
    here = vars(replication) | vars(replicator)
    assert {name: here[name.upper()] for name in spec.CONSTANTS} == spec.CONSTANTS
    assert len(spec.CONSTANTS) == 6
    assert replication.WINDOW_BYTES == limits.MAX_CREDIT_BYTES


def test_positions_that_are_run_again_are_as_many_as_in_the_code() -> None:
    """Section 9.4 has the number."""
    text = (PACKAGE.parent / "proto_spec.md").read_text(encoding="utf-8")
    assert f"later by more than {agreement.RERUN_POSITIONS} positions" in text


def test_error_table_is_the_codes_table() -> None:
    """Codes and whether they are retryable are equal."""
    assert {r["code"]: r["retryable"] == "yes" for r in spec.ERROR_TABLE} == ERROR_CODES
    assert {r["who acts"] for r in spec.ERROR_TABLE} == {"client", "operator", "peer"}
    assert {r["retryable"] for r in spec.ERROR_TABLE} == {"yes", "no"}


def codes_used() -> set[str]:
    """Every error code that the package writes as a literal."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            place = CODE_ARGUMENT.get(name)
            if place is not None and len(node.args) > place:
                given.append(node.args[place])
            found |= {n.value for n in given if isinstance(n, ast.Constant)}
    return {code for code in found if isinstance(code, str)}


def test_every_code_that_is_raised_is_in_the_table() -> None:
    """The package names no error code that the specification does not know."""
    assert codes_used() - {""} <= set(ERROR_CODES)


def test_frame_header_table() -> None:
    """The byte table of the frame header is the layout that the codec packs."""
    assert_layout(spec.FRAME_HEADER, codec.HEADER, 0)


def test_data_header_table() -> None:
    """The byte table of the data header is the layout, and its fields have these names."""
    assert_layout(spec.DATA_HEADER, data_frames.HEADER, 0)
    assert tuple(row["field"] for row in spec.DATA_HEADER) == data_frames.Header._fields


def test_kv_header_table() -> None:
    """The byte table of the KV header is the layout, after the data header."""
    assert_layout(spec.KV_HEADER, data_frames.KV_HEADER, data_frames.HEADER.size)


def assert_layout(rows: list[dict[str, str]], layout: struct.Struct, start: int) -> None:
    """Offsets without a gap, sizes and signs as `struct` has them."""
    codes = {"u8": "B", "u16": "H", "u32": "I", "u63": "q"}
    offset = start
    for row in rows:
        assert int(row["offset"]) == offset
        offset += int(row["size"])
    assert "<" + "".join(codes.get(row["type"], row["type"]) for row in rows) == layout.format
    assert offset - start == layout.size


@pytest.mark.parametrize("kind", data_frames.LAYOUTS, ids=lambda kind: kind.__name__)
def test_ranges_of_the_data_header(kind: type) -> None:
    """What each kind of data frame may hold is equal."""
    layout = data_frames.LAYOUTS[kind]  # type: ignore[index]
    dtypes = sorted(layout.dtypes)
    assert dtypes == list(range(dtypes[0], dtypes[-1] + 1))
    assert {
        name: spec.bounds(ends) for name, ends in spec.DATA_RANGES[BY_KIND[kind].name].items()
    } == {
        "sender": (0, MAX_NODES - 1),
        "stage": (0, layout.max_stage),
        "layer": (0, layout.max_layer),
        "half": (0, layout.max_half),
        "dtype": (dtypes[0], dtypes[-1]),
        "entries": (layout.min_entries, layout.max_entries),
        "rows": (1, layout.max_rows),
        "cols": (1, layout.max_cols),
    }


def test_ranges_are_given_for_every_data_frame() -> None:
    """No kind of data frame is missing on either side."""
    kinds = {row.name for row in MESSAGES if not issubclass(row.kind, ControlMessage)}
    assert kinds == set(spec.DATA_RANGES) == {BY_KIND[kind].name for kind in data_frames.LAYOUTS}


def test_element_types() -> None:
    """Numbers, names and sizes of the element types are equal."""
    table = {number: (row["name"], int(row["bytes"])) for number, row in spec.DTYPES.items()}
    assert table == {int(d): (d.name, ITEM_BYTES[d]) for d in WireDType}


# --- vectors --------------------------------------------------------------------------------------


def written_vectors() -> dict[str, list[dict[str, Any]]]:
    """What the vector files should hold."""
    valid = []
    for label, message in EXAMPLES.items():
        row = BY_KIND[type(message)]
        frame = codec.encode(message)
        valid.append(
            {
                "label": label,
                "message": row.name,
                "plane": row.plane.value,
                "hex": frame.hex(),
                "values": to_json(plain(message)),
            }
        )
    invalid = [{"label": label, "hex": frame.hex()} for label, frame in INVALID.items()]
    return {"valid.json": valid, "invalid.json": invalid}


def test_vectors_are_those_of_the_examples() -> None:
    """The files in `tests/vectors` are what the examples encode to, byte for byte."""
    for name, entries in written_vectors().items():
        text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
        if os.environ.get("P2PINFER_WRITE_VECTORS"):
            (VECTORS / name).write_text(text, encoding="utf-8")
        assert (VECTORS / name).read_text(encoding="utf-8") == text


def test_every_message_has_a_vector() -> None:
    """There is a frame of each message."""
    assert {entry["message"] for entry in vectors("valid.json")} == {r.name for r in MESSAGES}


@pytest.mark.parametrize("entry", vectors("valid.json"), ids=lambda entry: entry["label"])
def test_both_decoders_read_a_valid_vector(entry: dict[str, Any]) -> None:
    """The codec and the decoder from the specification give the values of the vector."""
    frame = bytes.fromhex(entry["hex"])
    message = codec.decode(frame, Plane(entry["plane"]))
    assert BY_KIND[type(message)].name == entry["message"]
    assert to_json(plain(message)) == entry["values"]
    name, values = spec.decode(frame, entry["plane"])
    assert (name, to_json(values)) == (entry["message"], entry["values"])
    assert codec.encode(message) == frame


@pytest.mark.parametrize("entry", vectors("invalid.json"), ids=lambda entry: entry["label"])
def test_both_decoders_refuse_an_invalid_vector(entry: dict[str, Any]) -> None:
    """Neither decoder takes a frame that the specification forbids."""
    frame = bytes.fromhex(entry["hex"])
    with pytest.raises(RemoteProtocolError):
        codec.decode(frame)
    with pytest.raises(spec.Refused):
        spec.decode(frame)


def test_values_survive_a_minor_that_knows_more() -> None:
    """A frame of a later minor with a field of its own is read, and the field is ignored."""
    body = msgspec.msgpack.encode({"request_id": 7, "since_minor_9": [1, {"a": b"b"}]})
    header = codec.HEADER.pack(codec.MAGIC, 1, 9, 41, len(body), 0)
    assert plain(codec.decode(header + body)) == spec.decode(header + body)[1] == {"request_id": 7}
