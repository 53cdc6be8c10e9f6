"""Replies to clients: text, stop strings, slow clients and clients that are gone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from p2pinfer.core.events import ClientCancelled, ClientSubmitted, Conclude, Deliver
from p2pinfer.demo import MODEL_DIR
from p2pinfer.limits import MAX_PENDING_CLIENTS
from p2pinfer.model.config import load_config
from p2pinfer.model.tokenizer import Tokenizer
from p2pinfer.serving import KEEPALIVE_S, RETRY_S, Serving
from p2pinfer.transport import Reply
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Chunk, ControlMessage, Failed, Finished, Submit

ROUTE, OTHER = b"\0one", b"\0two"
PARAMS = SamplingParams(max_tokens=64)
TEXT = "The little fox ran into the wood and found a friend."


class Client:
    """Stands at the other end of the routes: takes messages, or is slow, or is gone."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, ControlMessage]] = []
        self.answers = Reply.SENT
        self.woken = threading.Event()

    def send(self, route: bytes, message: ControlMessage) -> Reply:
        if self.answers is Reply.SENT:
            self.got.append((route, message))
        return self.answers

    @property
    def messages(self) -> list[ControlMessage]:
        return [message for _, message in self.got]

    @property
    def text(self) -> str:
        return "".join(m.text for m in self.messages if isinstance(m, Chunk | Finished))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The bundled model's tokenizer."""
    return Tokenizer.load(MODEL_DIR, load_config(MODEL_DIR))


@pytest.fixture
def client() -> Client:
    """Whoever the replies go to."""
    return Client()


@pytest.fixture
def serving(tokenizer: Tokenizer, client: Client) -> Iterator[Serving]:
    """The replies of one node, closed at the end."""
    serving = Serving(
        send=client.send,
        wake=client.woken.set,
        tokenizer=tokenizer,
        vocab_size=load_config(MODEL_DIR).vocab_size,
    )
    yield serving
    serving.close()


def submit(serving: Serving, *, params: SamplingParams = PARAMS, request_id: int = 1) -> None:
    """A request in token ids is in the core's hands at once."""
    message = Submit(request_id=request_id, prompt_ids=(5, 6), params=params)
    (given,) = serving.submit(ROUTE, message, 0.0)
    assert isinstance(given, ClientSubmitted)
    assert (given.route, given.prompt_ids) == (ROUTE, (5, 6))


def deliver(start: int, tokens: tuple[int, ...], route: bytes = ROUTE) -> Deliver:
    """Tokens of request 1."""
    return Deliver(route=route, request_id=1, start=start, tokens=tokens)


def conclude(reason: str, total: int, **fields: object) -> Conclude:
    """The end of request 1."""
    return Conclude(
        route=ROUTE,
        request_id=1,
        reason=reason,
        total_tokens=total,
        **fields,  # type: ignore[arg-type]
    )


def reply_ids(tokenizer: Tokenizer, text: str = TEXT) -> tuple[int, ...]:
    """Tokens of a text without what begins a prompt."""
    ids = tokenizer.encode(text)
    return tuple(i for i in ids if tokenizer.token_bytes(i))


