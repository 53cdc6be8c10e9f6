"""What a node finds out about itself before it starts: its model, its memory, its free ports."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from p2pinfer.config import PORTS_PER_NODE, NodeSettings, parse_address
from p2pinfer.core.events import NodeConfig
from p2pinfer.core.timing import PRESETS
from p2pinfer.errors import UsageError
from p2pinfer.model.checkpoint import Checkpoint, Progress, content_id
from p2pinfer.model.config import LlamaConfig, load_config, model_spec, resolve_model
from p2pinfer.model.tokenizer import Tokenizer
from p2pinfer.pipe import WorkerConfig
from p2pinfer.state_dir import StateDir, new_identity
from p2pinfer.types import DType, Member, ModelSpec

PORT_POLL_S: Final = 0.05

COPIES_FOLDER: Final = "quantised"
"""Of the state folder: quantised weights (`model/quantised_copies`)."""


@dataclass(frozen=True)
class LocalModel:
    """The model's folder, found whole as far as headers tell."""

    folder: Path
    config: LlamaConfig
    tokenizer: Tokenizer
    dtype: DType
    name: str

    @classmethod
    def open(cls, settings: NodeSettings) -> LocalModel:
        """Check configuration, weights files and tokenizer; raises `ModelError`."""
        folder = resolve_model(settings.model)
        config = load_config(folder)
        Checkpoint.open(folder, config)
        tokenizer = Tokenizer.load(folder, config)
        dtype = config.dtype if settings.dtype == "auto" else DType(settings.dtype)
        name = "demo" if settings.model == "demo" else folder.resolve().name
        return cls(folder, config, tokenizer, dtype, name)

    def spec(self, settings: NodeSettings, progress: Progress) -> ModelSpec:
        """What the cluster must agree on; hashes all files, which takes a second per gigabyte
        the first time. `progress` gets (bytes done, bytes in all)."""
        model_id = content_id(self.folder, progress=progress)
        return model_spec(
            self.config,
            name=self.name,
            model_id=model_id,
            dtype=self.dtype,
            quant=settings.quant,
            wire_dtype=settings.wire_dtype,
        )


def node_config(settings: NodeSettings, spec: ModelSpec | None, state: StateDir) -> NodeConfig:
    """What the core needs to know of this start of this node; `spec` is None for a witness."""
    return NodeConfig(
        member=Member(
            node_id=state.node_id,
            boot_id=new_identity(),
            name=settings.name,
            address=settings.advertised_address,
            pid=os.getpid(),
            threads=settings.threads,
            weight=settings.work_weight,
            kv_bytes=settings.kv_memory,
            witness=settings.witness,
            keeps_inputs=settings.keep_inputs,
            keeps_warm=settings.standby == "warm",
        ),
        model=spec,
        stored=state.read(),
        cluster_id=new_identity(),
        join=settings.join,
        layout=settings.layout,
        use_nodes=settings.use_nodes,
        replicas=settings.replicas,
        weighed=settings.weight is not None,
        min_nodes=settings.min_nodes,
        join_timeout=settings.join_timeout,
        wait_for_nodes=settings.wait_for_nodes,
        orphan_timeout=settings.orphan_timeout,
        drain_timeout=settings.drain_timeout,
        quorum=settings.quorum,
        timing=PRESETS[settings.timing],
    )


def worker_config(
    settings: NodeSettings, folder: Path | None, spec: ModelSpec | None, member: Member
) -> WorkerConfig:
    """What the worker needs to know of its node; a witness has neither folder nor model."""
    host, port = parse_address(settings.listen)
    return WorkerConfig(
        node_id=member.node_id,
        boot_id=member.boot_id,
        name=member.name,
        model_folder=str(folder.resolve()) if folder else "",
        model=spec,
        listen_host=host,
        step_port=port + 1,
        bulk_port=port + 2,
        device=settings.device,
        kernels=settings.kernels,
        threads=settings.threads,
        standby=settings.standby,
        copies=str(settings.state_dir.resolve() / COPIES_FOLDER) if spec else "",
        speed=settings.speed,
        local_links=settings.local_links,
    )


def await_worker_ports(
    host: str, port: int, patience_s: float, on_wait: Callable[[int], None]
) -> None:
    """Wait until the worker of the node on `port` can listen on its own two.

    `on_wait` gets the port that is waited for, again and again, and may raise. Raises `UsageError`
    where waiting is of no use, or if a port is taken after `patience_s`: a node that was killed
    leaves a worker behind that ends with it, but gives gigabytes back before it closes its ports.
    """
    deadline = time.monotonic() + patience_s
    pause = threading.Event()
    for other in range(port + 1, port + PORTS_PER_NODE):
        while error := _refusal(host, other):
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise UsageError(
                    f"port {other} is taken on {host}: {error.strerror}; a node uses its port and "
                    f"the next {PORTS_PER_NODE - 1}: choose another address with --listen"
                )
            on_wait(other)
            pause.wait(PORT_POLL_S)


def _refusal(host: str, port: int) -> OSError | None:
    """Why a port cannot be had; None: it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As libzmq binds: connections of a node that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, port))
        except OSError as error:
            return error
    return None
