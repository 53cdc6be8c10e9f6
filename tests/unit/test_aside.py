"""Things made in threads of their own, a few at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from concurrent.futures import Future
from typing import TypeVar

import pytest

from p2pinfer.model.aside import Aside

DEADLINE_S = 30.0

Made = TypeVar("Made")


def run(waiting: Generator[int, None, Made]) -> Made:
    """What a generator returns, however often it yields before."""
    while True:
        try:
            next(waiting)
        except StopIteration as done:
            made: Made = done.value
            return made


def test_so_many_are_made_at_once_and_no_more() -> None:
    """Two meet; the third is not begun before one of them is made."""
    meet, go = threading.Barrier(2), threading.Event()
    begun: list[int] = []

    def make(number: int) -> int:
        begun.append(number)
        if number < 2:
            meet.wait(DEADLINE_S)
            assert go.wait(DEADLINE_S)
        return number

    aside = Aside(2)
    first: list[Future[int]] = [run(aside.start(lambda n=n: make(n))) for n in range(2)]
    third = aside.start(lambda: make(2))
    assert next(third) == 0
    assert 2 not in begun
    go.set()
    last = run(third)
    run(aside.finish())
    assert [each.result() for each in (*first, last)] == [0, 1, 2]


def test_who_waits_is_told_that_making_failed() -> None:
    """By the next one that is begun, or at the end."""

    def fail() -> None:
        raise MemoryError("no room")

    aside = Aside(1)
    run(aside.start(fail))
    with pytest.raises(MemoryError, match="no room"):
        run(aside.start(lambda: None))
    run(aside.start(fail))
    with pytest.raises(MemoryError, match="no room"):
        run(aside.finish())


def test_threads_have_the_priority_of_who_asks() -> None:
    """What is loaded for others in the background stays there."""

    def asked(nice: int) -> list[int]:
        found: list[int] = []

        def ask() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
            aside = Aside(1)

            def look() -> int:
                return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

            made = run(aside.start(look))
            found.append(made.result(DEADLINE_S))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(DEADLINE_S)
        return found

    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert asked(own + 1) == [own + 1]
