"""`p2pinfer doctor`: is this machine fit for a node?"""

from __future__ import annotations

import click

from p2pinfer.cli.options import check_address, json_option


@click.command()
@click.option("--model", default="demo", show_default=True, metavar="DIR|demo", help="Check this.")
@click.option(
    "--listen",
    default="0.0.0.0:7720",
    show_default=True,
    metavar="ADDR",
    callback=check_address,
    help="Check these ports.",
)
@json_option
def doctor(model: str, listen: str, as_json: bool) -> int:
    """Check whether this machine is fit.

    Looks at Python, torch, the CPU, memory, ports and a model folder; exit code 1 if any fails.
    """
    import msgspec

    from p2pinfer.doctor import Level, examine

    findings = list(examine(model, listen))
    failed = any(finding.level is Level.FAIL for finding in findings)
    if as_json:
        body = {"ok": not failed, "checks": findings}
        click.echo(msgspec.json.encode(body).decode())
        return int(failed)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
    table = Table("check", "", "found", "advice", box=None, pad_edge=False, header_style="dim")
    for finding in findings:
        mark = Text(finding.level.value, style=colours[finding.level])
        table.add_row(finding.check, mark, Text(finding.detail), Text(finding.advice))
    Console().print(table)
    return int(failed)
