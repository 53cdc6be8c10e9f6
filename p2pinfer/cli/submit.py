"""`p2pinfer submit ...`: ask a cluster."""

from __future__ import annotations

import io
import sys
import time
from math import inf
from typing import TYPE_CHECKING, Any

import click

from p2pinfer.cli.options import json_option, to_option
from p2pinfer.errors import InvalidRequestError
from p2pinfer.limits import MAX_TEXT_CHARS, MAX_VOCAB

SETTLE_S = 1.0
"""After a move, what a node waits for in turn (a leader, its plan) is not worth a line each."""

if TYPE_CHECKING:
    from p2pinfer.client import Client, Event, Moved
    from p2pinfer.types import SamplingParams
    from p2pinfer.wire.messages import Finished


@click.group()
def submit() -> None:
    """Send prompts to a cluster."""


@submit.command()
@click.argument("text", metavar="TEXT|-", required=False)
@to_option
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="N",
    help="The longest reply; cut to what the model's context has room for.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    metavar="F",
    help="0 always takes the most likely token.",
)
@click.option("--top-k", type=click.IntRange(0), default=0, metavar="N", help="0: off.")
@click.option("--top-p", type=float, default=1.0, metavar="F", help="1: off.")
@click.option("--min-p", type=float, default=0.0, metavar="F", help="0: off.")
@click.option("--repetition-penalty", type=float, default=1.0, metavar="F", help="1: off.")
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 63) - 1),
    metavar="N",
    help="The same seed draws the same reply; default: a random one.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable.")
@click.option("--token-ids", metavar="1,2,3", help="A prompt of token ids in place of TEXT.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end of text.")
@click.option("--stream/--no-stream", default=True, help="Print as it comes (default), or at once.")
@click.option(
    "--retry-for",
    type=click.FloatRange(0, 1e6),
    default=30.0,
    show_default=True,
    metavar="S",
    help="When the node is gone, try for S seconds to go on through another one; 0: not at all.",
)
@json_option
def prompt(
    text: str | None,
    to: tuple[str, ...],
    token_ids: str | None,
    *,
    stream: bool,
    retry_for: float,
    as_json: bool,
    **sampling: Any,
) -> int:
    """Continue TEXT and print the reply.

    - reads TEXT from standard input; one newline at its end is not part of it.
    """
    from p2pinfer.client import Client

    given = _prompt(text, token_ids)
    params = _params(**sampling)
    client = Client(to, retry_for=retry_for)
    notices = _Notices(retry_for)
    if as_json:
        return _print_object(client, given, params, notices)
    _print_text(client, given, params, notices, stream)
    return 0


def _prompt(text: str | None, token_ids: str | None) -> str | tuple[int, ...]:
    """The text or the token ids; exactly one of them is given."""
    if (text is None) == (token_ids is None):
        raise click.UsageError("give either TEXT (or - for standard input) or --token-ids")
    if token_ids is None:
        return _standard_input() if text == "-" else text or ""
    try:
        ids = tuple(int(part) for part in token_ids.split(","))
    except ValueError:
        ids = (-1,)
    if min(ids) < 0:
        raise click.UsageError(f"--token-ids {token_ids!r}: write whole numbers like 1,2,3")
    if max(ids) >= MAX_VOCAB:
        raise click.UsageError(f"--token-ids: no vocabulary has the id {max(ids)}")
    return ids


def _standard_input() -> str:
    """The text on standard input without one newline at its end, which `echo` and editors add.

    At most little more than may be sent is read: enough to see that it is too much.
    Bytes that are no UTF-8 are kept as lone surrogates, as in arguments: the client refuses both.
    """
    if sys.stdin is None:
        raise click.UsageError("standard input is closed; give the prompt as TEXT")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    text = sys.stdin.read(MAX_TEXT_CHARS + len("\r\n") + 1)
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _params(seed: int | None, stop: tuple[str, ...], **values: Any) -> SamplingParams:
    """Checked sampling parameters; without a seed each call draws another reply.

    A value that is impossible for every model is a wrong command line; what only the cluster can
    tell is a failed request.
    """
    from secrets import randbits

    from p2pinfer.types import SamplingParams

    params = SamplingParams(seed=randbits(63) if seed is None else seed, stop=stop, **values)
    try:
        params.check()
    except InvalidRequestError as error:
        raise click.UsageError(error.message) from error
    return params