def test_text_is_tokenised_beside_the_loop(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """A prompt of text reaches the core as its token ids, after a wake-up."""
    message = Submit(request_id=1, text=TEXT, params=PARAMS)
    assert serving.submit(ROUTE, message, 0.0) == []
    assert client.woken.wait(10)
    (given,) = serving.tokenised()
    assert isinstance(given, ClientSubmitted)
    assert given.prompt_ids == tokenizer.encode(TEXT)
    assert serving.tokenised() == []


def test_an_empty_prompt_is_for_the_core_to_refuse(serving: Serving) -> None:
    """No text and no ids is an empty prompt, not the token that begins every text."""
    (given,) = serving.submit(ROUTE, Submit(request_id=1, params=PARAMS), 0.0)
    assert isinstance(given, ClientSubmitted)
    assert given.prompt_ids == ()


def test_text_cancelled_while_it_is_tokenised_is_forgotten(
    serving: Serving, client: Client
) -> None:
    """A request that ended before its text was tokenised does not come back."""
    serving.submit(ROUTE, Submit(request_id=1, text=TEXT, params=PARAMS), 0.0)
    serving.forget(ROUTE, 1)
    assert client.woken.wait(10)
    assert serving.tokenised() == []


def test_text_that_is_no_unicode_is_refused(serving: Serving, client: Client) -> None:
    """A lone surrogate is the client's mistake."""
    serving.submit(ROUTE, Submit(request_id=1, text="\ud800", params=PARAMS), 0.0)
    assert client.woken.wait(10)
    assert serving.tokenised() == []
    (failed,) = client.messages
    assert isinstance(failed, Failed)
    assert failed.code == "invalid_request"
    assert serving.requests == 0


@pytest.mark.parametrize("field", ["prompt_ids", "received"])
def test_a_token_outside_the_vocabulary_is_refused(
    serving: Serving, client: Client, field: str
) -> None:
    """The error names the id and the size of the vocabulary."""
    ids = {"prompt_ids": (5,), "received": (), field: (5, 1 << 30)}
    message = Submit(
        request_id=1, params=PARAMS, prompt_ids=ids["prompt_ids"], received=ids["received"]
    )
    assert serving.submit(ROUTE, message, 0.0) == []
    (failed,) = client.messages
    assert isinstance(failed, Failed)
    assert "token id 1073741824 is not in the model's vocabulary" in failed.message


def test_a_node_serves_so_many_clients_and_no_more(serving: Serving, client: Client) -> None:
    """One request over the limit is refused as overloaded, to be tried again."""
    for request_id in range(MAX_PENDING_CLIENTS):
        submit(serving, request_id=request_id)
    over = Submit(request_id=MAX_PENDING_CLIENTS, prompt_ids=(5,), params=PARAMS)
    assert serving.submit(ROUTE, over, 0.0) == []
    (failed,) = client.messages
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("overloaded", True)


def test_a_reply_is_its_text_token_by_token(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """The pieces of text add up, an end-of-text token is counted but not shown."""
    submit(serving)
    ids = (*reply_ids(tokenizer), tokenizer.eos_ids[0])
    for index, token in enumerate(ids):
        assert serving.deliver(deliver(index, (token,)), 1.0 + index) == []
    serving.conclude(conclude("stop", len(ids), ttft_s=0.5, tokens_per_s=7.0), 99.0)
    assert client.text == TEXT
    chunks = [m for m in client.messages if isinstance(m, Chunk)]
    assert [c.start for c in chunks] == list(range(len(ids)))
    last = client.messages[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.total_tokens, last.ttft_s, last.tokens_per_s) == (
        "stop",
        len(ids),
        0.5,
        7.0,
    )
    assert serving.requests == 0


def test_tokens_that_come_twice_are_sent_once(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """Overlapping deliveries are cut to what is new."""
    submit(serving)
    ids = reply_ids(tokenizer)
    serving.deliver(deliver(0, ids[:4]), 1.0)
    serving.deliver(deliver(2, ids[2:6]), 1.0)
    serving.deliver(deliver(0, ids[:6]), 1.0)
    assert [(m.start, m.tokens) for m in client.messages if isinstance(m, Chunk)] == [
        (0, ids[:4]),
        (4, ids[4:6]),
    ]


def test_a_stop_string_cuts_the_text_and_ends_the_reply(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """Text before the stop string arrives, the rest does not, and the reason is stop."""
    submit(serving, params=SamplingParams(stop=("wood",)))
    ids = reply_ids(tokenizer)
    cancelled = []
    for index, token in enumerate(ids):
        cancelled += serving.deliver(deliver(index, (token,)), 1.0)
    assert cancelled == [ClientCancelled(request_id=1, reason="stop")]
    serving.conclude(conclude("cancelled", len(ids)), 2.0)
    assert client.text == TEXT[: TEXT.index("wood")]
    last = client.messages[-1]
    assert isinstance(last, Finished)
    assert last.reason == "stop"
    assert last.total_tokens == sum(len(m.tokens) for m in client.messages if isinstance(m, Chunk))


def test_a_reply_ends_with_the_token_that_completes_a_stop_string(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """However many tokens come at once: the client has the same ones each time."""
    params, ids = SamplingParams(stop=("wood",)), reply_ids(tokenizer)
    for request_id, size in enumerate((1, 3, len(ids)), start=1):
        client.got.clear()
        submit(serving, params=params, request_id=request_id)
        for start in range(0, len(ids), size):
            order = Deliver(
                route=ROUTE, request_id=request_id, start=start, tokens=ids[start : start + size]
            )
            serving.deliver(order, 1.0)
        chunks = [m for m in client.messages if isinstance(m, Chunk)]
        tokens = tuple(token for m in chunks for token in m.tokens)
        assert tokens == ids[: len(tokens)]
        assert "wood" in tokenizer.decode(tokens)
        assert "wood" not in tokenizer.decode(tokens[:-1])
        assert client.text == TEXT[: TEXT.index("wood")]


@pytest.mark.parametrize("text", [False, True], ids=["ids", "text"])
def test_a_client_that_has_the_stop_string_already_needs_the_end_only(
    serving: Serving, client: Client, tokenizer: Tokenizer, text: bool
) -> None:
    """The core is told so, and the end comes without a token."""
    params, ids = SamplingParams(stop=("wood",)), reply_ids(tokenizer)
    message = Submit(
        request_id=1,
        text=TEXT if text else "",
        prompt_ids=() if text else (5, 6),
        params=params,
        received=ids,
    )
    given = serving.submit(ROUTE, message, 0.0)
    if text:
        assert client.woken.wait(10)
        given = serving.tokenised()
    (submitted,) = given
    assert isinstance(submitted, ClientSubmitted)
    assert submitted.stopped
    serving.conclude(conclude("stop", len(ids)), 1.0)
    (finished,) = client.messages
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.text, finished.total_tokens) == ("stop", "", len(ids))


@pytest.mark.parametrize("stop", ["", "wood", "forest", "\u4e16\u754c"])
def test_a_reply_may_break_after_any_token(tokenizer: Tokenizer, stop: str) -> None:
    """Text and tokens through two nodes are those through one, also where a character or a stop
    string is divided between the two."""
    params = SamplingParams(stop=(stop,) if stop else ())
    said = "the fo wo woo wood \u4f60\u597d, \u4e16\u754c! \U0001f98a wood"
    ids = reply_ids(tokenizer, said)

    def through(*parts: int) -> tuple[str, list[int], str]:
        text, tokens, reason = "", list[int](), ""
        for end in (*parts, len(ids)):
            client = Client()
            node = Serving(
                send=client.send,
                wake=client.woken.set,
                tokenizer=tokenizer,
                vocab_size=load_config(MODEL_DIR).vocab_size,
            )
            received = tuple(tokens)
            (given,) = node.submit(
                ROUTE,
                Submit(request_id=1, prompt_ids=(5, 6), params=params, received=received),
                0.0,
            )
            assert isinstance(given, ClientSubmitted)
            rest = ids[len(tokens) : end]
            stopped = given.stopped or bool(node.deliver(deliver(len(tokens), rest), 1.0))
            if stopped or end == len(ids):
                node.conclude(conclude("stop" if stopped else "length", end), 2.0)
            for message in client.messages:
                if isinstance(message, Chunk):
                    tokens += message.tokens
                assert isinstance(message, Chunk | Finished)
                text += message.text
                reason = getattr(message, "reason", reason)
            node.close()
            if reason:
                break
        return text, tokens, reason

    whole = through()
    assert whole[0] == (said.partition(stop)[0] if stop in ("wood", "\u4e16\u754c") else said)
    for at in range(len(ids)):
        assert through(at) == whole
        assert through(at, min(at + 1, len(ids))) == whole


def test_a_reply_whose_stop_string_was_seen_is_complete_even_if_the_leader_dies(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """What follows the stop string does not matter, so neither does its loss."""
    submit(serving, params=SamplingParams(stop=("fox",)))
    serving.deliver(deliver(0, reply_ids(tokenizer)), 1.0)
    serving.conclude(conclude("error", 0, code="leader_lost", message="gone"), 2.0)
    assert isinstance(client.messages[-1], Finished)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"reason": "error", "code": "node_lost", "message": "b is gone"}, "node_lost"),
        ({"reason": "cancelled"}, "cancelled"),
    ],
)
def test_an_end_in_an_error_is_told(
    serving: Serving, client: Client, fields: dict[str, str], code: str
) -> None:
    """An error, or a cancellation, is a FAILED with its code, never a FINISHED."""
    submit(serving)
    serving.conclude(conclude(total=0, retryable=True, **fields), 1.0)
    (failed,) = client.messages
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable, bool(failed.message)) == (code, True, True)
    assert serving.requests == 0


