"""Quantised products by onnxruntime: small graphs of `MatMulNBits`, called with bound buffers.

At accuracy level 4 a product quantises its inputs to int8 by row and by block of the row, and adds
up in integers within a block. A graph holds the products that follow one another with nothing of
ours between; it is not optimised, so that what it computes is what is written here. The library
copies weights into a layout of its own when a graph is made; ours may be freed after.

One thread computes in the caller's. More are a pool that all graphs of the process share: with a
pool for each, their threads keep one another from the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from p2pinfer.model.quantise import QuantisedWeight
from p2pinfer.model.stopwatch import PRODUCTS
from p2pinfer.model.unit_products import Norm

OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
"""Of ONNX and of `com.microsoft`: what onnxruntime 1.20 and later understand."""

CONTRIB = "com.microsoft"
ROWS = "rows"

ACCURACY_LEVEL = 4
"""Inputs as int8 by block."""

ROWS_TOGETHER = 2
"""Of weights in large blocks the last of an odd number of rows would take another kernel, with
other bits: a row of zeros makes the number even. That costs a fifth of an int4 product, and nothing
of an int8 one, which waits for the memory."""

SMALL_BLOCKS = 32
"""Of these, whatever their bits, a row's bits are the same in any number of rows."""

KEPT_ROWS = 16
"""Buffers for so many rows stay, for steps of any fewer: those of a prefill would take hundreds of
megabytes."""

ERRORS_ONLY = 3

onnxruntime.set_default_logger_severity(ERRORS_ONLY)


class _Threads:
    """How many threads the graphs of this process compute with; chosen once."""

    count = 1


def use_threads(count: int) -> None:
    """Let graphs that are made from now on compute with `count` threads; to be called once, before
    any is made."""
    if count > 1:
        onnxruntime.set_global_thread_pool_sizes(count, 1)
    _Threads.count = count


def threads() -> int:
    """How many threads graphs compute with."""
    return _Threads.count


class Graph:
    """What is to be computed, node by node. Values are named; all are float32, with the rows of a
    step in their last dimension but one."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Tensor] = {}
        self.rows_together = 1
        """Every number of rows is computed as a multiple of this."""
        self.constants: list[TensorProto] = []

    def product(self, x: str, weight: QuantisedWeight, out: str) -> str:
        """`out` = `x` times the weight's rows, plus its bias."""
        names = [f"{out}.values", f"{out}.scales"]
        parts = [weight.values, weight.scales]
        if weight.zeros is not None:
            names.append(f"{out}.zeros")
            parts.append(weight.zeros)
        self.weights.update(zip(names, parts, strict=True))
        if weight.form.block > SMALL_BLOCKS:
            self.rows_together = ROWS_TOGETHER
        result = out if weight.bias is None else f"{out}.unbiased"
        self.node(
            "MatMulNBits",
            [x, *names],
            [result],
            domain=CONTRIB,
            K=weight.inputs,
            N=weight.rows,
            bits=weight.form.bits,
            block_size=weight.form.block,
            accuracy_level=ACCURACY_LEVEL,
        )
        if weight.bias is not None:
            self.constant(f"{out}.bias", weight.bias)
            self.node("Add", [result, f"{out}.bias"], [out])
        return out

    def norm(self, x: str, norm: Norm, out: str) -> str:
        """`out` = `x` [..., width] by its root mean square and the norm's weight."""
        self.constant(f"{out}.weight", norm.weight)
        inputs = [x, f"{out}.weight"]
        self.node("SimplifiedLayerNormalization", inputs, [out], axis=-1, epsilon=norm.eps)
        return out

    def split(
        self, x: str, widths: Sequence[int], outs: Sequence[str], axis: int = -1
    ) -> Sequence[str]:
        """Cut `x` into pieces, side by side or along another axis."""
        if len(outs) == 1:
            self.node("Identity", [x], outs)
            return outs
        self.constant(f"{x}.widths", torch.tensor(widths))
        self.node("Split", [x, f"{x}.widths"], outs, axis=axis)
        return outs

    def turned(self, x: str, heads: int, angles: Sequence[str], out: str) -> str:
        """Rotary embedding of `heads` heads: `x` [1, rows, heads * head_dim] and `angles`, the
        names of cosines and sines [rows, head_dim / 2]."""
        # The rows of a step have their own angles, from the first one on.
        self.constant(f"{out}.first", torch.zeros(1, dtype=torch.int64))
        inputs = [x, f"{out}.first", *angles]
        self.node("RotaryEmbedding", inputs, [out], domain=CONTRIB, num_heads=heads)
        return out

    def silu_mul(self, gate: str, up: str, out: str) -> str:
        """`out` = silu(gate) * up."""
        self.node("QuickGelu", [gate], [f"{out}.silu"], domain=CONTRIB, alpha=1.0)
        self.node("Mul", [f"{out}.silu", up], [out])
        return out

    def constant(self, name: str, values: Tensor) -> None:
        """A small tensor that is part of the graph."""
        self.constants.append(numpy_helper.from_array(values.numpy(), name))

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> None:
        """An operation by its ONNX name."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))


class Value(NamedTuple):
    """An input or output of a graph, float32: its shape, in which `ROWS` stands for the rows of a
    step."""

    shape: tuple[int | str, ...]

    def of(self, rows: int) -> tuple[int, ...]:
        """The shape for so many rows."""
        return tuple(rows if isinstance(each, str) else each for each in self.shape)


class _Bound(NamedTuple):
    """Buffers for one number of rows, and the binding of a graph to them; what the graph computes
    beside these rows is not seen."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    binding: onnxruntime.IOBinding


