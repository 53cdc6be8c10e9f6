"""`p2pinfer bench decode`: how fast one reply is, and where a token's time goes.

The cluster and, beside it, `transformers` on the same cores answer the same prompt in turn, so that
ratios hold although the machine's speed drifts. The limit is the bytes of weights that one token
reads over the read bandwidth measured before and after.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from p2pinfer.bench.beside import beside, figures
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
from p2pinfer.client import Client
from p2pinfer.core.units import unit_count, unit_read_bytes
from p2pinfer.errors import ClusterError, UsageError
from p2pinfer.model.speed import read_bandwidth
from p2pinfer.types import ModelSpec, SamplingParams, UnitKind
from p2pinfer.wire.messages import Chunk

BANDWIDTH_READS = 2
"""Before the runs, and as many after."""

COUNTERS_S = 10.0
"""How long nodes may take to agree on how many steps are over."""

REPORTED_S = 0.5
"""A worker reports its counters several times in that time."""


@dataclass(frozen=True, kw_only=True)
class Settings(Inputs):
    """What to measure; `runs` counts after one warm-up each."""

    prompt_tokens: int = 128
    max_tokens: int = 64
    runs: int = 5
    concurrent: int = 0
    beside: int = 0
    reference: bool = True


@dataclass
class Timing:
    """One reply as its client saw it, in seconds since the submission."""

    arrivals: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """To the first token."""
        return self.arrivals[0]

    @property
    def decode_tokens_per_s(self) -> float:
        """After the first token."""
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])


def ask(client: Client, prompt: Sequence[int], tokens: int) -> Timing:
    """One greedy reply of exactly `tokens` tokens."""
    timing = Timing()
    began = time.perf_counter()
    for event in client.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)):
        if isinstance(event, Chunk):
            now = time.perf_counter() - began
            timing.arrivals += [now] * len(event.tokens)
    if len(timing.arrivals) != tokens:
        raise ClusterError("internal", f"{len(timing.arrivals)} tokens came, {tokens} were asked")
    return timing


def ask_together(addresses: Sequence[str], vocab: int, settings: Settings) -> float:
    """Tokens per second of `settings.concurrent` requests at once, from the moment all decode."""
    timings: list[Timing | BaseException] = []

    def one(index: int) -> None:
        try:
            client = Client([addresses[index % len(addresses)]], retry_for=0)
            prompt = prompt_of(vocab, settings.prompt_tokens, index)
            timings.append(ask(client, prompt, settings.max_tokens))
        except BaseException as error:  # whatever it is, the caller's thread raises it
            timings.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(settings.concurrent)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    for timing in timings:
        if isinstance(timing, BaseException):
            raise timing
    good = [t for t in timings if isinstance(t, Timing)]
    together = max(t.arrivals[0] for t in good)
    last = min(max(t.arrivals[-1] for t in good), elapsed)
    after = sum(sum(1 for a in t.arrivals if a > together) for t in good)
    return after / (last - together)


def counters(addresses: Sequence[str]) -> list[dict[str, Any]]:
    """Each node's counters, once all have done the same steps and none does more."""
    deadline = time.monotonic() + COUNTERS_S
    before: list[dict[str, Any]] = []
    while True:
        found = [Client([address]).status()["counters"] for address in addresses]
        steps = {row["steps"] for row in found}
        if len(steps) == 1 and [row["steps"] for row in before] == [row["steps"] for row in found]:
            return found
        if time.monotonic() > deadline:
            raise ClusterError("internal", f"nodes report different steps: {sorted(steps)}")
        before = found
        time.sleep(REPORTED_S)


