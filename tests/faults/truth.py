"""Replies as they are when nothing happens: from a single node that nobody strikes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, StartStop, free_base_port
from p2pinfer.types import SamplingParams

LEAST_TOKENS = 64

Prompt = str | tuple[int, ...]
"""Text, or token ids."""

Ask = tuple[Prompt, SamplingParams]


class Truth(StartStop):
    """A node of its own, asked for as much of each reply as was needed yet. A context manager."""

    def __init__(self, folder: Path, model: str = "demo", **options: Any) -> None:
        self._cluster = LocalCluster(
            *(1,),
            model=model,
            threads=1,
            base_port=free_base_port(1),
            folder=folder / "truth",
            options=options,
        )
        self._known: dict[Ask, list[int]] = {}
        self._whole: set[Ask] = set()
        # Asked from a thread that stays in this network when the caller enters another one.
        self._asking = ThreadPoolExecutor(1)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the node."""
        self._cluster.start()
        self._asking.submit(self._cluster.status).result()

    def stop(self) -> None:
        """End it; what it has said stays known."""
        self._asking.shutdown()
        self._cluster.stop()

    def tokens(self, prompt: Prompt, params: SamplingParams, count: int) -> list[int]:
        """The first `count` tokens of a reply; fewer where it ends by itself. From any thread."""
        with self._lock:
            return self._tokens(prompt, params, count)

    def _tokens(self, prompt: Prompt, params: SamplingParams, count: int) -> list[int]:
        key = (prompt, replace(params, max_tokens=1))
        known = self._known.get(key, [])
        if len(known) < count and key not in self._whole:
            more = replace(params, max_tokens=min(params.max_tokens, max(2 * count, LEAST_TOKENS)))
            reply = self._asking.submit(self._ask, prompt, more).result()
            assert reply["error"] is None, reply["error"]
            known = self._known[key] = reply["token_ids"]
            if reply["finish_reason"] == "stop":
                self._whole.add(key)
        return known[:count]

    def _ask(self, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
        client = Client([self._cluster.nodes[0].address], timeout=60.0)
        return client.submit_json_object(prompt, params)

    def difference(
        self, prompt: Prompt, params: SamplingParams, tokens: list[int], *, complete: bool = False
    ) -> str:
        """Where a reply, or its beginning, is not the true one; empty when it is."""
        right = self.tokens(prompt, params, params.max_tokens if complete else len(tokens))
        if tokens == right:
            return ""
        pairs = enumerate(zip(tokens, right, strict=False))
        at = next((n for n, (one, other) in pairs if one != other), len(right))
        return f"token {at} of {prompt[:20]!r} is {tokens[at : at + 4]}, not {right[at : at + 4]}"
