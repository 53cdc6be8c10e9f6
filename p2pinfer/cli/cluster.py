"""`p2pinfer cluster ...`: several nodes on this one machine."""

from __future__ import annotations

from pathlib import Path

import click

from p2pinfer.cli.options import shared_node_options


@click.group()
def cluster() -> None:
    """Run several nodes on this machine."""


@cluster.command()
@click.option("--nodes", required=True, type=click.IntRange(1, 16), metavar="N", help="How many.")
@click.option(
    "--base-port",
    type=int,
    default=7720,
    show_default=True,
    metavar="P",
    help="Node i listens on P + 10 i and the next two ports, on the loopback interface.",
)
@shared_node_options
def start(nodes: int, base_port: int, config: Path | None, **flags: object) -> int:
    """Start N nodes here as one cluster and run until Ctrl-C.

    When it is ready, one JSON line on stdout names the nodes, their addresses and process ids. A
    node that dies or leaves is told on stderr, and the others go on.
    """
    from p2pinfer.cluster import start_local

    return start_local(
        nodes,
        base_port=base_port,
        config_file=config,
        flags=flags,
        on_progress=lambda line: click.secho(f"{line} ...", err=True, dim=True),
    )
