"""`submit prompt` goes on by itself when the node that it asked is killed or stopped.

Whatever happens, stdout has exactly the reply that it would have had, and what happened is one line
of stderr.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode, free_base_port
from tests.faults.watching import (
    LEADER_FIRST,
    Diary,
    all_own,
    all_vote,
    kill,
    mend,
    others,
    pick,
    until,
)

pytestmark = pytest.mark.xdist_group("clusters")

STORY = "Once upon a time"
LONG_PROMPT = "The little fox ran into the wood. " * 120
GREEDY = ("--max-tokens", "120", "--ignore-eos")
SEEDED = (*GREEDY, "--temperature", "0.9", "--top-k", "40", "--seed", "7")
RETRY_S = 3.0
SLACK_S = 5.0
"""For a process to end, where many run."""


class Asking:
    """A running `p2pinfer submit prompt`, with what it has written so far."""

    def __init__(self, node: LocalNode, *options: str, prompt: str = STORY) -> None:
        self.prompt, self.options = prompt, options
        command = ["-m", "p2pinfer", "submit", "prompt", prompt, "--to", node.address, *options]
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._written = {"out": b"", "err": b""}
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(name, pipe), daemon=True)
            for name, pipe in (("out", self.process.stdout), ("err", self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, pipe: IO[bytes]) -> None:
        while part := os.read(pipe.fileno(), 65_536):
            self._written[name] += part

    @property
    def out(self) -> str:
        """Stdout so far; a character that is not whole yet is left out."""
        return self._written["out"].decode(errors="ignore")

    @property
    def err(self) -> str:
        """Stderr so far."""
        return self._written["err"].decode()

    def begun(self, characters: int = 20) -> Asking:
        """Wait until so much of the reply is there; returns itself."""
        until(lambda: len(self.out) >= characters or self.process.poll(), what="the reply")
        return self

    def reply(self) -> str:
        """Wait for the end, which is a good one; returns what stdout has."""
        assert self.end() == 0, (self.err, self.out)
        return self.out

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes, which `trio` mends between two tests."""
    folder = tmp_path_factory.mktemp("returns")
    with LocalCluster(3, threads=1, base_port=free_base_port(3), folder=folder) as cluster:
        yield cluster


@pytest.fixture
def trio(nodes: LocalCluster) -> LocalCluster:
    """Three nodes, all there, with a vote and units."""
    mend(nodes)
    until(lambda: all_vote(nodes, 3) and all_own(nodes), what="the cluster with all three")
    return nodes


@pytest.fixture(scope="module")
def undisturbed(nodes: LocalCluster) -> Callable[..., str]:
    """What a command line prints when nothing happens, by its prompt and options."""
    known: dict[tuple[str, ...], str] = {}

    def said(*options: str, prompt: str = STORY) -> str:
        if (prompt, *options) not in known:
            asking = Asking(nodes.nodes[0], *options, prompt=prompt)
            known[prompt, *options] = asking.reply()
        return known[prompt, *options]

    return said


def moves(asking: Asking) -> list[tuple[str, str]]:
    """Who was gone, and who went on with the reply, as stderr says it; one line, where no node is
    so slow that it seems gone."""
    return re.findall(r"^(\S+) is gone; going on through ([^\s,]+)", asking.err, re.MULTILINE)


@pytest.mark.parametrize("kind", LEADER_FIRST)
@pytest.mark.parametrize(
    "moment", [pytest.param("prefill", marks=pytest.mark.long), "decode", "end"]
)
def test_the_node_that_serves_a_reply_is_killed(
    trio: LocalCluster, undisturbed: Callable[..., str], moment: str, kind: str
) -> None:
    """Greedy or seeded, in text or JSON, the reply is the one that it would have been."""
    said = partial(undisturbed, prompt=LONG_PROMPT if moment == "prefill" else STORY)
    text, seeded = said(*GREEDY), json.loads(said(*SEEDED, "--json"))
    victim = pick(trio, kind)
    diary = Diary(victim)
    ask = partial(Asking, victim, prompt=LONG_PROMPT if moment == "prefill" else STORY)
    one, two = ask(*GREEDY), ask(*SEEDED, "--json")
    until(lambda: len(diary.facts("request_accepted")) == 2, what="both requests")
    # What it answers now leaves it after its word to both of who the other nodes are.
    Client([victim.address]).status()
    if moment != "prefill":
        one.begun(20 if moment == "decode" else len(text) - 8)
    kill(victim)
    assert one.reply() == text
    assert moves(one)[0][0] == victim.name
    assert moves(one)[-1][1] in {node.name for node in others(trio, victim)}
    reply = json.loads(two.reply())
    for field in ("text", "token_ids", "prompt_token_ids", "finish_reason", "error"):
        assert reply[field] == seeded[field]
    if moves(two):
        assert (moves(two)[0][0], moves(two)[-1][1]) == (victim.name, reply["served_by"])
    else:  # it was complete before
        assert (moment, reply["served_by"]) == ("end", victim.name)


