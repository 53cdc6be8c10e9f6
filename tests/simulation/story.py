"""Readable lines of what happens in a simulation."""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec

from p2pinfer.types import Fence, Member, Plan, SamplingParams
from p2pinfer.wire.tensors import Tensor

_QUIET = {"rumours", "hears_control", "hears_steps", "sent_at_ms", "echo_ms", "kv_limit_bytes"}
"""Fields that fill lines and say little."""

_MANY = 12


def describe(value: Any) -> str:  # noqa: PLR0911 - one line for each type
    """One line that shows a value without what is at its default."""
    match value:
        case bytes():
            return value.decode(errors="replace") if len(value) < 40 else f"{len(value)} bytes"
        case str():
            return value[:12] + "…" if len(value) == 64 else value
        case Fence():
            return f"{value.term}.{value.epoch}"
        case Member():
            return value.name + ("?" if value.blank else "") + f"/{value.boot_id[-3:]}"
        case Plan():
            return _plan(value)
        case Tensor():
            return f"{list(value.shape)}"
        case SamplingParams():
            return f"max {value.max_tokens}"
        case Enum():
            return str(value.value)
        case float():
            return f"{value:.4g}"
        case tuple() | list():
            shown = " ".join(map(describe, value[:_MANY]))
            return f"({shown}{' …' if len(value) > _MANY else ''})"
        case msgspec.Struct():
            return _struct(value)
        case _:
            return str(value)


def _struct(value: msgspec.Struct) -> str:
    shown = []
    for field in msgspec.structs.fields(value):
        content = getattr(value, field.name)
        if field.name in _QUIET or (content == field.default and field.name != "fence"):
            continue
        text = describe(content)
        plain = field.name in ("message", "report", "order") or isinstance(content, Plan)
        shown.append(text if plain else f"{field.name}={text}")
    return f"{type(value).__name__}({', '.join(shown)})"


def _plan(plan: Plan) -> str:
    names = [describe(member) for member in plan.members]
    voters = " ".join(plan.members[i].name for i in plan.voters)
    stages = "; ".join(
        f"{s.start}-{s.end} heads {''.join(map(str, s.head_owners))} "
        f"mlp {''.join(map(str, s.mlp_owners))} vocab {''.join(map(str, s.vocab_owners))}"
        for s in plan.stages
    )
    old = " ".join(each[-2:] for each in plan.old_voters)
    return (
        f"plan {describe(plan.fence)} of {' '.join(names)}, leader {names[plan.leader]}, "
        f"voters {voters} (before: {old}), {stages}"
    )
