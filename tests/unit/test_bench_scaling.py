"""`bench scaling`: what is asked for, what it comes to, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from p2pinfer.bench.asking import Together
from p2pinfer.bench.scaling import Point, Settings, base_of, figures, parse_axis, points_of, row
from p2pinfer.bench.scaling_report import tables, write_report
from p2pinfer.cli import root
from p2pinfer.errors import UsageError


def runs(*speeds: float) -> list[Together]:
    """Runs that decoded at these speeds, and read their prompts in two seconds."""
    return [Together(speed, (1 / speed, 2 / speed, 3 / speed), 2.0) for speed in speeds]


def test_an_axis_is_a_list_of_numbers() -> None:
    """In the order given, each once."""
    assert parse_axis("--nodes", "2, 1,4,1", 16) == (2, 1, 4)


@pytest.mark.parametrize("text", ["", "0", "17", "1,x", "1,,2", "-1"])
def test_what_is_no_axis_is_refused(text: str) -> None:
    """The flag and what is allowed are told."""
    with pytest.raises(UsageError, match=r"--nodes .*: give numbers from 1 to 16"):
        parse_axis("--nodes", text, 16)


def test_all_axes_begin_at_the_base() -> None:
    """One value changes at a time."""
    settings = Settings(nodes_axis=(2, 1), contexts=(64, 128), requests=(1, 8))
    assert base_of(settings) == Point(2, 64, 1)
    assert points_of(settings, "nodes") == [Point(2, 64, 1), Point(1, 64, 1)]
    assert points_of(settings, "contexts") == [Point(2, 64, 1), Point(2, 128, 1)]
    assert points_of(settings, "requests") == [Point(2, 64, 1), Point(2, 64, 8)]


def test_nodes_share_the_threads() -> None:
    """Each has one at least."""
    settings = Settings(threads=4)
    assert [settings.threads_of(nodes) for nodes in (1, 2, 3, 4, 8)] == [4, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--contexts", "x"], "--contexts x: give numbers"),
        (["--requests", "65"], "--requests 65: give numbers from 1 to 64"),
        (["--nodes", "1,17"], "--nodes 1,17: give numbers from 1 to 16"),
    ],
)
def test_the_flag_that_is_wrong_is_told(flags: list[str], told: str) -> None:
    """Before anything is started."""
    ended = CliRunner().invoke(root, ["bench", "scaling", "--shape", "tiny", *flags])
    assert isinstance(ended.exception, UsageError)
    assert told in str(ended.exception)


def test_ratios_are_of_runs_at_the_same_time() -> None:
    """Median, least and greatest of the runs' own ratios."""
    base = figures(Point(1, 64, 1), runs(10.0, 20.0))
    found = row(Point(1, 64, 4), 2, runs(30.0, 50.0), base)
    assert found["threads_per_node"] == 2
    assert (found["decode_tokens_per_s"], found["decode_tokens_per_s_ratio"]) == (40.0, 2.75)
    assert found["decode_tokens_per_s_ratio_min"] == 2.5
    assert found["prefill_tokens_per_s"] == 4 * 64 / 2.0
    assert found["prefill_tokens_per_s_ratio"] == 4.0
    assert found["inter_token_ms_max"] == pytest.approx(2000 / 30, abs=0.001)


def test_a_result_is_shown_and_written(tmp_path: Path) -> None:
    """A table and a column of pictures for each axis; more threads than cores are told."""
    base = figures(Point(1, 64, 1), runs(10.0, 20.0))
    rows = [
        row(Point(1, 64, 1), 2, runs(10.0, 20.0), base),
        row(Point(4, 64, 1), 1, runs(5.0, 6.0), base),
    ]
    result: dict[str, Any] = {
        "shape": "s",
        "dtype": "float32",
        "quant": "none",
        "cores": 2,
        "runs": 2,
        "base": {"nodes": 1, "context": 64, "requests": 1},
        "axes": {"nodes": rows},
    }
    console = Console(width=100)
    with console.capture() as shown:
        console.print(tables(result))
    assert "1 x 2, 4 x 1. More threads than cores" in shown.get()
    page = write_report(result, tmp_path).read_text()
    assert "| 4 | 5.50 (5.00-6.00) | 0.40 |" in page
    assert json.loads((tmp_path / "scaling.json").read_text()) == result
    assert (tmp_path / "scaling.png").stat().st_size > 0
    write_report(result | {"axes": {}}, tmp_path)
