"""The client against scripted nodes: what it accepts as a reply, what it calls a failure, and how
it goes on when a node is gone."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from p2pinfer.client import Client, Event, Moved
from p2pinfer.errors import ClusterError, InvalidRequestError, UsageError
from p2pinfer.limits import MAX_TEXT_CHARS
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire.messages import (
    Accepted,
    Cancel,
    Chunk,
    Contact,
    ControlMessage,
    Done,
    Drain,
    Failed,
    Finished,
    Pause,
    PlanRequest,
    StatusReply,
    StatusRequest,
    Submit,
)
from tests.client_bench import (
    ACCEPTED,
    CLOSE,
    FINISHED,
    ID,
    PARAMS,
    Answer,
    MakeNode,
    Node,
    chunk,
    to_submit,
)


@pytest.fixture
def make_node() -> Iterator[Callable[[Answer], Node]]:
    """Makes scripted nodes and ends them."""
    nodes: list[Node] = []

    def make(answer: Answer) -> Node:
        nodes.append(Node(answer))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def test_a_reply_is_one_object(make_node: MakeNode) -> None:
    """Text and tokens add up; keep-alives and answers to others are not part of it."""
    lost = Failover(position=2, lost=("b",), rung="replay", detect_s=0.1000000004, stall_s=0.2)
    node = make_node(
        to_submit(
            ACCEPTED,
            chunk(0, 10, text="a"),
            chunk(1),
            Chunk(request_id=ID + 1, start=5, tokens=(99,), text="not ours"),
            Failed(request_id=ID + 1, code="internal", message="not ours"),
            chunk(1, 11, 12, text="b"),
            Finished(request_id=ID, reason="stop", total_tokens=3, text="c", failovers=(lost,)),
        )
    )
    seen: list[object] = []
    reply = Client([node.address]).submit_json_object(
        "hello", PARAMS, request_id=ID, on_event=seen.append
    )
    assert reply == {
        "request_id": "0000000000000007",
        "text": "abc",
        "token_ids": [10, 11, 12],
        "prompt_token_ids": [1, 2],
        "finish_reason": "stop",
        "error": None,
        "ttft_s": 0.0,
        "tokens_per_s": 0.0,
        "served_by": "node1",
        "failovers": [
            {
                "position": 2,
                "lost": ["b"],
                "rung": "replay",
                "detect_s": 0.1,
                "stall_s": 0.2,
                "exact": True,
            }
        ],
    }
    assert [type(event) for event in seen] == [Accepted, Chunk, Chunk, Finished]
    (sent,) = node.got
    assert isinstance(sent, Submit)
    assert replace(sent, attempt=0) == Submit(request_id=ID, text="hello", params=PARAMS)


def test_a_prompt_of_ids_and_received_tokens_are_sent_as_they_are(make_node: MakeNode) -> None:
    """A resumed request goes on after the tokens that the client has."""
    node = make_node(to_submit(ACCEPTED, chunk(2, 12), FINISHED))
    events = Client([node.address]).submit([1, 2], PARAMS, request_id=ID, received=[10, 11])
    assert list(events) == [ACCEPTED, chunk(2, 12), FINISHED]
    (sent,) = node.got
    assert isinstance(sent, Submit)
    assert sent.attempt > 0
    assert replace(sent, attempt=0) == Submit(
        request_id=ID, prompt_ids=(1, 2), received=(10, 11), params=PARAMS
    )


@pytest.mark.parametrize(
    "answers",
    [(ACCEPTED, chunk(1, 11)), (ACCEPTED, chunk(0, 10), FINISHED)],
    ids=["hole", "short"],
)
def test_a_reply_with_a_hole_is_an_error(
    make_node: MakeNode, answers: tuple[ControlMessage, ...]
) -> None:
    """A truncation is never dressed as success."""
    node = make_node(to_submit(*answers))
    with pytest.raises(ClusterError, match="of the reply were lost") as error:
        list(Client([node.address], retry_for=0).submit("hello", PARAMS, request_id=ID))
    assert error.value.retryable


@pytest.mark.parametrize("failed_id", [ID, 0])
def test_a_failure_is_raised_with_its_code(make_node: MakeNode, failed_id: int) -> None:
    """FAILED of our request, or of our last message, ends it; the text so far is kept."""
    failed = Failed(request_id=failed_id, code="node_lost", message="b is gone", retryable=True)
    node = make_node(to_submit(ACCEPTED, chunk(0, 10, text="a"), failed))
    client = Client([node.address], retry_for=0)
    with pytest.raises(ClusterError, match="b is gone") as error:
        list(client.submit("hello", PARAMS, request_id=ID))
    assert (error.value.code, error.value.retryable) == ("node_lost", True)
    reply = client.submit_json_object("hello", PARAMS, request_id=ID)
    assert (reply["finish_reason"], reply["text"]) == ("error", "a")
    assert reply["error"] == {"code": "node_lost", "message": "b is gone"}


def test_a_node_that_goes_away_is_an_error(make_node: MakeNode) -> None:
    """A connection that breaks before the end of a reply is told at once, if that is wanted."""
    node = make_node(to_submit(CLOSE))
    with pytest.raises(ClusterError, match=r"the connection .* broke\Z") as error:
        list(Client([node.address], retry_for=0).submit("hello", PARAMS))
    assert (error.value.code, error.value.retryable) == ("node_lost", True)


def test_a_silent_node_is_an_error_and_gets_a_cancel(make_node: MakeNode) -> None:
    """After `timeout` seconds of silence the client gives up, and says so to the node."""
    node = make_node(to_submit(ACCEPTED))
    with pytest.raises(ClusterError, match=r"silent for 0\.3 s"):
        list(
            Client([node.address], timeout=0.3, retry_for=0).submit("hello", PARAMS, request_id=ID)
        )
    assert node.arrived.acquire(timeout=10)
    assert node.arrived.acquire(timeout=10)
    assert node.got[1] == Cancel(request_id=ID)


def test_the_next_address_is_tried(make_node: MakeNode) -> None:
    """An address that refuses, and one where something else listens, are passed over."""
    status = {"ready": True}

    def answer(message: ControlMessage) -> list[ControlMessage | bytes | None]:
        assert isinstance(message, StatusRequest)
        body = json.dumps(status).encode()
        foreign = StatusReply(request_id=message.request_id ^ 1, body=b"{}")
        return [foreign, StatusReply(request_id=message.request_id, body=body)]

    node = make_node(answer)
    with socket.create_server(("127.0.0.1", 0)) as mute, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        others = [f"127.0.0.1:{s.getsockname()[1]}" for s in (closed, mute)]
        assert Client([*others, node.address], timeout=0.3).status() == status


@pytest.mark.parametrize("without", ["", "b"])
def test_a_plan_is_asked_for_by_name_of_who_would_be_gone(
    without: str, make_node: MakeNode
) -> None:
    """`plan` returns the object that the node answers with."""
    found = {"without": without}

    def answer(message: ControlMessage) -> list[ControlMessage | bytes | None]:
        assert isinstance(message, PlanRequest)
        body = json.dumps({"without": message.without}).encode()
        return [StatusReply(request_id=message.request_id, body=body)]

    assert Client([make_node(answer).address]).plan(without) == found


def test_a_drain_returns_when_it_is_done(make_node: MakeNode) -> None:
    """`drain` waits for DONE of its own wish, and passes over what is about others."""

    def answer(message: ControlMessage) -> list[ControlMessage | bytes | None]:
        assert isinstance(message, Drain)
        mine, other = message.request_id, message.request_id ^ 1
        foreign = Failed(request_id=other, code="internal", message="not ours")
        return [foreign, Done(request_id=other), Done(request_id=mine)]

    node = make_node(answer)
    Client([node.address]).drain("b")
    assert [m.name for m in node.got if isinstance(m, Drain)] == ["b"]


def test_a_pause_returns_when_it_is_done(make_node: MakeNode) -> None:
    """So does its end."""

    def answer(message: ControlMessage) -> list[ControlMessage | bytes | None]:
        assert isinstance(message, Pause)
        return [Done(request_id=message.request_id)]

    node = make_node(answer)
    Client([node.address]).pause("b")
    Client([node.address]).resume("b")
    asked = [(m.name, m.resume) for m in node.got if isinstance(m, Pause)]
    assert asked == [("b", False), ("b", True)]


def test_a_question_that_fails_is_raised_with_its_code(make_node: MakeNode) -> None:
    """FAILED in answer to `plan` or `drain` is an error with the cluster's code and message."""

    def answer(message: ControlMessage) -> list[ControlMessage | bytes | None]:
        assert isinstance(message, PlanRequest | Drain)
        return [
            Failed(request_id=message.request_id, code="not_ready", message="no", retryable=True)
        ]

    client = Client([make_node(answer).address])
    for ask in (client.plan, client.drain):
        with pytest.raises(ClusterError, match="no") as error:
            ask("b")
        assert (error.value.code, error.value.retryable) == ("not_ready", True)


