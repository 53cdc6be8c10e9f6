"""`p2pinfer node ...`: the daemon of this machine."""

from __future__ import annotations

from pathlib import Path

import click

from p2pinfer.cli.options import own_node_options, shared_node_options, to_option


@click.group()
def node() -> None:
    """Run a node on this machine, or let one go."""


@node.command()
@own_node_options
@shared_node_options
def start(config: Path | None, **flags: object) -> int:
    """Start this machine's node and run until Ctrl-C.

    Without --join it founds a cluster; with --join ADDR it joins the cluster of any living node.
    Started again it goes back to its cluster, whatever --join says, until `node leave`.
    """
    from p2pinfer.config import load_settings
    from p2pinfer.priority import imported

    settings = load_settings(flags, config)
    # Only now: a wrong flag is told at once.
    imported("p2pinfer.daemon")
    from p2pinfer.daemon import run_node

    return run_node(settings)


@node.command()
@click.argument("name")
@to_option
def drain(name: str, to: tuple[str, ...]) -> int:
    """Let the node NAME hand over what it holds, and leave.

    Replies go on. It ends when others hold its part; if they cannot, it stays, and you are told.
    """
    from p2pinfer.client import Client

    Client(to).drain(name)
    click.echo(f"{name} has left")
    return 0


@node.command()
@click.argument("name")
@to_option
def pause(name: str, to: tuple[str, ...]) -> int:
    """Let the node NAME own no units until `node resume`, or until it is started again.

    Replies go on. It stays a member, votes, and keeps replicas of what it had. It ends when others
    own its part; if they cannot take over, the node is not paused, and you are told.
    """
    from p2pinfer.client import Client

    Client(to).pause(name)
    click.echo(f"{name} owns nothing now")
    return 0


@node.command()
@click.argument("name")
@to_option
def resume(name: str, to: tuple[str, ...]) -> int:
    """Let the node NAME, which was paused, own units again.

    It gets its share when what it kept is up to date.
    """
    from p2pinfer.client import Client

    Client(to).resume(name)
    click.echo(f"{name} may own units again")
    return 0


@node.command()
@to_option
def leave(to: tuple[str, ...]) -> int:
    """Let this machine's node hand over, leave, and forget its cluster.

    Started again, it founds a new cluster, or joins the one that --join names.
    """
    from p2pinfer.client import Client

    Client(to).drain("")
    click.echo("the node has left its cluster")
    return 0
