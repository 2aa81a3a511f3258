"""What stays: weights as loaded and as trained, adapters, gradients, optimizer states.

Sources: transformers 5.17 integrations/bitsandbytes.py; bitsandbytes 0.50 functional.py
(quantize_4bit, QuantState), nn/modules.py (Int8Params), optim/optimizer.py (init_state);
peft 0.21 tuners/lora/layer.py, utils/other.py (prepare_model_for_kbit_training).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from vramplan.errors import UnknownName
from vramplan.memory.allocator import rounded
from vramplan.memory.precision import Policy
from vramplan.memory.values import ITEMSIZE
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import Tensor, inventory

ABSMAX_BLOCK = 64  # elements of a 4-bit weight that share an absmax
NESTED_BLOCK = 256  # absmax values that share one of the second level (double quant)
CODE_4BIT = 16 * 4  # QuantState.code: 16 fp32 values
CODE_8BIT = 256 * 4  # state2.code: 256 fp32 values
SCALAR = 4


@dataclass(frozen=True, slots=True)
class Trained:
    """Equal parameters that get gradients: elements of each, bytes an element, how many."""

    name: str
    numel: int
    itemsize: int
    count: int
    embedding: bool
    shape: tuple[int, ...]
    linear: bool = False
    """The weight of an nn.Linear."""

    @property
    def module(self) -> str:
        """The module that holds it."""
        return self.name.removesuffix(".weight")


class Layout(NamedTuple):
    """Bytes of the weights, and what is trained."""

    parameters: int
    trainable_parameters: int
    loaded: int
    """After from_pretrained, buffers included."""
    load_peak: int
    weights: int
    """After preparation (upcasts) and with the adapters: what stays."""
    prepare_peak: int
    trained: tuple[Trained, ...]
    gradients: int


@lru_cache(maxsize=1024)
def layout(arch: Architecture, policy: Policy, allocator: str) -> Layout:
    """The weights of `arch` under `policy`. Raises UnknownName for targets that match nothing."""
    tensors = inventory(arch)
    adapters = tuple(adapters_of(tensors, policy))
    if policy.rank is not None and not adapters:
        raise UnknownName("target module", policy.targets, _module_names(tensors))
    trained = adapters if policy.rank is not None else tuple(_trained(tensors, policy))
    loaded = sum(t.count * loaded_bytes(t, policy, allocator) for t in tensors)
    adapter_bytes = sum(a.count * rounded(a.numel * a.itemsize, allocator) for a in adapters)
    prepared, peak = _prepare(tensors, policy, allocator, loaded)
    return Layout(
        parameters=sum(t.numel * t.count for t in tensors if t.role != "buffer"),
        trainable_parameters=sum(t.numel * t.count for t in trained),
        loaded=loaded,
        load_peak=loaded + max(_quantizing(tensors, policy), _merging(tensors, policy)),
        weights=prepared + adapter_bytes,
        prepare_peak=max(peak, prepared + adapter_bytes),
        trained=trained,
        gradients=sum(t.count * rounded(t.numel * t.itemsize, allocator) for t in trained),
    )


def is_quantized(tensor: Tensor, policy: Policy) -> bool:
    """Whether bitsandbytes stores it."""
    return policy.quantization is not None and tensor.quantizable


def loaded_bytes(tensor: Tensor, policy: Policy, allocator: str) -> int:
    """Bytes of one tensor after from_pretrained."""
    if not is_quantized(tensor, policy):
        return rounded(tensor.numel * ITEMSIZE[tensor.dtype or policy.dtype], allocator)
    if policy.quantization == "int8":
        # Int8Params.SCB: an fp32 scale for each output; a Conv1D's weight is transposed first
        rows = tensor.shape[-1 if tensor.transposed else 0] * 4
        return rounded(tensor.numel, allocator) + rounded(rows, allocator)
    return sum(rounded(part, allocator) for part in _packed(tensor.numel, policy.double_quant))


def _packed(numel: int, double_quant: bool) -> Iterator[int]:
    """A 4-bit weight: packed values, absmax values, code tables (and a second level of absmax)."""
    blocks = -(-numel // ABSMAX_BLOCK)
    yield -(-numel // 2)
    yield CODE_4BIT
    if not double_quant:
        yield blocks * 4
        return
    yield blocks
    yield -(-blocks // NESTED_BLOCK) * 4
    yield CODE_8BIT
    yield SCALAR  # the mean that is taken off before the second quantization


def _quantizing(tensors: tuple[Tensor, ...], policy: Policy) -> int:
    """While a weight is quantized it is there in the dtype it was loaded in as well."""
    sizes = [t.numel * ITEMSIZE[policy.dtype] for t in tensors if is_quantized(t, policy)]
    return max(sizes, default=0)


def _merging(tensors: tuple[Tensor, ...], policy: Policy) -> int:
    """Experts are saved one by one: while a layer's are merged, the parts are there as well."""
    sizes = [t.numel * ITEMSIZE[policy.dtype] for t in tensors if t.role == "expert" and t.former]
    return max(sizes, default=0)


