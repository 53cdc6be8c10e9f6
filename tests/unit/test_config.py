"""Settings of a node: addresses, defaults, the configuration file, and what is refused."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.config import (
    MAX_PORT,
    NodeSettings,
    as_flags,
    default_name,
    format_address,
    load_settings,
    parse_address,
    parse_bytes,
    parse_cpus,
)
from p2pinfer.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://10.0.0.1:7730", ("10.0.0.1", 7730)),
        ("lab-3.example:1", ("lab-3.example", 1)),
        ("lab3", ("lab3", 7720)),
        ("tcp://lab3", ("lab3", 7720)),
        ("[::1]:7730", ("::1", 7730)),
        ("tcp://[fe80::1%eth0]", ("fe80::1%eth0", 7720)),
        (f"h:{MAX_PORT}", ("h", MAX_PORT)),
    ],
)
def test_addresses_are_read(text: str, expected: tuple[str, int]) -> None:
    """The scheme and the port may be left out, and IPv6 stands in brackets."""
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":7720", "h:", "h:x", "h:0", "h:65534", "h:99999", "udp://h:1", "::1", "a b:1", "h:-1"],
)
def test_wrong_addresses_are_refused(text: str) -> None:
    """An address that nobody could listen on or connect to is refused and named."""
    with pytest.raises(UsageError, match=r"address|port|tcp"):
        parse_address(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_usage_error(text: str) -> None:
    """Whatever is typed, the outcome is an address that is read again alike, or a UsageError."""
    try:
        found = parse_address(text)
    except UsageError:
        return
    assert parse_address(format_address(*found)) == found


def test_defaults_need_no_flag() -> None:
    """Without a flag the node is called like its host and takes the usual port and all its CPUs."""
    settings = load_settings({})
    assert settings.name == default_name()
    assert settings.listen == "tcp://0.0.0.0:7720"
    assert settings.work_weight == settings.threads >= 1
    assert settings.state_dir.name == settings.name


def test_a_second_node_of_a_host_gets_another_name_and_state() -> None:
    """A node on another port may run beside the first without further flags."""
    first, second = load_settings({}), load_settings({"listen": "127.0.0.1:7730"})
    assert second.name == f"{first.name}-7730"
    assert second.state_dir != first.state_dir


def test_long_host_names_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name that is too long or odd still gives a valid node name."""
    monkeypatch.setattr(socket, "gethostname", lambda: "_a b" + "x" * 100)
    assert load_settings({"listen": "h:7730"}).name == ("a-b" + "x" * 56 + "-7730")


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--name", {"name": "a/b"}),
        ("--name", {"name": "x" * 65}),
        ("--model", {"model": "", "name": "n"}),
        ("--device", {"device": "tpu"}),
        ("--dtype", {"dtype": "float8"}),
        ("--quant", {"quant": "int8", "device": "cuda:1"}),
        ("--quant", {"quant": "fp8"}),
        ("--wire-dtype", {"wire_dtype": "float16"}),
        ("--kernels", {"kernels": "mkl"}),
        ("--layout", {"layout": "columns"}),
        ("--layout", {"layout": "5x4"}),
        ("--layout", {"layout": "0x4"}),
        ("--replicas", {"replicas": -1}),
        ("--replicas", {"replicas": 16}),
        ("--threads", {"threads": 0}),
        ("--weight", {"weight": 0.0}),
        ("--speed", {"speed": "fast"}),
        ("--speed", {"speed": "0"}),
        ("--speed", {"speed": "inf"}),
        ("--use-nodes", {"use_nodes": "some"}),
        ("--weight", {"weight": float("nan")}),
        ("--min-nodes", {"min_nodes": 17}),
        ("--join-timeout", {"join_timeout": 0.0}),
        ("--wait-for-nodes", {"wait_for_nodes": -1.0}),
        ("--orphan-timeout", {"orphan_timeout": -1.0}),
        ("--drain-timeout", {"drain_timeout": 1e9}),
        ("--quorum", {"quorum": "half"}),
        ("--timing", {"timing": "wan"}),
        ("--join", {"join": ("0.0.0.0:7720",)}),
        ("--join", {"listen": "h:7720", "join": ("tcp://h",)}),
        ("--advertise", {"advertise": "[::]:7720"}),
        ("--cpus", {"cpus": "0-x"}),
        ("--cpus", {"cpus": "4095"}),
    ],
)
def test_wrong_values_name_their_flag(flag: str, values: dict[str, Any]) -> None:
    """A value out of range is refused with the flag's name, the value, and what is allowed."""
    with pytest.raises(UsageError) as caught:
        load_settings(values)
    assert flag in str(caught.value)


@pytest.mark.parametrize("layout", ["auto", "heads", "layers", "2x2", "1x16", "16x1"])
def test_layouts(layout: str) -> None:
    """Heads, layers, and mixed layouts of up to 16 nodes are taken."""
    assert load_settings({"layout": layout}).layout == layout


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    """Each setting comes from the flag, else from the file, else from the default."""
    file = tmp_path / "node.toml"
    file.write_text('name = "filed"\nmin-nodes = 3\njoin = ["a", "b:1"]\nkv-memory = "1G"\n')
    settings = load_settings({"min_nodes": 2, "name": None, "join": ()}, file)
    assert (settings.name, settings.min_nodes, settings.layout) == ("filed", 2, "auto")
    assert settings.join == ("tcp://a:7720", "tcp://b:1")
    assert settings.kv_memory == 1 << 30