def token_budget(
    addresses: Sequence[str], client: Client, prompt: Sequence[int], tokens: int
) -> list[dict[str, float]]:
    """Per node, where the time of one decoded token went: figures per token.

    The prefill's share is taken out by the counters of a reply of one token.
    """
    start = counters(addresses)
    ask(client, prompt, 1)
    first = counters(addresses)
    timing = ask(client, prompt, tokens + 1)
    last = counters(addresses)
    wall = 1000 * (timing.arrivals[-1] - timing.arrivals[0]) / tokens
    rows = []
    for a, b, c in zip(start, first, last, strict=True):

        def per_token(name: str) -> float:
            return float((c[name] - b[name]) - (b[name] - a[name])) / tokens  # noqa: B023

        parts = {f"{n}_ms": 1000 * per_token(f"{n}_s") for n in ("compute", "exchange", "python")}
        # What is neither is waiting: for peers within a step, or for the leader's next step.
        parts["wait_ms"] = max(0.0, wall - sum(parts.values()))
        rows.append(
            {
                **{name: round(value, 4) for name, value in parts.items()},
                "messages": round(per_token("messages_sent"), 3),
                "bytes": round(per_token("bytes_sent"), 1),
            }
        )
    return rows


def bytes_per_token(model: ModelSpec) -> int:
    """Bytes of weights, with their scales, that decoding one token reads, on all nodes together."""
    return sum(
        unit_read_bytes(model, kind, unit) * (1 if kind is UnitKind.VOCAB else model.num_layers)
        for kind in UnitKind
        for unit in range(unit_count(model, kind))
    )


def measure(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Everything that `bench decode --json` prints."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    used = cpus[: settings.nodes * settings.threads]
    if settings.reference and importlib.util.find_spec("transformers") is None:
        raise UsageError(
            "the comparison needs transformers: pip install 'p2pinfer[bench]', or --no-reference"
        )
    folder, spec = open_model(settings, tell)
    check_positions(spec, settings.beside + 1, "--beside")
    tell("read bandwidth")
    bandwidth = [read_bandwidth(used) for _ in range(BANDWIDTH_READS)]
    reference = None
    if settings.reference:
        tell("transformers: loading")
        reference = Reference(folder, str(spec.dtype), used)
    try:
        result = _measure_cluster(settings, spec, folder, reference, tell)
    finally:
        if reference is not None:
            reference.close()
    bandwidth += [read_bandwidth(used) for _ in range(BANDWIDTH_READS)]
    limits = [gb_s * 1e9 / bytes_per_token(spec) for gb_s in bandwidth]
    speed = result["decode_tokens_per_s"]
    result |= spread("read_bandwidth_gb_s", bandwidth, 2)
    result |= spread("limit_tokens_per_s", limits, 3)
    result |= {"fraction_of_limit": round(speed / result["limit_tokens_per_s"], 4)}
    return result


def _measure_cluster(
    settings: Settings,
    spec: ModelSpec,
    folder: Path,
    reference: Reference | None,
    tell: Tell,
) -> dict[str, Any]:
    began = time.perf_counter()
    with local_cluster(settings, folder, tell) as cluster:
        load_s = time.perf_counter() - began
        addresses = [node.address for node in cluster.nodes]
        client = Client(addresses, retry_for=0)  # a reply that moved is no measurement
        replies, references = _runs(settings, spec, client, reference, tell)
        tell("the budget of a token")
        prompt = prompt_of(spec.vocab_size, settings.prompt_tokens, 0)
        budget = token_budget(addresses, client, prompt, settings.max_tokens)
        together = []
        for number in range(settings.runs if settings.concurrent else 0):
            tell(f"{settings.concurrent} requests at once, run {number + 1}")
            together.append(ask_together(addresses, spec.vocab_size, settings))
        disturbed = _beside(addresses, spec, settings, tell)
        rss = [_rss(node.pid) for node in cluster.nodes]
    result: dict[str, Any] = {
        **settings.fields(),
        "quant": spec.quant,
        "dtype": str(spec.dtype),
        "prompt_tokens": settings.prompt_tokens,
        "max_tokens": settings.max_tokens,
        "runs": settings.runs,
        **_figures(replies, settings.prompt_tokens),
        "per_token": {
            name: round(statistics.mean(row[name] for row in budget), 4) for name in budget[0]
        },
        "per_token_by_node": budget,
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
) -> tuple[list[Timing], list[dict[str, float]]]:
    """Cluster and reference in turn; the first of each is a warm-up."""
    replies, references = [], []
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
    return replies, references


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