def test_what_no_cluster_would_take_is_not_sent() -> None:
    """Impossible parameters, too long a text and a bad address are errors before any connect."""
    client = Client(["127.0.0.1:1"])
    with pytest.raises(InvalidRequestError, match="temperature"):
        list(client.submit("hello", SamplingParams(temperature=-1.0)))
    with pytest.raises(InvalidRequestError, match="at most 1048576") as error:
        list(client.submit("x" * (MAX_TEXT_CHARS + 1), PARAMS))
    assert error.value.code == "prompt_too_long"
    with pytest.raises(InvalidRequestError, match="stop string is not UTF-8"):
        list(client.submit("hello", SamplingParams(stop=("\udcff",))))
    reply = client.submit_json_object("hello", SamplingParams(top_p=0.0))
    assert (reply["finish_reason"], reply["error"]["code"]) == ("error", "invalid_request")
    with pytest.raises(UsageError):
        Client(["udp://127.0.0.1:7720"])


def test_a_message_that_breaks_the_protocol_is_the_callers_mistake(make_node: MakeNode) -> None:
    """A token id that does not exist anywhere is refused with the field's name."""
    node = make_node(to_submit())
    with pytest.raises(InvalidRequestError, match="SUBMIT cannot be sent"):
        list(Client([node.address]).submit([1 << 40], PARAMS))


