"""Commands that ask a node, with a client that replies as told in the place of the true one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from p2pinfer.cli import main
from p2pinfer.cli.plan_view import _speed
from p2pinfer.client import Event, Moved
from p2pinfer.errors import ClusterError
from p2pinfer.limits import MAX_TEXT_CHARS
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire.messages import Accepted, Chunk, Finished
from tests.cli_examples import PLAN, member


class FakeClient:
    """Stands in for `p2pinfer.client.Client`: replies as told, and remembers what it was asked."""

    def __init__(self, *events: Event | BaseException) -> None:
        self.events = events
        self.asked: tuple[Any, SamplingParams] | None = None
        self.addresses: tuple[str, ...] = ()
        self.retry_for = -1.0
        self.drained: str | None = None
        self.paused: list[tuple[str, str]] = []

    def __call__(self, addresses: tuple[str, ...], retry_for: float = -1.0) -> FakeClient:
        self.addresses, self.retry_for = addresses, retry_for
        return self

    def submit(self, prompt: str | tuple[int, ...], params: SamplingParams) -> Iterator[Event]:
        self.asked = (prompt, params)
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            yield event

    def submit_json_object(
        self, prompt: Any, params: SamplingParams, on_event: Callable[[Event], None]
    ) -> dict[str, Any]:
        try:
            for event in self.submit(prompt, params):
                on_event(event)
        except ClusterError as error:
            return {"error": {"code": error.code, "message": error.message}}
        return {"error": None, "text": "whole"}

    def status(self) -> dict[str, Any]:
        self._fail()
        members = [member("a")]
        return {"model": {"name": "m"}, "leader": "a", "ready": True, "members": members}

    def plan(self, without: str = "") -> dict[str, Any]:
        self._fail()
        if not without:
            return PLAN
        moved = {"head": [0, 1], "mlp": [], "vocab": [2]}
        found = {"without": without, "survives": True, "why": "", "moved": moved}
        found |= {"exact": False, "plan": PLAN}
        if without == "a":
            found |= {"survives": False, "why": "of 2 voters 1 would be left: w"}
            found |= {"moved": None, "exact": None, "plan": None}
        return found

    def drain(self, name: str) -> None:
        self._fail()
        self.drained = name

    def pause(self, name: str) -> None:
        self._fail()
        self.paused.append(("pause", name))

    def resume(self, name: str) -> None:
        self._fail()
        self.paused.append(("resume", name))

    def _fail(self) -> None:
        for event in self.events:
            if isinstance(event, BaseException):
                raise event


REPLY: tuple[Event, ...] = (
    Accepted(request_id=1, served_by="a", prompt_ids=(1,), waiting="1 of 2 nodes"),
    Chunk(request_id=1, start=0, tokens=(1,), text="a fox"),
    Finished(request_id=1, reason="stop", total_tokens=2, text=" ran"),
)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeClient]:
    """A function that runs a command line against a fake client and returns that client."""

    def run(*arguments: str, events: tuple[Any, ...] = REPLY, code: int = 0) -> FakeClient:
        client = FakeClient(*events)
        monkeypatch.setattr("p2pinfer.client.Client", client)
        assert main(list(arguments)) == code
        return client

    return run


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_submit_prints_the_reply(
    how: str, ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """The reply's text is all that stdout gets; what it waited for goes to stderr."""
    client = ask("submit", "prompt", "hi", how, "--to", "h:1", "--to", "h:2")
    assert capsys.readouterr() == ("a fox ran\n", "waiting: 1 of 2 nodes ...\n")
    assert (client.addresses, client.retry_for) == (("h:1", "h:2"), 30.0)


