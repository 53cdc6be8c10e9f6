"""Things made in threads of their own, while whoever wants them goes on with something else.

A product library may take a second to pack a large graph. Who loads meanwhile reads what the next
one is made of, and says now and then that it lives, lest others believe that this node hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

PAUSE_S = 0.05
"""Between two looks at what is made."""

Made = TypeVar("Made")


class Aside:
    """Makes up to `at_once` things at the same time. For one thread at a time."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._making: set[Future[Any]] = set()

    def start(self, make: Callable[[], Made]) -> Generator[int, None, Future[Made]]:
        """Let `make` run in a thread once one is free: yields 0 now and then until then.

        A thread of its own, so that it has the priority of whoever asks for it now. Raises what
        making something before has raised.
        """
        yield from self._wait(self._at_once - 1)
        with_one = ThreadPoolExecutor(1)
        made = with_one.submit(make)
        with_one.shutdown(wait=False)
        self._making.add(made)
        return made

    def finish(self) -> Generator[int, None, None]:
        """Wait until all is made: yields 0 now and then. Raises what making something raised."""
        yield from self._wait(0)

    def _wait(self, left: int) -> Generator[int, None, None]:
        while True:
            done, self._making = wait(self._making, 0, FIRST_COMPLETED)
            for each in done:
                each.result()
            if len(self._making) <= left:
                return
            wait(self._making, PAUSE_S, FIRST_COMPLETED)
            yield 0
