"""A cluster of two real processes: what it serves, whom it refuses, and what does it no harm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq

from p2pinfer.client import Client, new_request_id
from p2pinfer.cluster import LocalCluster, free_base_port
from p2pinfer.demo import MODEL_DIR
from p2pinfer.errors import ClusterError
from p2pinfer.limits import MAX_CONTROL_BYTES
from p2pinfer.types import Member, SamplingParams
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import Accepted, Chunk, Hello, Refused
from tests.faults.watching import facts, until
from tests.processes.command_line import DEADLINE_S, family, finish, node_flags, start_cli

pytestmark = pytest.mark.xdist_group("clusters")

PROMPT = "Once upon a time"
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
"""A reply of several seconds, to break off."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes that several tests ask; each leaves them as they were."""
    folder = tmp_path_factory.mktemp("pair")
    with LocalCluster(2, threads=1, base_port=free_base_port(2), folder=folder) as cluster:
        yield cluster


# --- serving --------------------------------------------------------------------------------------


def test_any_node_takes_a_prompt_and_all_give_the_same_reply(pair: LocalCluster) -> None:
    """Through the leader and through a follower, the reply is the same, text and tokens."""
    params = SamplingParams(max_tokens=24)
    replies = [Client([node.address]).submit_json_object(PROMPT, params) for node in pair.nodes]
    assert [reply["served_by"] for reply in replies] == ["node1", "node2"]
    first, second = replies
    assert first["error"] is None
    assert first["finish_reason"] in ("stop", "length")
    assert first["text"]
    assert 0 < len(first["token_ids"]) <= 24
    for key in ("text", "token_ids", "prompt_token_ids", "finish_reason"):
        assert first[key] == second[key]
    assert first["ttft_s"] > 0
    assert first["tokens_per_s"] > 0


def test_status_names_the_members_and_what_they_own(pair: LocalCluster) -> None:
    """Both nodes tell of a ready cluster, of one leader, and of units that are all owned once."""
    leaders = set()
    for index in range(2):
        status = pair.status(index)
        assert status["ready"]
        leaders.add(status["leader"])
        assert [member["name"] for member in status["members"]] == ["node1", "node2"]
        heads = [unit for member in status["members"] for unit in member["head_units"]]
        assert sorted(heads) == list(range(status["model"]["num_units"]["head"]))
    assert len(leaders & {"node1", "node2"}) == len(leaders) == 1


def test_twenty_clients_at_once_get_what_each_would_get_alone(pair: LocalCluster) -> None:
    """Requests served together, through different nodes, equal the same requests alone."""
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=11)
    prompts = [f"{PROMPT}, {number} little foxes" for number in range(20)]

    def ask(number: int) -> list[int]:
        node = pair.nodes[number % 2]
        reply = Client([node.address]).submit_json_object(prompts[number], params)
        assert reply["error"] is None, reply
        ids: list[int] = reply["token_ids"]
        return ids

    with ThreadPoolExecutor(max_workers=20) as clients:
        together = list(clients.map(ask, range(20)))
    assert together == [ask(number) for number in range(20)]


def test_a_stop_string_ends_the_reply_before_it(pair: LocalCluster) -> None:
    """The text is what comes before the stop string, and the reason is stop."""
    client = Client([pair.nodes[1].address])
    params = SamplingParams(max_tokens=40)
    whole = client.submit_json_object(PROMPT, params)["text"]
    word = whole.split()[6]
    stopped = client.submit_json_object(PROMPT, SamplingParams(max_tokens=40, stop=(word,)))
    assert stopped["text"] == whole[: whole.index(word)]
    assert stopped["finish_reason"] == "stop"


def test_token_ids_are_a_prompt_too(pair: LocalCluster) -> None:
    """The ids that a text becomes give the same reply as the text."""
    client = Client([pair.nodes[0].address])
    params = SamplingParams(max_tokens=8)
    by_text = client.submit_json_object(PROMPT, params)
    by_ids = client.submit_json_object(by_text["prompt_token_ids"], params)
    assert by_ids["token_ids"] == by_text["token_ids"]


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "empty_prompt"),
        ("fox " * 3000, "prompt_too_long"),
        ([5, 1_000_000], "invalid_request"),
    ],
)
def test_an_impossible_prompt_is_refused_by_name(
    pair: LocalCluster, prompt: str | list[int], code: str
) -> None:
    """Empty, longer than the context, or of unknown tokens: each has its error code."""
    with pytest.raises(ClusterError) as error:
        list(Client([pair.nodes[1].address]).submit(prompt, SamplingParams()))
    assert error.value.code == code
    assert not error.value.retryable


