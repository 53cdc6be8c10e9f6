"""`p2pinfer demo`: four nodes on this machine tell a story."""

from __future__ import annotations

import click

PROMPT = "Once upon a time, a little fox"
NODES = 4
MAX_TOKENS = 160


@click.command()
def demo() -> None:
    """Watch four nodes tell a story.

    Starts four nodes on this machine with the bundled model, streams a reply, shows who held
    which part of the model, and ends them again.
    """
    from rich.console import Console

    from p2pinfer.cli.status_view import holdings_table
    from p2pinfer.client import Client
    from p2pinfer.cluster import LocalCluster, free_base_port
    from p2pinfer.types import SamplingParams
    from p2pinfer.wire.messages import Chunk, Finished

    console = Console(highlight=False)
    console.print(f"Starting {NODES} nodes on this machine; together they hold one small Llama.")
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    with LocalCluster(NODES, model="demo", base_port=free_base_port(NODES)) as cluster:
        client = Client([cluster.nodes[1].address])
        members = client.status()["members"]
        console.print(f"Ready. [dim]{cluster.nodes[1].name} is asked to go on with:[/]\n")
        console.print(PROMPT, style="bold", end="")
        for event in client.submit(PROMPT, params):
            match event:
                case Chunk():
                    console.out(event.text, end="")
                case Finished():
                    console.out(event.text + "\n")
                    speed = f"{event.total_tokens} tokens, {event.tokens_per_s:.0f} per second"
                    console.print(f"[dim]{speed}[/]\n")
    console.print("Every token was computed by all of them. Each held a part of every layer:\n")
    console.print(holdings_table(members))
    console.print("\nAll nodes have ended. Next: p2pinfer cluster start --nodes 4")
