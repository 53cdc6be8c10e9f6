"""The command line: instant help, exit codes, and that no mistake ends in a traceback."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from p2pinfer import __version__
from p2pinfer.cli import main, node, root
from p2pinfer.cli.interrupt import sigterm_is_ctrl_c
from p2pinfer.cli.model import SHAPES_HELP
from p2pinfer.errors import ClusterError, InvalidRequestError, ModelError, UsageError

HEAVY = (
    "torch",
    "numpy",
    "onnxruntime",
    "onnx",
    "zmq",
    "transformers",
    "tokenizers",
    "rich",
    "structlog",
)


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
        (["node", "start", "--quant", "int5"], "allowed is none, int8, int4"),
        (["node", "start", "--quant", "int4", "--device", "cuda"], "--quant int4 is for CPUs"),
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


def test_the_help_names_all_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    """`model make --help` lists the shapes there are."""
    from p2pinfer.model.shapes import SHAPES

    assert f"One of {', '.join(SHAPES)}." == SHAPES_HELP
    assert main(["model", "make", "--help"]) == 0
    assert "tinyllama-1.1b" in capsys.readouterr().out


def test_sigterm_is_ctrl_c_only_inside_the_block() -> None:
    """SIGTERM raises KeyboardInterrupt while the block runs, and is then as before."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_is_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
