"""`p2pinfer plan`: who holds what, and who would if a node were gone."""

from __future__ import annotations

import click

from p2pinfer.cli.options import json_option, to_option


@click.command()
@click.option("--without", metavar="NAME", default="", help="As if this node were gone.")
@to_option
@json_option
def plan(without: str, to: tuple[str, ...], as_json: bool) -> int:
    """Show who holds which part of the model.

    With --without NAME: who would hold what if that node were gone, whether it fits, and whether
    the cluster could still decide anything. Nothing is changed.
    """
    import json

    from rich.console import Console

    from p2pinfer.cli.plan_view import plan_view
    from p2pinfer.client import Client
    from p2pinfer.errors import ClusterError

    try:
        found = Client(to).plan(without)
    except ClusterError as error:
        if not as_json:
            raise
        click.echo(json.dumps({"error": {"code": error.code, "message": error.message}}))
        return 1
    if as_json:
        click.echo(json.dumps(found))
    else:
        Console().print(plan_view(found))
    return 0
