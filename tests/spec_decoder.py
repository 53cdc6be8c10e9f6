"""A second decoder, written from `proto_spec.md` alone: no import of the package.

It reads the specification's own tables (limits, types, messages, headers), so a table that is
incomplete or wrong shows as a disagreement with `p2pinfer.wire`. Values are plain: messages and
structures are dicts, lists are lists, a tensor is a dict of dtype, shape and bytes.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

SPEC = Path(__file__).parent.parent / "proto_spec.md"


class Refused(Exception):
    """The bytes are no message of the specification."""


# --- the specification's tables -------------------------------------------------------------------


class Section(NamedTuple):
    """What stands under one heading: its title and its tables, rows as dicts by column."""

    title: str
    tables: list[list[dict[str, str]]]


def read_sections(text: str) -> list[Section]:
    """Every heading of a Markdown text with the tables below it."""
    sections: list[Section] = []
    columns: list[str] | None = None
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            sections.append(Section(line.lstrip("# "), []))
        if not line.startswith("|"):
            columns = None
            continue
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if columns is None:
            columns = cells
            sections[-1].tables.append([])
        elif not set(line) <= set("|-"):
            assert len(cells) == len(columns), line
            sections[-1].tables[-1].append(dict(zip(columns, cells, strict=True)))
    return sections


SECTIONS = read_sections(SPEC.read_text(encoding="utf-8"))


def table(*columns: str) -> list[dict[str, str]]:
    """The one table with these columns."""
    found = [
        rows
        for section in SECTIONS
        for rows in section.tables
        if rows and tuple(rows[0]) == columns
    ]
    assert len(found) == 1, columns
    return found[0]


LIMITS = {row["limit"]: int(row["value"]) for row in table("limit", "value", "of what")}
NAMED_TYPES = {row["type"]: row for row in table("type", "is", "pattern")}
MESSAGE_TABLE = table("id", "name", "plane", "direction", "body", "since")
DATA_RANGES = {
    row.pop("message"): row
    for row in table(
        "message", "sender", "stage", "layer", "half", "dtype", "entries", "rows", "cols"
    )
}
DTYPES = {int(row["dtype"]): row for row in table("dtype", "name", "bytes")}
TIMER_TABLE = table("timer", "lan", "test", "formula or reason")
SETTING_TABLE = table("setting", "default", "meaning")
CONSTANTS = {row["constant"]: float(row["value"]) for row in table("constant", "value", "of what")}
ERROR_TABLE = table("code", "retryable", "who acts", "meaning")
FIELD_TABLES = {
    section.title: rows
    for section in SECTIONS
    for rows in section.tables
    if rows and tuple(rows[0]) == ("field", "type", "default", "meaning")
}
HEADERS = [
    rows
    for section in SECTIONS
    for rows in section.tables
    if rows and tuple(rows[0]) == ("offset", "size", "type", "field")
]
FRAME_HEADER, DATA_HEADER, KV_HEADER = HEADERS


def number(text: str) -> float:
    """A number, or an expression of limits: `2*MAX_NODES`, `MAX_STAGES-1`, `MAX_A*MAX_B`."""
    if re.fullmatch(r"-?[0-9.]+(e[0-9]+)?", text):
        return float(text) if "." in text or "e" in text else int(text)
    assert re.fullmatch(r"(([0-9]|[A-Z_]+)\*)?[A-Z_]+(-1)?", text), text
    return int(eval(text, {"__builtins__": {}}, dict(LIMITS)))


def bounds(text: str) -> tuple[float, float]:
    """The two ends of `A..B`."""
    low, high = text.split("..")
    return number(low), number(high)


# --- types ----------------------------------------------------------------------------------------


class Type(NamedTuple):
    """A parsed type: its kind, its bounds, and what it is made of."""

    kind: str
    low: float = 0
    high: float = math.inf
    pattern: str = ""
    words: tuple[str, ...] = ()
    inner: Any = None


def parse_type(text: str) -> Type:
    """The type that a cell of a table names."""
    if text in NAMED_TYPES:
        row = NAMED_TYPES[text]
        return parse_type(row["is"])._replace(pattern=row["pattern"].strip("`"))
    if text in FIELD_TABLES:
        return Type("map", inner=text)
    if text in ("bool", "str"):
        return Type(text)
    if text.startswith("one of "):
        return Type("word", words=tuple(text.removeprefix("one of ").split(", ")))
    kind, rest = re.fullmatch(r"(int|float|str|bytes|list|optional)\((.*)\)", text).groups()  # type: ignore[union-attr]
    if kind == "optional":
        return Type(kind, inner=parse_type(rest))
    if kind == "list":
        item, ends = rest.rsplit(", ", 1)
        return Type(kind, *bounds(ends), inner=parse_type(item))
    return Type(kind, *bounds(rest))


NO_DEFAULT = object()


def parse_default(text: str) -> Any:
    """The default of a field: a literal between backquotes, or a dash where there is none."""
    words = {"`true`": True, "`false`": False, "`null`": None, "`[]`": [], "—": NO_DEFAULT}
    if text in words:
        return words[text]
    literal = text.strip("`")
    if literal.startswith('"'):
        return literal.strip('"')
    return float(literal) if "." in literal else int(literal)


SCHEMAS = {
    title: {
        row["field"].strip("`"): (parse_type(row["type"]), parse_default(row["default"]))
        for row in rows
    }
    for title, rows in FIELD_TABLES.items()
}

# --- MessagePack ----------------------------------------------------------------------------------


class Ext(NamedTuple):
    """An extension value: valid only where nobody looks."""

    type: int


class Pack:
    """A reader of MessagePack. Text stays bytes until somebody looks at it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if self.at + count > len(self.data):
            raise Refused("MessagePack ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def uint(self, size: int) -> int:
        """A big-endian number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def head(self) -> tuple[str, Any]:
        """The kind of the next value, and the value, or its length for `map` and `list`."""
        first = self.uint(1)
        if first < 0x80:
            return "int", first
        if first < 0x90:
            return "map", first & 15
        if first < 0xA0:
            return "list", first & 15
        if first < 0xC0:
            return "str", self.take(first & 31)
        if first >= 0xE0:
            return "int", first - 256
        return self.long(first)

    def long(self, first: int) -> tuple[str, Any]:  # noqa: PLR0911 - one per format
        """A value whose format is a whole byte, 0xC0 to 0xDF."""
        if first in (0xC0, 0xC2, 0xC3):
            return ("nil", None) if first == 0xC0 else ("bool", first == 0xC3)
        if 0xC4 <= first <= 0xC6:
            return "bytes", self.take(self.uint(1 << first - 0xC4))
        if 0xC7 <= first <= 0xC9:
            size = self.uint(1 << first - 0xC7)
            return "ext", Ext(self.take(1 + size)[0])
        if first in (0xCA, 0xCB):
            return "float", struct.unpack(
                *((">f", self.take(4)) if first == 0xCA else (">d", self.take(8)))
            )[0]
        if 0xCC <= first <= 0xCF:
            return "int", self.uint(1 << first - 0xCC)
        if 0xD0 <= first <= 0xD3:
            return "int", int.from_bytes(self.take(1 << first - 0xD0), "big", signed=True)
        if 0xD4 <= first <= 0xD8:
            return "ext", Ext(self.take(1 + (1 << first - 0xD4))[0])
        if 0xD9 <= first <= 0xDB:
            return "str", self.take(self.uint(1 << first - 0xD9))
        if first in (0xDC, 0xDD):
            return "list", self.uint(2 if first == 0xDC else 4)
        if first in (0xDE, 0xDF):
            return "map", self.uint(2 if first == 0xDE else 4)
        raise Refused("0xC1 is no MessagePack")

    def skip(self) -> None:
        """Step over one value, whatever is in it."""
        left = 1
        while left:
            kind, value = self.head()
            left += {"map": 2, "list": 1}.get(kind, 0) * (
                value if kind in ("map", "list") else 0
            ) - 1

    def value(self, wanted: Type) -> Any:
        """The next value, which must be of type `wanted`."""
        kind, value = self.head()
        if wanted.kind == "optional":
            if kind == "nil":
                return None
            wanted = wanted.inner
        if wanted.kind == "float" and kind == "int":
            kind, value = "float", float(value)
        if kind != {"word": "str"}.get(wanted.kind, wanted.kind):
            raise Refused(f"{kind} where {wanted.kind} is wanted")
        if kind == "map":
            return self.fields(value, wanted.inner)
        if kind == "list":
            self.within(value, wanted)
            return [self.value(wanted.inner) for _ in range(value)]
        if kind == "str":
            return self.text(value, wanted)
        if kind in ("int", "float"):
            self.within(value, wanted)
        elif kind == "bytes":
            self.within(len(value), wanted)
        return value

    def text(self, raw: bytes, wanted: Type) -> str:
        """UTF-8 of the wanted length, pattern or words."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused("not UTF-8") from error
        if wanted.kind == "word" and text not in wanted.words:
            raise Refused(f"{text!r} is none of {wanted.words}")
        if wanted.pattern and not re.fullmatch(wanted.pattern, text):
            raise Refused(f"{text!r} does not match {wanted.pattern}")
        self.within(len(text), wanted)
        return text

    @staticmethod
    def within(value: float, wanted: Type) -> None:
        """NaN is within nothing."""
        if not wanted.low <= value <= wanted.high:
            raise Refused(f"{value} is not within {wanted.low} to {wanted.high}")

    def fields(self, count: int, title: str) -> dict[str, Any]:
        """A map with the fields of the table under `title`."""
        schema = SCHEMAS[title]
        given: dict[str, Any] = {}
        for _ in range(count):
            kind, key = self.head()
            if kind != "str":
                raise Refused("a key that is no text")
            name = next((name for name in schema if name.encode() == key), None)
            if name is None:
                self.skip()
            else:
                given[name] = self.value(schema[name][0])
        out = {}
        for name, (_, default) in schema.items():
            if name not in given and default is NO_DEFAULT:
                raise Refused(f"{name} is missing")
            out[name] = given.get(name, default)
        return out


# --- rules of messages ----------------------------------------------------------------------------


def require(holds: bool, rule: str) -> None:
    """Refuse what breaks a rule that stands with a message."""
    if not holds:
        raise Refused(rule)


def check_rules(name: str, m: dict[str, Any]) -> None:
    """The sentences with MUST in sections 5.1 and 6."""
    most = LIMITS["MAX_POSITIONS"]
    if name == "SUBMIT":
        require(not (m["text"] and m["prompt_ids"]), "text and prompt_ids")
    if name in ("SUBMIT", "FORWARD"):
        require(len(m["prompt_ids"]) + len(m["received"]) <= most, "too many tokens")
    if name == "CHUNK":
        require(m["start"] + len(m["tokens"]) <= most, "too many tokens")
    if name == "LOG_ENTRY":
        require(m["start"] + len(m["tokens"]) <= most, "too many tokens")
    if name == "ACTIVATE":
        require(all(log["restart"] <= log["length"] for log in m["logs"]), "restart of a log")
        require(all(log["recompute"] <= log["restart"] for log in m["logs"]), "recompute of a log")
    if name == "STEP":
        runs = [(slot["start"], len(slot["tokens"])) for slot in m["slots"]]
        require(sum(length for _, length in runs) <= LIMITS["MAX_STEP_TOKENS"], "positions")
        require(all(start + length <= most for start, length in runs), "end of a slot")
    if name == "KV_REQUEST":
        require(m["start"] < m["end"] <= most, "positions")
    if name in ("PROPOSE", "PRE_VOTE_REPLY") and m["plan"] is not None:
        check_plan(m["plan"])


def check_plan(plan: dict[str, Any]) -> None:
    """The rules of a Plan at the end of section 5.1's structures."""
    count = len(plan["members"])
    require(len({member["node_id"] for member in plan["members"]}) == count, "same node_id")
    named = [plan["leader"], *plan["voters"]]
    for stage in plan["stages"]:
        require(stage["start"] < stage["end"], "span")
        for kind in ("head", "mlp", "vocab"):
            owners, standbys = stage[f"{kind}_owners"], stage[f"{kind}_standbys"]
            named += owners + [index for row in standbys for index in row]
            require(not standbys or len(standbys) == len(owners), "standbys")
    require(max(named) < count, "index")


# --- data bodies ----------------------------------------------------------------------------------


def read_header(rows: list[dict[str, str]], data: bytes, shift: int = 0) -> dict[str, Any]:
    """The fields of a byte table; offsets count from `shift` before the start of `data`."""
    out: dict[str, Any] = {}
    for row in rows:
        start, size = int(row["offset"]) - shift, int(row["size"])
        raw = data[start : start + size]
        if len(raw) < size:
            raise Refused(f"no {row['field']}")
        value = int.from_bytes(raw, "little")
        out[row["field"]] = raw if row["type"].endswith("s") else value
        require(row["type"] != "u63" or value < 1 << 63, f"{row['field']} is too large")
    return out


def read_data(name: str, body: bytes) -> dict[str, Any]:
    """Section 5.2 and 5.3."""
    h = read_header(DATA_HEADER, body)
    for field, ends in DATA_RANGES[name].items():
        low, high = bounds(ends)
        require(low <= h[field] <= high, f"{field} is {h[field]}")
    rest = body[48:]
    entries, rows, cols, dtype = h["entries"], h["rows"], h["cols"], h["dtype"]
    kv: dict[str, Any] = {}
    if name == "KV_DELTA":
        kv = read_header(KV_HEADER, body)
        require(kv["unit"] < LIMITS["MAX_UNITS"], "unit")
        require(1 <= kv["layers"] <= LIMITS["MAX_LAYERS"], "layers")
        require(kv["start"] + rows <= LIMITS["MAX_POSITIONS"], "positions")
        rest = rest[48:]
    padded = math.ceil(2 * entries / 16) * 16
    require(len(rest) >= padded and not any(rest[2 * entries : padded]), "table")
    numbers = list(struct.unpack_from(f"<{entries}H", rest))
    require(len(set(numbers)) == entries, "an entry twice")
    for entry in numbers:
        if name == "PARTIAL":
            require((entry % 4096) * 2 ** (entry // 4096) < LIMITS["MAX_UNITS"], "tree node")
        else:
            require(entry < LIMITS["MAX_UNITS"], "unit")
    shapes = {
        "PARTIAL": {"tensor": (dtype, [entries, rows, cols])},
        "HIDDEN": {"tensor": (dtype, [rows, cols])},
        "CANDIDATES": {
            "ids": (4, [rows, entries, cols]),
            "logits": (1, [rows, entries, cols]),
            "lse": (1, [rows, entries]),
        },
        "LOGITS": {"tensor": (dtype, [rows, cols])},
        "KV_DELTA": {"tensor": (dtype, [kv.get("layers"), 2, rows, cols])},
    }[name]
    tensors, at = {}, padded
    for field, (kind, shape) in shapes.items():
        size = math.prod(shape) * int(DTYPES[kind]["bytes"])
        tensors[field] = {"dtype": kind, "shape": shape, "data": rest[at : at + size]}
        at += size
    require(at == len(rest), "length of the tensors")
    fence = {"term": h["term"], "epoch": h["epoch"]}
    fields = {"fence": fence, **{f: h[f] for f in ("step", "link_seq", "sender")}}
    extra = {
        "PARTIAL": {**{f: h[f] for f in ("stage", "layer", "half")}, "parts": numbers},
        "HIDDEN": {"stage": h["stage"]},
        "CANDIDATES": {"units": numbers},
        "LOGITS": {"unit": (numbers or [None])[0]},
        "KV_DELTA": {
            "request_id": kv.get("request_id"),
            "stage": h["stage"],
            "unit": kv.get("unit"),
            "start": kv.get("start"),
            "log_digest": kv.get("log_digest", b"").hex(),
        },
    }[name]
    return {**fields, **extra, **tensors}


# --- frames ---------------------------------------------------------------------------------------


def decode(frame: bytes, plane: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name and the values of a frame's message; raises `Refused`, and nothing else."""
    h = read_header(FRAME_HEADER, frame)
    require(h["magic"] == b"P2PI" and h["major"] == 1 and h["reserved"] == 0, "header")
    body = frame[16:]
    require(h["length"] == len(body), "length")
    row = next((row for row in MESSAGE_TABLE if int(row["id"]) == h["type"]), None)
    if row is None:
        raise Refused("type")
    planes = row["plane"].split(", ")
    require(plane is None or plane in planes, "plane")
    name = row["name"]
    if row["body"] == "data":
        limit = "MAX_STEP_BYTES" if planes == ["steps"] else "MAX_BULK_BYTES"
        require(len(frame) <= LIMITS[limit], "size")
        return name, read_data(name, body)
    require(len(frame) <= LIMITS["MAX_CONTROL_BYTES"], "size")
    pack = Pack(body)
    values: dict[str, Any] = pack.value(Type("map", inner=name))
    require(pack.at == len(body), "bytes after the map")
    check_rules(name, values)
    return name, values
