"""Logs: one line per fact, for people in a terminal and for machines elsewhere."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from p2pinfer import logs
from p2pinfer.core.events import (
    Fact,
    FrameDropped,
    PeerDead,
    PeerJoined,
    PlanAdopted,
    RequestFinished,
    StandbysReady,
    WorkerHung,
)
from p2pinfer.types import Fence, Member

MEMBER = Member(node_id="0" * 16, boot_id="1" * 16, name="a", address="tcp://127.0.0.1:7720")
FINISHED = RequestFinished(
    request_id=255,
    reason="stop",
    prompt_tokens=3,
    reply_tokens=9,
    ttft_s=0.123456,
    tokens_per_s=20.0,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def structlog_as_before() -> Iterator[None]:
    """Leaves the process's log configuration as it was."""
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("fact", "name", "fields"),
    [
        (
            PeerJoined(member=MEMBER),
            "peer_joined",
            {
                "name": "a",
                "node_id": "0" * 16,
                "boot_id": "1" * 16,
                "address": "tcp://127.0.0.1:7720",
            },
        ),
        (
            PlanAdopted(
                fence=Fence(2, 7),
                members=("a", "b"),
                leader="a",
                voters=("a",),
                owners=("b",),
                agree_s=0.25,
            ),
            "plan_adopted",
            {
                "term": 2,
                "epoch": 7,
                "members": ["a", "b"],
                "leader": "a",
                "voters": ["a"],
                "owners": ["b"],
                "agree_s": 0.25,
            },
        ),
        (
            FINISHED,
            "request_finished",
            {
                "request_id": "00000000000000ff",
                "reason": "stop",
                "prompt_tokens": 3,
                "reply_tokens": 9,
                "ttft_s": 0.1235,
                "tokens_per_s": 20.0,
                "code": "",
            },
        ),
    ],
)
def test_a_fact_has_a_name_and_plain_fields(
    fact: Fact, name: str, fields: dict[str, object]
) -> None:
    """Fences and members are flattened, and request ids are the labels that people see."""
    assert logs.fact_name(fact) == name
    assert logs.fact_fields(fact) == fields


def test_machines_get_one_json_object_per_line() -> None:
    """Elsewhere than in a terminal each line is a JSON object with node, level and time."""
    stream = io.StringIO()
    logs.configure(stream)
    logger = logs.node_logger("node1")
    logs.log_fact(logger, FINISHED)
    logs.log_fact(logger, PeerDead(name="b", node_id="2" * 16, reason="silent", silence_s=1.2))
    finished, dead = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert finished["event"] == "request_finished"
    assert finished["node"] == "node1"
    assert finished["level"] == "info"
    assert finished["timestamp"].endswith("Z")
    assert (dead["event"], dead["level"]) == ("peer_dead", "warning")


def test_people_get_a_readable_line() -> None:
    """In a terminal a fact is one line that is no JSON."""
    stream = Terminal()
    logs.configure(stream)
    logs.log_fact(logs.node_logger("node1"), FINISHED)
    (line,) = stream.getvalue().splitlines()
    assert "request_finished" in line
    assert not line.startswith("{")


def test_dropped_frames_are_no_news() -> None:
    """Ignored control messages are told at debug level, which is not written."""
    stream = io.StringIO()
    logs.configure(stream)
    logs.log_fact(logs.node_logger("node1"), FrameDropped(reason="unknown sender"))
    assert stream.getvalue() == ""


def test_standbys_that_cannot_be_loaded_are_a_warning() -> None:
    """That they are ready is none."""
    stream = io.StringIO()
    logs.configure(stream)
    for error in ("", "no memory"):
        fact = StandbysReady(fence=Fence(1, 2), units=3, weight_bytes=4, error=error)
        logs.log_fact(logs.node_logger("node1"), fact)
    levels = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert levels == ["info", "warning"]


def test_a_worker_that_moves_again_is_no_warning() -> None:
    """A hang is told as a warning, its end is not."""
    stream = io.StringIO()
    logs.configure(stream)
    for hung in (True, False):
        logs.log_fact(logs.node_logger("node1"), WorkerHung(hung=hung, silence_s=0.7))
    levels = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert levels == ["warning", "info"]
