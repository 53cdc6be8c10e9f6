"""`p2pinfer bench ...`: measure on this machine."""

from __future__ import annotations

from pathlib import Path

import click

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
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Markdown and plot.")
@json_option
def decode(report: Path | None, as_json: bool, **options: object) -> int:
    """Time to first token, prefill and decode speed, beside the unsplit model by transformers."""
    from p2pinfer.bench.decode import run

    return run(report=report, as_json=as_json, **options)
