"""`p2pinfer bench ...`: measure on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pinfer.cli.interrupt import sigterm_is_ctrl_c
from p2pinfer.cli.options import check_address, json_option, together

if TYPE_CHECKING:
    from rich.console import RenderableType

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
        click.option(
            "--kernels",
            default="auto",
            show_default=True,
            metavar="auto|onednn|zendnn",
            help="Of what is not quantised.",
        ),
        click.option(
            "--local-links/--no-local-links",
            default=True,
            help="Exchange over Unix sockets, or over TCP.",
        ),
        click.option(
            "--wire-dtype",
            default="float32",
            show_default=True,
            metavar="NAME",
            help="Format of sums that are sent.",
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
    show: Callable[[Result], RenderableType],
    write: Callable[[Result, Path], Path],
    *,
    report: Path | None,
    as_json: bool,
) -> None:
    """Check, measure with progress on stderr, write the report, and print the result."""
    import json

    from rich.console import Console

    from p2pinfer.cli.progress import telling

    settings.check()  # what is wrong is told before minutes pass
    with sigterm_is_ctrl_c(), telling() as tell:
        result = measure(settings, tell)
    if report is not None:
        click.echo(f"report: {write(result, report)}", err=True)
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console(highlight=False, markup=False).print(show(result))


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
    from p2pinfer.bench.report import summary, write_report

    settings = Settings(**options)  # type: ignore[arg-type]
    run_bench(settings, measure, summary, write_report, report=report, as_json=as_json)


@bench.command()
@click.option(
    "--to",
    multiple=True,
    metavar="ADDR",
    callback=check_address,
    help="A node of the cluster to measure; default: start one here, by the options below.",
)
@cluster_options(nodes=2, least=2)
@click.option(
    "--echoes",
    type=click.IntRange(1, 256),
    default=32,
    show_default=True,
    help="Of each kind over each link, in each round.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1, 1024), default=128, show_default=True)
@click.option("--max-tokens", type=click.IntRange(2), default=32, show_default=True)
def net(report: Path | None, as_json: bool, **options: object) -> None:
    """Latency and bandwidth between nodes, and what exchanges should cost and do.

    Echoes go over the links that steps use, between any two nodes, and never while a node has a
    step in hand. What they take, and what the plan exchanges, is what the network should add to a
    token and to a prompt; beside it is what the nodes' own counters say.
    """
    from p2pinfer.bench.net import Settings, measure
    from p2pinfer.bench.net_report import tables, write_report

    settings = Settings(**options)  # type: ignore[arg-type]
    run_bench(settings, measure, tables, write_report, report=report, as_json=as_json)


@bench.command()
@click.option("--shape", default="llama-3.2-1b", show_default=True, metavar="NAME")
@click.option("--nodes", default="1,2,4", show_default=True, metavar="LIST")
@click.option(
    "--contexts", default="128,1024,8192", show_default=True, metavar="LIST", help="Prompt tokens."
)
@click.option(
    "--requests", default="1,4,16", show_default=True, metavar="LIST", help="Requests at once."
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="Of all nodes together; default: the machine's cores.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(3),
    default=64,
    show_default=True,
    help="That are measured of each reply.",
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Of each point.")
@model_options
@result_options
def scaling(
    report: Path | None, as_json: bool, threads: int | None, nodes: str, **options: Any
) -> None:
    """Decode and prefill speed over numbers of nodes, contexts, and requests at once.

    One axis at a time from a base, the first value of each list; a list of one value leaves its
    axis out. All nodes together use the machine's cores, whatever their number.
    """
    from p2pinfer.bench.scaling import Settings, measure, parse_axis
    from p2pinfer.bench.scaling_report import tables, write_report
    from p2pinfer.limits import MAX_NODES, MAX_POSITIONS, MAX_STEP_SLOTS

    settings = Settings(
        nodes_axis=parse_axis("--nodes", nodes, MAX_NODES),
        contexts=parse_axis("--contexts", options.pop("contexts"), MAX_POSITIONS),
        requests=parse_axis("--requests", options.pop("requests"), MAX_STEP_SLOTS),
        threads=threads or 0,
        **options,
    )
    run_bench(settings, measure, tables, write_report, report=report, as_json=as_json)


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
    from p2pinfer.bench.failover_report import summary, write_report

    chosen = parse_rungs(rungs) if rungs else available_rungs()
    settings = Settings(rungs=chosen, **options)  # type: ignore[arg-type]
    run_bench(settings, measure, summary, write_report, report=report, as_json=as_json)


@bench.command()
@click.option("--model", default="demo", show_default=True, metavar="DIR|demo")
@click.option("--sequences", type=click.IntRange(1, 64), default=16, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="Of each.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@json_option
def quant(as_json: bool, **options: object) -> None:
    """How far quantised weights are from the model that they are made of, by block size.

    The unquantised model writes sequences in float32, and every format says what it holds of
    each of their tokens; with the model as it is, and with a few inputs of each layer a thousand
    times larger than the others.
    """
    import json

    from p2pinfer.bench.quantisation import Settings, measure, summary_lines
    from p2pinfer.cli.progress import telling

    settings = Settings(**options)  # type: ignore[arg-type]
    with sigterm_is_ctrl_c(), telling() as tell:
        result = measure(settings, tell)
    click.echo(json.dumps(result) if as_json else "\n".join(summary_lines(result)))
