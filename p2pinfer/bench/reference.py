"""The unsplit model by `transformers`, in a process of its own that answers one run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from p2pinfer.errors import P2pinferError


class Reference:
    """`transformers` on `cpus`, loaded once and asked between the cluster's runs."""

    def __init__(self, folder: Path, dtype: str, cpus: Sequence[int]) -> None:
        command = [sys.executable, "-m", "p2pinfer.bench.reference", "--model", str(folder)]
        command += ["--dtype", dtype, "--cpus", ",".join(map(str, cpus))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cpus)), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def run(self, prompt: Sequence[int], new_tokens: int) -> dict[str, float]:
        """`ttft_s`, `prefill_tokens_per_s` and `decode_tokens_per_s` of one greedy reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "new": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise P2pinferError(f"transformers ended early (exit code {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--dtype", required=True)
@click.option("--cpus", required=True)
def main(model: Path, dtype: str, cpus: str) -> None:
    """Answer runs asked for as JSON lines on stdin."""
    import torch
    import transformers

    numbers = {int(cpu) for cpu in cpus.split(",")}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, numbers)
    torch.set_num_threads(len(numbers))
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    llama = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    llama.train(False)
    print(json.dumps({"ready": True}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(_generate(llama, asked["prompt"], asked["new"])), flush=True)


def _generate(llama: Any, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """A plain greedy loop: what `generate` does, without its per-token bookkeeping."""
    import torch

    began = time.perf_counter()
    out = llama(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    token = out.logits[0, -1].argmax()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        out = llama(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[0, -1].argmax()
    last = time.perf_counter()
    return {
        "ttft_s": first - began,
        "prefill_tokens_per_s": len(prompt) / (first - began),
        "decode_tokens_per_s": (new_tokens - 1) / (last - first),
    }


if __name__ == "__main__":
    main()
