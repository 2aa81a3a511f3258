"""bitsandbytes on fake tensors, as its CUDA backend behaves.

bitsandbytes' own Python (Linear4bit, MatMul4Bit, MatMul8bitLt, quantize_4bit, the optimizers) runs
as it is. What is replaced: parameter subclasses, which cannot wrap a fake tensor; the branches
that look for a CPU; and the insides of the CUDA kernels (`KERNELS`, `SCRATCH`), after
bitsandbytes/backends/cuda/ops.py and backends/default/ops.py of version 0.50.2.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vramplan.memory import outliers
from vramplan_launcher.trace.reduction import Processors


def replace_linears(model: Any, recipe: dict[str, Any], compute: torch.dtype) -> None:
    """Puts bitsandbytes' modules in, as transformers' quantizers do before weights load."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    kind = recipe["quantization"]
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
        model.is_loaded_in_8bit = True
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=recipe["double_quant"],
            bnb_4bit_compute_dtype=compute,
        )
        model.is_loaded_in_4bit = True
    keep = get_keys_to_not_convert(model) + list(model._keep_in_fp32_modules or [])
    before = {name: value.dtype for name, value in model.named_parameters()}
    replace_with_bnb_linear(model, modules_to_not_convert=keep, quantization_config=config)
    for name, value in model.named_parameters():  # made in fp32; loaded in the model's dtype
        if name.endswith(".bias") and value.dtype != before[name]:
            value.data = value.data.to(before[name])
    model.is_quantized = True