def _prepare(
    tensors: tuple[Tensor, ...], policy: Policy, allocator: str, loaded: int
) -> tuple[int, int]:
    """prepare_model_for_kbit_training: one parameter after the other is upcast to fp32."""
    if policy.quantization is None:
        return loaded, loaded
    live = peak = loaded
    for t in tensors:
        if t.role == "buffer" or is_quantized(t, policy) or ITEMSIZE[t.dtype or policy.dtype] != 2:
            continue
        old, new = rounded(t.numel * 2, allocator), rounded(t.numel * 4, allocator)
        live += t.count * (new - old)
        peak = max(peak, live + old)
    return live, peak


def _trained(tensors: tuple[Tensor, ...], policy: Policy) -> Iterator[Trained]:
    for t in tensors:
        if t.role != "buffer":
            itemsize = ITEMSIZE[t.dtype or policy.weight_dtype]
            embedding, linear = t.role == "embedding", t.role in ("linear", "head")
            plain = linear and not t.transposed  # a Conv1D is none
            yield Trained(t.name, t.numel, itemsize, t.count, embedding, t.shape, plain)


def frozen(arch: Architecture, policy: Policy) -> tuple[Trained, ...]:
    """What adapters leave as it is, in the shapes that it is stored in."""
    if policy.rank is None:
        return ()
    found = []
    for t in inventory(arch):
        packed = is_quantized(t, policy) and policy.quantization != "int8"
        shape = (-(-t.numel // 2), 1) if packed else t.shape
        if t.role != "buffer":
            found.append(Trained(t.name, prod(shape), SCALAR, t.count, False, shape))
    return tuple(found)


def adapters_of(tensors: tuple[Tensor, ...], policy: Policy) -> Iterator[Trained]:
    """lora_A (rank x in) and lora_B (out x rank) of every adapted linear, router and expert.

    peft's ParamWrapper gives a parameter that merges several former modules their number times the
    rank, for every expert (peft 0.21, tuners/lora/layer.py, utils/transformers_weight_conversion).
    """
    rank, itemsize = policy.rank, ITEMSIZE[policy.adapter_dtype]
    if rank is None:
        return
    for t in tensors:
        module = t.name.removesuffix(".weight")
        wide = rank
        if policy.adapts_parameter(t.former):
            wide *= len(t.former) * (t.shape[0] if len(t.shape) == 3 else 1)
        elif not t.adaptable or not policy.adapts(module):
            continue
        n_out, n_in = reversed(t.shape[-2:]) if t.transposed else t.shape[-2:]
        for part, shape in (("lora_A", (wide, n_in)), ("lora_B", (n_out, wide))):
            numel = shape[0] * shape[1]
            yield Trained(f"{module}.{part}", numel, itemsize, t.count, False, shape, linear=True)


def _module_names(tensors: tuple[Tensor, ...]) -> list[str]:
    """The last parts of the names of modules that can be adapted."""
    names = {t.name.removesuffix(".weight").rpartition(".")[2] for t in tensors if t.adaptable}
    for t in tensors:
        names.update(former.rpartition(".")[2] for former in t.former)
    return sorted(names)
