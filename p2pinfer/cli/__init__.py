"""The command line. Each module holds one group of verbs and calls what does the work.

Nothing heavy is imported before a verb runs, so that `--help` is instant. Exit codes: 0 done,
1 the request or the cluster failed, 2 usage or configuration, 130 Ctrl-C. Results go to stdout,
everything else to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from p2pinfer import __version__
from p2pinfer.cli import bench, cluster, demo, doctor, model, node, status, submit
from p2pinfer.errors import P2pinferError, UsageError

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
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        return _fail(error.format_message(), EXIT_USAGE)
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except P2pinferError as error:
        return _fail(str(error), EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout is gone; keep the interpreter from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return code if isinstance(code, int) else EXIT_OK


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {message}", err=True)
    return code