@pytest.mark.parametrize(
    ("code", "through", "notice"),
    [
        ("node_lost", "b", "a is gone; going on through b ...\n"),
        ("node_lost", "a", "a is gone; going on through a again ...\n"),
        ("leaving", "b", "a does not go on with it (leaving); going on through b ...\n"),
        ("node_lost", "", "a is gone; asking the other nodes for 5 s ...\n"),
        ("node_lost", "w", "a is gone; going on through w, which waits for a plan ...\n"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_submit_says_where_a_reply_goes_on(
    code: str,
    through: str,
    notice: str,
    *,
    as_json: bool,
    ask: Callable[..., FakeClient],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line on stderr, whatever is waited for just then; the reply on stdout is as if nothing
    had been."""
    waits, chunk, finished = REPLY
    moved = Moved(
        "a",
        ClusterError(code, "no more", retryable=True),
        through,
        "a plan" if through == "w" else "",
    )
    events = (waits, waits, chunk, moved, replace(waits, waiting="a plan"), finished)
    options = ("--retry-for", "5", *(["--json"] if as_json else []))
    assert ask("submit", "prompt", "hi", *options, events=events).retry_for == 5.0
    seen = capsys.readouterr()
    assert seen.err == "waiting: 1 of 2 nodes ...\n" + notice
    if not as_json:
        assert seen.out == "a fox ran\n"


def test_submit_passes_all_sampling_options(ask: Callable[..., FakeClient]) -> None:
    """Every option of `submit prompt` reaches the request."""
    options = "--max-tokens 3 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1"
    more = "--repetition-penalty 1.1 --seed 7 --stop x --stop y --ignore-eos --token-ids 1,2"
    client = ask("submit", "prompt", *options.split(), *more.split())
    assert client.asked == (
        (1, 2),
        SamplingParams(
            max_tokens=3,
            temperature=0.5,
            top_k=4,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            seed=7,
            stop=("x", "y"),
            ignore_eos=True,
        ),
    )


def test_submit_without_a_seed_draws_one(ask: Callable[..., FakeClient]) -> None:
    """Two calls without --seed have different seeds."""
    seeds = {ask("submit", "prompt", "hi").asked[1].seed for _ in range(2)}  # type: ignore[index]
    assert len(seeds) == 2


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_submit_reads_standard_input(
    end: str, ask: Callable[..., FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of `-` is read from standard input, without one newline at its end."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"two\nlines\n\t{end}", newline=""))
    client = ask("submit", "prompt", "-")
    assert client.asked is not None and client.asked[0] == "two\nlines\n\t"


def test_a_prompt_that_is_too_long_is_not_cut_at_a_newline(
    ask: Callable[..., FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newline where reading ends makes no shorter prompt of one that is too long."""
    text = "x" * MAX_TEXT_CHARS + "\r\n\n" + "y"
    monkeypatch.setattr("sys.stdin", io.StringIO(text, newline=""))
    client = ask("submit", "prompt", "-")
    assert client.asked is not None and len(client.asked[0]) > MAX_TEXT_CHARS


def test_a_broken_reply_is_an_error(
    ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """A reply that breaks off keeps what came, and ends in an error with exit code 1."""
    lost = ClusterError("node_lost", "node b died", retryable=True)
    ask("submit", "prompt", "hi", events=(*REPLY[:2], lost), code=1)
    seen = capsys.readouterr()
    assert seen.out == "a fox\n" and seen.err.endswith("error (node_lost): node b died\n")


def test_ctrl_c_says_how_far_the_reply_was(
    ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C keeps what came, and counts its tokens in a line of stderr; exit code 130."""
    ask("submit", "prompt", "hi", events=(*REPLY[:2], KeyboardInterrupt()), code=130)
    seen = capsys.readouterr()
    assert seen.out == "a fox\n" and seen.err.endswith(" ...\ncancelled after 1 token\n")


def test_in_a_terminal_a_wait_has_a_line_of_its_own(
    ask: Callable[..., FakeClient],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a reply has begun, what it waits for does not go on in the middle of its text, and
    the summary says what it survived."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, chunk, finished = REPLY
    assert isinstance(finished, Finished)
    lost = Failover(position=1, lost=("b", "c"), rung="replay", detect_s=0.1, stall_s=0.25)
    waits = replace(REPLY[0], waiting="the election of a leader")
    ask("submit", "prompt", "hi", events=(chunk, waits, replace(finished, failovers=(lost,))))
    seen = capsys.readouterr()
    assert seen.out == "a fox ran\n"
    waited, summary = seen.err.split("...\n")
    assert waited == "\nwaiting: the election of a leader "
    assert "went on 0.2 s after losing b, c" in summary


def test_plan_shows_who_holds_what(
    ask: Callable[..., FakeClient],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`plan` prints a line per member; `--json` prints what the node said, unchanged."""
    monkeypatch.setenv("COLUMNS", "120")
    ask("plan")
    head, room, speed, titles, first, second = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "m heads leader a term 2 epoch 5 quorum last-man"
    assert "4096 positions" in room and titles.split()[:2] == ["node", "votes"]
    assert speed == "1 of 2 nodes: 31.2 tok/s predicted; 2: 27   (owning nothing: b)"
    assert first.split()[:2] == ["a", "yes"] and first.split()[-4:] == ["3", "-", "7", "22.5"]
    assert titles.split()[4] == "keeps" and first.split()[-7] == "-"
    assert second.split() == ["w", "yes", *"---------"]
    ask("plan", "--json")
    assert json.loads(capsys.readouterr().out) == PLAN


@pytest.mark.parametrize(
    ("unknown", "said"), [(["b"], "the speed of b unknown"), ([], "round trips unknown")]
)
def test_plan_says_what_no_speed_is_predicted_for_want_of(unknown: list[str], said: str) -> None:
    """No figure is made up."""
    found = PLAN["prediction"] | {"tokens_per_s": None, "nodes": 2, "unknown": unknown}
    assert _speed({"prediction": found}).plain == f"2 of 2 nodes: no speed predicted, {said}"


def test_plan_without_a_node_says_what_would_become_of_it(
    ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """It says whether the cluster would go on, what would move, and why it would not go on."""
    ask("plan", "--without", "b")
    goes_on, moved, other_class, *_ = capsys.readouterr().out.splitlines()
    assert goes_on == "without b the cluster goes on"
    assert moved == "other nodes would take over: heads 0-1, vocabulary units 2"
    assert "another numeric class" in other_class
    ask("plan", "--without", "a")
    told = capsys.readouterr().out
    assert told == "without a the cluster stands still: of 2 voters 1 would be left: w\n"


def test_drain_and_leave_say_when_it_is_done(
    ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """`node drain NAME` is about that node, `node leave` about the one that is asked."""
    assert ask("node", "drain", "b", "--to", "h:1").drained == "b"
    assert ask("node", "leave").drained == ""
    assert capsys.readouterr().out == "b has left\nthe node has left its cluster\n"
    ask("node", "drain", "b", events=(ClusterError("not_ready", "b could not"),), code=1)
    assert capsys.readouterr() == ("", "error (not_ready): b could not\n")


def test_pause_and_resume_say_when_it_is_done(
    ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are about the node that is named."""
    assert ask("node", "pause", "b", "--to", "h:1").paused == [("pause", "b")]
    assert ask("node", "resume", "b").paused == [("resume", "b")]
    assert capsys.readouterr().out == "b owns nothing now\nb may own units again\n"
    ask("node", "pause", "b", events=(ClusterError("not_ready", "b could not"),), code=1)
    assert capsys.readouterr() == ("", "error (not_ready): b could not\n")


@pytest.mark.parametrize("verb", ["status", "plan"])
def test_json_of_a_failure_is_an_object(
    verb: str, ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` says on stdout why there is nothing to tell, with exit code 1."""
    ask(verb, "--json", events=(ClusterError("not_ready", "nobody"),), code=1)
    seen = capsys.readouterr()
    assert seen.err == ""
    assert json.loads(seen.out) == {"error": {"code": "not_ready", "message": "nobody"}}


@pytest.mark.parametrize("broken", [False, True])
def test_submit_json_is_one_object(
    broken: bool, ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` prints one object, for a failed request too, and the exit code tells them apart."""
    lost = ClusterError("node_lost", "node b died", retryable=True)
    ask("submit", "prompt", "hi", "--json", events=(lost,) if broken else REPLY, code=int(broken))
    reply = json.loads(capsys.readouterr().out)
    assert bool(reply["error"]) == broken


def test_status_prints_a_table_or_the_object(
    ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """`status` shows the members; `--json` prints what the node said, unchanged."""
    client = ask("status")
    assert "leader a" in capsys.readouterr().out
    ask("status", "--json")
    assert json.loads(capsys.readouterr().out) == client.status()


def test_tables_are_plain_in_a_pipe(
    ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside a terminal the status table is plain text without colours."""
    ask("status")
    assert "\x1b" not in capsys.readouterr().out
