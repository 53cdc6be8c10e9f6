"""The settings of one node: flags of `node start`, the configuration file, and their defaults.

Flags win over the file, the file over the defaults. Every value is checked here, before anything
is started, and an error names the flag, the value and what is allowed. Imports stay light: `--help`
reads this module.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

from p2pinfer.errors import UsageError
from p2pinfer.limits import MAX_ADDRESS_CHARS, MAX_GB_S, MAX_NAME_CHARS, MAX_NODES, MAX_STAGES

DEFAULT_PORT = 7720
PORTS_PER_NODE = 3
"""A node listens on its port (control), port + 1 (steps) and port + 2 (bulk)."""

MAX_PORT = 65535 - (PORTS_PER_NODE - 1)
MIN_KV_BYTES = 16 << 20
"""Less would not hold one short request of a model worth splitting."""

MAX_THREADS = 1024
MAX_WAIT_S = 86_400.0

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTS = ("none", "int8", "int4")
KERNELS = ("auto", "onednn", "zendnn")
WIRE_DTYPES = ("float32", "bfloat16")
LAYOUTS = ("auto", "heads", "layers")
QUORUMS = ("majority", "last-man")
TIMINGS = ("lan", "test")
USE_NODES = ("auto", "all")
SPEEDS = ("auto", "measure", "off")
STANDBYS = ("auto", "hot", "warm")
SWITCHES = ("local_links",)
"""Settings that are on unless they are switched off by `--no-...`."""

LEAST_GB_S = 0.0001
"""Of `--speed`: slower than any machine that computes at all."""

WILDCARDS = ("0.0.0.0", "::", "*")
Value = TypeVar("Value")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?")
_LAYOUT = re.compile(r"([1-9]\d?)x([1-9]\d?)")
_HOST = re.compile(r"[A-Za-z0-9._*-]+|\[[0-9A-Fa-f:.%A-Za-z0-9]+\]")


def parse_address(text: str) -> tuple[str, int]:
    """Split `tcp://host:port`, `host:port` or `host` into (host, port); the port defaults to 7720.

    An IPv6 address stands in brackets, with which it is returned without. Raises `UsageError`.
    """
    wanted = "an address looks like tcp://host:port or host:port (IPv6: [::1]:7720)"
    rest = text.removeprefix("tcp://")
    if "://" in rest:
        raise UsageError(f"{text!r}: only tcp:// is spoken; {wanted}")
    host, colon, digits = rest, "", ""
    if not rest.endswith("]"):
        host, colon, digits = rest.rpartition(":") if ":" in rest else (rest, "", "")
    if not _HOST.fullmatch(host) or len(text) > MAX_ADDRESS_CHARS - len("tcp://:65535"):
        raise UsageError(f"{text!r} is no address; {wanted}")
    if colon and not re.fullmatch(r"[0-9]{1,5}", digits):
        raise UsageError(f"{text!r}: the port must be a number; {wanted}")
    port = int(digits) if colon else DEFAULT_PORT
    if not 1 <= port <= MAX_PORT:
        raise UsageError(
            f"{text!r}: the port must be 1 to {MAX_PORT}, because a node also uses the next two"
        )
    return host.strip("[]"), port


def format_address(host: str, port: int) -> str:
    """`tcp://host:port`, with an IPv6 host in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def available_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_name(port: int = DEFAULT_PORT) -> str:
    """The host's name; with the port where it is not the usual one, so that two can run here."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("._-") or "node"
    suffix = "" if port == DEFAULT_PORT else f"-{port}"
    return host[: MAX_NAME_CHARS - len(suffix)] + suffix


def default_state_dir(name: str) -> Path:
    """Where a node of this name keeps its identity, by the platform's convention."""
    return platformdirs.user_state_path("p2pinfer") / name


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What one node was told. Addresses are normalised to `tcp://host:port`; times in seconds.

    `weight` is the share of work relative to other nodes; None means by the node's speed, or one
    per thread where that is unknown. `speed` is how many GB of weights it multiplies per second:
    `auto` as remembered or else measured, `measure` measured anew, `off` unknown, or a number.
    `kernels` is the library that computes on a CPU what is not quantised (`model/kernels`).
    `advertise` empty means: found out from `listen` and the network. `cpus` pins the compute
    threads (empty: not pinned). `kv_memory` is the KV cache's limit in bytes (0: chosen from what
    is free). `replicas` is how many other nodes keep a copy of each unit's weights and KV; that of
    the leader counts. `standby`: how those that this node keeps have their weights ready, in its
    memory (`hot`) or in the page cache (`warm`). `keep_inputs`: keep what lost KV can be made of
    (`core/inputs`). `local_links`: frames of steps for nodes on this machine go over Unix sockets
    (`local_links.py`). `quorum`, `layout` and `use_nodes` (whether nodes that make the whole slower
    are left out) count for the whole cluster, and are its founder's. Raises
    `UsageError` for a value that is out of range.
    """

    model: str = "demo"
    name: str = field(default_factory=default_name)
    listen: str = format_address("0.0.0.0", DEFAULT_PORT)
    join: tuple[str, ...] = ()
    advertise: str = ""
    state_dir: Path = field(default_factory=lambda: default_state_dir(default_name()))
    device: str = "auto"
    kernels: str = "auto"
    threads: int = field(default_factory=available_cpus)
    cpus: tuple[int, ...] = ()
    dtype: str = "auto"
    quant: str = "none"
    wire_dtype: str = "float32"
    layout: str = "auto"
    use_nodes: str = "auto"
    replicas: int = 1
    standby: str = "auto"
    keep_inputs: bool = False
    local_links: bool = True
    weight: float | None = None
    speed: str = "auto"
    kv_memory: int = 0
    min_nodes: int = 1
    join_timeout: float = 30.0
    wait_for_nodes: float = 30.0
    orphan_timeout: float = 10.0
    drain_timeout: float = 30.0
    witness: bool = False
    quorum: str = "majority"
    timing: str = "lan"

    def __post_init__(self) -> None:
        """Check every value's range; raise `UsageError` naming the flag."""
        _check(
            "--name",
            self.name,
            bool(_NAME.fullmatch(self.name)) and len(self.name) <= MAX_NAME_CHARS,
            f"1 to {MAX_NAME_CHARS} letters, digits, '.', '_' and '-', not starting with a mark",
        )
        _check("--model", self.model, bool(self.model), "a folder, or demo for the bundled model")
        _check("--device", self.device, bool(_DEVICE.fullmatch(self.device)), "auto, cpu, cuda[:N]")
        _check("--dtype", self.dtype, self.dtype in DTYPES, ", ".join(DTYPES))
        _check("--quant", self.quant, self.quant in QUANTS, ", ".join(QUANTS))
        if self.quant != "none" and self.device.startswith("cuda"):
            raise UsageError(
                f"--quant {self.quant} is for CPUs, and --device is {self.device}: take --device "
                "cpu, or --quant none"
            )
        _check("--kernels", self.kernels, self.kernels in KERNELS, ", ".join(KERNELS))
        _check(
            "--wire-dtype", self.wire_dtype, self.wire_dtype in WIRE_DTYPES, ", ".join(WIRE_DTYPES)
        )
        _check_layout(self.layout)
        _check("--use-nodes", self.use_nodes, self.use_nodes in USE_NODES, ", ".join(USE_NODES))
        _check_range("--threads", self.threads, 1, MAX_THREADS)
        _check_range("--replicas", self.replicas, 0, MAX_NODES - 1)
        _check("--standby", self.standby, self.standby in STANDBYS, ", ".join(STANDBYS))
        _check_range("--min-nodes", self.min_nodes, 1, MAX_NODES)
        _check_range("--join-timeout", self.join_timeout, 0.1, MAX_WAIT_S)
        _check_range("--wait-for-nodes", self.wait_for_nodes, 0.0, MAX_WAIT_S)
        _check_range("--orphan-timeout", self.orphan_timeout, 0.0, MAX_WAIT_S)
        _check_range("--drain-timeout", self.drain_timeout, 0.0, MAX_WAIT_S)
        _check("--quorum", self.quorum, self.quorum in QUORUMS, ", ".join(QUORUMS))
        _check("--timing", self.timing, self.timing in TIMINGS, ", ".join(TIMINGS))
        _check(
            "--kv-memory",
            f"{self.kv_memory} bytes",
            self.kv_memory == 0 or self.kv_memory >= MIN_KV_BYTES,
            f"at least {MIN_KV_BYTES >> 20}M, or 0 for as much as is free",
        )
        if self.weight is not None:
            _check_range("--weight", self.weight, 0.001, 1e6)
        told = LEAST_GB_S if self.speed in SPEEDS else _number(self.speed)
        words = ", ".join(SPEEDS)
        _check(
            "--speed",
            self.speed,
            LEAST_GB_S <= told <= MAX_GB_S,
            f"{words}, or GB per second, a number from {LEAST_GB_S:g} to {MAX_GB_S:g}",
        )
        self._check_addresses()

    def _check_addresses(self) -> None:
        own = parse_address(self.listen)
        for flag, address in [("--advertise", self.advertise), *(("--join", a) for a in self.join)]:
            host = parse_address(address)[0] if address else ""
            _check(flag, address, host not in WILDCARDS, "an address that others can connect to")
        _check("--join", self.listen, own not in map(parse_address, self.join), "another node")

    @property
    def work_weight(self) -> float:
        """The share of work while no speed is known: `weight`, or one per thread."""
        return float(self.threads) if self.weight is None else self.weight

    @property
    def advertised_address(self) -> str:
        """The control address that other nodes are told, `tcp://host:port`."""
        if self.advertise:
            return self.advertise
        host, port = parse_address(self.listen)
        if host in WILDCARDS:
            host = _outgoing_host(parse_address(self.join[0]) if self.join else ("192.0.2.1", 9))
        return format_address(host, port)


