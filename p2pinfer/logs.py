"""Logs go to stderr: readable lines in a terminal, one JSON object per line otherwise.

Everything that the core finds noteworthy is a `Fact`; here each becomes one line, named after it.
"""

from __future__ import annotations

import re
import sys
from typing import Any, Final, TextIO

import msgspec
import structlog

from p2pinfer.core.events import (
    Fact,
    FrameDropped,
    LeaderLost,
    MemberSlow,
    PairBroken,
    PeerDead,
    PeerRefused,
    PeerSuspected,
    PlanFailed,
    StandbysReady,
    WorkerHung,
)
from p2pinfer.types import Fence, Member

Logger = structlog.typing.FilteringBoundLogger

_WARNINGS: Final = (
    PeerSuspected,
    PeerDead,
    PeerRefused,
    PlanFailed,
    LeaderLost,
    WorkerHung,
    PairBroken,
    MemberSlow,
)
_WORD_START: Final = re.compile(r"(?<!^)(?=[A-Z])")


def configure(stream: TextIO | None = None) -> None:
    """Send this process's logs to `stream` (default: stderr), for people or for machines."""
    stream = stream or sys.stderr
    renderer: Any = structlog.processors.JSONRenderer()
    if stream.isatty():
        renderer = structlog.dev.ConsoleRenderer(colors=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not stream.isatty()),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )


def node_logger(name: str) -> Logger:
    """A logger whose lines all say which node speaks."""
    logger: Logger = structlog.get_logger().bind(node=name)
    return logger


def request_label(request_id: int) -> str:
    """A request id as people see it: 16 hexadecimal digits."""
    return format(request_id, "016x")


def fact_fields(fact: Fact) -> dict[str, Any]:
    """A fact's fields as plain values: fences and members flattened, request ids as labels."""
    fields: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(fact).items():
        match value:
            case Fence():
                fields |= {"term": value.term, "epoch": value.epoch}
            case Member():
                fields |= {
                    "name": value.name,
                    "node_id": value.node_id,
                    "boot_id": value.boot_id,
                    "address": value.address,
                }
            case tuple():
                fields[name] = list(value)
            case float():
                fields[name] = round(value, 4)
            case int() if name == "request_id":
                fields[name] = request_label(value)
            case _:
                fields[name] = value
    return fields


def fact_name(fact: Fact) -> str:
    """`peer_joined` for `PeerJoined`."""
    return _WORD_START.sub("_", type(fact).__name__).lower()


def log_fact(logger: Logger, fact: Fact) -> None:
    """Write a fact as one line. A finished reply's is the canonical line of its request."""
    level = "info"
    moves_again = isinstance(fact, WorkerHung) and not fact.hung
    lacks = isinstance(fact, StandbysReady) and fact.error
    if lacks or (isinstance(fact, _WARNINGS) and not moves_again):
        level = "warning"
    elif isinstance(fact, FrameDropped):
        level = "debug"
    getattr(logger, level)(fact_name(fact), **fact_fields(fact))
