"""Loads the weights of standby units while the node serves: in a thread of its own, out of the way.

It has one of torch's threads and the lowest priority, and can be stopped between two products.
What it has loaded by then stays, for it or for somebody in a hurry to go on.
Other parts it only warms: it reads their bytes, so that they lie in the page cache, and does so
again from time to time, since the system drops what nobody reads.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch

from p2pinfer import heap
from p2pinfer.core.holdings import Holding
from p2pinfer.model.part import Part
from p2pinfer.model.stage_loader import StageLoader
from p2pinfer.priority import be_last

WARM_AGAIN_S = 120.0
"""Reading what is in the page cache takes about a fifth of a second per gigabyte."""


class StandbyLoader:
    """Loads `parts` in their order, from now on until done or stopped.

    It begins after `after_s` seconds: replies that have just been interrupted go on first. `warmed`
    are brought into the page cache before, by what `pages` reads of each, and kept there
    until stopped. A part of which anything fails says so (`Part.error`), and the next one is begun.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        loader: Callable[[], StageLoader],
        warmed: Sequence[Part] = (),
        pages: Callable[[Holding], Iterator[int]] | None = None,
        *,
        after_s: float = 0.0,
    ) -> None:
        assert pages is not None or not warmed, "who is to warm parts knows where they lie"
        self._parts = tuple(parts)
        self._loader = loader
        self._warmed = tuple(warmed)
        self._pages = pages
        self._after_s = after_s
        self._stopping = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="standby-loader", daemon=True)
        # A thread that is inside torch while the interpreter ends would crash it.
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the product in hand is loaded and the thread is gone."""
        self._stopping.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def wait(self, timeout: float) -> bool:
        """Wait until all is loaded and warm or has failed, in seconds; returns whether it is."""
        return self._done.wait(timeout)

    def _run(self) -> None:
        be_last()
        try:
            if not self._stopping.wait(self._after_s):
                self._warm([part for part in self._warmed if not part.warm])
                self._load()
        finally:
            self._done.set()
        while self._warmed and not self._stopping.wait(WARM_AGAIN_S):
            self._warm(self._warmed)

    def _warm(self, parts: Sequence[Part]) -> None:
        pages = self._pages
        for part in parts:
            assert pages is not None, "checked at the beginning"
            with suppress(Exception):
                while not self._stopping.is_set() and part.warm_piece(pages) is not None:
                    pass

    def _load(self) -> None:
        # Threads and gradients are settings of the calling thread.
        torch.set_num_threads(1)
        with torch.no_grad():
            for part in self._parts:
                # The part keeps the reason.
                with suppress(Exception):
                    while not self._stopping.is_set() and part.load_piece(self._loader) is not None:
                        pass
        if self._parts and not self._stopping.is_set():
            heap.give_back()