def _check(flag: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        shown = "''" if value == "" else value
        raise UsageError(f"{flag} {shown}: allowed is {allowed}")


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    _check(flag, value, low <= value <= high, f"a number from {low:g} to {high:g}")


def _number(text: str) -> float:
    """The number that a text says, or NaN, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return nan


def _check_layout(layout: str) -> None:
    mixed = _LAYOUT.fullmatch(layout)
    nodes = int(mixed[1]) * int(mixed[2]) if mixed else 1
    _check(
        "--layout",
        layout,
        (layout in LAYOUTS or mixed is not None) and nodes <= min(MAX_NODES, MAX_STAGES),
        f"auto, heads, layers, or SxH: S stages of H nodes, at most {MAX_NODES} nodes, e.g. 2x2",
    )


def _outgoing_host(towards: tuple[str, int]) -> str:
    """The address of the interface that leads `towards` there (nothing is sent), else loopback."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(*towards, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


# --- from flags and a file ------------------------------------------------------------------------


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> NodeSettings:
    """Settings from `flags` (field names; None or () means: not given) over a TOML file.

    The file's keys are the flags' names without the dashes: `model = "demo"`, `min-nodes = 3`,
    `join = ["a:7720"]`. Raises `UsageError`.
    """
    values = read_config(config_file) if config_file else {}
    values |= {key: value for key, value in flags.items() if value is not None and value != ()}
    for key in ("listen", "advertise"):
        if key in values:
            values[key] = _named(f"--{key}", _address, values[key])
    if "join" in values:
        values["join"] = tuple(_named("--join", _address, text) for text in values["join"])
    port = parse_address(values["listen"])[1] if "listen" in values else DEFAULT_PORT
    values.setdefault("name", default_name(port))
    if "state_dir" in values:
        values["state_dir"] = _named("--state-dir", expand_path, values["state_dir"])
    elif _NAME.fullmatch(values["name"]):  # else NodeSettings refuses the name below
        values["state_dir"] = default_state_dir(values["name"])
    if isinstance(values.get("kv_memory"), str):
        values["kv_memory"] = _named("--kv-memory", parse_bytes, values["kv_memory"])
    if isinstance(values.get("cpus"), str):
        values["cpus"] = parse_cpus(values["cpus"])
    return NodeSettings(**values)


def _named(flag: str, read: Callable[[str], Value], text: str) -> Value:
    """What `read` makes of `text`; its complaint gets the flag's name."""
    try:
        return read(text)
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from error


def _address(text: str) -> str:
    return format_address(*parse_address(text))


def expand_path(text: str | Path) -> Path:
    """The path that a person means: `~` is a home folder. Raises `UsageError` for no path."""
    if not str(text) or "\0" in str(text):
        raise UsageError(f"{str(text)!r} is no path; give the path of a folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{text}: there is no such home folder; write the whole path") from error


_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_FILE_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(
        ("model", "name", "listen", "advertise", "state_dir", "device", "dtype", "quant"),
        (_TEXT, "a text in quotes"),
    ),
    **dict.fromkeys(
        (
            "wire_dtype",
            "layout",
            "use_nodes",
            "cpus",
            "kv_memory",
            "quorum",
            "timing",
            "standby",
            "speed",
            "kernels",
        ),
        (_TEXT, "a text in quotes"),
    ),
    **dict.fromkeys(("witness", "keep_inputs", "local_links"), ((bool,), "true or false")),
    **dict.fromkeys(("threads", "min_nodes", "replicas"), (_WHOLE, "a whole number")),
    **dict.fromkeys(
        ("weight", "join_timeout", "wait_for_nodes", "orphan_timeout", "drain_timeout"),
        (_NUMBER, "a number"),
    ),
}


