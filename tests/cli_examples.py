"""What a node says of its cluster, as `status --json` and `plan --json` print it."""

from __future__ import annotations

from typing import Any


def member(name: str, **others: Any) -> dict[str, Any]:
    """A member as `status --json` lists it."""
    owned = [
        {"span": [0, 4], "head_units": [0, 1], "mlp_units": [0], "vocab_units": []},
        {"span": [4, 8], "head_units": [2], "mlp_units": [3], "vocab_units": [0, 1]},
    ]
    return {
        "name": name,
        "state": "alive",
        "address": "tcp://127.0.0.1:7720",
        "owned": owned,
        "rtt_ms": 0.25,
        "tokens_per_s": 12.0,
        "kv": {"used_bytes": 1 << 20, "limit_bytes": 1 << 30},
        **others,
    }


PLAN: dict[str, Any] = {
    "model": "m",
    "layout": "heads",
    "leader": "a",
    "term": 2,
    "epoch": 5,
    "quorum": "last-man",
    "kv_positions": 4096,
    "prediction": {
        "tokens_per_s": 31.25,
        "nodes": 1,
        "of": 2,
        "left_out": ["b"],
        "unknown": [],
        "alternatives": [{"nodes": 2, "names": ["a", "b"], "tokens_per_s": 27.04}],
    },
    "members": [
        {
            **member("a"),
            "voter": True,
            "witness": False,
            "weight_bytes": 2 << 20,
            "standby_bytes": 1 << 20,
            "memory_bytes": None,
            "kv_room_bytes": 7 << 20,
            "product_gb_s": 22.5,
        },
        {
            **member("w", owned=[]),
            "voter": True,
            "witness": True,
            "weight_bytes": 0,
            "standby_bytes": 0,
            "memory_bytes": 9 << 20,
            "kv_room_bytes": 9 << 20,
            "product_gb_s": None,
        },
    ],
}
