"""A reply that is followed while other things are done: when each of its tokens came."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise

from p2pinfer.client import Client, new_request_id
from p2pinfer.errors import ClusterError
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire.messages import Chunk, Finished

STALLED_S = 120.0
"""Without a token for so long a measurement is given up."""


def greedy(tokens: int) -> SamplingParams:
    """Of a reply of exactly so many tokens."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


class Following:
    """One reply, read in a thread of its own; the prompt is text or token ids.

    `times` are when its tokens came to this client (wall clock, seconds), as nodes' logs have them.
    """

    def __init__(
        self, addresses: Sequence[str], prompt: str | Sequence[int], params: SamplingParams
    ) -> None:
        self.request_id = new_request_id()
        self.text = ""
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.failovers: tuple[Failover, ...] = ()
        self._addresses = tuple(addresses)
        self._prompt = prompt if isinstance(prompt, str) else tuple(prompt)
        self._params = params
        self._news = threading.Condition()
        self._error: Exception | None = None
        self._over = self._stopped = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether no more will come; raises what it failed with."""
        if self._error is not None:
            raise self._error
        return self._over

    def await_tokens(self, count: int) -> None:
        """Wait until so many tokens are there; raises `ClusterError` if they will never be."""
        with self._news:
            while len(self.tokens) < count:
                known = len(self.tokens)
                if self._error is not None:
                    raise self._error
                if self._over:
                    raise ClusterError("internal", f"the reply ended with {known} tokens")
                self._news.wait(STALLED_S)
                if len(self.tokens) == known and not self._over:
                    raise ClusterError(
                        "internal", f"no token in {STALLED_S:g} s after {known} of them"
                    )

    def whole(self) -> Following:
        """Wait for the end, and return itself; raises `ClusterError` for a reply that fails."""
        self.await_tokens(self._params.max_tokens)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self

    def stop(self) -> None:
        """Cancel what is left of it."""
        self._stopped = True
        self._thread.join()

    def _read(self) -> None:
        try:
            client = Client(self._addresses)
            for event in client.submit(self._prompt, self._params, request_id=self.request_id):
                if self._stopped:
                    return
                if isinstance(event, Finished):
                    self.failovers = event.failovers
                    self.text += event.text
                elif isinstance(event, Chunk):
                    self._add(event)
        except Exception as error:  # whatever it is, the caller's thread raises it
            self._error = error
        finally:
            with self._news:
                self._over = True
                self._news.notify_all()

    def _add(self, chunk: Chunk) -> None:
        with self._news:
            self.times += [time.time()] * len(chunk.tokens)
            self.tokens += chunk.tokens
            self.text += chunk.text
            self._news.notify_all()


def longest_gap(times: Sequence[float], since: float, until: float) -> float:
    """The longest time between two tokens between which some of the time from `since` to `until`
    lies; 0 where there are none."""
    gaps = (b - a for a, b in pairwise(times) if b > since and a < until)
    return max(gaps, default=0.0)
