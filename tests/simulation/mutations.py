"""Defects put into the core on purpose: a simulation that does not find them proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Mutation = Callable[[], AbstractContextManager[None]]

MUTATIONS: dict[str, Mutation] = {}
"""By the name that `--mutation` takes."""


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """The core with that defect; as it is for an empty name."""
    if not name:
        yield
        return
    with MUTATIONS[name]():
        yield