# --- going on elsewhere ---------------------------------------------------------------------------


def accepted(name: str, *others: Node, waiting: str = "") -> Accepted:
    """A node of that name has the request, and knows others."""
    return Accepted(
        request_id=ID,
        served_by=name,
        prompt_ids=(1, 2),
        waiting=waiting,
        others=tuple(Contact(name="other", address=node.address) for node in others),
    )


def submissions(node: Node) -> list[Submit]:
    """What a node was asked, in order."""
    return [message for message in node.got if isinstance(message, Submit)]


def dies_at(start: int, node: Node, events: Iterator[Event]) -> list[Event]:
    """All events of a reply; when the token `start` is there, the node dies."""
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, Chunk) and event.start == start:
            node.die()
    return seen


OVERLOADED = Failed(request_id=ID, code="overloaded", message="too many", retryable=True)
NODE_2 = to_submit(accepted("node2"), chunk(1, 11, text="b"), chunk(2, 12, text="c"), FINISHED)


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ((), "node_lost"),
        ((b"no message at all",), "node_lost"),
        ((OVERLOADED,), "overloaded"),
        ((chunk(2, 12),), "internal"),
        ((FINISHED,), "internal"),
    ],
    ids=["gone", "no message", "failed", "hole", "short"],
)
def test_a_reply_that_breaks_off_goes_on_through_another_member(
    make_node: MakeNode, last: tuple[ControlMessage | bytes, ...], code: str
) -> None:
    """With the same id, the prompt as token ids, and what came; no token or text is missing, and
    none comes twice. The node that was left is not told to cancel it."""
    two = make_node(NODE_2)
    one = make_node(to_submit(accepted("node1", two), chunk(0, 10, text="a"), *last))
    following = Client([one.address]).submit("hello", PARAMS, request_id=ID)
    events = list(following) if last else dies_at(0, one, following)
    first, began, moved, again, *rest, finished = events
    assert (first, began) == (accepted("node1", two), chunk(0, 10, text="a"))
    assert isinstance(moved, Moved)
    assert (moved.lost, moved.through, moved.error.code) == ("node1", "node2", code)
    assert again == accepted("node2")
    assert rest == [chunk(1, 11, text="b"), chunk(2, 12, text="c")]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.total_tokens, finished.text) == ("length", 3, "!")
    assert finished.ttft_s != FINISHED.ttft_s, "what the second node saw is not the whole reply"
    (before,), (after,) = submissions(one), submissions(two)
    assert before.text == "hello"
    assert (after.text, after.prompt_ids, after.received) == ("", (1, 2), (10,))
    assert (after.request_id, after.params) == (ID, PARAMS)
    assert after.attempt > before.attempt
    assert not any(isinstance(message, Cancel) for node in (one, two) for message in node.got)


