"""`p2pinfer bench ...`: measure on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pinfer.cli.interrupt import sigterm_is_ctrl_c
from p2pinfer.cli.options import json_option, together

if TYPE_CHECKING:
    from p2pinfer.bench.inputs import Inputs, Tell

Measured = TypeVar("Measured", bound="Inputs")
Result = dict[str, Any]
Command = TypeVar("Command", bound=Callable[..., object])


@click.group()
def bench() -> None:
    """Measure speed on this machine."""


def cluster_options(nodes: int, least: int = 1) -> Callable[[Command], Command]:
    """What every benchmark of a local cluster takes: `--shape`, how many `--nodes` of which kind
    (by default `nodes`, at least `least`), and what to do with the result."""
    return together(
        click.option("--shape", default="llama-3.2-1b", show_default=True, metavar="NAME"),
        click.option(
            "--nodes", type=click.IntRange(least, 16), default=nodes, show_default=True, metavar="N"
        ),
        click.option(
            "--threads", type=click.IntRange(1), default=1, show_default=True, metavar="N"
        ),
        model_options,
        result_options,
    )


def model_options(command: Command) -> Command:
    """How the model is split and computed, and where the nodes listen."""
    return together(
        click.option(
            "--layout", default="auto", show_default=True, metavar="auto|heads|layers|SxH"
        ),
        click.option(
            "--dtype", default="auto", show_default=True, metavar="NAME", help="Number format."
        ),
        click.option(
            "--quant", default="none", show_default=True, metavar="NAME", help="Of weights."
        ),
        click.option("--base-port", type=click.IntRange(1, 65000), default=7820, show_default=True),
    )(command)


def result_options(command: Command) -> Command:
    """`--report DIR` and `--json`."""
    return together(
        click.option(
            "--report",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Write Markdown and plots there.",
        ),
        json_option,
    )(command)


def run_bench(
    settings: Measured,
    measure: Callable[[Measured, Tell], Result],
    show: Callable[[Result], list[str]],
    write: Callable[[Result, Path], Path],
    *,
    report: Path | None,
    as_json: bool,
) -> None:
    """Check, measure with progress on stderr, write the report, and print the result."""
    import json

    from p2pinfer.cli.progress import telling

    settings.check()  # what is wrong is told before minutes pass
    with sigterm_is_ctrl_c(), telling() as tell:
        result = measure(settings, tell)
    if report is not None:
        click.echo(f"report: {write(result, report)}", err=True)
    click.echo(json.dumps(result) if as_json else "\n".join(show(result)))


@bench.command()
@cluster_options(nodes=2)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Of each kind.")
@click.option(
    "--concurrent",
    type=click.IntRange(0, 64),
    default=8,
    show_default=True,
    metavar="N",
    help="Requests at once, measured too; 0 leaves that out.",
)
@click.option(
    "--beside",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Read a prompt of N tokens while a reply decodes, and time that reply.",
)
@click.option("--reference/--no-reference", default=True, help="Measure transformers beside it.")
def decode(report: Path | None, as_json: bool, **options: object) -> None:
    """Time to first token, prefill and decode speed, beside the unsplit model by transformers.

    N nodes of one cluster run on this machine with --threads threads each, pinned. The model of
    the shape is made with random weights once and kept.
    """
    from p2pinfer.bench.decode import Settings, measure
    from p2pinfer.bench.report import summary_lines, write_report

    settings = Settings(**options)  # type: ignore[arg-type]
    run_bench(settings, measure, summary_lines, write_report, report=report, as_json=as_json)


@bench.command()
@cluster_options(nodes=4, least=2)
@click.option(
    "--context", type=click.IntRange(1), default=1024, show_default=True, help="Prompt tokens."
)
@click.option("--max-tokens", type=click.IntRange(3), default=64, show_default=True)
@click.option(
    "--kill-after",
    type=click.IntRange(2),
    default=24,
    show_default=True,
    help="Tokens of the reply before the kill.",
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Of each rung.")
@click.option(
    "--rungs",
    metavar="LIST",
    help="Of replay,recompute,replica; default: all that these nodes have.",
)
@click.option(
    "--victim",
    default="second",
    show_default=True,
    metavar="second|leader|follower|serving|NAME",
    help="Who is killed; second: the owner of the second run of heads.",
)
@click.option(
    "--pairs",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    metavar="N",
    help="Of 64 tokens with and 64 without replication, for its cost; 0 leaves that out.",
)
def failover(report: Path | None, as_json: bool, rungs: str | None, **options: object) -> None:
    """Kill a node in the middle of a reply, by each rung, and time what follows.

    A rung is the way in which lost KV comes back: replay computes all of it again, recompute the
    lost heads only, replica has it. And: what keeping replicas costs while nothing fails.
    """
    from p2pinfer.bench.failover import Settings, available_rungs, measure, parse_rungs
    from p2pinfer.bench.failover_report import summary_lines, write_report

    chosen = parse_rungs(rungs) if rungs else available_rungs()
    settings = Settings(rungs=chosen, **options)  # type: ignore[arg-type]
    run_bench(settings, measure, summary_lines, write_report, report=report, as_json=as_json)