class Session:
    """A graph ready to compute, with inputs and outputs by their names.

    `arrange` makes of the outputs, [rows, width] each, what `run` returns: once for the buffers
    that are kept, so that it may be views only.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, Value],
        outputs: Mapping[str, Value],
        arrange: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = tuple,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # An arena of its own per graph would keep what the longest prefill took, of every layer.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = 1
        if _Threads.count > 1:
            options.use_per_session_threads = False
        held = {name: weight.numpy() for name, weight in graph.weights.items()}
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in held.values()]
        options.add_external_initializers(list(held), values)
        self._session = onnxruntime.InferenceSession(
            _model(graph, inputs, outputs).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        self._inputs = dict(inputs)
        self._outputs = dict(outputs)
        self._arrange = arrange
        self._rows_together = graph.rows_together
        self._kept: tuple[list[Tensor], list[Tensor]] | None = None
        self._bound: dict[int, _Bound] = {}

    @PRODUCTS
    def run(self, rows: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of `inputs`, which have the shapes of theirs but for dimensions of 1
        before. They are good until the next call."""
        filler = -rows % self._rows_together
        if rows > KEPT_ROWS:
            if filler:
                inputs = tuple(functional.pad(each, (0, 0, 0, filler)) for each in inputs)
            whole = [each.contiguous() for each in inputs]
            outputs = [torch.empty(each.of(rows + filler)) for each in self._outputs.values()]
            bound = self._bind(rows, rows + filler, whole, outputs)
        else:
            if rows not in self._bound:
                self._bound[rows] = self._bind(rows, rows + filler, *self._buffers())
            bound = self._bound[rows]
            for place, given in zip(bound.inputs, inputs, strict=True):
                place.copy_(given)
        self._session.run_with_iobinding(bound.binding)
        return bound.outputs

    def _buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs for `KEPT_ROWS`. Fewer take the beginning of them: what lies there of
        another number of rows is overwritten, or becomes filler, which no other row sees."""
        if self._kept is None:
            most = KEPT_ROWS + -KEPT_ROWS % self._rows_together
            inputs = [torch.zeros(each.of(most)) for each in self._inputs.values()]
            self._kept = inputs, [torch.zeros(each.of(most)) for each in self._outputs.values()]
        return self._kept

    def _bind(
        self, rows: int, computed: int, inputs: list[Tensor], outputs: list[Tensor]
    ) -> _Bound:
        """A binding of buffers for `computed` rows, of which only `rows` are of interest."""
        binding = self._session.io_binding()
        taken, made = [], []
        for (name, value), memory in zip(self._inputs.items(), inputs, strict=True):
            shape = value.of(computed)
            binding.bind_input(name, "cpu", 0, np.float32, shape, memory.data_ptr())
            taken.append(memory.view(-1)[: prod(shape)].view(shape).narrow(-2, 0, rows))
        for (name, value), memory in zip(self._outputs.items(), outputs, strict=True):
            shape = value.of(computed)
            binding.bind_output(name, "cpu", 0, np.float32, shape, memory.data_ptr())
            made.append(memory.view(-1)[: prod(shape)].view(computed, -1)[:rows])
        return _Bound(tuple(taken), self._arrange(made), binding)


def _described(values: Mapping[str, Value]) -> list[ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape))
        for name, value in values.items()
    ]


def _model(graph: Graph, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> ModelProto:
    initialisers = [*graph.constants]
    for name, weight in graph.weights.items():
        kind = TensorProto.UINT8 if weight.dtype is torch.uint8 else TensorProto.FLOAT
        held = TensorProto(name=name, dims=list(weight.shape), data_type=kind)
        held.data_location = TensorProto.EXTERNAL
        held.external_data.add(key="location", value="memory")
        initialisers.append(held)
    whole = helper.make_graph(
        graph.nodes, "products", _described(inputs), _described(outputs), initialisers
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
    return helper.make_model(whole, opset_imports=opsets, ir_version=IR_VERSION)
