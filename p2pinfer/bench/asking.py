"""Replies as their clients see them: one, and several at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from p2pinfer.client import Client
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Chunk

LEAST_TOKENS = 3
"""Of each reply, so that there is a time to measure."""

LONGER = 16
"""A reply may be so many times as long as what is measured of it: it goes on while others are still
reading their prompts."""


@dataclass
class Timing:
    """One reply as its client saw it: when it was submitted (of `time.perf_counter`), and when each
    token came, in seconds since."""

    began: float
    arrivals: list[float] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """When each token came, by the clock of `began`."""
        return [self.began + arrival for arrival in self.arrivals]

    @property
    def gaps_s(self) -> list[float]:
        """The times between two tokens."""
        return [b - a for a, b in pairwise(self.arrivals)]

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
    timing = Timing(time.perf_counter())
    for event in client.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)):
        if isinstance(event, Chunk):
            now = time.perf_counter() - timing.began
            timing.arrivals += [now] * len(event.tokens)
    if len(timing.arrivals) != tokens:
        raise ClusterError("internal", f"{len(timing.arrivals)} tokens came, {tokens} were asked")
    return timing


class _Crowd:
    """Replies that run at once, each followed by a thread of its own, until each has had `tokens`
    tokens while all of them decode."""

    def __init__(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self._prompts = prompts
        self._tokens = tokens
        self._lock = threading.Lock()
        self._since = [0] * len(prompts)
        self._began = [False] * len(prompts)
        self.timings = [Timing(0.0) for _ in prompts]
        self.errors: list[BaseException] = []
        self.over = False

    def follow(self, index: int, address: str) -> None:
        """Submit one of the prompts and note when its tokens come; leaving early cancels it."""
        try:
            client = Client([address], retry_for=0)
            params = SamplingParams(max_tokens=LONGER * self._tokens, ignore_eos=True)
            timing = self.timings[index] = Timing(time.perf_counter())
            for event in client.submit(self._prompts[index], params):
                if isinstance(event, Chunk):
                    now = time.perf_counter() - timing.began
                    timing.arrivals += [now] * len(event.tokens)
                    self._came(index, len(event.tokens))
                if self.over:
                    return
        except BaseException as error:  # whatever it is, the caller's thread raises it
            self.errors.append(error)
            self.over = True

    def _came(self, index: int, count: int) -> None:
        with self._lock:
            self._began[index] = True
            if all(self._began):
                self._since[index] += count
                self.over = self.over or min(self._since) > self._tokens


def ask_together(
    addresses: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int
) -> Together:
    """One reply to each prompt, all at once, through the nodes in turn; each goes on until all have
    had `tokens` tokens while all decoded, at most `LONGER` times as long.

    Raises `ClusterError` where one fails, or where they never all decode at once.
    """
    crowd = _Crowd(prompts, tokens)
    threads = [
        threading.Thread(target=crowd.follow, args=(i, addresses[i % len(addresses)]))
        for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if crowd.errors:
        raise crowd.errors[0]
    return Together.of(crowd.timings)


@dataclass(frozen=True)
class Together:
    """Several replies, from the first token of the last one to the last token of the first one:
    while all of them decode. `gaps_s` are the times between two tokens of one reply, `prefill_s`
    is from the first submission until all of them decode."""

    tokens_per_s: float
    gaps_s: tuple[float, ...]
    prefill_s: float

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> Together:
        """Raises `ClusterError` where there is no such time, or less than `LEAST_TOKENS` in it."""
        if not all(timing.arrivals for timing in timings):
            raise ClusterError("internal", "a reply ended without a token")
        since = max(timing.times[0] for timing in timings)
        until = min(timing.times[-1] for timing in timings)
        inside = [[at for at in timing.times if since <= at <= until] for timing in timings]
        gaps = tuple(b - a for times in inside for a, b in pairwise(times))
        if until <= since or min(map(len, inside)) < LEAST_TOKENS:
            raise ClusterError(
                "internal",
                f"{len(timings)} requests hardly ever decoded all at once: give more --max-tokens",
            )
        prefill_s = since - min(timing.began for timing in timings)
        return cls(len(gaps) / (until - since), gaps, prefill_s)
