"""A model in exact integers, in which everything that should contribute must contribute once.

It has a Llama's shape: a residual per position, KV per layer, head unit and position, partial sums
per unit, candidates per vocab unit. Every number is mixed from those it depends on, so a partial
that lacks, comes twice or is of another step, and KV that was written for other tokens, give a
wrong token. `Reference` is the same model in one piece: the truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import pack, unpack

from msgspec.structs import replace

from p2pinfer.core.units import unit_bounds, unit_count
from p2pinfer.types import UnitKind
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.model_specs import TWO_LAYERS

EOS = 0
COLUMNS = 4
"""An integer below 2^64 is four float32 of 16 bits each."""

MODEL = replace(TWO_LAYERS, hidden_size=COLUMNS, eos_token_ids=(EOS,))
HEADS = unit_count(MODEL, UnitKind.HEAD)
MLPS = unit_count(MODEL, UnitKind.MLP)
VOCABS = unit_count(MODEL, UnitKind.VOCAB)
_BOUNDS = tuple(unit_bounds(MODEL, UnitKind.VOCAB, unit) for unit in range(VOCABS))

PRIME = (1 << 61) - 1
_MASK = (1 << 64) - 1
ROOT_TAG = 7
"""The tag of an empty log."""


def mix(one: int, other: int) -> int:
    """A number below 2^61 that depends on both, in this order (splitmix64's last steps)."""
    z = (one * 0x9E3779B97F4A7C15 + other * 0xC2B2AE3D27D4EB4F + 0x165667B19E3779F9) & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return (z ^ (z >> 31)) % PRIME


def tag(before: int, token: int) -> int:
    """Names a log by its tokens: that of the log before this token, and the token."""
    return mix(before, token + 1)


def tags(tokens: Iterable[int]) -> list[int]:
    """The tag after each token."""
    named, last = [], ROOT_TAG
    for token in tokens:
        last = tag(last, token)
        named.append(last)
    return named


def embedding(token: int, position: int) -> int:
    """The residual that a position begins with."""
    return mix(token + 1, position)


def attend(layer: int, unit: int, before: int, x: int) -> int:
    """What a head unit's KV up to and including a position come to, for residual `x` there."""
    return mix(before, mix(x, 1_000 + 64 * layer + unit))


def head_partial(layer: int, unit: int, attended: int, x: int) -> int:
    """A head unit's contribution to the residual."""
    return mix(attended + 64 * layer + unit, x)


def mlp_partial(layer: int, unit: int, x: int) -> int:
    """An MLP unit's contribution to the residual."""
    return mix(x, 5_000 + 64 * layer + unit)


def offer(unit: int, x: int) -> tuple[int, int]:
    """A vocab unit's best token after residual `x`, and its score (exact in float32)."""
    z = mix(x, 9_000 + unit)
    start, end = _BOUNDS[unit]
    return start + z % (end - start), (z >> 20) & 0xFFFFFF


def draw(offers: Iterable[tuple[int, int]], kind: int) -> int:
    """The token that a leader of numeric class `kind` draws from (token, score) of all units."""
    if kind:
        return min(offers, key=lambda each: mix(mix(each[0], each[1]), kind))[0]
    return min(offers, key=lambda each: (-each[1], each[0]))[0]


# --- on the wire ----------------------------------------------------------------------------------


def to_tensor(rows: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Integers as float32 columns; `shape` counts them, without the columns."""
    columns: list[int] = []
    for value in rows:
        columns += (value & 0xFFFF, value >> 16 & 0xFFFF, value >> 32 & 0xFFFF, value >> 48)
    return Tensor(WireDType.FLOAT32, (*shape, COLUMNS), pack(f"<{len(columns)}f", *columns))


def from_tensor(tensor: Tensor) -> list[int]:
    """The integers of `to_tensor`, in order."""
    columns = [int(value) for value in unpack(f"<{len(tensor.data) // 4}f", tensor.data)]
    return [
        columns[i] | columns[i + 1] << 16 | columns[i + 2] << 32 | columns[i + 3] << 48
        for i in range(0, len(columns), COLUMNS)
    ]


# --- the truth ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Computed:
    """A position: the residual before each half layer and at the end, and what was attended."""

    position: int
    residuals: list[int]
    attended: list[list[int]]
    """[layer][head unit]"""


class Reference:
    """The whole model in one piece, each log computed once."""

    def __init__(self) -> None:
        self._known: dict[int, Computed] = {}
        self._replies: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def computed(self, before: int, token: int, position: int) -> Computed:
        """The position of `token` after the log with tag `before`, which was computed already."""
        name = tag(before, token)
        known = self._known.get(name)
        if known is None:
            past = self._known[before].attended if position else None
            known = self._known[name] = _compute(past, token, position)
        return known

    def known(self, name: int) -> Computed | None:
        """The last position of the log with that tag, if it was ever computed."""
        return self._known.get(name)

    def log(self, tokens: Sequence[int]) -> Computed:
        """The last position of a log."""
        before = ROOT_TAG
        for position, token in enumerate(tokens):
            last = self.computed(before, token, position)
            before = tag(before, token)
        return last

    def next_token(self, tokens: Sequence[int], kind: int = 0) -> int:
        """The token that follows a log, drawn by a leader of class `kind`."""
        x = self.log(tokens).residuals[-1]
        return draw([offer(unit, x) for unit in range(VOCABS)], kind)

    def reply(self, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """The whole reply to a prompt, in class 0."""
        key = (prompt, max_tokens)
        if key not in self._replies:
            log = list(prompt)
            room = min(max_tokens, MODEL.max_positions - len(prompt))
            while len(log) - len(prompt) < room:
                log.append(self.next_token(log))
                if log[-1] == EOS:
                    break
            self._replies[key] = tuple(log[len(prompt) :])
        return self._replies[key]


def _compute(past: list[list[int]] | None, token: int, position: int) -> Computed:
    x = embedding(token, position)
    residuals, attended = [x], []
    for layer in range(MODEL.num_layers):
        folds = [attend(layer, unit, past[layer][unit] if past else 0, x) for unit in range(HEADS)]
        attended.append(folds)
        total = sum(head_partial(layer, unit, folds[unit], x) for unit in range(HEADS))
        x = (x + total) % PRIME
        residuals.append(x)
        x = (x + sum(mlp_partial(layer, unit, x) for unit in range(MLPS))) % PRIME
        residuals.append(x)
    return Computed(position, residuals, attended)