def test_what_decides_about_failures_can_stand_in_the_file(tmp_path: Path) -> None:
    """Quorum, timing, witness, inputs, standbys and the two time-outs are read from the file."""
    file = tmp_path / "node.toml"
    file.write_text(
        'quorum = "last-man"\ntiming = "test"\nwitness = true\nkeep-inputs = true\n'
        'standby = "warm"\n'
        "orphan-timeout = 0\ndrain-timeout = 2.5\n"
    )
    settings = load_settings({}, file)
    assert (settings.quorum, settings.timing, settings.witness) == ("last-man", "test", True)
    assert (settings.orphan_timeout, settings.drain_timeout) == (0, 2.5)
    assert (settings.keep_inputs, load_settings({}).keep_inputs) == (True, False)
    assert (settings.standby, load_settings({}).standby) == ("warm", "auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae = 'x'", "no setting 'nmae'; did you mean name"),
        ("zzzzzz = 1", "no setting 'zzzzzz'"),
        ("threads = '4'", "threads must be a whole number"),
        ("threads = true", "threads must be a whole number"),
        ("weight = '4'", "weight must be a number"),
        ("name = 4", "name must be a text"),
        ("quorum = 1", "quorum must be a text"),
        ("witness = 'yes'", "witness must be true or false"),
        ("drain-timeout = true", "drain-timeout must be a number"),
        ("join = 4", "join must be an address or a list"),
        ("join = [4]", "join must be an address or a list"),
        ("threads =", "not valid TOML"),
        ("quant = 'int7'", "--quant int7"),
    ],
)
def test_wrong_files_name_the_key(text: str, message: str, tmp_path: Path) -> None:
    """A mistake in the configuration file is told with the key, or as not TOML at all."""
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_settings({}, file)


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    """A configuration file that is absent or no text is refused by its path."""
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for file in (tmp_path / "none.toml", binary):
        with pytest.raises(UsageError, match=file.name):
            load_settings({}, file)


def test_one_replica_is_kept_unless_another_number_is_given(tmp_path: Path) -> None:
    """By flag or file: none, or as many as there can be other nodes."""
    file = tmp_path / "node.toml"
    file.write_text("replicas = 15\n")
    given = (load_settings({}), load_settings({"replicas": 0}), load_settings({}, file))
    assert [settings.replicas for settings in given] == [1, 0, 15]


def test_advertised_address() -> None:
    """Others are told --advertise, else the listening host, else this host's own address."""
    assert NodeSettings(advertise="tcp://me:1").advertised_address == "tcp://me:1"
    assert NodeSettings(listen="tcp://10.1.1.1:7730").advertised_address == "tcp://10.1.1.1:7730"
    towards_loopback = NodeSettings(join=("tcp://127.0.0.1:7730",))
    assert towards_loopback.advertised_address == "tcp://127.0.0.1:7720"
    host, port = parse_address(NodeSettings().advertised_address)
    assert port == 7720 and host not in ("0.0.0.0", "::")


def test_unreachable_neighbours_do_not_stop_a_node() -> None:
    """Where no interface leads to the other node, loopback is advertised."""
    settings = NodeSettings(join=("tcp://[fe80::1]:7720",))  # of no interface, so nowhere
    assert settings.advertised_address == "tcp://127.0.0.1:7720"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("512", 512),
        ("1K", 1024),
        ("512m", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2 TB", 2 << 40),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    """Amounts are powers of 1024 with the usual letters."""
    assert parse_bytes(text) == expected


def test_wrong_amounts_of_memory_are_refused() -> None:
    """An amount without a number or with another unit is refused."""
    for text in ("", "G", "-1", "1X", "1,5G"):
        with pytest.raises(UsageError):
            parse_bytes(text)


def test_cpu_lists() -> None:
    """A list of numbers and ranges names CPUs that this process may use."""
    mine = sorted(os.sched_getaffinity(0))
    assert parse_cpus(",".join(map(str, mine))) == tuple(mine)
    assert parse_cpus(f"{mine[0]}-{mine[0]}") == (mine[0],)


def test_flags_can_be_written_again() -> None:
    """Given values become the command line that gives them: what `cluster start` hands on."""
    values = {"model": "demo", "min_nodes": 2, "join": ("a", "b"), "weight": None}
    assert as_flags(values) == ["--model", "demo", "--min-nodes", "2", "--join", "a", "--join", "b"]
    assert as_flags({"witness": True, "drain_timeout": 2.5}) == [
        "--witness",
        "--drain-timeout",
        "2.5",
    ]
    assert as_flags({"witness": False, "local_links": True}) == ["--local-links"]
    assert as_flags({"local_links": False}) == ["--no-local-links"]
