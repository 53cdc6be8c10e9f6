"""Whole clusters over TCP against `transformers`: text in, text out; and what a node keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2pinfer.cluster import LocalCluster, free_base_port
from p2pinfer.core.scatter import SCATTER_ROWS
from p2pinfer.core.topology import weight_bytes
from p2pinfer.demo import MODEL_DIR
from p2pinfer.model.config import load_config, model_spec
from tests.faults.watching import all_protected, until
from tests.lockstep import Lockstep
from tests.random_models import LLAMA3_ROPE, write_random_model

NEW_TOKENS = 48
PROMPT = "Once upon a time, a little fox"
LONG_PROMPT = 20 * f"{PROMPT} went to the river to look for a friend. "
OVERHEAD_BYTES = 450 << 20
"""What a node may take beside its weights and its KV."""


def said_by_transformers(folder: Path, prompt: str) -> tuple[list[int], list[int], str]:
    """Prompt ids, greedy reply ids and the reply's text, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids, cache, reply = torch.tensor([prompt_ids]), None, []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            reply.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[reply[-1]]])
    return prompt_ids, reply, tokenizer.decode(reply, skip_special_tokens=True)


def submit(address: str, *arguments: str) -> dict[str, object]:
    """Run `p2pinfer submit prompt --json`."""
    command = [sys.executable, "-m", "p2pinfer", "submit", "prompt", "--to", address, "--json"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    reply: dict[str, object] = json.loads(done.stdout)
    return reply


@pytest.mark.parametrize(
    ("model", "nodes", "layout"),
    [
        ("demo", 3, "heads"),
        pytest.param("demo", 4, "2x2", marks=pytest.mark.long),
        pytest.param("random", 2, "heads", marks=pytest.mark.long),
        ("random", 2, "layers"),
    ],
)
def test_a_cluster_says_the_text_that_transformers_says(
    model: str, nodes: int, layout: str, tmp_path: Path
) -> None:
    """The command line's text and token ids are those of the unsplit model."""
    folder = MODEL_DIR
    if model == "random":
        folder = write_random_model(
            tmp_path / "model",
            seed=21,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_hidden_layers=4,
            rope=LLAMA3_ROPE,
            tie=True,
            files=3,
        )
    # The long one has its sums added by shares, where there are members enough.
    said = {prompt: said_by_transformers(folder, prompt) for prompt in (PROMPT, LONG_PROMPT)}
    assert len(said[LONG_PROMPT][0]) > SCATTER_ROWS
    with LocalCluster(
        nodes, model=str(folder), base_port=free_base_port(nodes), options={"layout": layout}
    ) as cluster:
        ends = (cluster.nodes[0], cluster.nodes[-1])
        for node, (prompt, (prompt_ids, ids, text)) in zip(ends, said.items(), strict=True):
            reply = submit(node.address, prompt, "--max-tokens", str(NEW_TOKENS), "--ignore-eos")
            assert reply["prompt_token_ids"] == prompt_ids
            assert reply["token_ids"] == ids
            assert reply["text"] == text
            assert reply["finish_reason"] == "length"


@pytest.mark.parametrize(
    "standby", ["hot", *(pytest.param(each, marks=pytest.mark.long) for each in (None, "warm"))]
)
def test_a_node_keeps_its_own_units_and_little_else(standby: str | None, tmp_path: Path) -> None:
    """Private memory stays within the weights of its units, its KV, and a fixed overhead; a hot
    standby's weights are private too, a warm one's are the system's page cache."""
    nodes = 2
    folder = write_random_model(
        tmp_path / "model",
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32_000,
    )
    config = load_config(folder)
    spec = model_spec(config, name="t", model_id="0" * 64)
    plan = Lockstep(folder, nodes=nodes)
    own, other = (weight_bytes(spec, each.holdings[0]) for each in plan.topologies)
    assert own > 450 << 20, "the whole model must not fit into the overhead"
    kv = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_dim * 4 * 384 // nodes
    options = {"replicas": 1, "standby": standby} if standby else {"replicas": 0}
    with LocalCluster(
        nodes, model=str(folder), base_port=free_base_port(nodes), options=options
    ) as cluster:
        submit(cluster.nodes[0].address, "x" * 300, "--max-tokens", "20", "--ignore-eos")
        if standby:
            until(lambda: all_protected(cluster), what="standbys with their weights")
        held = own + kv + (kv if standby else 0) + (other if standby == "hot" else 0)
        for node in cluster.nodes:
            family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
            private = sum(anonymous_bytes(process.pid) for process in family)
            assert private <= held + OVERHEAD_BYTES
            assert standby != "hot" or private > own + other


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, in bytes (proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon: not Linux?")
