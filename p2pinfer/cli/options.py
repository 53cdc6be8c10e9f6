"""Options that several verbs share, and how values come from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])

DEFAULT_TO = "127.0.0.1:7720"

MIN_NODES_HELP = (
    "Make the first plan only with so many nodes; default: 1, by `cluster start` all of them."
)


def check_address(_: click.Context, __: click.Parameter, value: str | tuple[str, ...]) -> object:
    """Refuse, by the option's name, what is no address; what is one stays as it was written."""
    from p2pinfer.config import parse_address
    from p2pinfer.errors import UsageError

    for text in (value,) if isinstance(value, str) else value:
        try:
            parse_address(text)
        except UsageError as error:
            raise click.BadParameter(str(error)) from error
    return value


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator that adds all of these options, in the order of the help."""

    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def _replica_options(command: Command) -> Command:
    """What is kept of each part of the model and its KV, so that it is not lost with a node."""
    return together(
        click.option(
            "--replicas",
            type=int,
            metavar="N",
            help="How many other nodes keep a live copy of each part; default: 1. 0 saves memory, "
            "but a node's death makes its replies be computed again. Give all nodes the same.",
        ),
        click.option(
            "--standby",
            metavar="auto|hot|warm",
            help="How copies have their weights ready: hot in the node's memory, warm in the "
            "system's page cache, from where they are loaded after a death. Default: hot where "
            "there is memory.",
        ),
        click.option(
            "--keep-inputs",
            is_flag=True,
            default=None,
            help="Keep what the KV cache is made of: after a node's death only the KV of the parts "
            "that it had is computed again, if they have no copy. Give all nodes the same.",
        ),
    )(command)


def _number_format_options(command: Command) -> Command:
    """What bits depend on: all nodes must have the same."""
    return together(
        click.option("--dtype", metavar="auto|float32|bfloat16|float16", help="Number format."),
        click.option("--quant", metavar="none|int8|int4", help="Quantise weights, on CPUs."),
        click.option(
            "--wire-dtype",
            metavar="float32|bfloat16",
            help="Format of sums that nodes exchange: bfloat16 halves what is sent, and rounds.",
        ),
    )(command)


def _local_links_option(command: Command) -> Command:
    return click.option(
        "--local-links/--no-local-links",
        default=None,
        help="Exchange with nodes on this machine over Unix sockets (default), or over TCP.",
    )(command)


def _speed_options(command: Command) -> Command:
    """How work is shared out among nodes of different speed."""
    return together(
        click.option(
            "--use-nodes",
            metavar="auto|all",
            help="Whether nodes that would make the whole slower own nothing (auto, but by "
            "`cluster start`), or all own a part. The founder's counts.",
        ),
        click.option(
            "--weight",
            type=float,
            metavar="F",
            help="Share of work, about 1 per thread; default: by the measured speed.",
        ),
        click.option(
            "--speed",
            metavar="auto|measure|off|GB/S",
            help="GB of weights per second: as remembered or measured, measured anew, unknown, or "
            "as told.",
        ),
    )(command)


def shared_node_options(command: Command) -> Command:
    """The options that all nodes of one machine may have in common. No default is given here:
    what was not said stays None, so that a configuration file can say it."""
    return together(
        click.option("--model", metavar="DIR|demo", help="Model folder, or the bundled model."),
        click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute."),
        click.option(
            "--kernels",
            metavar="auto|onednn|zendnn",
            help="What computes on a CPU what is not quantised; auto: ZenDNN on AMD's.",
        ),
        click.option("--threads", type=int, metavar="N", help="Compute threads of a node."),
        _number_format_options,
        click.option("--layout", metavar="auto|heads|layers|SxH", help="How to split the model."),
        _speed_options,
        _replica_options,
        _local_links_option,
        click.option("--kv-memory", metavar="SIZE", help="Limit of the KV cache, for example 2G."),
        click.option("--min-nodes", type=int, metavar="N", help=MIN_NODES_HELP),
        click.option(
            "--join-timeout",
            type=float,
            metavar="S",
            help="Give up joining after S seconds; default: 30.",
        ),
        click.option(
            "--wait-for-nodes",
            type=float,
            metavar="S",
            help="How many seconds a request may wait until the cluster is ready; default: 30.",
        ),
        click.option(
            "--orphan-timeout",
            type=float,
            metavar="S",
            help="How long a reply goes on whose client and serving node are gone; default: 10.",
        ),
        click.option(
            "--drain-timeout",
            type=float,
            metavar="S",
            help="How long a node that is told to end may take to hand over; default: 10.",
        ),
        click.option(
            "--quorum",
            metavar="majority|last-man",
            help="Who may decide: most voters (default), or whoever is left, which is unsafe when "
            "cables are cut. Give all nodes the same.",
        ),
        click.option(
            "--timing",
            metavar="lan|test",
            help="All timers: lan (default), or test, with shorter ones.",
        ),
        click.option(
            "--config",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            help="TOML file with any of these settings; flags win.",
        ),
    )(command)


def own_node_options(command: Command) -> Command:
    """The options that tell one node from another."""
    return together(
        click.option("--name", metavar="NAME", help="Name of this node; default: the host's."),
        click.option("--listen", metavar="ADDR", help="Listen here; default: 0.0.0.0:7720."),
        click.option(
            "--join",
            multiple=True,
            metavar="ADDR",
            help="A node of the cluster to join. Repeatable.",
        ),
        click.option(
            "--advertise", metavar="ADDR", help="Address by which others reach this node."
        ),
        click.option(
            "--state-dir", metavar="DIR", help="Where this node remembers itself and its cluster."
        ),
        click.option("--cpus", metavar="LIST", help="Pin the compute threads, for example 0,2-3."),
        click.option(
            "--witness",
            is_flag=True,
            default=None,
            help="Vote, but hold no part of the model: for a small third machine.",
        ),
    )(command)


def to_option(command: Command) -> Command:
    """`--to ADDR`, repeatable: the nodes to ask, in order."""
    return click.option(
        "--to",
        multiple=True,
        default=(DEFAULT_TO,),
        show_default=True,
        metavar="ADDR",
        callback=check_address,
        help="A node to ask; repeat it to name others to try.",
    )(command)


def json_option(command: Command) -> Command:
    """`--json`: one machine-readable object on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
