"""`p2pinfer demo`: four nodes on this machine tell a story."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from p2pinfer.cli.interrupt import sigterm_is_ctrl_c

if TYPE_CHECKING:
    from rich.console import Console

    from p2pinfer.client import Client
    from p2pinfer.cluster import LocalCluster
    from p2pinfer.types import SamplingParams

PROMPT = "Once upon a time"
NODES = 4
MAX_TOKENS = 400
TEMPERATURE, SEED = 0.7, 9
"""Greedy stories are much alike; this is a good one, the same on every machine of a kind."""


@click.command()
@click.option("--kill", is_flag=True, help="Kill one of them in the middle of it (kill -9).")
def demo(*, kill: bool) -> None:
    """Watch four nodes tell a story.

    Starts four nodes on this machine with the bundled model, streams a reply, shows who held
    which part of the model, and ends them again.
    """
    from rich.console import Console

    from p2pinfer.cli.status_view import holdings_table
    from p2pinfer.client import Client
    from p2pinfer.cluster import LocalCluster, free_base_port

    console = Console(highlight=False)
    console.print(f"Starting {NODES} nodes on this machine; together they hold one small Llama.")
    with ExitStack() as stack:
        stack.enter_context(sigterm_is_ctrl_c())
        with console.status("starting ...") as progress:
            cluster = LocalCluster(
                NODES,
                model="demo",
                base_port=free_base_port(NODES),
                on_progress=lambda line: progress.update(f"{line} ..."),
            )
            stack.enter_context(cluster)
        asked = cluster.nodes[1]
        client = Client([asked.address])
        try:
            if kill:
                _tell_through_a_kill(console, cluster)
            else:
                console.print(
                    f"[dim]Ready. {asked.name} at {asked.address} is asked for a story:[/]\n"
                )
                _tell_story(console, client)
        except KeyboardInterrupt:
            click.echo()
            click.secho(f"stopping {NODES} nodes ...", err=True, dim=True)
            raise click.Abort from None
        members = client.status()["members"]
    who = "all that were there" if kill else "all of them"
    console.print(f"Every token was computed by {who}. Each held this part of the model:\n")
    console.print(holdings_table(members))
    console.print("\nThe nodes have ended. To keep some: p2pinfer cluster start --nodes 4")


def _tell_story(console: Console, client: Client) -> None:
    """Stream the reply to the fixed prompt, always the same one, and how fast it came."""
    from p2pinfer.client import Moved
    from p2pinfer.wire.messages import Accepted, Finished

    console.print(PROMPT, style="bold", end="")
    for event in client.submit(PROMPT, story_params()):
        if isinstance(event, Accepted | Moved):
            continue
        console.out(event.text, end="", highlight=False)
        if isinstance(event, Finished):
            speed = f"{event.total_tokens} tokens, {event.tokens_per_s:.0f} per second"
            console.print(f"\n\n[dim]{speed}[/]\n")


def _tell_through_a_kill(console: Console, cluster: LocalCluster) -> None:
    """Show the story and whose heads are where, while a node is killed; and that it is the same
    story as without."""
    from rich.live import Live

    from p2pinfer.cli.demo_kill import KILL_AFTER, KillPlay

    play = KillPlay(cluster, PROMPT, story_params())
    with Live(console=console, auto_refresh=False) as live:
        for scene in play.scenes():
            live.update(scene, refresh=True)
    console.print(
        f"\nAfter {KILL_AFTER} tokens {scene.killed} was killed (kill -9). The story stood still "
        f"for {play.pause_s:.2f} s, then those that kept replicas of its heads went on with them."
    )
    same = play.undisturbed() == play.tokens
    console.print(
        f"Asked for it again, undisturbed, the others tell the same {len(play.tokens)} tokens.\n"
        if same
        else "[bold red]Asked for it again, undisturbed, the others tell another story.[/]\n"
    )
    if not same:
        raise click.exceptions.Exit(1)


def story_params() -> SamplingParams:
    """How the story is drawn: always the same one."""
    from p2pinfer.types import SamplingParams

    return SamplingParams(max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=SEED)
