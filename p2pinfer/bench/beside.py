"""What a running reply notices of a long prompt that is read beside it: `bench decode --beside`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from p2pinfer.bench.following import Following, greedy
from p2pinfer.bench.inputs import prompt_of, spread
from p2pinfer.client import Client
from p2pinfer.errors import ClusterError
from p2pinfer.wire.messages import Chunk

SETTLED = 8
"""Tokens of the running reply that do not count: its prompt was read just before."""

UNDISTURBED = 32
"""Tokens of it that are timed before the long prompt comes."""


def beside(
    addresses: Sequence[str], vocab: int, *, running: int, prompt: int, seed: int
) -> dict[str, float]:
    """One reply to a prompt of `running` tokens decodes; one of `prompt` tokens is read meanwhile.

    Returns the median and the longest time between two tokens of the running reply before and
    while it is read, in milliseconds, and the prompt's tokens per second until its first token.
    Raises `ClusterError` if the running reply ends before.
    """
    most = SETTLED + UNDISTURBED + prompt  # a step beside it reads at least one token
    reply = Following(addresses, prompt_of(vocab, running, seed), greedy(most))
    try:
        reply.await_tokens(SETTLED + UNDISTURBED)
        began = time.time()
        _read(Client(addresses, retry_for=0), prompt_of(vocab, prompt, seed + 1))
        until = time.time()
        if reply.over:
            raise ClusterError(
                "internal", "the running reply ended before the prompt beside it was read"
            )
    finally:
        reply.stop()
    gaps = list(pairwise(reply.times[SETTLED:]))
    alone = [1000 * (b - a) for a, b in gaps if b <= began]
    while_read = [1000 * (b - a) for a, b in gaps if b > began and a < until]
    usual = statistics.median(alone)
    return {
        "before_ms": usual,
        "before_longest_ms": max(alone),
        "while_ms": statistics.median(while_read),
        "while_longest_ms": max(while_read),
        "ratio": statistics.median(while_read) / usual,
        "prefill_tokens_per_s": prompt / (until - began),
    }


def _read(client: Client, prompt: Sequence[int]) -> None:
    """Return when the first token of the reply to `prompt` is there: all of it."""
    for event in client.submit(prompt, greedy(1)):
        if isinstance(event, Chunk) and event.tokens:
            return
    raise ClusterError("internal", "the prompt was read, and no token came")


def figures(prompt: int, rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What several runs of `beside` say together."""
    result: dict[str, Any] = {"prompt_tokens": prompt}
    for name in rows[0]:
        result |= spread(name, [row[name] for row in rows], 3)
    return result


def lines(row: dict[str, Any]) -> list[str]:
    """The same for people."""

    def figure(name: str) -> str:
        return f"{row[name]:.4g} ({row[name + '_min']:.4g} to {row[name + '_max']:.4g})"

    return [
        f"  beside a prompt of {row['prompt_tokens']} tokens, read at "
        f"{figure('prefill_tokens_per_s')} tokens/s, the time between two tokens of a reply:",
        f"    before {figure('before_ms')} ms, longest {figure('before_longest_ms')}",
        f"    while  {figure('while_ms')} ms, longest {figure('while_longest_ms')}: "
        f"{figure('ratio')} times",
    ]
