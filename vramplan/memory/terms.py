"""Terms of an estimate that stay for a phase: weights, gradients, states, workspaces, inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vramplan.memory import allocator
from vramplan.memory.estimate import Estimate
from vramplan.memory.optimizer_states import optimizer_tables
from vramplan.memory.optimizers import states_of
from vramplan.memory.precision import Policy
from vramplan.memory.states import frozen, is_quantized, loaded_bytes
from vramplan.memory.timeline import INPUT_TENSORS, TOKEN
from vramplan.memory.values import ITEMSIZE
from vramplan.models.tensors import Tensor, inventory
from vramplan.recipe.optimizers import Optimizer, find_optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """A part of the peak. `formula` is in symbols, `figures` the same with numbers."""

    category: str
    what: str
    formula: str
    figures: str
    bytes: int
    source: str


def loading(e: Estimate) -> Iterator[Term]:
    """The peaks of from_pretrained and of prepare_model_for_kbit_training."""
    for tensor in inventory(e.architecture):
        yield _weight(e, tensor, prepared=False)
    layout, rest = e.parts.layout, e.peak_allocated - e.parts.layout.loaded
    if e.peak_phase == "load":
        what, source = "largest weight while it is quantized", "bitsandbytes 0.50 functional.py"
    else:
        what = "upcast of what is not quantized, the copy in progress"
        source = "peft 0.21 utils/other.py, prepare_model_for_kbit_training"
    yield Term(
        category="temporary",
        what=what,
        formula="peak - weights as loaded",
        figures=f"{e.peak_allocated} - {layout.loaded}",
        bytes=rest,
        source=source,
    )


def resident(e: Estimate) -> Iterator[Term]:
    for tensor in inventory(e.architecture):
        yield _weight(e, tensor, prepared=True)
    if e.policy.rank is not None:
        yield from _of_trained(e, "parameter", "adapter", "peft 0.21 tuners/lora/layer.py")
    yield from _optimizer_states(e)
    if e.parts.buckets:
        yield Term(
            category="buffer",
            what="DDP's gradient buckets",
            formula="a flat copy of all gradients",
            figures=f"{e.parts.buckets} B",
            bytes=e.parts.buckets,
            source="torch 2.13 torch/csrc/distributed/c10d/reducer.cpp, initialize_buckets",
        )
    yield Term(
        category="workspace",
        what="cuBLAS workspaces",
        formula="a workspace for each thread's handle",
        figures=f"{e.workspace} B",
        bytes=e.workspace,
        source="aten/src/ATen/cuda/CUDABlas.cpp, getChosenWorkspaceSize",
    )
    r = e.recipe
    tokens = f"{r.batch_size} x {r.seq_len} x {r.gradient_accumulation_steps}"
    yield Term(
        category="activation",
        what="inputs: input_ids, labels, attention_mask",
        formula=f"{INPUT_TENSORS} x {TOKEN} B x batch x seq x accumulation",
        figures=f"{INPUT_TENSORS} x {TOKEN} x {tokens}",
        bytes=INPUT_TENSORS * TOKEN * r.batch_size * r.seq_len * r.gradient_accumulation_steps,
        source="transformers 5.17 Trainer: int64, all micro-batches of a step at once",
    )


def _weight(e: Estimate, t: Tensor, *, prepared: bool) -> Term:
    policy, kind = e.policy, e.recipe.allocator
    shape = " x ".join(map(str, t.shape))
    if is_quantized(t, policy):
        each = loaded_bytes(t, policy, kind)
        formula, source = _quantized_formula(policy), "bitsandbytes 0.50 functional.py"
        figures = f"{t.count} x {each} B, n = {shape}"
    else:
        width = ITEMSIZE[t.dtype or policy.dtype]
        upcast = prepared and policy.quantization and t.role != "buffer" and width == 2
        width = 4 if upcast else width
        each = allocator.rounded(t.numel * width, kind)
        formula = f"count x {width} B x n" + _blocks(t.numel * width, each)
        figures = f"{t.count} x {width} x {shape}"
        source = "weights as loaded"
        if upcast:
            source = "peft 0.21 prepare_model_for_kbit_training: 16-bit weights become fp32"
    return Term(
        category="parameter",
        what=t.name,
        formula=formula,
        figures=figures,
        bytes=t.count * each,
        source=source,
    )


def _quantized_formula(policy: Policy) -> str:
    if policy.quantization == "int8":
        return "count x (n + 4 B x rows)"
    absmax = "n/64 + 4 B x n/64/256 + tables" if policy.double_quant else "4 B x n/64 + table"
    return f"count x (n/2 + {absmax})"


def _blocks(asked: int, got: int) -> str:
    return "" if asked == got else ", in blocks of 512 B"


def _of_trained(e: Estimate, category: str, what: str, source: str) -> Iterator[Term]:
    """A tensor as large as each trained parameter."""
    for t in e.parts.layout.trained:
        asked = t.numel * t.itemsize
        each = allocator.rounded(asked, e.recipe.allocator)
        yield Term(
            category=category,
            what=f"{what}: {t.name}",
            formula=f"count x {t.itemsize} B x n" + _blocks(asked, each),
            figures=f"{t.count} x {t.itemsize} x {' x '.join(map(str, t.shape))}",
            bytes=t.count * each,
            source=source,
        )


def gradients(e: Estimate, what: str) -> Iterator[Term]:
    yield from _of_trained(e, "gradient", what, "torch: a gradient has its parameter's dtype")


def _optimizer_states(e: Estimate) -> Iterator[Term]:
    optimizer, kind = find_optimizer(e.recipe.optimizer), e.recipe.allocator
    others = frozen(e.architecture, e.policy) if optimizer.states_of_frozen else ()
    for t, tensors in states_of(optimizer, e.parts.layout, e.policy.projection, others):
        sizes = Counter(size for size, paged in tensors if not paged)
        each = sum(k * allocator.rounded(size, kind) for size, k in sizes.items())
        yield Term(
            category="optimizer",
            what=f"{optimizer.name}: {t.name}",
            formula=f"count x ({' + '.join(_state(size, k, t.numel) for size, k in sizes.items())})"
            + _blocks(sum(k * size for size, k in sizes.items()), each),
            figures=f"{t.count} x {each} B, n = {' x '.join(map(str, t.shape))}",
            bytes=t.count * each,
            source=_optimizer_source(optimizer),
        )
    yield Term(
        category="optimizer",
        what="code tables that all 8-bit states share",
        formula="tables x 256 x 4 B",
        figures=f"{optimizer_tables(optimizer)} B",
        bytes=optimizer_tables(optimizer),
        source="bitsandbytes 0.50 optim/optimizer.py, fill_qmap",
    )


def _state(size: int, count: int, numel: int) -> str:
    text = f"{size // numel} B x n" if size % numel == 0 else f"{size} B"
    return text if count == 1 else f"{count} x {text}"


def _optimizer_source(optimizer: Optimizer) -> str:
    file = {
        "torch": "torch.optim",
        "transformers": "transformers 5.17 optimization.py",
        "bitsandbytes": "bitsandbytes 0.50 optim/optimizer.py, init_state",
        "torchao": "torchao 0.18 optim/adam.py",
        "galore_torch": "galore-torch 1.0",
        "apollo_torch": "apollo-torch 1.0.3 apollo.py",
        "lomo_optim": "lomo-optim 0.1.1",
        "grokadamw": "grokadamw 0.1.2",
        "schedulefree": "schedulefree 1.4.1",
        "optimi": "torch-optimi 0.3.3 stableadamw.py",
    }
    return f"{file[optimizer.package]}: {optimizer.class_name.rpartition('.')[2]}"


def step_transient(e: Estimate) -> Iterator[Term]:
    optimizer = find_optimizer(e.recipe.optimizer)
    size, gradients = e.parts.stepping.transient, e.parts.layout.gradients
    formula, figures = "what its variables hold at once, parameter by parameter", f"{size} B"
    if optimizer.stepping == "foreach":
        formula, figures = "temporaries x gradients", f"{size // gradients} x {gradients}"
    yield Term(
        category="temporary",
        what=f"{optimizer.name} while it steps",
        formula=formula,
        figures=figures,
        bytes=size,
        source=f"{_optimizer_source(optimizer)}, stepping {optimizer.stepping}",
    )
