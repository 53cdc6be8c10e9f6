"""Bad input by the real command line: each mistake has its exit code and says what is wrong.

2: the command line, a file or a folder of this machine is wrong. 1: the request or the cluster
failed; `submit --json` then prints its object all the same. Whatever happens, no traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.cluster import LocalCluster, free_base_port
from p2pinfer.demo import MODEL_DIR
from p2pinfer.limits import MAX_TEXT_CHARS, MAX_VOCAB
from tests.faults.watching import facts, until

DEADLINE_S = 60.0
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORMS = ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight")


def run(
    *arguments: str | bytes, stdin: bytes = b"", cwd: Path | None = None
) -> tuple[int, str, str]:
    """Run `p2pinfer` to its end: exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "p2pinfer", *arguments],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=DEADLINE_S,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def check_error(result: tuple[int, str, str], code: int, *words: str) -> None:
    """The exit code, nothing on stdout, and a last line on stderr that has all the words."""
    found, out, err = result
    last = err.splitlines()[-1]
    assert (found, out) == (code, ""), err
    assert last.startswith("error: " if code == 2 else "error (")
    for word in words:
        assert word in last


# --- a wrong command line -------------------------------------------------------------------------


WRONG_COMMANDS: list[tuple[str, tuple[str, ...]]] = [
    ("node start --name ''", ("--name ''", "1 to 64 letters")),
    ("node start --listen ''", ("--listen '' is no address", "tcp://host:port")),
    ("node start --join nowhere:x", ("--join 'nowhere:x'", "port must be a number")),
    ("node start --join-timeout nan", ("--join-timeout nan", "from 0.1 to 86400")),
    ("node start --kv-memory lots", ("--kv-memory 'lots'", "512M or 2G")),
    ("node start --state-dir ''", ("--state-dir '' is no path",)),
    ("node start --state-dir ~nobodys-home/x", ("--state-dir", "no such home folder")),
    ("node start --config typo.toml", ("'thread'", "did you mean threads?")),
    ("node start --config damaged.toml", ("damaged.toml", "not valid TOML", "line 1")),
    ("node start --config folder", ("folder", "is a directory")),
    ("node start --config none.toml", ("none.toml", "No such file")),
    ("node start --model file", ("file is a file", "give the model's folder")),
    ("node start --model folder", ("folder holds no config.json", "give the one with")),
    ("cluster start --nodes 2 --base-port 65530", ("--base-port 65530", "1 to 65523")),
    ("cluster start --nodes 2 --layout 3x2", ("--layout 3x2 needs 6 nodes", "--nodes is 2")),
    ("cluster start --nodes 9 --layout 9x1", ("9 stages", "only 4 layers")),
    ("cluster start --nodes 2 --min-nodes 5", ("--min-nodes 5", "--nodes 2")),
    ("cluster start --nodes 2 --model none", ("none: no such model folder", "`demo`")),
    ("submit prompt hi --to nowhere:x", ("'--to'", "'nowhere:x'", "must be a number")),
    ("submit prompt hi --temperature nan", ("temperature", "0 (greedy)", "not nan")),
    ("submit prompt hi --temperature 1e-300", ("temperature", "from 1e-09", "not 1e-300")),
    ("submit prompt hi --top-p 0 --json", ("top_p", "above 0 and at most 1")),
    ("submit prompt hi --max-tokens 5000000000", ("max_tokens", "below 2^32")),
    ("submit prompt hi --seed -1", ("'--seed'", "-1 is not in the range")),
    ("submit prompt hi --seed 9223372036854775808", ("'--seed'", "not in the range")),
    ("submit prompt hi --stop ''", ("stop string", "must not be empty")),
    ("submit prompt --token-ids ''", ("--token-ids ''", "like 1,2,3")),
    (f"submit prompt --token-ids 1,{MAX_VOCAB}", ("no vocabulary has the id", str(MAX_VOCAB))),
    ("status --to ''", ("'--to'", "is no address")),
    ("demo --nodes 3", ("No such option '--nodes'", "p2pinfer demo --help")),
    ("bench decode --dtype int3", ("--dtype int3", "bfloat16")),
    ("bench decode --report file", ("'--report'", "'file' is a file")),
    ("model make --shape tiny --seed -1 new", ("'--seed'", "-1 is not in the range")),
    ("model make --shape tiny folder/../file", ("is a file; give a folder",)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the wrong commands name."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "folder").mkdir()
    (folder / "file").write_text("text")
    (folder / "typo.toml").write_text("thread = 3\n")
    (folder / "damaged.toml").write_text("threads = \n")
    return folder


@pytest.mark.parametrize(
    ("line", "words"), WRONG_COMMANDS, ids=[line for line, _ in WRONG_COMMANDS]
)
def test_a_wrong_command_line_is_told(place: Path, line: str, words: tuple[str, ...]) -> None:
    """Exit code 2, nothing on stdout, the flag and what is allowed in one line."""
    arguments = ["" if word == "''" else word for word in line.split()]
    result = run(*arguments, cwd=place)
    check_error(result, 2, *words)
    assert len(result[2].splitlines()) == 1


@pytest.mark.parametrize("verb", ["cluster start --nodes 2", "bench decode --shape tiny --nodes 2"])
def test_a_taken_port_is_told_before_anything_is_started(verb: str) -> None:
    """The second node's middle port: its number, and which flag to change."""
    base = free_base_port(2)
    with socket.create_server(("127.0.0.1", base + 11)):
        result = run(*verb.split(), "--base-port", str(base))
    check_error(result, 2, f"port {base + 11} is taken", "choose another --base-port")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody may write to")
def test_a_state_dir_that_cannot_be_written_is_told() -> None:
    """A read-only place: the flag, the folder and the system's reason."""
    listen = f"127.0.0.1:{free_base_port(1)}"
    result = run("node", "start", "--listen", listen, "--state-dir", "/proc/p2pinfer")
    check_error(result, 2, "--state-dir /proc/p2pinfer: cannot be used", "may write to")


# --- model folders --------------------------------------------------------------------------------


def set_config(**changes: Any) -> Callable[[Path], None]:
    """Change fields of `config.json`."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def set_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header of the weights; their bytes stay."""

    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return rewrite


def set_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change a file's bytes."""

    def rewrite(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return rewrite


def larger_tokenizer(folder: Path) -> None:
    """A token more than the model has rows."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    extra = {"id": 5000, "content": "<more>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["model"]["vocab"]["<more>"] = 5000
    tokenizer["added_tokens"].append(extra | flags)
    file.write_text(json.dumps(tokenizer))


def dead_link(folder: Path) -> None:
    """The weights are a link whose target was left behind."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/nowhere")


def overlap(header: dict[str, Any]) -> None:
    """Two tensors in one place."""
    header[NORMS[1]]["data_offsets"] = header[NORMS[0]]["data_offsets"]


def turn(header: dict[str, Any]) -> None:
    """The same numbers in another shape."""
    header[Q_PROJ]["shape"].reverse()


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "architecture": (
        set_config(architectures=["BertModel"]),
        ("config.json", "BertModel", "LlamaForCausalLM"),
    ),
    "rope": (
        set_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        ("rope_scaling.rope_type", "'yarn'", "llama3"),
    ),
    "config cut": (set_bytes("config.json", lambda b: b[:50]), ("config.json is not JSON",)),
    "config list": (set_bytes("config.json", lambda b: b"[]"), ("list, not a JSON object",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), (f"holds neither {WEIGHTS}", "download")),
    "dead link": (
        dead_link,
        (f"{WEIGHTS} is a link to nowhere", "copy the file itself"),
    ),
    "LFS pointer": (
        set_bytes(WEIGHTS, lambda b: b"version https://git-lfs.github.com/spec/v1\noid ...\n"),
        ("Git LFS pointer", "git lfs pull"),
    ),
    "web page": (
        set_bytes(WEIGHTS, lambda b: b"<html>not found</html>" * 9),
        ("no safetensors file", "download"),
    ),
    "truncated": (
        set_bytes(WEIGHTS, lambda b: b[:-1000]),
        (f"{WEIGHTS} is truncated", "download or copy the file again"),
    ),
    "cut header": (set_bytes(WEIGHTS, lambda b: b[:100]), ("truncated inside its header",)),
    "overlapping": (set_header(overlap), (WEIGHTS, "overlaps model.layers.")),
    "missing": (
        set_header(lambda h: h.pop("model.norm.weight")),
        ("has no tensor model.norm.weight", "download the weights again"),
    ),
    "shape": (set_header(turn), (Q_PROJ, "[224, 256]", "[256, 224]", "from the same model")),
    "tokenizer": (
        larger_tokenizer,
        ("tokenizer.json does not fit", "5000", "vocab_size is 1536", "belongs to the model"),
    ),
    "tokenizer cut": (
        set_bytes("tokenizer.json", lambda b: b[:1000]),
        ("tokenizer.json is damaged", "download"),
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("holds no tokenizer", "copy it")),
}


def damaged(folder: Path, damage: str) -> Path:
    """A copy of the bundled model with one kind of damage."""
    model = folder / "model"
    shutil.copytree(MODEL_DIR, model)
    DAMAGE[damage][0](model)
    return model


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_told(tmp_path: Path, damage: str) -> None:
    """Exit code 2; file, tensor or field, what is wrong with it, and what to do."""
    result = run("model", "inspect", str(damaged(tmp_path, damage)))
    check_error(result, 2, *DAMAGE[damage][1])


@pytest.mark.parametrize("verb", ["node start", "cluster start --nodes 2"])
def test_no_node_starts_with_a_damaged_model(tmp_path: Path, verb: str) -> None:
    """`node start` and `cluster start` say the same, and nothing is started."""
    model = damaged(tmp_path, "truncated")
    check_error(run(*verb.split(), "--model", str(model)), 2, *DAMAGE["truncated"][1])


def test_doctor_tells_of_a_damaged_model(tmp_path: Path) -> None:
    """Its row fails with the same words; exit code 1."""
    model = damaged(tmp_path, "truncated")
    listen = f"127.0.0.1:{free_base_port(1)}"
    code, out, err = run("doctor", "--model", str(model), "--listen", listen, "--json")
    assert (code, err) == (1, "")
    (row,) = (row for row in json.loads(out)["checks"] if row["check"] == "model")
    assert row["level"] == "fail"
    assert all(word in row["detail"] for word in DAMAGE["truncated"][1])


# --- requests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes whose model folder is removed as soon as they are ready."""
    folder = tmp_path_factory.mktemp("cluster")
    model = folder / "model"
    shutil.copytree(MODEL_DIR, model)
    with LocalCluster(
        2, model=str(model), threads=1, base_port=free_base_port(2), folder=folder / "nodes"
    ) as nodes:
        shutil.rmtree(model)
        yield nodes


def submit(cluster: LocalCluster, *arguments: str | bytes, stdin: bytes = b"") -> Any:
    """`submit prompt` to the second node."""
    return run("submit", "prompt", "--to", cluster.nodes[1].address, *arguments, stdin=stdin)


REQUESTS: dict[str, tuple[tuple[str | bytes, ...], bytes, str, tuple[str, ...]]] = {
    "empty": (("",), b"", "empty_prompt", ("no tokens", "give some text")),
    "empty stdin": (("-",), b"", "empty_prompt", ("no tokens", "give some text")),
    "too long": (("-",), b"fox " * 3000, "prompt_too_long", ("tokens", "2047", "shorten it")),
    "far too long": (
        ("-",),
        b"x" * (MAX_TEXT_CHARS + 9),
        "prompt_too_long",
        (f"at most {MAX_TEXT_CHARS} characters",),
    ),
    "binary stdin": (("-",), b"a\xff\xfeb", "invalid_request", ("not UTF-8", "character 2")),
    "binary text": ((b"\xff",), b"", "invalid_request", ("prompt is not UTF-8", "character 1")),
    "binary stop": (("a", "--stop", b"\xff"), b"", "invalid_request", ("stop string is not",)),
    "unknown id": (
        ("--token-ids", "1,1536"),
        b"",
        "invalid_request",
        ("token id 1536", "vocabulary of 1536"),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_impossible_request_is_told(cluster: LocalCluster, name: str) -> None:
    """Exit code 1: in one line, or with --json in the one object, with the error's code."""
    arguments, stdin, error, words = REQUESTS[name]
    check_error(submit(cluster, *arguments, stdin=stdin), 1, *words)
    code, out, err = submit(cluster, *arguments, "--json", stdin=stdin)
    assert (code, err) == (1, "")
    reply = json.loads(out)
    assert (reply["finish_reason"], reply["error"]["code"]) == ("error", error)
    assert (reply["text"], reply["token_ids"]) == ("", [])
    assert all(word in reply["error"]["message"] for word in words)


def test_nobody_there_is_told() -> None:
    """`status` and `submit` name the address and the command that starts a node."""
    to = ("--to", f"127.0.0.1:{free_base_port(1)}")
    for verb in (("status",), ("submit", "prompt", "hi")):
        check_error(run(*verb, *to), 1, f"no node answers at tcp://{to[1]}", "p2pinfer node start")
    for verb in (("status",), ("submit", "prompt", "hi")):
        code, out, err = run(*verb, "--json", *to)
        assert (code, err, json.loads(out)["error"]["code"]) == (1, "", "not_ready")


def test_extreme_sampling_values_that_are_allowed_harm_no_step(cluster: LocalCluster) -> None:
    """The coldest and hottest draws, with the strongest penalties, complete."""
    for temperature in ("1e-9", "1e9"):
        for penalty in ("1e-9", "1e9"):
            flags = ("--temperature", temperature, "--repetition-penalty", penalty)
            code, _, err = submit(cluster, "One day", "--max-tokens", "2", *flags, "--ignore-eos")
            assert (code, err) == (0, "")


def cancelled(cluster: LocalCluster) -> int:
    """How many requests of the second node were cancelled."""
    return len(facts(cluster.nodes[1], "request_finished", reason="cancelled"))


def test_a_reader_that_goes_away_ends_the_request(cluster: LocalCluster) -> None:
    """`submit ... | head -c 5`: exit code 1 without a word, and the slot is free."""
    before = cancelled(cluster)
    command = ["submit", "prompt", "One day", "--to", cluster.nodes[1].address]
    with subprocess.Popen(
        [sys.executable, "-m", "p2pinfer", *command, "--max-tokens", "1900", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(DEADLINE_S) == 1
    until(lambda: cancelled(cluster) > before, what="the free slot")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("verb", ["submit prompt hi --max-tokens 2", "status", "status --json"])
def test_a_full_disk_behind_stdout_is_told(cluster: LocalCluster, verb: str) -> None:
    """The system's reason in one line, and exit code 1."""
    command = [sys.executable, "-m", "p2pinfer", *verb.split(), "--to", cluster.nodes[1].address]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: the system refused: No space left on device\n"


def test_a_cluster_outlives_its_models_folder(cluster: LocalCluster) -> None:
    """The weights are in memory: requests go on, and a new node is told that the folder is gone."""
    code, out, err = submit(cluster, "Once upon a time", "--max-tokens", "4", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["token_ids"]) == 4
    folder = str(cluster.nodes[0].log.parent.parent / "model")
    result = run("node", "start", "--model", folder, "--join", cluster.nodes[0].address)
    check_error(result, 2, f"{folder}: no such model folder")
