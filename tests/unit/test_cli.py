"""The command line: instant help, exit codes, and that no mistake ends in a traceback."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from msgspec.structs import replace

from p2pinfer import __version__
from p2pinfer.cli import main, node, root
from p2pinfer.cli.interrupt import sigterm_is_ctrl_c
from p2pinfer.cli.model import SHAPES_HELP
from p2pinfer.cli.status_view import runs, status_view
from p2pinfer.client import Event, Moved
from p2pinfer.errors import ClusterError, InvalidRequestError, ModelError, UsageError
from p2pinfer.limits import MAX_TEXT_CHARS
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire.messages import Accepted, Chunk, Finished

HEAVY = ("torch", "numpy", "zmq", "transformers", "tokenizers", "rich", "structlog")


def verbs(command: click.Command = root, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every group and command by its words."""
    yield words
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from verbs(child, (*words, name))


@pytest.mark.parametrize("words", [*verbs()], ids=" ".join)
def test_help_is_instant(words: tuple[str, ...]) -> None:
    """The help of no verb imports torch, numpy, ZeroMQ or anything else that is slow."""
    program = (
        "import sys; from p2pinfer.cli import main; code = main(sys.argv[1:]);"
        f"print('imported:', *(name for name in {HEAVY} if name in sys.modules)); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {' '.join(('p2pinfer', *words))} ")
    assert done.stdout.endswith("imported:\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the package's version."""
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a verb the help is shown on stderr, as a usage error."""
    assert main([]) == 2
    assert "Usage: p2pinfer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "No such command 'dance'"),
        (["node", "start", "--no-such"], "No such option"),
        (["node", "start", "--threads", "many"], "'many' is not a valid integer"),
        (["node", "start", "--quant", "int4"], "not available in this version"),
        (["node", "start", "--layout", "9x9"], "--layout 9x9"),
        (["node", "start", "--replicas", "16"], "--replicas 16: allowed is a number from 0 to 15"),
        (["cluster", "start", "--nodes", "2", "--replicas", "x"], "'x' is not a valid integer"),
        (["node", "start", "--join", "udp://x"], "only tcp:// is spoken"),
        (["node", "start", "--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (["cluster", "start"], "Missing option '--nodes'"),
        (["cluster", "start", "--nodes", "17"], "17 is not in the range"),
        (["submit", "prompt"], "give either TEXT"),
        (["submit", "prompt", "hi", "--token-ids", "1"], "give either TEXT"),
        (["submit", "prompt", "--token-ids", "1,x"], "write whole numbers"),
        (["submit", "prompt", "--token-ids", "1,-2"], "write whole numbers"),
        (["submit", "prompt", "hi", "--max-tokens", "0"], "max-tokens"),
        (["submit", "prompt", "hi", "--retry-for", "-1"], "retry-for"),
        (["submit", "prompt", "hi", "--retry-for", "nan"], "retry_for must be 0 or more"),
        (["model", "inspect", "/nonexistent"], "/nonexistent"),
        (["model", "make", "--shape", "giant", "/nonexistent/x"], "giant"),
        (["doctor", "--listen", "h:99999"], "the port must be"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong command line exits with 2 and one line on stderr that says what is wrong."""
    assert main(arguments) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith("error: ") and message in seen.err
    assert len(seen.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "9999"], "top_k"),
        (["--repetition-penalty", "nan"], "repetition_penalty"),
    ],
)
def test_impossible_sampling_values(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampling values that no sampler could obey are a wrong command line: no node is asked."""
    assert main(["submit", "prompt", "hi", "--to", "127.0.0.1:1", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UsageError("flag"), 2, "error: flag\n"),
        (ModelError("folder"), 2, "error: folder\n"),
        (ClusterError("node_lost", "lost", retryable=True), 1, "error (node_lost): lost\n"),
        (InvalidRequestError("empty"), 1, "error (invalid_request): empty\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever a verb raises on purpose becomes an exit code and a line, never a traceback."""

    def verb(**_: Any) -> None:
        raise raised

    monkeypatch.setattr(node.start, "callback", verb)
    assert main(["node", "start"]) == code
    assert capsys.readouterr().err == message


def test_a_verbs_own_exit_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that a verb returns is the exit code."""
    monkeypatch.setattr(node.start, "callback", lambda **_: 1)
    assert main(["node", "start"]) == 1


def test_a_closed_pipe_is_no_traceback() -> None:
    """When the reader of stdout goes away the program ends without a word."""
    command = [sys.executable, "-m", "p2pinfer", "model", "inspect", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_model_make_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`model make` writes a model that `model inspect` reads, as text and as JSON."""
    folder = tmp_path / "made"
    assert main(["model", "make", "--shape", "tiny", str(folder)]) == 0
    assert "tiny" in capsys.readouterr().err
    assert main(["model", "inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["model", "inspect", str(folder)]) == 0
    assert facts["model_id"] in capsys.readouterr().out


def test_doctor_reports_taken_ports(capsys: pytest.CaptureFixture[str]) -> None:
    """`doctor` exits with 1 when another program holds one of the ports."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = min(other.getsockname()[1], 65533)
        assert main(["doctor", "--listen", f"127.0.0.1:{port}", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    levels = {row["check"]: row["level"] for row in report["checks"]}
    assert not report["ok"] and levels["ports"] == "fail"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], "-"), ([3], "3"), ([0, 1, 2], "0-2"), ([5, 0, 1, 7, 8], "0-1,5,7-8")],
)
def test_runs_of_numbers(numbers: list[int], text: str) -> None:
    """Unit numbers are shown as ranges."""
    assert runs(numbers) == text


def member(name: str, **others: Any) -> dict[str, Any]:
    """A member as `status --json` lists it."""
    owned = [
        {"span": [0, 4], "head_units": [0, 1], "mlp_units": [0], "vocab_units": []},
        {"span": [4, 8], "head_units": [2], "mlp_units": [3], "vocab_units": [0, 1]},
    ]
    return {
        "name": name,
        "state": "alive",
        "address": "tcp://127.0.0.1:7720",
        "owned": owned,
        "rtt_ms": 0.25,
        "tokens_per_s": 12.0,
        "kv": {"used_bytes": 1 << 20, "limit_bytes": 1 << 30},
        **others,
    }


def rendered(status: dict[str, Any]) -> str:
    """The status view as plain text of 140 columns."""
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(status_view(status))
    return console.export_text()


def test_status_view_shows_who_holds_what() -> None:
    """The status table has a line per member with state, layers, units and figures."""
    members = [member("a"), member("b", state="dead", owned=[])]
    text = rendered(
        {"model": {"name": "m"}, "leader": "a", "epoch": 3, "ready": True, "members": members}
    )
    head, _, titles, first, second = text.splitlines()
    assert head.split() == ["m", "leader", "a", "term", "0", "epoch", "3", "ready"]
    assert titles.split()[:6] == ["name", "state", "address", "layers", "heads", "keeps"]
    assert [*first.split()] == [
        *("a", "alive", "127.0.0.1:7720", "0-3", "|", "4-7", "0-1", "|", "2", "-"),
        *("0", "|", "3", "0.2", "12.0", "1/1024"),
    ]
    assert second.split() == ["b", "dead", "127.0.0.1:7720", *"-------"]


def test_status_view_shows_which_heads_a_member_keeps() -> None:
    """A table of 80 columns has room for it in a plan of one stage, where all have all layers."""
    part = {"span": [0, 4], "head_units": [0, 1, 2], "mlp_units": [0, 1], "vocab_units": [0]}
    kept = [{**part, "head_units": [3, 4, 7]}]
    text = rendered({"ready": True, "members": [member("node1", owned=[part], standby=kept)]})
    _, _, titles, line = text.splitlines()
    assert titles.split()[:6] == ["name", "state", "address", "heads", "keeps", "MLP"]
    assert line.split()[2:6] == ["127.0.0.1:7720", "0-2", "3-4,7", "0-1"]
    assert len(line.rstrip()) <= 80


def test_status_view_says_what_is_waited_for() -> None:
    """A cluster that is not ready says why, and nothing of deaths that it would survive."""
    text = rendered({"model": None, "leader": None, "waiting": "1 of 3 nodes", "members": []})
    assert "no model" in text and "not ready\nwaiting: 1 of 3 nodes" in text
    assert "survives" not in text


@pytest.mark.parametrize(
    ("tolerates", "told"),
    [([], "nobody"), (["b"], "b"), (["a", "b", "c"], "any of a, b, c")],
    ids=["none", "one", "each"],
)
def test_status_view_says_whose_death_is_survived(tolerates: list[str], told: str) -> None:
    """A ready cluster names its voters and the nodes of which any one may die."""
    status = {"ready": True, "voters": ["a", "b", "c"], "tolerates": tolerates, "members": []}
    _, line, *_ = rendered(status).splitlines()
    assert line.rstrip() == f"voters a, b, c   survives the death of {told}"


@pytest.mark.parametrize(
    ("others", "word"),
    [
        ({}, "alive"),
        ({"hung": True, "draining": True}, "hung"),
        ({"draining": True}, "draining"),
        ({"witness": True, "numeric_class": "", "kv": {"limit_bytes": 1}}, "witness"),
        ({"numeric_class": ""}, "starting"),
        ({"numeric_class": "0123"}, "alive"),
        ({"state": "suspect", "hung": True}, "suspect"),
        ({"state": "left", "draining": True}, "left"),
    ],
)
def test_status_view_has_one_word_for_a_members_state(others: dict[str, Any], word: str) -> None:
    """What is wrong with a member wins over what is right; a witness has no KV to show."""
    line = rendered({"ready": True, "members": [member("a", **others)]}).splitlines()[-1]
    assert line.split()[1] == word
    assert (line.split()[-1] == "-") == (word in ("witness", "left"))


PLAN: dict[str, Any] = {
    "model": "m",
    "layout": "heads",
    "leader": "a",
    "term": 2,
    "epoch": 5,
    "quorum": "last-man",
    "kv_positions": 4096,
    "members": [
        {
            **member("a"),
            "voter": True,
            "witness": False,
            "weight_bytes": 2 << 20,
            "standby_bytes": 1 << 20,
            "memory_bytes": None,
            "kv_room_bytes": 7 << 20,
        },
        {
            **member("w", owned=[]),
            "voter": True,
            "witness": True,
            "weight_bytes": 0,
            "standby_bytes": 0,
            "memory_bytes": 9 << 20,
            "kv_room_bytes": 9 << 20,
        },
    ],
}


class FakeClient:
    """Stands in for `p2pinfer.client.Client`: replies as told, and remembers what it was asked."""

    def __init__(self, *events: Event | BaseException) -> None:
        self.events = events
        self.asked: tuple[Any, SamplingParams] | None = None
        self.addresses: tuple[str, ...] = ()
        self.retry_for = -1.0
        self.drained: str | None = None

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
    head, room, titles, first, second = capsys.readouterr().out.splitlines()
    assert " ".join(head.split()) == "m heads leader a term 2 epoch 5 quorum last-man"
    assert "4096 positions" in room and titles.split()[:2] == ["node", "votes"]
    assert first.split()[:2] == ["a", "yes"] and first.split()[-3:] == ["3", "-", "7"]
    assert titles.split()[4] == "keeps" and first.split()[-6] == "-"
    assert second.split() == ["w", "yes", *"--------"]
    ask("plan", "--json")
    assert json.loads(capsys.readouterr().out) == PLAN


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


@pytest.mark.parametrize("verb", ["status", "plan"])
def test_json_of_a_failure_is_an_object(
    verb: str, ask: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` says on stdout why there is nothing to tell, with exit code 1."""
    ask(verb, "--json", events=(ClusterError("not_ready", "nobody"),), code=1)
    seen = capsys.readouterr()
    assert seen.err == ""
    assert json.loads(seen.out) == {"error": {"code": "not_ready", "message": "nobody"}}


def test_the_help_names_all_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    """`model make --help` lists the shapes there are."""
    from p2pinfer.model.shapes import SHAPES

    assert f"One of {', '.join(SHAPES)}." == SHAPES_HELP
    assert main(["model", "make", "--help"]) == 0
    assert "tinyllama-1.1b" in capsys.readouterr().out


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


def test_sigterm_is_ctrl_c_only_inside_the_block() -> None:
    """SIGTERM raises KeyboardInterrupt while the block runs, and is then as before."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_is_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
