"""A child process that ends with the one that started it, so that no kill leaves an orphan.

The parent names itself in the child's environment; the child asks the kernel to be killed with it
(`PR_SET_PDEATHSIG`, prctl(2), Linux only). On other systems the end of a pipe has to do. The kernel
means the *thread* that started the child: start children from a thread that lives on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

PARENT_VARIABLE: Final = "P2PINFER_PARENT_PID"

_PR_SET_PDEATHSIG: Final = 1


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child that is to end with it, with some `changes`."""
    return {**os.environ, **changes, PARENT_VARIABLE: str(os.getpid())}


def die_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """Be killed when the parent named in the environment ends; nothing if none is named.

    Exits at once when that parent has ended already: the kernel would not tell any more. A process
    whose parent is another one (a grandchild that inherited the variable) is not concerned.
    """
    parent = environment.get(PARENT_VARIABLE, "")
    if not parent.isdigit() or not sys.platform.startswith("linux"):
        return
    if os.getppid() == int(parent):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent) and not _alive(int(parent)):
        raise SystemExit(1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
