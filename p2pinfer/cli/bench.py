"""`p2pinfer bench ...`: measure on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from p2pinfer.cli.interrupt import sigterm_is_ctrl_c
from p2pinfer.cli.options import json_option


@click.group()
def bench() -> None:
    """Measure speed on this machine."""


@bench.command()
@click.option("--shape", default="llama-3.2-1b", show_default=True, metavar="NAME")
@click.option("--nodes", type=click.IntRange(1, 16), default=2, show_default=True, metavar="N")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, metavar="N")
@click.option("--layout", default="auto", show_default=True, metavar="auto|heads|layers|SxH")
@click.option("--dtype", default="auto", show_default=True, metavar="NAME", help="Number format.")
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
@click.option("--base-port", type=click.IntRange(1, 65000), default=7820, show_default=True)
@click.option("--reference/--no-reference", default=True, help="Measure transformers beside it.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Markdown and plot.",
)
@json_option
def decode(report: Path | None, as_json: bool, **options: object) -> None:
    """Time to first token, prefill and decode speed, beside the unsplit model by transformers.

    N nodes of one cluster run on this machine with --threads threads each, pinned. The model of
    the shape is made with random weights once and kept.
    """
    import json

    from p2pinfer.bench.decode import Settings, measure
    from p2pinfer.bench.report import summary_lines, write_report
    from p2pinfer.cli.progress import telling
    from p2pinfer.cluster import check_ports
    from p2pinfer.config import load_settings

    settings = Settings(**options)  # type: ignore[arg-type]
    # What is wrong is told before minutes pass.
    load_settings({"layout": settings.layout, "dtype": settings.dtype})
    check_ports(settings.base_port, settings.nodes)

    with sigterm_is_ctrl_c(), telling() as tell:
        result = measure(settings, tell)
    if report is not None:
        click.echo(f"report: {write_report(result, report)}", err=True)
    click.echo(json.dumps(result) if as_json else "\n".join(summary_lines(result)))


@bench.command()
@click.option("--shape", default="llama-3.2-1b", show_default=True, metavar="NAME")
@click.option("--nodes", type=click.IntRange(2, 16), default=4, show_default=True, metavar="N")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, metavar="N")
@click.option("--layout", default="auto", show_default=True, metavar="auto|heads|layers|SxH")
@click.option("--dtype", default="auto", show_default=True, metavar="NAME", help="Number format.")
@click.option("--quant", default="none", show_default=True, metavar="NAME", help="Of weights.")
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
@click.option("--base-port", type=click.IntRange(1, 65000), default=7820, show_default=True)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Markdown, HTML and plots.",
)
@json_option
def failover(report: Path | None, as_json: bool, rungs: str | None, **options: object) -> None:
    """Kill a node in the middle of a reply, by each rung, and time what follows.

    A rung is the way in which lost KV comes back: replay computes all of it again, recompute the
    lost heads only, replica has it. And: what keeping replicas costs while nothing fails.
    """
    import json

    from p2pinfer.bench.failover import (
        Settings,
        available_rungs,
        check_settings,
        measure,
        parse_rungs,
    )
    from p2pinfer.bench.failover_report import summary_lines, write_report
    from p2pinfer.cli.progress import telling
    from p2pinfer.cluster import check_ports
    from p2pinfer.config import load_settings

    chosen = parse_rungs(rungs) if rungs else available_rungs()
    settings = Settings(rungs=chosen, **options)  # type: ignore[arg-type]
    # What is wrong is told before minutes pass.
    check_settings(settings)
    load_settings({"layout": settings.layout, "dtype": settings.dtype, "quant": settings.quant})
    check_ports(settings.base_port, settings.nodes)

    with sigterm_is_ctrl_c(), telling() as tell:
        result = measure(settings, tell)
    if report is not None:
        click.echo(f"report: {write_report(result, report)}", err=True)
    click.echo(json.dumps(result) if as_json else "\n".join(summary_lines(result)))
