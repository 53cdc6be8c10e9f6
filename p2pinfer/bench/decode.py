"""`p2pinfer bench decode`: how fast one reply is, and where a token's time goes.

The cluster and, beside it, `transformers` on the same cores answer the same prompt in turn, so that
ratios hold although the machine's speed drifts. The limit is the bytes of weights that one token
reads over the read bandwidth, which is measured before and after each run: what a run reached of it
is taken of these two readings.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from p2pinfer.bench.asking import Timing, ask, ask_together
from p2pinfer.bench.beside import beside, figures
from p2pinfer.bench.budget import percentages, token_budget
from p2pinfer.bench.inputs import (
    Inputs,
    Tell,
    check_positions,
    local_cluster,
    open_model,
    prompt_of,
    spread,
)
from p2pinfer.bench.reference import Reference
from p2pinfer.bench.settling import settle
from p2pinfer.client import Client
from p2pinfer.core.units import unit_count, unit_read_bytes
from p2pinfer.errors import UsageError
from p2pinfer.model.speed import read_bandwidth
from p2pinfer.types import ModelSpec, UnitKind


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """What to measure; `runs` counts after one warm-up each."""

    prompt_tokens: int = 128
    max_tokens: int = 64
    runs: int = 5
    concurrent: int = 0
    beside: int = 0
    reference: bool = True


def bytes_per_token(model: ModelSpec) -> int:
    """Bytes of weights, with their scales, that decoding one token reads, on all nodes together."""
    return sum(
        unit_read_bytes(model, kind, unit) * (1 if kind is UnitKind.VOCAB else model.num_layers)
        for kind in UnitKind
        for unit in range(unit_count(model, kind))
    )


def measure(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Everything that `bench decode --json` prints."""
    if settings.reference and importlib.util.find_spec("transformers") is None:
        raise UsageError(
            "the comparison needs transformers: pip install 'p2pinfer[bench]', or --no-reference"
        )
    folder, spec = open_model(settings, tell)
    check_positions(spec, settings.beside + 1, "--beside")
    reference = None
    if settings.reference:
        tell("transformers: loading")
        reference = Reference(folder, str(spec.dtype), _cpus(settings))
    try:
        return _measure_cluster(settings, spec, folder, reference, tell)
    finally:
        if reference is not None:
            reference.close()


