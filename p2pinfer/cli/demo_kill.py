"""`p2pinfer demo --kill`: a node is killed while it tells a story, and the story goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from p2pinfer.bench.following import Following, longest_gap
from p2pinfer.bench.settling import await_protection
from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, LocalNode
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams

KILL_AFTER = 60
"""Tokens of the story before the kill."""

LOOK_S = 0.1
"""How often the nodes are asked who holds what."""

TAKEN_OVER_S = 30.0
"""Within this the others own everything; it is a matter of milliseconds."""

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


@dataclass
class Scene:
    """What is to be seen: the story so far, and whose heads are where. Times in seconds."""

    prompt: str
    homes: dict[int, str]
    """Which node had each head unit in the beginning: it keeps that colour."""
    members: Sequence[Mapping[str, Any]] = ()
    text: str = ""
    tokens: int = 0
    killed: str = ""

    def __rich__(self) -> RenderableType:
        """The story above, the table of heads below it."""
        story = Text.assemble((self.prompt, "bold"), self.text)
        return Group(Panel(story, height=18, title=self._title()), self._table())

    def _title(self) -> str:
        told = f"{self.tokens} tokens"
        if not self.killed:
            return told
        return f"{told}; {self.killed} was killed (kill -9) after {KILL_AFTER} of them"

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("node", "state", "computes heads", "keeps a replica of"):
            table.add_column(title, no_wrap=True, min_width=12)
        rows = {member["name"]: member for member in self.members}
        for name in sorted({*self.homes.values(), *rows}):
            member = rows.get(name, {"head_units": (), "standby_head_units": ()})
            if name == self.killed:
                table.add_row(Text(name, style="dim"), Text("killed", style="bold red"))
                continue
            kept = self._heads(member["standby_head_units"], dim=True)
            table.add_row(name, "alive", self._heads(member["head_units"]), kept)
        return table

    def _heads(self, units: Sequence[int], *, dim: bool = False) -> Text:
        names = sorted(set(self.homes.values()))
        heads = Text()
        for unit in units:
            colour = COLOURS[names.index(self.homes[unit]) % len(COLOURS)]
            style = colour if dim else f"bold black on {colour}"
            heads.append(f" {unit} ", style=style).append(" ")
        return heads


class KillPlay:
    """A story told by a cluster that loses a node in the middle of it.

    `scenes` shows it; after that `pause_s` is how long the story stood still, in seconds, and
    `tokens` are its tokens.
    """

    def __init__(self, cluster: LocalCluster, prompt: str, params: SamplingParams) -> None:
        self._cluster = cluster
        self._prompt = prompt
        self._params = params
        self._victim = cluster.nodes[2]
        self._asked = cluster.nodes[1]
        self.tokens: list[int] = []
        self.pause_s = 0.0

    def scenes(self) -> Iterator[Scene]:
        """What is to be seen, again and again until the story is told. Raises `ClusterError`."""
        await_protection(self._cluster)
        members = self._members()
        homes = {unit: m["name"] for m in members for unit in m["head_units"]}
        scene = Scene(self._prompt, homes, members)
        story = Following([self._asked.address], self._prompt, self._params)
        killed_at = 0.0
        while not story.over:
            if not killed_at and len(story.tokens) >= KILL_AFTER:
                killed_at = time.time()
                _kill(self._victim)
                scene.killed = self._victim.name
            self._look(scene, story)
            yield scene
            time.sleep(LOOK_S)
        self._look(scene, story)
        yield scene
        self.tokens = story.tokens
        self.pause_s = longest_gap(story.times, killed_at, killed_at + TAKEN_OVER_S)
        yield from self._end(scene, story)

    def _end(self, scene: Scene, story: Following) -> Iterator[Scene]:
        deadline = time.monotonic() + TAKEN_OVER_S
        while self._owns_something(scene):
            if time.monotonic() > deadline:
                raise ClusterError("internal", f"nobody has taken {scene.killed}'s part over")
            self._look(scene, story)
            yield scene
            time.sleep(LOOK_S)

    @staticmethod
    def _owns_something(scene: Scene) -> bool:
        return any(m["owned"] for m in scene.members if m["name"] == scene.killed)

    def _look(self, scene: Scene, story: Following) -> None:
        scene.members = self._members()
        scene.text, scene.tokens = story.text, len(story.tokens)

    def _members(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = Client([self._asked.address]).status()["members"]
        return found

    def undisturbed(self) -> list[int]:
        """The tokens of the same story, told by those that are left."""
        story = Following([self._asked.address], self._prompt, self._params)
        while not story.over:
            time.sleep(LOOK_S)
        return story.tokens


def _kill(node: LocalNode) -> None:
    node.process.kill()
    node.process.wait()
