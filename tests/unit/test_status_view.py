"""The table of `status`, as a reader sees it."""

from __future__ import annotations

import io
from typing import Any

import pytest

from p2pinfer.cli.status_view import runs, status_view
from tests.cli_examples import member


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], "-"), ([3], "3"), ([0, 1, 2], "0-2"), ([5, 0, 1, 7, 8], "0-1,5,7-8")],
)
def test_runs_of_numbers(numbers: list[int], text: str) -> None:
    """Unit numbers are shown as ranges."""
    assert runs(numbers) == text


def rendered(status: dict[str, Any]) -> str:
    """The status view as plain text of 140 columns."""
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(status_view(status))
    return console.export_text()


def test_status_view_shows_who_holds_what() -> None:
    """The status table has a line per member with state, layers, units and figures."""
    members = [member("a"), member("b", state="dead", owned=[])]
    text = rendered(
        {"model": {"name": "m"}, "leader": "a", "epoch": 3, "ready": True, "members": members}
    )
    head, _, titles, first, second = text.splitlines()
    assert head.split() == ["m", "leader", "a", "term", "0", "epoch", "3", "ready"]
    assert titles.split()[:6] == ["name", "state", "address", "layers", "heads", "keeps"]
    assert [*first.split()] == [
        *("a", "alive", "127.0.0.1:7720", "0-3", "|", "4-7", "0-1", "|", "2", "-"),
        *("0", "|", "3", "0.2", "12.0", "1/1024"),
    ]
    assert second.split() == ["b", "dead", "127.0.0.1:7720", *"-------"]


def test_status_view_shows_which_heads_a_member_keeps() -> None:
    """A table of 80 columns has room for it in a plan of one stage, where all have all layers."""
    part = {"span": [0, 4], "head_units": [0, 1, 2], "mlp_units": [0, 1], "vocab_units": [0]}
    kept = [{**part, "head_units": [3, 4, 7]}]
    text = rendered({"ready": True, "members": [member("node1", owned=[part], standby=kept)]})
    _, _, titles, line = text.splitlines()
    assert titles.split()[:6] == ["name", "state", "address", "heads", "keeps", "MLP"]
    assert line.split()[2:6] == ["127.0.0.1:7720", "0-2", "3-4,7", "0-1"]
    assert len(line.rstrip()) <= 80


def test_status_view_shows_the_layers_of_what_a_member_keeps() -> None:
    """Where the plan has several stages, heads of one are not those of another."""
    part = {"head_units": [0, 1], "mlp_units": [0, 1], "vocab_units": []}
    first, last = ({**part, "span": span} for span in ([0, 2], [2, 4]))
    members = [
        member("a", owned=[first, last], standby=[]),
        member("b", owned=[], standby=[first, last]),
    ]
    *_, one, other = rendered({"ready": True, "members": members}).splitlines()
    assert one.split()[3:10] == ["0-1", "|", "2-3", "0-1", "|", "0-1", "-"]
    assert other.split()[3:14] == [
        *("-", "-", "0-1", "of", "layers", "0-1", "|"),
        "0-1",
        "of",
        "layers",
        "2-3",
    ]


def test_status_view_says_what_is_waited_for() -> None:
    """A cluster that is not ready says why, and nothing of deaths that it would survive."""
    text = rendered({"model": None, "leader": None, "waiting": "1 of 3 nodes", "members": []})
    assert "no model" in text and "not ready\nwaiting: 1 of 3 nodes" in text
    assert "survives" not in text


@pytest.mark.parametrize(
    ("tolerates", "told"),
    [([], "nobody"), (["b"], "b"), (["a", "b", "c"], "any of a, b, c")],
    ids=["none", "one", "each"],
)
def test_status_view_says_whose_death_is_survived(tolerates: list[str], told: str) -> None:
    """A ready cluster names its voters and the nodes of which any one may die."""
    status = {"ready": True, "voters": ["a", "b", "c"], "tolerates": tolerates, "members": []}
    _, line, *_ = rendered(status).splitlines()
    assert line.rstrip() == f"voters a, b, c   survives the death of {told}"


@pytest.mark.parametrize(
    ("others", "word"),
    [
        ({}, "alive"),
        ({"hung": True, "draining": True}, "hung"),
        ({"draining": True}, "draining"),
        ({"witness": True, "numeric_class": "", "kv": {"limit_bytes": 1}}, "witness"),
        ({"numeric_class": ""}, "starting"),
        ({"numeric_class": "0123"}, "alive"),
        ({"state": "suspect", "hung": True}, "suspect"),
        ({"state": "left", "draining": True}, "left"),
    ],
)
def test_status_view_has_one_word_for_a_members_state(others: dict[str, Any], word: str) -> None:
    """What is wrong with a member wins over what is right; a witness has no KV to show."""
    line = rendered({"ready": True, "members": [member("a", **others)]}).splitlines()[-1]
    assert line.split()[1] == word
    assert (line.split()[-1] == "-") == (word in ("witness", "left"))
