"""What `demo --kill` shows of a moment."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from p2pinfer.cli.demo_kill import Scene


def shown(scene: Scene, *, colour: bool = False) -> str:
    """As a terminal of 80 columns has it."""
    file = StringIO()
    system = "standard" if colour else None
    Console(file=file, width=80, force_terminal=colour, color_system=system).print(scene)
    return file.getvalue()


def moment(**changes: object) -> Scene:
    """Two nodes; the second has taken over the head of the third."""
    members = [
        {"name": "node1", "head_units": [0], "standby_head_units": [1, 2]},
        {"name": "node2", "head_units": [1, 2], "standby_head_units": [0]},
    ]
    homes = {0: "node1", 1: "node2", 2: "node3"}
    return Scene("Once upon", homes, members, text=" a time", tokens=4, **changes)  # type: ignore[arg-type]


def test_the_story_and_whose_heads_are_where() -> None:
    """Also of a node that has nothing yet."""
    text = shown(moment())
    assert "Once upon a time" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("node")}
    assert rows["node2"] == ["node2", "alive", "1", "2", "0"]
    assert rows["node3"] == ["node3", "alive"]


def test_who_was_killed_is_marked() -> None:
    """In its row, and above the story."""
    text = shown(moment(killed="node3"))
    assert "node3 was killed (kill -9)" in text
    assert any(line.split()[:2] == ["node3", "killed"] for line in text.splitlines())


def test_a_head_keeps_the_colour_of_the_node_that_had_it_first() -> None:
    """So one sees it go to another: two colours in one row."""
    text = shown(moment(), colour=True)
    row = next(line for line in text.splitlines() if line.startswith("node2"))
    assert "\x1b[1;30;45m 1 " in row
    assert "\x1b[1;30;43m 2 " in row
