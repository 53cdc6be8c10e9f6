"""`p2pinfer node ...`: the daemon of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from p2pinfer.cli.options import own_node_options, shared_node_options


@click.group()
def node() -> None:
    """Run a node on this machine."""


@node.command()
@own_node_options
@shared_node_options
def start(config: Path | None, **flags: object) -> int:
    """Start this machine's node and run until Ctrl-C.

    Without --join it founds a cluster; with --join ADDR it joins the cluster of any living node.
    """
    from p2pinfer.config import load_settings

    settings = load_settings(flags, config)
    from p2pinfer.daemon import run_node  # only now: a wrong flag is told at once

    return run_node(settings)
