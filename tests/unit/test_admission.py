"""Who may come in: every reason to refuse, and the second process with one identity."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from p2pinfer.core.admission import Gate, check_hello, common_version, make_hello
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Member
from p2pinfer.wire.codec import VERSIONS
from tests.model_specs import SIX_LAYERS

ADDRESS, ELSEWHERE = "tcp://h2:7720", "tcp://h9:7720"


def member(number: int, *, boot: int = 0, address: str = "") -> Member:
    return Member(
        node_id=f"{number:016x}",
        boot_id=f"{number * 100 + boot:016x}",
        name=f"node{number}",
        address=address or f"tcp://h{number}:7720",
        pid=4321,
    )


def code(gate: Gate, greeter: Member, **values: Any) -> str:
    """The code with which a fitting HELLO, changed in these fields, is refused, or ""."""
    hello = make_hello(greeter, values.pop("model", SIX_LAYERS), gate.cluster_id, "heads")
    refused = check_hello(replace(hello, **values), gate)
    return refused.code if refused else ""


GATE = Gate(member(1), SIX_LAYERS, "c" * 16, (member(2),))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ""),
        ({"versions": (99,)}, "wrong_version"),
        ({"member": member(1, boot=1)}, "identity_taken"),
        ({"model_id": "cd" * 32}, "wrong_model"),
        ({"model_id": ""}, "wrong_model"),
        ({"dtype": "float32"}, "wrong_settings"),
        ({"quant": "int8"}, "wrong_settings"),
        ({"wire_dtype": "bfloat16"}, "wrong_settings"),
        ({"cluster_id": "d" * 16}, "wrong_cluster"),
        ({"cluster_id": ""}, ""),
        ({"member": replace(member(9), name="node1")}, "name_taken"),
        ({"member": replace(member(9), name="node2")}, "name_taken"),
    ],
)
def test_who_does_not_fit_is_refused(values: dict[str, Any], expected: str) -> None:
    """Version, identity, model, settings, cluster and name must fit."""
    assert code(GATE, member(9), **values) == expected


def test_a_witness_needs_no_model_and_judges_none() -> None:
    """A witness says that it has none, and leaves the others' to those who have one."""
    assert code(GATE, replace(member(9), witness=True), model=None) == ""
    blind = Gate(replace(member(1), witness=True), None, "c" * 16, ())
    assert code(blind, member(9)) == ""


def test_a_node_without_a_cluster_welcomes_nobody_yet() -> None:
    """It refuses for a time, for it is itself on its way in."""
    refused = check_hello(
        make_hello(member(9), SIX_LAYERS, "", "heads"), Gate(member(1), SIX_LAYERS, "", ())
    )
    assert refused is not None
    assert (refused.code, refused.retryable) == ("not_ready", True)


def test_a_full_cluster_has_room_for_its_own() -> None:
    """The seventeenth node waits; a member that greets again does not."""
    others = tuple(member(number) for number in range(2, MAX_NODES + 1))
    full = Gate(member(1), SIX_LAYERS, "c" * 16, others)
    assert code(full, member(99)) == "cluster_full"
    assert code(full, others[-1]) == ""


def test_the_highest_common_version_is_spoken() -> None:
    """Versions of one side only do not count; 0 is none."""
    assert common_version((*VERSIONS, 99)) == max(VERSIONS)
    assert common_version((99,)) == 0


def answer(greeter: Member, heard: tuple[int, ...]) -> str:
    """The code with which node 1, whose peers are 2 and 3, refuses, or ""."""
    gate = Gate(
        me=member(1),
        model=None,
        cluster_id="c" * 16,
        peers=(member(3), member(2)),
        heard=[member(number).node_id for number in heard],
    )
    refused = check_hello(make_hello(greeter, None, "", "heads"), gate)
    return refused.code if refused else ""


def test_an_identity_in_use_is_refused() -> None:
    """While the first process is heard, a second one elsewhere with its node id stays out."""
    twin = member(2, boot=1, address=ELSEWHERE)
    assert answer(twin, heard=(2, 3)) == "identity_taken"
    assert answer(twin, heard=(3,)) == ""


@pytest.mark.parametrize(
    "greeter",
    [member(2), member(2, address=ELSEWHERE), member(2, boot=1), member(4, address=ADDRESS)],
    ids=["itself", "moved", "restarted", "another"],
)
def test_the_same_node_comes_in(greeter: Member) -> None:
    """The same process, the next one at its address, and others are no twins."""
    assert answer(greeter, heard=(2, 3)) == ""


def test_the_refusal_names_both_processes() -> None:
    """Who is refused can see which process has its identity, and where."""
    gate = Gate(
        me=member(1),
        model=None,
        cluster_id="c" * 16,
        peers=(member(2),),
        heard=(member(2).node_id,),
    )
    hello = make_hello(member(2, boot=1, address=ELSEWHERE), None, "", "heads")
    refused = check_hello(hello, gate)
    assert refused is not None
    assert not refused.retryable
    for word in (member(2).node_id, "4321", ADDRESS, ELSEWHERE):
        assert word in refused.message
