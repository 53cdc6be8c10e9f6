"""The command line. Each module holds one group of verbs and calls what does the work.

Nothing heavy is imported before a verb runs, so that `--help` is instant. Exit codes: 0 done,
1 the request or the cluster failed, 2 usage or configuration, 130 Ctrl-C. Results go to stdout,
everything else to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from p2pinfer import __version__
from p2pinfer.cli import bench, cluster, demo, doctor, model, node, plan, status, submit
from p2pinfer.errors import ClusterError, P2pinferError, UsageError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="p2pinfer")
def root() -> None:
    """Serve one Llama by several machines together, split by attention heads.

    Start with `p2pinfer demo`: four nodes on this machine tell a story.
    """


for _verb in (
    node.node,
    cluster.cluster,
    submit.submit,
    status.status,
    plan.plan,
    demo.demo,
    doctor.doctor,
    model.model,
    bench.bench,
):
    root.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    try:
        args = None if arguments is None else list(arguments)
        code = root.main(args=args, prog_name="p2pinfer", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except (click.ClickException, P2pinferError, OSError) as error:
        return _report(error)
    return code if isinstance(code, int) else EXIT_OK


def _report(error: click.ClickException | P2pinferError | OSError) -> int:
    """Say what is wrong in one line on stderr, with the error's code if it has one of the
    protocol's; returns the exit code."""
    mark = "error"
    match error:
        case click.exceptions.NoArgsIsHelpError():
            error.show()
            return EXIT_USAGE
        case click.ClickException():
            context = getattr(error, "ctx", None)
            see = f" (see {context.command_path} --help)" if context else ""
            text, code = error.format_message() + see, EXIT_USAGE
        case ClusterError():
            mark, text, code = f"error ({error.code})", error.message, EXIT_FAILED
        case P2pinferError():
            text, code = str(error), EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
        case BrokenPipeError():  # the reader of stdout is gone, on purpose: nothing to say
            _give_up_output()
            return EXIT_FAILED
        case OSError():  # a full disk, a file that went away, no more descriptors
            _give_up_output()
            where = f": {error.filename}" if error.filename else ""
            text, code = f"the system refused: {error.strerror or error}{where}", EXIT_FAILED
    click.echo(f"{mark}: {text}", err=True)
    return code


def _give_up_output() -> None:
    """Keep the interpreter from flushing into a stdout that takes no more at exit."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
