"""AMD's ZenDNN, where it is here and fits: the operators of `zentorch`.

On AMD's processors its products of few rows read weights a quarter to a half faster than oneDNN's
(decision 30), and its attention over many keys takes half the time of torch's. Of the package only
the library of operators is loaded: to import it takes seconds, since it brings along what
`torch.compile` needs.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = "zentorch"
LIBRARY = "libzentorch.so"
VENDOR = "AuthenticAMD"
CPU_FILE = Path("/proc/cpuinfo")

ALGORITHM = "1"
"""Of `ZENDNNL_MATMUL_ALGO`: the only one whose packed weights can be kept. Others, and the choice
by trial that a user's environment may ask for, round otherwise from one product to the next."""

OTHERS = ("DLP_", "AOCL_DLP_")
"""Variables of the library below begin so; with threads or instructions of their own its products
are wrong."""


@lru_cache(maxsize=1)
def missing() -> str:
    """Load the operators. Returns why that cannot be; empty where they are there."""
    try:
        of_package = version(PACKAGE) or "of no version"  # what is damaged has none
    except PackageNotFoundError:
        return f"the package {PACKAGE} is not installed"
    if _release(of_package) != _release(torch.__version__):
        return f"{PACKAGE} {of_package} is not for torch {torch.__version__}"
    # Finding a package that is no part of another does not import it.
    found = importlib.util.find_spec(PACKAGE)
    folders = found.submodule_search_locations if found else None
    if not folders:
        return f"{PACKAGE} {of_package} has no folder"
    for name in [each for each in os.environ if each.startswith(OTHERS)]:
        del os.environ[name]
    os.environ["ZENDNNL_MATMUL_ALGO"] = ALGORITHM
    try:
        torch.ops.load_library(str(Path(folders[0]) / LIBRARY))  # type: ignore[no-untyped-call]
        fits = torch.ops.zentorch.zentorch_is_avx512_supported()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{PACKAGE} {of_package} cannot be loaded: {str(error).partition(chr(10))[0]}"
    return "" if fits else "this processor has no AVX-512"


def is_for(dtype: torch.dtype) -> bool:
    """Whether the operators, which are loaded, are for weights in `dtype` on this processor."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.zentorch.zentorch_is_bf16_supported())
    return dtype is torch.float32


@lru_cache(maxsize=1)
def is_of_vendor(path: Path = CPU_FILE) -> bool:
    """Whether this processor is one that the library is made for."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.startswith("vendor_id") and line.endswith(VENDOR) for line in lines)


def _release(of_version: str) -> list[str]:
    """The part of a version that programs are compiled for."""
    return of_version.split(".")[:2]