def test_a_silent_node_is_left_for_another_one(make_node: MakeNode) -> None:
    """One of the addresses that were given, where no member is known; before any word of it."""
    two = make_node(to_submit(ACCEPTED, chunk(0, 10, 11, 12), FINISHED))
    one = make_node(to_submit())
    client = Client([one.address, two.address], timeout=0.3)
    moved, *_ = client.submit("hello", PARAMS, request_id=ID)
    assert isinstance(moved, Moved)
    assert (moved.lost, moved.through, moved.error.code) == (one.address, "node1", "node_lost")
    (asked,) = submissions(two)
    assert (asked.text, asked.received) == ("hello", ())


def test_one_object_tells_of_the_last_node_that_served_it(make_node: MakeNode) -> None:
    """`served_by` is who finished the reply; its text and tokens are those of all."""
    two = make_node(NODE_2)
    one = make_node(to_submit(accepted("node1", two), chunk(0, 10, text="a"), OVERLOADED))
    seen: list[Event] = []
    reply = Client([one.address]).submit_json_object(
        "hello", PARAMS, request_id=ID, on_event=seen.append
    )
    assert (reply["served_by"], reply["error"]) == ("node2", None)
    assert (reply["text"], reply["token_ids"]) == ("abc!", [10, 11, 12])
    assert sum(isinstance(event, Moved) for event in seen) == 1


def test_a_node_that_cannot_serve_what_another_accepted_is_passed_over(
    make_node: MakeNode,
) -> None:
    """A witness refuses the request as invalid: that is told of the first node only."""
    refused = Failed(request_id=ID, code="invalid_request", message="a witness")
    witness = make_node(to_submit(refused))
    three = make_node(NODE_2)
    one = make_node(to_submit(accepted("node1", witness, three), chunk(0, 10), OVERLOADED))
    events = list(Client([one.address]).submit("hello", PARAMS, request_id=ID))
    assert [event.through for event in events if isinstance(event, Moved)] == ["node2"]
    assert len(submissions(witness)) == 1
    with pytest.raises(ClusterError, match="a witness"):
        list(Client([witness.address, three.address]).submit("hello", PARAMS, request_id=ID))
    late = make_node(to_submit(accepted("node1", three), chunk(0, 10), refused))
    with pytest.raises(ClusterError, match="a witness"):
        list(Client([late.address]).submit("hello", PARAMS, request_id=ID))