def is_quantized_linear(module: Any) -> bool:
    """Whether bitsandbytes holds this module's weight."""
    bnb: Any = importlib.import_module("bitsandbytes")

    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def load_weight(module: Any, dtype: torch.dtype) -> None:
    """One weight arrives in `dtype` on the device and is quantized there."""
    bnb: Any = importlib.import_module("bitsandbytes")

    old = module.weight
    value = torch.empty(tuple(old.shape), dtype=dtype)
    if isinstance(module, bnb.nn.Linear4bit):
        packed, state = bnb.functional.quantize_4bit(
            value,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        new: Any = nn.Parameter(packed, requires_grad=False)
        for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
            setattr(new, name, getattr(old, name))
        new.quant_state = module.quant_state = state
        new.bnb_quantized, new.module = True, module
    else:
        half = value.to(torch.float16)  # the loader sends it to the host and back as fp16
        packed, scale, _ = bnb.functional.int8_vectorwise_quant(half)
        new = nn.Parameter(packed, requires_grad=False)
        new.CB, new.SCB, new.has_fp16_weights = packed, scale, False
    module._parameters["weight"] = new


@contextlib.contextmanager
def cuda_backend(counter: Any) -> Iterator[None]:
    """While open, bitsandbytes' Python takes the branches that it takes on CUDA."""
    if not installed():
        yield
        return
    bnb: Any = importlib.import_module("bitsandbytes")
    from bitsandbytes import functional
    from bitsandbytes.autograd import _functions
    from bitsandbytes.optim import optimizer

    def matmul(
        rows: Any,
        weight: Any,
        out: Any = None,
        state: Any = None,
        threshold: float = 0.0,
        bias: Any = None,
    ) -> Any:
        state = state or _functions.MatmulLtState()
        if threshold > 0.0:
            state.threshold = threshold
        enabled = torch.is_autocast_enabled(counter.device)
        counter.autocast = torch.get_autocast_dtype(counter.device) if enabled else None
        return _functions.MatMul8bitLt.apply(rows, weight, out, bias, state)

    def paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        with counter.outside():
            out: Any = torch.empty(shape, dtype=dtype)
        out.is_paged, out.page_deviceid = True, 0
        return cast(torch.Tensor, out)

    def state_buffer(
        self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        if not self.is_paged or p.numel() < 1e5:
            return torch.zeros_like(p, dtype=dtype)
        return paged(*p.shape, dtype=dtype)

    def dynamic_map(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty(256, dtype=torch.float32)  # its callers send it to the device

    patches: list[tuple[Any, str, Any]] = [
        (bnb, "matmul", matmul),
        (functional, "get_paged", paged),
        (functional, "fill", lambda *a, **k: None),
        (functional, "prefetch_tensor", lambda *a, **k: None),
        (functional, "create_dynamic_map", dynamic_map),
        (functional, "name2qmap", {}),
        (optimizer.Optimizer8bit, "get_state_buffer", state_buffer),
        (optimizer, "sync_gpu", lambda *a: None),
        (optimizer.GlobalOptimManager, "_instance", None),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def _rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]


class Outliers:
    """How many columns of a linear's input int8 keeps in their own precision.

    As reckoned for random weights (`vramplan.memory.outliers`): those of a gated product, which is
    what a feed-forward's `down_proj` is given; no other input reaches the threshold.
    """

    def __init__(self, model: Any, counter: Any) -> None:
        config = model.config.get_text_config()
        hidden = getattr(config, "hidden_size", 0)
        deviation = getattr(config, "initializer_range", 0.02) * hidden**0.5
        self.deviation = int(deviation * outliers.MICRO)
        self.counter = counter
        self.fed: set[str] = set()
        for name, module in model.named_modules():
            gated = hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj")
            if gated and isinstance(getattr(module, "down_proj", None), nn.Module):
                self.fed.add(f"{name}.down_proj")

    def columns(self, rows: torch.Tensor) -> int:
        """Outlier columns of `rows`, the input of the linear that is running."""
        name = self.counter.module.removeprefix("base_model.model.").removesuffix(".base_layer")
        if name not in self.fed:
            return 0
        return int(rows.shape[-1] * outliers.share(self.deviation, _rows(rows)))


def _int8_quant(columns: Callable[[torch.Tensor], int]) -> Callable[..., Any]:
    """Rows of int8 with their scales, and which columns are outliers."""

    def kernel(func: Any, rows: torch.Tensor, threshold: float = 0.0) -> Any:
        return (
            torch.empty(rows.shape, dtype=torch.int8),
            torch.empty(_rows(rows), dtype=torch.float32),
            torch.empty(columns(rows), dtype=torch.int64) if threshold > 0.0 else None,
        )

    return kernel


def _int8_quant_scratch(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """`A.abs() >= threshold`: a 16-bit copy and a boolean one."""
    threshold = kwargs.get("threshold", args[1] if len(args) > 1 else 0.0)
    return 3 * args[0].numel() if threshold > 0.0 else 0


def _int8_mixed(counter: Any) -> Callable[..., Any]:
    """The result, and the outlier columns of the input (backends/default/ops.py).

    Those are added by `output.addmm`, which autocast sees: the result is of its dtype then.
    """

    def kernel(
        func: Any,
        rows: torch.Tensor,
        packed: torch.Tensor,
        weight: torch.Tensor,
        row_scales: Any,
        scales: Any,
        columns: torch.Tensor | None = None,
        bias: Any = None,
    ) -> Any:
        shape = (*packed.shape[:-1], weight.shape[0])
        if columns is None or not columns.numel():
            return torch.empty(shape, dtype=rows.dtype), torch.empty(0, dtype=rows.dtype)
        out = torch.empty(shape, dtype=counter.autocast or rows.dtype)
        return out, torch.empty((_rows(rows), columns.numel()), dtype=rows.dtype)

    return kernel


def _int8_scaled_scratch(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """The int32 product and, where the result is not fp16, the fp16 one before its cast."""
    return int(out.numel() * (4 if out.dtype == torch.float16 else 6))


def _int8_mixed_scratch(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """As without outliers; with them the weight's columns, dequantized, stay throughout.

    The most is needed by `int8_vectorwise_dequant`, which makes two fp32 tensors of the columns'
    packed copy; by the product, as without outliers; or by `output.addmm`, where autocast copies
    all three operands. Explains the peak of an int8 run on an H100 to 1 KiB.
    """
    result, outliers_of_rows = out
    if not outliers_of_rows.numel():
        return _int8_scaled_scratch(func, args, kwargs, result)
    size, kept = args[0].element_size(), result.numel() * result.element_size()
    columns, count = args[2].shape[0] * outliers_of_rows.shape[1], result.numel()
    product = count * (size + (4 if args[0].dtype == torch.float16 else 6))
    added = count * size
    if result.dtype != args[0].dtype:
        added += result.element_size() * (count + outliers_of_rows.numel() + columns)
    dequantized = columns * (1 + 4 + 4) - kept
    return int(max(dequantized, columns * size + product - kept, columns * size + added))


@functools.cache
def _custom_gemm() -> tuple[Any, int]:
    """bitsandbytes' own rule of when 4-bit products skip dequantizing, read from its source.

    The module that holds it cannot be imported without CUDA.
    """
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "backends" / "cuda" / "ops.py"
    tree = ast.parse(path.read_text())
    wanted = "_gemm_4bit_use_custom_cuda"
    body: list[ast.stmt] = []
    most = 1536
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == wanted:
            node.decorator_list = []
            body.append(node)
        if isinstance(node, ast.Assign) and "_GEMM_4BIT_CUSTOM_FLOOR_M" in ast.unparse(node):
            body.append(node)
    if not body:
        return None, 0
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), space)
    return space, most


def uses_custom_gemm(
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, int],
    block: int,
    capability: str,
    processors: Processors,
) -> bool:
    """Whether a 4-bit product of `rows` rows reads the packed weight without dequantizing it."""
    space, most = _custom_gemm()
    if not space or rows > most or shape[1] % block:
        return False
    major, minor = (int(part) for part in capability.split("."))
    space["_gpu_dispatch_props"] = lambda _: (processors.count, major, minor)
    return bool(space["_gemm_4bit_use_custom_cuda"](0, dtype, rows, *shape))


def _gemm_scratch(capability: str, processors: Processors) -> Callable[..., int]:
    def rule(func: Any, args: Any, kwargs: Any, out: Any) -> int:
        left, _, shape, _, block = args[:5]
        if uses_custom_gemm(left.dtype, _rows(left), tuple(shape), block, capability, processors):
            return 0
        need: int = shape[0] * shape[1] * left.element_size()
        nested = kwargs.get("absmax_8bit")
        return need if nested is None else need + 2 * 4 * nested.numel()

    return rule


def kernels(found: Outliers) -> dict[Any, Any]:
    """Replaced results of bitsandbytes' operations."""
    if not installed():
        return {}
    ops = torch.ops.bitsandbytes
    return {
        ops.int8_vectorwise_quant.default: _int8_quant(found.columns),
        ops.int8_mixed_scaled_mm.default: _int8_mixed(found.counter),
    }


def scratch(capability: str, processors: Processors) -> dict[Any, Any]:
    """What bitsandbytes' CUDA kernels take inside."""
    if not installed():
        return {}
    ops = torch.ops.bitsandbytes
    return {
        ops.int8_vectorwise_quant.default: _int8_quant_scratch,
        ops.int8_mixed_scaled_mm.default: _int8_mixed_scratch,
        ops.int8_scaled_mm.default: _int8_scaled_scratch,
        ops.gemm_4bit.default: _gemm_scratch(capability, processors),
    }


def notices(added_bias: Callable[[Any], None], capability: str) -> dict[Any, Any]:
    """4-bit products that dequantize the weight end in torch's own product with a bias."""
    if not installed():
        return {}

    def gemm_4bit(
        left: Any,
        packed: Any,
        shape: Any,
        absmax: Any,
        block: int,
        kind: str,
        *rest: Any,
        **kw: Any,
    ) -> None:
        few = uses_custom_gemm(
            left.dtype, _rows(left), tuple(shape), block, capability, Processors()
        )
        if not few:
            added_bias(rest[0] if rest else kw.get("bias"))

    return {torch.ops.bitsandbytes.gemm_4bit.default: gemm_4bit}


def installed() -> bool:
    """Whether bitsandbytes can be imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for CPU kernels
    try:
        import bitsandbytes  # noqa: F401  (defines its operations)
    except ImportError:
        return False
    return True
