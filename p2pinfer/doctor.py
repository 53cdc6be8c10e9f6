"""Look at this machine before a node starts on it: what would fail, what would be slow, and why."""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import psutil
from msgspec import Struct

from p2pinfer.client import Client
from p2pinfer.config import PORTS_PER_NODE, available_cpus, format_address, parse_address
from p2pinfer.errors import P2pinferError, UsageError

GIB = 1 << 30
MEMORY_NEEDED = GIB // 2
"""Bytes that a node needs beside its share of the model: interpreter, torch, buffers."""

MEMORY_WANTED = 2 * GIB
ASK_S = 1.0
"""How long whoever listens on a node's port may take to say that it is a node."""

OLDEST_PYTHON = (3, 11)


class Level(StrEnum):
    """How bad a finding is: `fail` means that a node would not start or not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(Struct, frozen=True, kw_only=True):
    """One row: what was looked at, how it is, and what to do about it (empty when ok)."""

    check: str
    level: Level
    detail: str
    advice: str = ""


def examine(model: str = "demo", listen: str = "0.0.0.0:7720") -> Iterator[Finding]:
    """Check Python, torch, CPU, memory, the ports of `listen` and the folder `model`, in order."""
    yield check_python()
    yield from check_torch()
    yield check_memory()
    yield check_ports(listen)
    yield check_model(model)


def check_python() -> Finding:
    """This interpreter is new enough."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding(
            check="python", level=Level.FAIL, detail=detail, advice="install Python 3.11 or newer"
        )
    return Finding(check="python", level=Level.OK, detail=detail)


def check_torch() -> Iterator[Finding]:
    """torch can be imported; its threads, its accelerator, and what this CPU multiplies fast."""
    try:
        import torch
    except ImportError as error:
        advice = "install p2pinfer's packages again, or run bin/p2pinfer"
        yield Finding(check="torch", level=Level.FAIL, detail=str(error), advice=advice)
        return
    where = ", CUDA device " + torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    yield Finding(check="torch", level=Level.OK, detail=f"{torch.__version__}{where}")
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{available_cpus()} CPUs for this process, {capability}"
    fast = cpu_flags() & {"avx512_bf16", "amx_bf16"}
    if fast:
        yield Finding(check="cpu", level=Level.OK, detail=f"{detail}, {', '.join(sorted(fast))}")
    else:
        yield Finding(
            check="cpu",
            level=Level.WARN,
            detail=f"{detail}, no bfloat16 instructions",
            advice="bfloat16 prompts are read slowly here; --dtype float32 may be faster",
        )
    yield check_kernels()


def check_kernels() -> Finding:
    """Who multiplies weights on this CPU where nothing else is said, in float32 and in bfloat16,
    and whether that is the fastest there is."""
    import torch

    from p2pinfer.model import zendnn
    from p2pinfer.model.kernels import library

    both = (library(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16))
    used = ", in bfloat16 ".join(dict.fromkeys(both))
    if used.startswith("zendnn") or not zendnn.is_of_vendor() or "avx512f" not in cpu_flags():
        return Finding(check="kernels", level=Level.OK, detail=used)
    return Finding(
        check="kernels",
        level=Level.WARN,
        detail=f"{used}: {zendnn.missing()}",
        advice=f"install the {zendnn.PACKAGE} of torch's release: weights that are not quantised "
        "are multiplied a quarter faster then",
    )


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction set extensions by Linux's names; empty where the kernel does not list them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, ":").partition(":")[2].split())


def check_memory() -> Finding:
    """Enough memory is free for a node beside its share of a model."""
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    level = Level.OK
    if memory.available < MEMORY_WANTED:
        level = Level.WARN if memory.available >= MEMORY_NEEDED else Level.FAIL
    advice = "" if level is Level.OK else "end other programs, or let other nodes hold more"
    return Finding(check="memory", level=level, detail=detail, advice=advice)


def check_ports(listen: str) -> Finding:
    """The three ports of a node that listens on `listen` are free here.

    Ports that a node of ours holds are a warning only: this machine is fit, as one sees.
    """
    host, port = parse_address(listen)
    ports = range(port, port + PORTS_PER_NODE)
    taken = {number: reason for number in ports if (reason := _bind_error(host, number))}
    if not taken:
        detail = f"{ports[0]} to {ports[-1]} free on {host}"
        return Finding(check="ports", level=Level.OK, detail=detail)
    if port in taken and (name := _node_at(host, port)):
        return Finding(
            check="ports",
            level=Level.WARN,
            detail=f"{ports[0]}-{ports[-1]} in use by p2pinfer node {name}",
            advice="p2pinfer status shows it; a second node needs another --listen HOST:PORT",
        )
    reasons = dict.fromkeys(taken.values())
    return Finding(
        check="ports",
        level=Level.FAIL,
        detail="; ".join(
            f"{', '.join(str(each) for each in taken if taken[each] == reason)}: {reason}"
            for reason in reasons
        ),
        advice="end the program that listens there, or choose another --listen HOST:PORT",
    )


def _node_at(host: str, port: int) -> str:
    """The name of the node of ours that answers there; empty if none does."""
    here = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        status = Client([format_address(here, port)], timeout=ASK_S).status()
    except (P2pinferError, OSError):
        return ""
    for member in status["members"]:
        # A node measures no round trip to itself.
        own_port = parse_address(member["address"])[1] == port and member["rtt_ms"] is None
        if own_port and member["state"] == "alive":
            return str(member["name"])
    return ""


def _bind_error(host: str, port: int) -> str:
    """Why `host:port` cannot be listened on; empty if it can."""
    host = "0.0.0.0" if host == "*" else host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As ZeroMQ does: a port in TIME_WAIT is free, one that is listened on is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_model(model: str) -> Finding:
    """The folder holds a model that can be served, and its share may fit into memory."""
    from p2pinfer.model.checkpoint import Checkpoint
    from p2pinfer.model.config import load_config, model_name, resolve_model
    from p2pinfer.model.tokenizer import Tokenizer

    try:
        folder = resolve_model(model)
        config = load_config(folder)
        checkpoint = Checkpoint.open(folder, config)
        Tokenizer.load(folder, config)
    except UsageError as error:
        advice = "p2pinfer model inspect DIR says more; --model demo always works"
        return Finding(check="model", level=Level.FAIL, detail=str(error), advice=advice)
    size = checkpoint.nbytes
    detail = (
        f"{model_name(folder)}: {config.num_hidden_layers} layers, "
        f"{config.num_key_value_heads} KV heads, {size / GIB:.2f} GiB of weights"
    )
    available = psutil.virtual_memory().available
    if size + MEMORY_NEEDED > available:
        nodes = -(-size // max(available - MEMORY_NEEDED, 1)) if available > MEMORY_NEEDED else 0
        advice = f"share it by {nodes} or more nodes like this" if nodes else "free memory first"
        return Finding(check="model", level=Level.WARN, detail=detail, advice=advice)
    return Finding(check="model", level=Level.OK, detail=detail)