def _cpus(settings: Settings) -> list[int]:
    """Those that the nodes compute on, as far as there are so many."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    return cpus[: settings.nodes * settings.threads]


def _measure_cluster(
    settings: Settings,
    spec: ModelSpec,
    folder: Path,
    reference: Reference | None,
    tell: Tell,
) -> dict[str, Any]:
    began = time.perf_counter()
    with local_cluster(settings, folder, tell, speed="measure") as cluster:
        load_s = time.perf_counter() - began
        settle(cluster, tell)
        addresses = [node.address for node in cluster.nodes]
        client = Client(addresses, retry_for=0)  # a reply that moved is no measurement
        replies, references, gb_s = _runs(settings, spec, client, reference, tell)
        tell("the budget of a token")
        prompt = prompt_of(spec.vocab_size, settings.prompt_tokens, 0)
        budget = token_budget(addresses, client, prompt, settings.max_tokens)
        together = []
        for number in range(settings.runs if settings.concurrent else 0):
            tell(f"{settings.concurrent} requests at once, run {number + 1}")
            prompts = [
                prompt_of(spec.vocab_size, settings.prompt_tokens, index)
                for index in range(settings.concurrent)
            ]
            together.append(ask_together(addresses, prompts, settings.max_tokens).tokens_per_s)
        disturbed = _beside(addresses, spec, settings, tell)
        rss = [_rss(node.pid) for node in cluster.nodes]
        predicted = client.plan()["prediction"]["tokens_per_s"]
    result: dict[str, Any] = {
        **settings.fields(),
        "quant": spec.quant,
        "wire_dtype": spec.wire_dtype,
        "dtype": str(spec.dtype),
        "prompt_tokens": settings.prompt_tokens,
        "max_tokens": settings.max_tokens,
        "runs": settings.runs,
        **(measured := _figures(replies, settings.prompt_tokens)),
        **limit_figures([t.decode_tokens_per_s for t in replies], gb_s, bytes_per_token(spec)),
        "predicted_tokens_per_s": predicted,
        "predicted_over_measured": (
            round(predicted / measured["decode_tokens_per_s"], 4) if predicted else None
        ),
        "per_token": budget.decode,
        "per_token_percent": percentages(budget.decode),
        "per_token_by_node": budget.decode_by_node,
        "per_prompt": budget.prefill,
        "per_prompt_percent": percentages(budget.prefill),
        "load_s": round(load_s, 2),
        "rss_bytes": rss,
        "reference": {},
    }
    if references:
        result["reference"] = {"transformers": _compared(replies, references, settings)}
    if together:
        alone = result["decode_tokens_per_s"]
        result["together"] = {
            "requests": settings.concurrent,
            **spread("tokens_per_s", together),
            **spread("times_one", [t / alone for t in together]),
        }
    if disturbed:
        result["beside"] = figures(settings.beside, disturbed)
    return result


def _beside(
    addresses: Sequence[str], spec: ModelSpec, settings: Settings, tell: Tell
) -> list[dict[str, float]]:
    """Each run of a reply that decodes while a long prompt is read; none where it is left out."""
    rows = []
    for number in range(settings.runs if settings.beside else 0):
        tell(f"a prompt of {settings.beside} tokens beside a reply, run {number + 1}")
        rows.append(
            beside(
                addresses,
                spec.vocab_size,
                running=settings.prompt_tokens,
                prompt=settings.beside,
                seed=2 * number,
            )
        )
    return rows


def _runs(
    settings: Settings, spec: ModelSpec, client: Client, reference: Reference | None, tell: Tell
) -> tuple[list[Timing], list[dict[str, float]], list[float]]:
    """Cluster and reference in turn, the first of each as a warm-up; and the read bandwidth in
    GB/s, before the first run and after each."""
    replies, references, gb_s = [], [], []
    for number in range(settings.runs + 1):
        tell(f"run {number} of {settings.runs}" if number else "warming up")
        prompt = prompt_of(spec.vocab_size, settings.prompt_tokens, number)
        timing = ask(client, prompt, settings.max_tokens)
        if number:
            replies.append(timing)
        if reference is not None:
            answer = reference.run(prompt, settings.max_tokens)
            if number:
                references.append(answer)
        gb_s.append(read_bandwidth(_cpus(settings)))
    return replies, references, gb_s


def limit_figures(
    tokens_per_s: Sequence[float], gb_s: Sequence[float], token_bytes: int
) -> dict[str, float]:
    """The limit of decoding, and what each run reached of it: `gb_s` are readings of the bandwidth
    before the first run and after each, `token_bytes` are read for a token."""
    limits = [reading * 1e9 / token_bytes for reading in gb_s]
    around = [(before + after) / 2 for before, after in pairwise(limits)]
    reached = [speed / limit for speed, limit in zip(tokens_per_s, around, strict=True)]
    return {
        **spread("read_bandwidth_gb_s", gb_s, 2),
        **spread("limit_tokens_per_s", limits, 3),
        **spread("fraction_of_limit", reached),
    }


def _figures(replies: Sequence[Timing], prompt_tokens: int) -> dict[str, float]:
    return {
        **spread("ttft_s", [t.ttft_s for t in replies]),
        **spread("prefill_tokens_per_s", [prompt_tokens / t.ttft_s for t in replies], 2),
        **spread("decode_tokens_per_s", [t.decode_tokens_per_s for t in replies], 3),
    }


def _compared(
    replies: Sequence[Timing], references: Sequence[dict[str, float]], settings: Settings
) -> dict[str, Any]:
    """The reference's own figures, and ours over its, run by run."""
    pairs = list(zip(replies, references, strict=True))
    return {
        "threads": settings.nodes * settings.threads,
        **spread("ttft_s", [r["ttft_s"] for r in references]),
        **spread("prefill_tokens_per_s", [r["prefill_tokens_per_s"] for r in references], 2),
        **spread("decode_tokens_per_s", [r["decode_tokens_per_s"] for r in references], 3),
        **spread(
            "decode_ratio", [t.decode_tokens_per_s / r["decode_tokens_per_s"] for t, r in pairs]
        ),
        **spread("prefill_ratio", [r["ttft_s"] / t.ttft_s for t, r in pairs]),
    }


def _rss(pid: int) -> int:
    """Resident bytes of a node's processes, what is mapped from the model's files included."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(int(p.memory_info().rss) for p in family)