def test_a_slow_client_gets_everything_in_order(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """While a client's queue is full its messages wait here, the last one included."""
    submit(serving)
    ids = reply_ids(tokenizer)
    client.answers = Reply.FULL
    for index, token in enumerate(ids):
        assert serving.deliver(deliver(index, (token,)), 0.5) == []
    serving.conclude(conclude("length", len(ids)), 0.5)
    assert serving.deadline == 0.5 + RETRY_S
    assert serving.sweep(0.6) == []
    assert client.messages == []
    client.answers = Reply.SENT
    assert serving.sweep(0.7) == []
    assert client.text == TEXT
    assert isinstance(client.messages[-1], Finished)
    assert serving.requests == 0
    assert serving.deadline == float("inf")


def test_a_silent_reply_says_that_it_lives(serving: Serving, client: Client) -> None:
    """After a second without tokens the client gets an empty CHUNK, and again after another."""
    submit(serving)
    assert serving.deadline == KEEPALIVE_S
    assert serving.sweep(KEEPALIVE_S) == []
    assert client.messages == [Chunk(request_id=1, start=0, tokens=())]
    assert serving.deadline == 2 * KEEPALIVE_S


@pytest.mark.parametrize("by", ["token", "silence"])
def test_a_client_that_is_gone_frees_its_slot(
    serving: Serving, client: Client, tokenizer: Tokenizer, by: str
) -> None:
    """Found by the next token or the next sweep, its request is cancelled, once."""
    submit(serving)
    client.answers = Reply.GONE
    if by == "token":
        cancelled = serving.deliver(deliver(0, reply_ids(tokenizer)), 0.5)
    else:
        cancelled = serving.sweep(KEEPALIVE_S)
    assert cancelled == [ClientCancelled(request_id=1, reason="orphan")]
    assert serving.requests == 0
    assert serving.sweep(9.0) == []
    serving.conclude(conclude("cancelled", 0), 9.0)
    assert client.messages == []


def test_a_client_that_came_back_goes_on_where_it_was(
    serving: Serving, client: Client, tokenizer: Tokenizer
) -> None:
    """By another connection, with what it has received, it gets the rest of the text, and the
    end of its old connection cancels nothing."""
    submit(serving)
    ids = reply_ids(tokenizer)
    serving.deliver(deliver(0, ids[:3]), 1.0)
    before = client.text
    again = Submit(request_id=1, prompt_ids=(5, 6), params=PARAMS, received=ids[:3])
    (given,) = serving.submit(OTHER, again, 1.5)
    assert isinstance(given, ClientSubmitted)
    assert given.received == ids[:3]
    client.got.clear()
    serving.deliver(deliver(3, ids[3:], route=OTHER), 2.0)
    assert {route for route, _ in client.got} == {OTHER}
    assert before + client.text == TEXT
    assert serving.requests == 1


def test_the_old_connection_of_a_client_that_came_back_may_end(
    serving: Serving, client: Client
) -> None:
    """Losing one of two connections of a request is no reason to cancel it."""
    submit(serving)
    serving.submit(OTHER, Submit(request_id=1, prompt_ids=(5, 6), params=PARAMS), 0.5)
    client.answers = Reply.GONE
    assert serving.sweep(KEEPALIVE_S) == []
    assert serving.requests == 1
    client.answers = Reply.SENT
    serving.conclude(conclude("length", 0), 2.0)
    assert serving.requests == 0
