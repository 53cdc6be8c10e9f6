"""`p2pinfer status`: the cluster as one of its nodes sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from p2pinfer.cli.options import json_option, to_option

if TYPE_CHECKING:
    from p2pinfer.client import Client

WATCH_EVERY_S = 1.0


@click.command()
@to_option
@click.option("--watch", is_flag=True, help="Keep it up to date until Ctrl-C.")
@json_option
def status(to: tuple[str, ...], watch: bool, as_json: bool) -> int:
    """Show the cluster's members.

    What each holds and how it is, who leads, and whether prompts are answered.
    """
    import json

    from p2pinfer.client import Client
    from p2pinfer.errors import ClusterError

    client = Client(to)
    try:
        if watch:
            _watch(client, as_json)
        _print_once(client, as_json)
    except ClusterError as error:
        if not as_json:
            raise
        click.echo(json.dumps({"error": {"code": error.code, "message": error.message}}))
        return 1
    return 0


def _print_once(client: Client, as_json: bool) -> None:
    import json

    from rich.console import Console

    from p2pinfer.cli.status_view import status_view

    found = client.status()
    if as_json:
        click.echo(json.dumps(found))
    else:
        Console().print(status_view(found))


def _watch(client: Client, as_json: bool) -> None:
    """Print again and again (in a terminal: in place); ends by Ctrl-C or an error only."""
    import time

    from rich.console import Console
    from rich.live import Live

    from p2pinfer.cli.status_view import status_view

    console = Console()
    if as_json or not console.is_terminal:
        while True:
            _print_once(client, as_json)
            time.sleep(WATCH_EVERY_S)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(status_view(client.status()), refresh=True)
            time.sleep(WATCH_EVERY_S)