def read_config(path: Path) -> dict[str, Any]:
    """The values of a TOML configuration file by field name; raises `UsageError` naming the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: is not UTF-8 text: {error.reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: is not valid TOML: {error}") from error
    known = [item.name for item in fields(NodeSettings)]
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise UsageError(f"--config {path}: there is no setting {key!r}{hint}")
        values[name] = _file_value(path, key, name, value)
    return values


def _file_value(path: Path, key: str, name: str, value: object) -> object:
    if name == "join":
        addresses = [value] if isinstance(value, str) else value
        if isinstance(addresses, list) and all(isinstance(item, str) for item in addresses):
            return tuple(addresses)
        raise UsageError(f"--config {path}: {key} must be an address or a list of them")
    types, wanted = _FILE_TYPES[name]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UsageError(f"--config {path}: {key} must be {wanted}, not {value!r}")
    return value


def parse_bytes(text: str) -> int:
    """Bytes from `512M`, `2G`, `1.5GiB` or a plain number (powers of 1024); raises `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"{text!r} is no amount of memory; write for example 512M or 2G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers from a list like `0,2-3`; raises `UsageError` if one is not ours to use."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if not match:
            raise UsageError(f"--cpus {text}: write CPU numbers and ranges, for example 0,2-3")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(numbers)
    if not numbers or not numbers <= allowed:
        raise UsageError(f"--cpus {text}: this process may use {sorted(allowed)}")
    return tuple(sorted(numbers))


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The command line that gives `node start` these values (field names; None: not given)."""
    flags: list[str] = []
    for key, value in values.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag] if value else [f"--no-{flag[2:]}"] if key in SWITCHES else []
        elif value is not None:
            for item in value if isinstance(value, tuple) else (value,):
                flags += [flag, str(item)]
    return flags
