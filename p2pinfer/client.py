"""A client of a cluster: submits prompts to any node, follows replies, asks for status.

Each call makes its own connection to the first of the given addresses that answers, and closes it;
a `Client` holds nothing open. A reply whose node is lost goes on through another node of the
cluster. Events are the protocol's own messages, and `Moved`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from p2pinfer.client_link import ClientLink, client_sockets
from p2pinfer.config import format_address, parse_address
from p2pinfer.core.echoes import GRACE_S, RUN_S
from p2pinfer.errors import ClusterError, InvalidRequestError, UsageError
from p2pinfer.limits import MAX_TEXT_CHARS
from p2pinfer.retries import RETRY_FOR_S, Retries
from p2pinfer.transport import SocketPair
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import (
    Accepted,
    Cancel,
    Chunk,
    ControlMessage,
    Done,
    Drain,
    Failed,
    Finished,
    MeasureLink,
    Pause,
    PlanRequest,
    StatusReply,
    StatusRequest,
    Submit,
)

CONNECT_S: Final = 3.0
"""How long an address may take to answer before the next one is tried."""

RECONNECT_S: Final = 1.0
"""The same where a reply stands still meanwhile."""

SILENCE_S: Final = 5.0
"""A node that serves us speaks at least every second, if only by an empty CHUNK. It is dead to the
others sooner; to leave one that is only late costs a moment, and no token."""

MEASURE_S: Final = RUN_S + 2 * GRACE_S
"""A node answers a MEASURE_LINK when the run is over, which takes no longer."""

DRAIN_S: Final = 60.0
"""A node answers a DRAIN when it is done with it, or after its own time-out."""


class Moved(NamedTuple):
    """A reply that broke off goes on elsewhere.

    `lost` is the name of the node that it came through (its address, where no name is known), and
    `error` why it does no more; `through` is who goes on with it, empty while nobody does, and
    `waiting` what that one waits for first, if anything.
    """

    lost: str
    error: ClusterError
    through: str
    waiting: str = ""


Event = Accepted | Chunk | Finished | Moved
"""What `submit` yields: the request is known (or waits: see `Accepted.waiting`), more of the reply,
its end; and that it goes on elsewhere."""


class Client:
    """Speaks to the first of `addresses` (`tcp://host:port` or `host:port`) that answers.

    `timeout` bounds, in seconds, how long a node may be silent. A reply that breaks off, with its
    node or by an error that may pass, is gone on with through another of `addresses` or of the
    cluster's members, tried for `retry_for` seconds; 0: not at all. Raises `UsageError` for an
    address that is none, and for a time that is none.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout: float = SILENCE_S,
        retry_for: float = RETRY_FOR_S,
    ) -> None:
        self.addresses = tuple(format_address(*parse_address(text)) for text in addresses)
        if not retry_for >= 0:
            raise UsageError(f"retry_for must be 0 or more seconds, not {retry_for}")
        self._timeout = timeout
        self._retry_for = retry_for

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: int | None = None,
        received: Sequence[int] = (),
    ) -> Iterator[Event]:
        """Submit a prompt, text or token ids, and yield what happens until the reply is complete.

        Whatever happens, its chunks are those of one reply, without a gap or a repetition.
        `received` are reply tokens of this `request_id` that the caller has already. Ending the
        iteration early, or Ctrl-C, cancels the request. Raises `InvalidRequestError` for a request
        that no cluster would take, and `ClusterError` with the protocol's code for a failed one.
        """
        if request_id is None:
            request_id = new_request_id()
        reply = _Reply(_submit_message(request_id, prompt, params, received))
        retries = Retries(self.addresses, self._retry_for)
        with client_sockets() as pair:
            link = self._first_that_answers(pair)
            retries.attached(link.address, time.monotonic())
            try:
                while True:
                    failure = None
                    try:
                        yield from self._follow(link, reply, retries)
                    except ClusterError as error:
                        failure = error
                    if reply.complete:
                        return
                    self._leave(link, reply, retries, failure)
                    link = yield from self._elsewhere(pair, reply, retries)
            finally:
                if not reply.over:
                    link.send(Cancel(request_id=request_id))

    def _follow(self, link: ClientLink, reply: _Reply, retries: Retries) -> Iterator[Event]:
        """Yield what one node says of a reply, until it is complete or another node's turn.

        Raises `ClusterError` when this node cannot go on with it.
        """
        link.send(reply.submission())
        while not reply.complete:
            within = min(self._timeout, max(0.0, retries.leave_at - time.monotonic()))
            answer = link.receive(within)
            if answer is None and within < self._timeout:
                return
            match answer:
                case None:
                    raise link.silent(self._timeout)
                case Failed(request_id=known) if known in (0, reply.request_id):
                    reply.over = True
                    raise ClusterError(answer.code, answer.message, retryable=answer.retryable)
                case Accepted(request_id=known) if known == reply.request_id:
                    retries.accepted(link.address, answer, time.monotonic())
                    yield from reply.accepted(answer)
                case Chunk(request_id=known) if known == reply.request_id and answer.tokens:
                    reply.add(answer, time.monotonic())
                    retries.progress()
                    yield answer
                case Finished(request_id=known) if known == reply.request_id:
                    yield reply.finished(answer)

    def _leave(
        self, link: ClientLink, reply: _Reply, retries: Retries, failure: ClusterError | None
    ) -> None:
        """Break the connection to a node that failed, or that only waits: without a CANCEL, since
        the reply goes on. Raises `ClusterError` where it does not."""
        now = time.monotonic()
        if failure is None:
            retries.passed(link.address, now)
        elif reply.may_go_on(failure):
            retries.failed(link.address, failure, now)
            reply.broke(retries.name(link.address), failure)
        else:
            raise failure
        link.close()

    def _elsewhere(
        self, pair: SocketPair, reply: _Reply, retries: Retries
    ) -> Generator[Event, None, ClientLink]:
        """Connect to the next node that answers; raises `ClusterError` when none does in time."""
        while True:
            now = time.monotonic()
            address = retries.next(now)
            if address is None:
                yield from reply.nobody()
                time.sleep(max(0.0, retries.next_at - now))
                continue
            try:
                found = _connect(pair, address, min(RECONNECT_S, retries.deadline - now))
            except UsageError:  # of an address that a node told us
                found = None
            now = time.monotonic()
            if found is None:
                retries.passed(address, now)
                continue
            retries.attached(address, now)
            return found

    def submit_json_object(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> dict[str, Any]:
        """Submit, wait for the whole reply, and return it as one object for JSON.

        A failure is in the object (`finish_reason` `error`, `error` with `code` and `message`),
        with the text and tokens that came before it.
        """
        request_id = new_request_id() if request_id is None else request_id
        reply: dict[str, Any] = {
            "request_id": format(request_id, "016x"),
            "text": "",
            "token_ids": [],
            "prompt_token_ids": [],
            "finish_reason": "error",
            "error": None,
            "ttft_s": None,
            "tokens_per_s": None,
            "served_by": None,
            "failovers": [],
        }
        try:
            for event in self.submit(prompt, params, request_id=request_id):
                _record(reply, event)
                if on_event is not None:
                    on_event(event)
        except ClusterError as error:
            reply["error"] = {"code": error.code, "message": error.message}
        return reply

    def cancel(self, request_id: int) -> None:
        """Cancel a request that the node serves; nothing happens if it does not (any more)."""
        with client_sockets() as pair:
            self._first_that_answers(pair).send(Cancel(request_id=request_id))

    def status(self) -> dict[str, Any]:
        """The `status --json` object, as the first node that answers sees the cluster."""
        answer = self._ask(StatusRequest(request_id=new_request_id()), self._timeout)
        assert isinstance(answer, StatusReply)
        status: dict[str, Any] = json.loads(answer.body)
        return status

    def plan(self, without: str = "") -> dict[str, Any]:
        """The `plan --json` object: who holds what, or would if the node `without` were gone.

        Raises `ClusterError` where there is no plan, or no such node.
        """
        answer = self._ask(PlanRequest(request_id=new_request_id(), without=without), self._timeout)
        assert isinstance(answer, StatusReply)
        plan: dict[str, Any] = json.loads(answer.body)
        return plan

    def measure_link(self, name: str, *, there: int, back: int, count: int) -> dict[str, Any]:
        """How long frames take from the first node that answers to the member `name` and back.

        `count` echoes, one after the other, on the link that steps use, with `there` and `back`
        bytes of filler. Returns `from`, `to`, `round_trips_ms` (a list) and how many echoes were
        `disturbed` by a step or `lost`. Raises `ClusterError`: `overloaded` (ask again) where links
        are being measured already.
        """
        question = MeasureLink(
            request_id=new_request_id(), name=name, there=there, back=back, count=count
        )
        answer = self._ask(question, MEASURE_S)
        assert isinstance(answer, StatusReply)
        measured: dict[str, Any] = json.loads(answer.body)
        return measured

    def drain(self, name: str) -> None:
        """Let the node `name` hand over what it holds and leave; returns when it has left.

        An empty name is the asked node itself, which then forgets its cluster. Raises
        `ClusterError` when there is no such node, or the others cannot take over.
        """
        self._ask(Drain(request_id=new_request_id(), name=name), DRAIN_S)

    def pause(self, name: str) -> None:
        """Let the node `name` own no units; returns when others have taken them over.

        An empty name is the asked node itself. Raises `ClusterError` when there is no such node, or
        the others cannot take over.
        """
        self._ask(Pause(request_id=new_request_id(), name=name), DRAIN_S)

    def resume(self, name: str) -> None:
        """Let the node `name` own units again. Raises `ClusterError` when there is no such node."""
        self._ask(Pause(request_id=new_request_id(), name=name, resume=True), DRAIN_S)

    def _ask(
        self, question: StatusRequest | PlanRequest | MeasureLink | Drain | Pause, within: float
    ) -> ControlMessage:
        """The answer to a question; raises `ClusterError` where that is FAILED."""
        with client_sockets() as pair:
            link = self._first_that_answers(pair)
            link.send(question)
            while (answer := link.receive(within)) is not None:
                match answer:
                    case StatusReply() | Done() if answer.request_id == question.request_id:
                        return answer
                    case Failed() if answer.request_id in (0, question.request_id):
                        raise ClusterError(answer.code, answer.message, retryable=answer.retryable)
            raise link.silent(within)

    def _first_that_answers(self, pair: SocketPair) -> ClientLink:
        for address in self.addresses:
            link = _connect(pair, address, min(CONNECT_S, self._timeout))
            if link is not None:
                return link
        raise ClusterError(
            "not_ready",
            f"no node answers at {', '.join(self.addresses)}: is the address right, and does it "
            "run? Start one with: p2pinfer node start",
            retryable=True,
        )


class _Reply:
    """One reply, over all the nodes that it comes through."""

    def __init__(self, message: Submit) -> None:
        self.request_id = message.request_id
        self.complete = False
        self.over = False
        """The present node has said its last word of it, or the reply is complete."""
        self._message = message
        self._tokens = list(message.received)
        self._received = len(message.received)
        self._known = False
        """Some node has accepted it, so it is no impossible request."""
        self._known_here = False
        self._began = time.monotonic()
        self._times: tuple[float, float] | None = None
        """When its first and its last token came."""
        self._broken: tuple[str, ClusterError] | None = None
        self._told: str | None = None
        """Of what is `_broken`: who the caller thinks goes on with it."""
        self._moved = False

    def submission(self) -> Submit:
        """What to send to the next node: all that is there of it."""
        # The clock of whoever submits last is the latest, as far as people's clocks go.
        attempt = max(self._message.attempt + 1, time.time_ns() // 1_000_000)
        received = tuple(self._tokens)
        self._message = replace(self._message, received=received, attempt=attempt)
        self.over = self._known_here = False
        return self._message

    def may_go_on(self, error: ClusterError) -> bool:
        """Whether another node may do what this one could not."""
        # A node that refuses what another one accepted is itself the reason: a witness, say.
        here = self._known and not self._known_here and error.code == "invalid_request"
        return error.retryable or here

    def broke(self, node: str, error: ClusterError) -> None:
        """The node of that name cannot go on with it."""
        self._moved = True
        if self._broken is None:
            self._broken, self._told = (node, error), None

    def nobody(self) -> Iterator[Event]:
        """All nodes were asked, and none goes on with it."""
        if self._broken and self._told is None:
            self._told = ""
            yield Moved(*self._broken, "")

    def accepted(self, message: Accepted) -> Iterator[Event]:
        """A node has it."""
        self._known = self._known_here = True
        # As token ids it is the same prompt everywhere.
        self._message = replace(self._message, text="", prompt_ids=message.prompt_ids)
        if self._broken:
            if not self._told or (self._told != message.served_by and not message.waiting):
                self._told = message.served_by
                yield Moved(*self._broken, message.served_by, message.waiting)
            if not message.waiting:
                self._broken = None
        yield message

    def add(self, chunk: Chunk, now: float) -> None:
        """More tokens; raises `ClusterError` if some before them are missing."""
        _check_whole(len(self._tokens), chunk.start)
        self._tokens += chunk.tokens
        self._broken = None
        self._times = (self._times[0] if self._times else now, now)

    def finished(self, message: Finished) -> Finished:
        """The end, with the times as seen from here where more than one node served it; raises
        `ClusterError` if tokens are missing."""
        self.over = True
        _check_whole(len(self._tokens), message.total_tokens)
        self.complete = True
        if not self._moved or self._times is None:
            return message
        first, last = self._times
        drawn = len(self._tokens) - self._received
        rate = (drawn - 1) / (last - first) if last > first else 0.0
        return replace(message, ttft_s=first - self._began, tokens_per_s=rate)


def _connect(pair: SocketPair, address: str, within: float) -> ClientLink | None:
    """A link to the node at that address; None if it does not answer in so many seconds.

    Raises `UsageError` for an address that is none.
    """
    link = ClientLink(pair, address)
    if link.is_up(within):
        return link
    link.close()
    return None


def new_request_id() -> int:
    """A request id that no other client will choose: 63 random bits."""
    return secrets.randbits(63)


def _check_whole(have: int, said: int) -> None:
    """A reply with a hole must not look like a reply."""
    if have != said:
        raise ClusterError(
            "internal", f"tokens {have} to {said} of the reply were lost", retryable=True
        )


def _submit_message(
    request_id: int, prompt: str | Sequence[int], params: SamplingParams, received: Sequence[int]
) -> Submit:
    params.check()
    if isinstance(prompt, str):
        _check_unicode("the prompt", prompt)
        if len(prompt) > MAX_TEXT_CHARS:
            raise InvalidRequestError(
                f"the prompt is too long: at most {MAX_TEXT_CHARS} characters can be sent",
                code="prompt_too_long",
            )
    for each in params.stop:
        _check_unicode("a stop string", each)
    text, ids = (prompt, ()) if isinstance(prompt, str) else ("", tuple(prompt))
    return Submit(
        request_id=request_id,
        text=text,
        prompt_ids=ids,
        params=params,
        received=tuple(received),
    )


def _check_unicode(what: str, text: str) -> None:
    """Text from a terminal or a pipe may hold bytes that were no UTF-8, as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{what} is not UTF-8 text (character {error.start + 1}); send plain text"
        ) from error


def _record(reply: dict[str, Any], event: Event) -> None:
    """Enter an event into the object of `submit_json_object`."""
    match event:
        case Accepted():
            reply["served_by"] = event.served_by
            reply["prompt_token_ids"] = list(event.prompt_ids)
        case Chunk():
            reply["text"] += event.text
            reply["token_ids"] += event.tokens
        case Finished():
            reply["text"] += event.text
            reply["finish_reason"] = event.reason
            reply["ttft_s"] = round(event.ttft_s, 6)
            reply["tokens_per_s"] = round(event.tokens_per_s, 3)
            reply["failovers"] = [
                {
                    "position": failover.position,
                    "lost": list(failover.lost),
                    "rung": failover.rung,
                    "detect_s": round(failover.detect_s, 6),
                    "stall_s": round(failover.stall_s, 6),
                    "exact": failover.exact,
                }
                for failover in event.failovers
            ]


__all__ = ["Client", "Event", "Moved", "new_request_id"]