class _Notices:
    """What happens to a reply, for people: on stderr, each in a line of its own."""

    def __init__(self, retry_for: float) -> None:
        self.begun = False
        """The reply is in the middle of a line of stdout."""
        self._retry_for = retry_for
        self._told = ""
        self._moved_at = -inf

    def show(self, event: Event) -> None:
        """Say that the reply goes on elsewhere, or what the cluster waits for, each once."""
        from p2pinfer.client import Moved
        from p2pinfer.wire.messages import Accepted

        if isinstance(event, Moved):
            self._moved_at = time.monotonic()
            self._say(_moved(event, self._retry_for))
        elif isinstance(event, Accepted) and event.waiting != self._told:
            self._told = event.waiting
            if event.waiting and time.monotonic() >= self._moved_at + SETTLE_S:
                self._say(f"waiting: {event.waiting}")

    def _say(self, text: str) -> None:
        start = "\n" if self.begun and sys.stdout.isatty() else ""
        click.echo(f"{start}{text} ...", err=True)


def _moved(event: Moved, retry_for: float) -> str:
    """Who is gone, and who goes on with the reply."""
    code = event.error.code
    end = "is gone" if code == "node_lost" else f"does not go on with it ({code})"
    if not event.through:
        return f"{event.lost} {end}; asking the other nodes for {retry_for:g} s"
    again = " again" if event.through == event.lost else ""
    waits = f", which waits for {event.waiting}" if event.waiting else ""
    return f"{event.lost} {end}; going on through {event.through}{again}{waits}"


def _print_object(
    client: Client, given: str | tuple[int, ...], params: SamplingParams, notices: _Notices
) -> int:
    """The whole reply as one object; a failed one is in it too, with exit code 1."""
    import json

    reply = client.submit_json_object(given, params, on_event=notices.show)
    click.echo(json.dumps(reply))
    return 1 if reply["error"] else 0


def _print_text(
    client: Client,
    given: str | tuple[int, ...],
    params: SamplingParams,
    notices: _Notices,
    stream: bool,
) -> None:
    """Reply text to stdout; what it waits for and, in a terminal, a summary line to stderr."""
    from p2pinfer.wire.messages import Accepted, Chunk, Finished

    held: list[str] = []
    served_by = ""
    tokens = 0
    try:
        for event in client.submit(given, params):
            notices.show(event)
            if isinstance(event, Accepted):
                served_by = event.served_by
            if not isinstance(event, Chunk | Finished):
                continue
            if isinstance(event, Chunk):
                tokens += len(event.tokens)
            if stream:
                notices.begun = True
                click.echo(event.text, nl=False)
            else:
                held.append(event.text)
            if isinstance(event, Finished):
                click.echo("".join(held))
                notices.begun = False
                if sys.stderr.isatty():
                    click.secho(_summary(event, served_by), err=True, dim=True)
    except KeyboardInterrupt:
        click.echo(err=not notices.begun)  # the terminal has written ^C
        notices.begun = False
        count = "1 token" if tokens == 1 else f"{tokens} tokens"
        click.secho(f"cancelled after {count}", err=True, dim=True)
        raise click.Abort from None
    finally:
        if notices.begun:  # broken off: what follows begins on a line of its own
            click.echo()


def _summary(reply: Finished, served_by: str) -> str:
    """One line of figures: tokens, times, why it ended, who served it."""
    parts = (
        f"{reply.total_tokens} tokens",
        f"first after {reply.ttft_s:.2f} s",
        f"{reply.tokens_per_s:.1f} tokens/s",
        f"ended by {reply.reason}",
        f"served by {served_by}",
        *(
            f"went on {failover.stall_s:.1f} s after losing {', '.join(failover.lost)}"
            for failover in reply.failovers
        ),
    )
    return " · ".join(parts)