def test_a_stop_string_and_its_node_come_to_an_end_together(
    trio: LocalCluster, undisturbed: Callable[..., str]
) -> None:
    """The text ends before a stop string that began at one node and ended at another."""
    text = undisturbed(*GREEDY)
    stop = text[60:75]
    victim = pick(trio, "follower")
    asking = Asking(victim, *GREEDY, "--stop", stop).begun(text.index(stop) - 10)
    kill(victim)
    assert asking.reply() == text[: text.index(stop)] + "\n"


def test_a_node_that_says_nothing_is_left(
    trio: LocalCluster, undisturbed: Callable[..., str]
) -> None:
    """It is stopped, not ended: no connection breaks, and the reply goes on elsewhere."""
    text = undisturbed(*GREEDY)
    victim = pick(trio, "follower")
    asking = Asking(victim, *GREEDY).begun()
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        assert asking.reply() == text
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    assert moves(asking)[0][0] == victim.name


def test_all_nodes_but_one_are_killed_in_turn(tmp_path: Path) -> None:
    """Each time the one that serves the reply, the leader too; it is named only one address."""
    options = ("--max-tokens", "160", "--ignore-eos")
    with LocalCluster(
        3,
        threads=1,
        base_port=free_base_port(3),
        folder=tmp_path,
        options={"quorum": "last-man"},
    ) as cluster:
        text = Asking(cluster.nodes[0], *options).reply()
        asking = Asking(cluster.nodes[0], *options).begun()
        serving = cluster.nodes[0]
        for _ in range(2):
            known = len(moves(asking))
            kill(serving)
            until(lambda known=known: len(moves(asking)) > known, what="its going on")
            through = moves(asking)[-1][1]
            serving = next(node for node in cluster.nodes if node.name == through)
            asking.begun(len(asking.out) + 20)
        assert asking.reply() == text


def test_with_no_node_left_what_was_printed_stays(
    trio: LocalCluster, undisturbed: Callable[..., str]
) -> None:
    """The error comes in the time that was given; exit code 1."""
    text = undisturbed(*GREEDY)
    asking = Asking(trio.nodes[1], *GREEDY, "--retry-for", str(RETRY_S)).begun()
    kill(*trio.nodes)
    killed = time.monotonic()
    assert asking.end() == 1
    assert time.monotonic() - killed < RETRY_S + SLACK_S
    assert text.startswith(asking.out.removesuffix("\n"))
    assert len(asking.out) >= 20
    *_, notice, error = asking.err.splitlines()
    assert notice.endswith("is gone; asking the other nodes for 3 s ...")
    assert error.startswith("error (node_lost): the connection to the node at tcp://")
    assert "no node went on with it within 3 s" in error
    assert all(node.name in error for node in trio.nodes)


def test_ctrl_c_ends_the_search_at_once(trio: LocalCluster) -> None:
    """While it asks for nodes that are gone."""
    asking = Asking(trio.nodes[1], *GREEDY).begun()
    kill(*trio.nodes)
    until(lambda: "asking the other nodes" in asking.err, what="the search")
    pressed = time.monotonic()
    asking.process.send_signal(signal.SIGINT)
    assert asking.end() == 130, asking.err
    assert time.monotonic() - pressed < SLACK_S
    assert re.search(r"^cancelled after \d+ tokens$", asking.err, re.MULTILINE)


def test_a_cluster_that_comes_back_goes_on_with_it(
    trio: LocalCluster, undisturbed: Callable[..., str]
) -> None:
    """All nodes lost what they knew of the reply: its client brings it back."""
    text = undisturbed(*GREEDY)
    asking = Asking(trio.nodes[0], *GREEDY, "--retry-for", "60").begun()
    kill(*trio.nodes)
    for index in range(3):
        trio.nodes[index] = trio.start_node(index, join=())
    assert asking.reply() == text
