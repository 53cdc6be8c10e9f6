"""The machine's read bandwidth: every given CPU reads memory at once, for a fixed time.

Each CPU is a process of its own, pinned, reading an array far larger than any cache with torch's
vectorised maximum (which does nothing but read). The sum over CPUs is what weights can be streamed
at, and so the limit of decoding one token at a time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import click

from p2pinfer.errors import P2pinferError

ARRAY_BYTES = 512 << 20
SECONDS = 1.5


def read_bandwidth(cpus: Sequence[int]) -> float:
    """GB/s (1e9 bytes) that `cpus`, one reader each, read together."""
    command = [sys.executable, "-m", "p2pinfer.bench.bandwidth"]
    readers = [
        subprocess.Popen(
            [*command, "--cpu", str(cpu)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for cpu in cpus
    ]
    try:
        for reader in readers:
            _expect(reader, "ready")
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("go\n")
            reader.stdin.flush()
        return sum(float(_expect(reader, "")) for reader in readers)
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def _expect(reader: subprocess.Popen[str], word: str) -> str:
    assert reader.stdout is not None
    line = reader.stdout.readline().strip()
    if not line or (word and line != word):
        raise P2pinferError(f"a bandwidth reader ended early (exit code {reader.poll()})")
    return line


@click.command()
@click.option("--cpu", type=int, required=True)
def main(cpu: int) -> None:
    """Read memory on one CPU when told to, and print GB/s."""
    import os

    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})
    torch.set_num_threads(1)
    array = torch.ones(ARRAY_BYTES // 4)
    array.amax()
    print("ready", flush=True)
    sys.stdin.readline()
    began, reads = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < SECONDS:
        array.amax()
        reads += 1
    print(reads * ARRAY_BYTES / elapsed / 1e9, flush=True)


if __name__ == "__main__":
    main()
