"""Products whose bits depend on nothing but their row and their weight."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from p2pinfer.device import kernels_of, use_kernels
from p2pinfer.errors import UsageError
from p2pinfer.model import kernels, linear, zendnn
from p2pinfer.model.kernels import library as library_of
from p2pinfer.model.linear import (
    MIN_ROWS,
    Diagonal,
    OnednnLinear,
    PlainLinear,
    SideBySide,
    ZendnnLinear,
    join,
    pack,
    padded_rows,
)
from p2pinfer.types import DType
from tests.model_specs import TWO_LAYERS

SHAPES = (
    (48, 16),
    (64, 80),
    (96, 33),
    (224, 192),
    (256, 2048),
    (1024, 512),
    (2048, 1536),
    (14336, 64),
)
"""(in, out) of small models and of one unit of a large one."""

ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64, 100, 128, 257, 600)


CLASSES = {"onednn": OnednnLinear, "zendnn": ZendnnLinear}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_and_kernels() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    kernels.use("auto")


@pytest.fixture(params=CLASSES)
def library(request: pytest.FixtureRequest) -> str:
    """Each of the libraries that can multiply here, in use."""
    name: str = request.param
    if name == "zendnn" and zendnn.missing():
        pytest.skip(f"ZenDNN cannot multiply here: {zendnn.missing()}")
    kernels.use(name)
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_rows_slices_or_threads(
    shape: tuple[int, int], dtype: torch.dtype, library: str
) -> None:
    """A row's result is the same alone, in any batch, by any slice, on one thread or three."""
    inputs, outputs = shape
    torch.manual_seed(inputs)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype)
    x = torch.randn(max(ROWS), inputs, dtype=dtype)
    torch.set_num_threads(1)
    product = pack(weight, bias)
    assert isinstance(product, CLASSES[library])
    expected = product(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            assert torch.equal(product(x[:rows].contiguous()), expected[:rows]), (threads, rows)
    for rows in (MIN_ROWS, 600):
        place = torch.empty_like(expected[:rows])
        product.into(place, x[:rows].contiguous())
        assert torch.equal(place, expected[:rows]), rows
    for start, end in ((0, 16), (0, outputs // 2), (outputs // 2, outputs)):
        part = pack(weight[start:end].clone(), bias[start:end].clone())
        assert torch.equal(part(x[:5].contiguous()), expected[:5, start:end]), (start, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_one_row_of_each_product_has_the_bits_that_it_has_alone(
    count: int, shape: tuple[int, int], dtype: torch.dtype, library: str
) -> None:
    """Weights that are joined multiply a row of each at once, and by themselves what else comes."""
    inputs, outputs = shape
    torch.manual_seed(count)
    products = [pack(torch.randn(outputs, inputs, dtype=dtype)) for _ in range(count)]
    x = torch.randn(count, 7, inputs, dtype=dtype)
    expected = torch.stack([product(of) for product, of in zip(products, x, strict=True)])
    joined = join(products)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (1, 5, 7):
            side_by_side = SideBySide(products, (rows, max(rows, MIN_ROWS)))
            side_by_side.multiply(x[:, : max(rows, MIN_ROWS)])
            assert torch.equal(torch.cat(side_by_side.results), expected[:, :rows]), rows
        if joined:
            diagonal = Diagonal(joined)
            diagonal.multiply(x)
            assert torch.equal(torch.cat(diagonal.results), expected[:, :1])
    assert sum(many for _, many in joined) == (count if joined else 0)
    assert all(1 < many <= MIN_ROWS for _, many in joined)


def test_weights_are_joined_where_their_layout_allows_it(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZenDNN's lie one above the other if they are of whole panels, of 64 rows; different shapes
    and oneDNN's, which nobody can look into, do not, and large ones are left apart."""
    of_units = [pack(torch.randn(256, 64, dtype=torch.bfloat16)) for _ in range(5)]
    assert [many for _, many in join(of_units)] == ([2, 3] if library == "zendnn" else [])
    assert not join(of_units[:1])
    assert not join([*of_units, pack(torch.randn(256, 128, dtype=torch.bfloat16))])
    assert not join([pack(torch.randn(96, 64, dtype=torch.bfloat16)) for _ in range(5)])
    large = [pack(torch.randn(320, 64, dtype=torch.bfloat16)) for _ in range(2)]
    monkeypatch.setattr(linear, "MAX_JOINED_BYTES", 2 * large[0].nbytes - 1)
    assert not join(large)
    if library == "zendnn":
        memory = {each.packed.untyped_storage().data_ptr() for each in of_units}
        assert len(memory) == 2, "each has a part of what two or three have together"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_libraries_multiply_alike(dtype: torch.dtype, library: str) -> None:
    """What they give, the plain product included, is the same up to rounding."""
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 128, dtype=dtype), torch.randn(96, dtype=dtype)
    x = torch.randn(2, 128, dtype=dtype)
    plain = PlainLinear(weight, bias)
    assert plain(x).shape == (2, 96)
    exact = x.double() @ weight.double().T + bias.double()
    assert torch.allclose(plain(x).double(), exact, atol=0.1, rtol=0.02)
    assert torch.allclose(pack(weight, bias)(x).double(), exact, atol=0.1, rtol=0.02)
    assert plain.nbytes == weight.nbytes


def test_few_rows_are_padded() -> None:
    """A batch is computed with at least MIN_ROWS rows."""
    assert [padded_rows(n) for n in (1, MIN_ROWS, 9)] == [MIN_ROWS, MIN_ROWS, 9]
    assert [padded_rows(n, "int8") for n in (1, 2, 9)] == [1, 2, 9]
    assert [padded_rows(n, "int4") for n in (1, 2, 9)] == [1, 2, 9]


def test_weights_that_are_freed_leave_nothing_behind(library: str) -> None:
    """A weight at the place of a freed one is multiplied as itself: no layout is remembered by its
    address."""
    torch.manual_seed(1)
    x = torch.randn(MIN_ROWS, 128)
    for _ in range(64):
        weight = torch.randn(96, 128)
        product = pack(weight)
        assert torch.allclose(product(x), x @ weight.T, atol=1e-3), library
        del product, weight


def test_zendnn_is_taken_by_itself_on_the_processors_that_it_is_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Elsewhere, and where it cannot be loaded, it is not; nor for number formats that it lacks."""
    here = "" if zendnn.missing() else "zendnn"
    monkeypatch.setattr(zendnn, "is_of_vendor", lambda: True)
    assert library_of(torch.float32, CPU) == (here or "onednn")
    assert library_of(torch.float16, CPU) == "torch"
    assert library_of(torch.float32, torch.device("cuda")) == "torch"
    monkeypatch.setattr(zendnn, "is_of_vendor", lambda: False)
    assert library_of(torch.float32, CPU) == "onednn"
    monkeypatch.setattr(zendnn, "is_of_vendor", lambda: True)
    monkeypatch.setattr(zendnn, "missing", lambda: "it is not here")
    assert library_of(torch.float32, CPU) == "onednn"


def test_zendnn_where_it_cannot_be_had_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for it is told why not, and what to do."""
    monkeypatch.setattr(zendnn, "missing", lambda: "the package zentorch is not installed")
    with pytest.raises(UsageError, match=r"--kernels zendnn: .* not installed; take --kernels"):
        use_kernels("zendnn", TWO_LAYERS, CPU)
    use_kernels("auto", TWO_LAYERS, CPU)
    assert kernels_of(TWO_LAYERS, CPU) == "onednn"
    # A witness computes nothing, and a GPU has its own.
    use_kernels("zendnn", None, CPU)
    assert kernels_of(None, CPU) == ""
    use_kernels("zendnn", TWO_LAYERS, torch.device("cuda:1"))
    assert kernels_of(TWO_LAYERS, torch.device("cuda:1")) == "torch"


def test_zendnn_for_a_number_format_that_it_lacks_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor without bfloat16 instructions; quantised weights have a bfloat16 cache."""
    monkeypatch.setattr(zendnn, "missing", lambda: "")
    monkeypatch.setattr(zendnn, "is_for", lambda dtype: dtype is torch.float32)
    use_kernels("zendnn", TWO_LAYERS, CPU)
    assert kernels_of(TWO_LAYERS, CPU) == "zendnn"
    with pytest.raises(UsageError, match=r"does not compute in this number format"):
        use_kernels("zendnn", replace(TWO_LAYERS, dtype=DType.FLOAT16), CPU)
    quantised = replace(TWO_LAYERS, quant="int4", kv_dtype=DType.BFLOAT16)
    with pytest.raises(UsageError, match=r"does not compute in this number format"):
        use_kernels("zendnn", quantised, CPU)


@pytest.mark.parametrize(
    ("of_torch", "of_package", "why"),
    [
        ("2.15.0+cpu", "2.13.0.2", "zentorch 2.13.0.2 is not for torch 2.15.0"),
        ("2.13.1", None, "not installed"),
        ("2.13.1", "", "zentorch of no version is not for torch 2.13.1"),
        ("2.13.1", "2.13.9", "cannot be loaded: .*libzentorch.so"),
    ],
)
def test_a_library_that_does_not_fit_is_not_loaded(
    of_torch: str,
    of_package: str | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Compiled for another torch, not there, or damaged: the reason says which."""

    def version(_: str) -> str:
        if of_package is None:
            raise PackageNotFoundError
        return of_package

    (tmp_path / "zentorch").mkdir()
    (tmp_path / "zentorch" / "__init__.py").touch()
    (tmp_path / "zentorch" / zendnn.LIBRARY).write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(zendnn, "version", version)
    monkeypatch.setattr(torch, "__version__", of_torch)
    assert re.search(why, zendnn.missing.__wrapped__())


def test_the_processor_is_known_by_its_vendor(tmp_path: Path) -> None:
    """As Linux tells it; where it does not, it is none of AMD's."""
    file = tmp_path / "cpuinfo"
    for vendor, is_amd in (("AuthenticAMD", True), ("GenuineIntel", False)):
        file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel\t: 17\n")
        assert zendnn.is_of_vendor.__wrapped__(file) is is_amd
    assert not zendnn.is_of_vendor.__wrapped__(tmp_path / "none")


WRONG_ENVIRONMENT = """
import torch
from p2pinfer.model import kernels
from p2pinfer.model.linear import pack
kernels.use("zendnn")
torch.set_num_threads(2)
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    weight, x = torch.randn(512, 768, dtype=dtype), torch.randn(70, 768, dtype=dtype)
    found, exact = pack(weight)(x).double(), x.double() @ weight.double().T
    assert (found - exact).norm() < 0.01 * exact.norm()
"""


@pytest.mark.skipif(bool(zendnn.missing()), reason="ZenDNN cannot multiply here")
def test_a_users_environment_does_not_make_products_wrong() -> None:
    """Threads and instructions of the library below, which it would take from there, are left to
    us."""
    theirs = {
        "DLP_NUM_THREADS": "1",
        "DLP_IC_NT": "2",
        "AOCL_DLP_ENABLE_INSTRUCTIONS": "avx2",
        "ZENDNNL_MATMUL_ALGO": "auto",
    }
    subprocess.run(
        [sys.executable, "-c", WRONG_ENVIRONMENT], env={**os.environ, **theirs}, check=True
    )
