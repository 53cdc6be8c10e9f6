"""The worker's process: imports what computes out of the way of others, and serves the daemon."""

from __future__ import annotations

import signal

import click

from p2pinfer.lifeline import die_with_parent
from p2pinfer.pipe import PipeClosed, worker_side
from p2pinfer.priority import imported, stay_on


@click.command()
@click.option("--pipe-fd", type=int, required=True)
@click.option("--cpus", default="", help="CPU numbers to be pinned to.")
def main(pipe_fd: int, cpus: str) -> None:
    """Run a worker; started by the daemon, not by people."""
    die_with_parent()
    if cpus:
        # Before it imports: the daemon keeps off these, and other workers compute on its own.
        stay_on([int(number) for number in cpus.split(",")])
    # Ctrl-C in a terminal reaches the whole group: the daemon alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = worker_side(pipe_fd)
    # With torch, seconds on a busy machine.
    imported("p2pinfer.worker")
    from p2pinfer.worker import serve

    try:
        serve(pipe)
    except PipeClosed:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