def test_a_client_that_breaks_off_frees_its_slot(pair: LocalCluster) -> None:
    """Ending the iteration cancels the request on the leader."""
    request_id = new_request_id()
    events = Client([pair.nodes[1].address]).submit(PROMPT, LONG, request_id=request_id)
    assert isinstance(next(events), Accepted)
    assert isinstance(next(events), Chunk)
    events.close()  # type: ignore[attr-defined]
    label = format(request_id, "016x")
    until(lambda: facts(pair.nodes[1], "request_finished", request_id=label, reason="cancelled"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_ends_early_frees_its_slot(
    pair: LocalCluster, number: signal.Signals
) -> None:
    """Killed or by Ctrl-C, its request is cancelled: the one is found out, the other says so."""
    before = len(facts(pair.nodes[1], "request_finished", reason="cancelled"))
    flags = ("--max-tokens", "1500", "--ignore-eos", "--to", pair.nodes[1].address)
    with start_cli("submit", "prompt", PROMPT, *flags) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(number)
        assert finish(process)[0] == (130 if number is signal.SIGINT else -signal.SIGKILL)
    until(lambda: len(facts(pair.nodes[1], "request_finished", reason="cancelled")) > before)


def test_another_client_may_cancel_by_the_request_id(pair: LocalCluster) -> None:
    """Who knows the id cancels; the one who waits is told."""
    request_id = new_request_id()
    client = Client([pair.nodes[1].address])
    events = client.submit(PROMPT, LONG, request_id=request_id)
    assert isinstance(next(events), Accepted)
    client.cancel(request_id)
    with pytest.raises(ClusterError) as error:
        list(events)
    assert error.value.code == "cancelled"


def test_nodes_live_on_after_bytes_that_are_no_message(pair: LocalCluster) -> None:
    """Random bytes, an oversize frame and a forged length are dropped, counted and told."""
    node = pair.nodes[1]
    port = int(node.address.rsplit(":", 1)[1])
    context = zmq.Context()
    for target in (port, port + 1, port + 2):
        with socket.create_connection(("127.0.0.1", target)) as stranger:
            stranger.sendall(os.urandom(4096))
        with context.socket(zmq.DEALER) as hostile:
            hostile.setsockopt(zmq.LINGER, 1000)
            hostile.connect(f"tcp://127.0.0.1:{target}")
            hostile.send(os.urandom(64))
            hostile.send(b"P2PI\x01\x00\x20\x00\xff\xff\xff\x7f\x00\x00\x00\x00" + bytes(64))
            hostile.send(bytes(MAX_CONTROL_BYTES + 1))
    context.term()
    until(lambda: facts(node, "frame_undecodable"))
    reply = Client([node.address]).submit_json_object(PROMPT, SamplingParams(max_tokens=4))
    assert reply["error"] is None


def test_the_control_process_holds_no_tensors(pair: LocalCluster) -> None:
    """It never imports torch, so it stays small; the worker is its only child."""
    process, *children = family(pair.nodes[1].pid)
    assert not any("libtorch" in region.path for region in process.memory_maps())
    assert process.memory_info().rss < 200 << 20
    assert len(children) == 1


# --- refusing -------------------------------------------------------------------------------------


def test_a_node_with_another_model_is_refused_on_both_sides(
    pair: LocalCluster, tmp_path: Path
) -> None:
    """The joiner exits with the reason, the member logs it; the cluster serves on."""
    other = tmp_path / "other"
    shutil.copytree(MODEL_DIR, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    joiner = start_cli(
        *node_flags(tmp_path, free_base_port(1)),
        *("--model", str(other), "--join", pair.nodes[1].address),
    )
    code, _, err = finish(joiner)
    assert code == 1
    assert "this cluster serves model demo" in err.splitlines()[-1]
    assert '"by_us": false' in err
    assert facts(pair.nodes[1], "peer_refused", code="wrong_model", by_us=True)


def test_a_node_with_another_number_format_is_refused(pair: LocalCluster, tmp_path: Path) -> None:
    """The message names both formats."""
    joiner = start_cli(
        *node_flags(tmp_path, free_base_port(1)),
        *("--dtype", "bfloat16", "--join", pair.nodes[0].address),
    )
    code, _, err = finish(joiner)
    assert code == 1
    assert "as float32" in err.splitlines()[-1]
    assert "bfloat16" in err.splitlines()[-1]


def test_a_peer_of_another_protocol_version_is_refused(pair: LocalCluster) -> None:
    """The answer names the versions of both sides; the member logs the refusal."""
    stranger = Member(
        node_id="f" * 16, boot_id="e" * 16, name="stranger", address="tcp://127.0.0.1:9"
    )
    hello = Hello(versions=(9,), member=stranger, model_id="", dtype="", quant="")
    context = zmq.Context()
    with context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(pair.nodes[0].address)
        dealer.send(encode(hello))
        assert dealer.poll(int(DEADLINE_S * 1000))
        refused = decode(dealer.recv())
    context.term()
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retryable) == ("wrong_version", False)
    assert "protocol version 1, stranger 9" in refused.message
    until(lambda: facts(pair.nodes[0], "peer_refused", code="wrong_version", by_us=True))


def test_a_megabyte_of_text_does_not_hold_up_heartbeats(pair: LocalCluster) -> None:
    """It is tokenised beside the loop; no peer is suspected meanwhile."""
    before = [len(facts(node, "peer_dead")) for node in pair.nodes]
    with pytest.raises(ClusterError, match="tokens") as error:
        list(Client([pair.nodes[1].address]).submit("fox " * 250_000, SamplingParams()))
    assert error.value.code == "prompt_too_long"
    assert [len(facts(node, "peer_dead")) for node in pair.nodes] == before
    assert pair.status(0)["ready"]


def test_a_name_belongs_to_one_node(pair: LocalCluster, tmp_path: Path) -> None:
    """A second node1 is told to take another name."""
    flags = node_flags(tmp_path, free_base_port(1), "node1")
    code, _, err = finish(start_cli(*flags, "--join", pair.nodes[1].address))
    assert code == 1
    assert "--name" in err.splitlines()[-1]


# --- asking ---------------------------------------------------------------------------------------


def test_doctor_knows_a_node_of_ours(pair: LocalCluster) -> None:
    """Ports that a node holds are a warning with its name, and the exit code is 0."""
    address = pair.nodes[1].address.removeprefix("tcp://")
    code, out, _ = finish(start_cli("doctor", "--listen", address, "--json"))
    row = next(row for row in json.loads(out)["checks"] if row["check"] == "ports")
    assert (code, row["level"]) == (0, "warn")
    assert row["detail"].endswith(" in use by p2pinfer node node2")
