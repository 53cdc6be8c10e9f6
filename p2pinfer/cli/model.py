"""`p2pinfer model ...`: model folders on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from p2pinfer.cli.options import json_option

SHAPES_HELP = "One of tiny, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, tinyllama-1.1b."
"""Spelt out, as the module that has the shapes imports what is slow."""


@click.group()
def model() -> None:
    """Make and look at model folders."""


@model.command()
@click.option("--shape", required=True, metavar="NAME", help=SHAPES_HELP)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Other weights.",
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def make(shape: str, seed: int, folder: Path) -> None:
    """Write a model of a known shape with random weights into DIR, to test and measure with."""
    from p2pinfer.cli.progress import bytes_progress
    from p2pinfer.model.shapes import make_model

    with bytes_progress(f"writing {shape}") as progress:
        make_model(shape, folder, seed=seed, progress=progress)
    click.echo(f"{folder}: {shape}, random weights", err=True)


@model.command()
@click.argument("folder", metavar="DIR|demo")
@json_option
def inspect(folder: str, as_json: bool) -> None:
    """Show what a model folder holds: shape, units, sizes, tokenizer."""
    from p2pinfer.cli.progress import bytes_progress
    from p2pinfer.model.config import resolve_model
    from p2pinfer.model.shapes import inspect_model

    with bytes_progress(f"reading {folder}") as progress:
        facts = inspect_model(resolve_model(folder), progress=progress)
    if as_json:
        import json

        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{key:<24} {text}")