def test_the_only_node_is_asked_again(make_node: MakeNode) -> None:
    """What may pass passes: the same node is asked until it takes the request."""
    answers = iter(
        (
            [OVERLOADED],
            [OVERLOADED],
            [ACCEPTED, chunk(0, 10, 11, 12), FINISHED],
        )
    )
    node = make_node(lambda message: list(next(answers)) if isinstance(message, Submit) else [])
    events = list(Client([node.address]).submit("hello", PARAMS, request_id=ID))
    moves = [event for event in events if isinstance(event, Moved)]
    assert [(move.lost, move.through) for move in moves] == [
        (node.address, ""),
        (node.address, "node1"),
    ]
    attempts = [message.attempt for message in submissions(node)]
    assert attempts == sorted(set(attempts))


def test_with_no_node_left_it_ends_in_an_error(make_node: MakeNode) -> None:
    """In the time that was given, with what came, and naming who was asked."""
    two = make_node(to_submit(CLOSE))
    one = make_node(to_submit(accepted("node1", two), chunk(0, 10, text="a")))
    client = Client([one.address], timeout=5, retry_for=0.5)
    began = time.monotonic()
    reply = client.submit_json_object(
        "hello",
        PARAMS,
        request_id=ID,
        on_event=lambda event: one.die() if isinstance(event, Chunk) else None,
    )
    assert 0.5 <= time.monotonic() - began < 5
    assert (reply["text"], reply["finish_reason"]) == ("a", "error")
    assert reply["error"]["code"] == "node_lost"
    assert "no node went on with it within 0.5 s (asked: node1, other)" in reply["error"]["message"]


def test_a_node_that_only_waits_is_left_in_time(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one that does not; who goes on with it is told once it does."""
    monkeypatch.setattr("p2pinfer.retries.WAITING_S", 0.2)
    three = make_node(to_submit(accepted("node3"), chunk(1, 11, 12), FINISHED))
    two = make_node(to_submit(accepted("node2", three, waiting="more voters")))
    one = make_node(to_submit(accepted("node1", two), chunk(0, 10), OVERLOADED))
    events = list(Client([one.address]).submit("hello", PARAMS, request_id=ID))
    moves = [event for event in events if isinstance(event, Moved)]
    assert [(move.lost, move.through) for move in moves] == [("node1", "node2"), ("node1", "node3")]
    assert not any(isinstance(message, Cancel) for message in two.got)


def test_at_the_end_of_the_time_a_node_that_waits_is_told_to_cancel(make_node: MakeNode) -> None:
    """The error says what it waits for."""
    two = make_node(to_submit(accepted("node2", waiting="more voters")))
    one = make_node(to_submit(accepted("node1", two), chunk(0, 10), OVERLOADED))
    with pytest.raises(ClusterError, match="and node2 waits for more voters; no node went on"):
        list(Client([one.address], retry_for=0.5).submit("hello", PARAMS, request_id=ID))
    until = time.monotonic() + 10
    while two.got[-1] != Cancel(request_id=ID):
        assert two.arrived.acquire(timeout=until - time.monotonic())


def test_breaking_off_cancels_where_the_reply_is(make_node: MakeNode) -> None:
    """Not where it was."""
    two = make_node(to_submit(accepted("node2"), chunk(1, 11)))
    one = make_node(to_submit(accepted("node1", two), chunk(0, 10), OVERLOADED))
    events = Client([one.address]).submit("hello", PARAMS, request_id=ID)
    while not (isinstance(event := next(events), Chunk) and event.start == 1):
        pass
    events.close()  # type: ignore[attr-defined]
    for _ in range(2):
        assert two.arrived.acquire(timeout=10)
    assert two.got[-1] == Cancel(request_id=ID)
    assert not any(isinstance(message, Cancel) for message in one.got)


def test_an_address_that_is_none_is_passed_over(make_node: MakeNode) -> None:
    """A node may say what it likes of others."""
    two = make_node(NODE_2)
    nowhere = Contact(name="nowhere", address="tcp://*:7720")
    named = replace(accepted("node1", two), others=(nowhere, *accepted("node1", two).others))
    one = make_node(to_submit(named, chunk(0, 10), OVERLOADED))
    events = list(Client([one.address]).submit("hello", PARAMS, request_id=ID))
    assert isinstance(events[-1], Finished)
