"""Training steps as transformers' `Trainer` and accelerate make them, under a `Counter`."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vramplan_launcher.trace import (
    autocast,
    build,
    cuda_ops,
    engine,
    flash,
    naming,
    quantized,
    reduction,
)
from vramplan_launcher.trace.blocks import Blocks
from vramplan_launcher.trace.counting import Counter, Phase
from vramplan_launcher.trace.reduction import Processors

DEFAULTS: dict[str, Any] = {
    "dtype": "bf16",
    "mixed_precision": "bf16",
    "quantization": None,
    "double_quant": True,
    "lora": None,
    "attention": "sdpa",
    "gradient_checkpointing": False,
    "optimizer": "adamw_torch_fused",
    "batch_size": 1,
    "seq_len": 2048,
    "gradient_accumulation_steps": 1,
    "allocator": "expandable_segments",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What a trace counted: `phases` in the order in which they ran, sizes in bytes."""

    phases: list[Phase]
    parameters: int
    trainable_parameters: int
    counter: Counter
    layers: int | None = None
    """Where the depth was cut: to how many layers."""
    head: str = ""
    """The name of the module that makes the logits."""
    base_parameters: int = 0
    """Parameters of the model itself: without adapters, quantized ones as what they stand for."""
    managed: int = 0
    """Bytes of paged optimizer states, which are on no counter."""

    def step(self, number: int) -> dict[str, Phase]:
        """The phases of step `number` (the first is 1) by name; step 0 is load and prepare."""
        prefix = f"{number}:"
        return {p.name.removeprefix(prefix): p for p in self.phases if p.name.startswith(prefix)}

    @property
    def peak_allocated(self) -> int:
        """The most from loading on."""
        return max(p.peak for p in self.phases)


def trace(
    config: dict[str, Any],
    recipe: Any = None,
    *,
    layers: int | None = None,
    steps: int = 2,
    compute_capability: str = "9.0",
    processors: Processors | None = None,
    keep_events: bool = False,
    watch_peak: bool = False,
    code: str | None = None,
    device: str = "cpu",
) -> Trace:
    """Runs `steps` training steps of `recipe` on fake tensors and returns what was counted.

    `config` is a Hugging Face `config.json`; `recipe` is a `vramplan.Recipe` or a dict of its
    fields (those left out take its defaults); `layers` cuts the depth. `watch_peak` keeps the
    storages that are live at each phase's peak and end; `keep_events` keeps every allocation and
    release in order. `code` is a local folder whose own model code is trusted and run. `device`
    "cuda" makes fake CUDA tensors, which take torch's own paths for CUDA: it needs a GPU that
    torch can use, and no memory on it. Sizes are bytes.
    """
    if hasattr(recipe, "to_dict"):
        recipe = recipe.to_dict()
    chosen = {**DEFAULTS, **(recipe or {})}
    processors = processors or Processors()
    counter = Counter(
        scratch={
            **cuda_ops.KERNEL_SCRATCH,
            **reduction.scratch(processors),
            **quantized.scratch(compute_capability, processors),
        },
        replaced=dict(cuda_ops.REPLACED),
        answer=cuda_ops.answer_scalar,
        keep_events=keep_events,
        watch_peak=watch_peak,
        blocks=Blocks() if chosen["allocator"] == "default" else None,
    )
    with naming.quiet(), flash.package():
        skeleton = build.skeleton(build.hf_config(config, layers, code), chosen, code)
    base = sum(p.numel() for p in skeleton.parameters())
    if chosen["lora"]:
        importlib.import_module("peft")  # modules make tensors when they are imported
    counter.replaced |= quantized.kernels(quantized.Outliers(skeleton, counter))
    counter.device = device
    paths = cuda_semantics(counter, compute_capability)
    with paths, FakeTensorMode(allow_non_fake_inputs=True), counter, naming.quiet():
        run = Run(skeleton, chosen, counter, compute_capability)
        run.load()
        run.prepare()
        run.train(steps)
        return Trace(
            phases=counter.phases,
            parameters=sum(p.numel() for p in run.model.parameters()),
            trainable_parameters=sum(p.numel() for p in run.model.parameters() if p.requires_grad),
            counter=counter,
            layers=layers,
            head=build.head_of(run.model),
            base_parameters=base,
            managed=run.managed(),
        )


@contextlib.contextmanager
def cuda_semantics(counter: Counter, capability: str) -> Iterator[None]:
    """CUDA's autocast lists and composite paths; transformers is told that nothing is traced."""
    import_utils: Any = importlib.import_module("transformers.utils.import_utils")
    was = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda _: False
    try:
        with contextlib.ExitStack() as stack:
            if counter.device == "cpu":
                stack.enter_context(autocast.cuda_lists())
                stack.enter_context(cuda_ops.cuda_paths(capability))
            else:
                stack.enter_context(torch.device(counter.device))
                engine.sole_holders.cache_clear()
                engine.sole_holders()  # tried on this device, before there is a backward
            stack.enter_context(quantized.cuda_backend(counter))
            stack.enter_context(flash.package())
            yield
    finally:
        import_utils.is_fake_tensor = was


class Run:
    """One run: the model, its optimizer and the steps."""

    def __init__(
        self, model: Any, recipe: dict[str, Any], counter: Counter, capability: str
    ) -> None:
        self.model: Any = model
        self.running = [""]
        """Names of the modules that run, the innermost last; in backward the layer is the first."""
        self.recipe = recipe
        self.counter = counter
        self.workspace = cuda_ops.CUBLAS_WORKSPACE.get(
            capability, cuda_ops.CUBLAS_WORKSPACE_DEFAULT
        )
        self.epilogues: set[bool] = set()
        counter.notice |= {
            torch.ops.aten.addmm.default: self._added_bias,
            **quantized.notices(self._added_bias, capability),
        }

    def _added_bias(self, bias: Any, *others: Any, **kwargs: Any) -> None:
        """The first product with a bias makes cuBLASLt's workspace, one for each thread."""
        engine = torch._C._current_autograd_node() is not None
        if bias is None or bias.dim() != 1 or engine in self.epilogues:
            return
        self.epilogues.add(engine)
        thread = "autograd" if engine else "forward"
        name = f"cuBLASLt workspace ({thread} thread)"
        self.counter.keep(cuda_ops.CUBLASLT_WORKSPACE, name, "workspace")

    def load(self) -> None:
        """`from_pretrained` onto the device."""
        self.counter.category = "parameter"
        build.warm_up(self.model, self.counter)
        with self.counter.measure("0:load"):
            build.materialize(self.model, build.DTYPES[self.recipe["dtype"]])

    def prepare(self) -> None:
        """Adapters, checkpointing, and the forward that accelerate wraps."""
        recipe, counter = self.recipe, self.counter
        with counter.measure("0:prepare"):
            if recipe["quantization"]:
                self.model = build.prepare_for_kbit(self.model, recipe)
                if counter.blocks is not None:
                    counter.blocks.empty_cache()
            if recipe["lora"]:
                self.model = build.add_lora(self.model, recipe)
            if recipe["gradient_checkpointing"]:
                if recipe["lora"]:
                    self.model.enable_input_require_grads()
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.config.use_cache = False
            self.model.train()
        self._label_parameters()
        naming.name_modules(self.model, counter, self.running)
        self.loss_kwargs = build.accepts_loss_kwargs(self.model)
        self.input_names = build.input_names(self.model)
        if recipe["mixed_precision"] != "no":
            self._wrap_forward(build.DTYPES[recipe["mixed_precision"]])
        with counter.outside():  # making it takes nothing on the device; what it imports might
            self.optimizer = build.make_optimizer(self.model, recipe)
        self._states_at_once()
        self._count_first_states()
        self.scaler = (
            torch.zeros((), dtype=torch.float32) if recipe["mixed_precision"] == "fp16" else None
        )

    def _count_first_states(self) -> None:
        """States that are there from the optimizer's making (torch's Adagrad) are on the device."""
        self.counter.category = "optimizer"
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    self.counter.to_device(value, "optimizer state")
        self.counter.category = "activation"

    def _states_at_once(self) -> None:
        """Adagrad makes its states before the first step (torch/optim/adagrad.py)."""
        self.counter.category = "optimizer"
        for state in self.optimizer.state.values():
            for name, value in list(state.items()):
                if isinstance(value, torch.Tensor) and value.dim():
                    state[name] = torch.empty_like(value)
        self.counter.category = "activation"

    def _wrap_forward(self, dtype: torch.dtype) -> None:
        from accelerate.utils import convert_outputs_to_fp32

        forward = self.model.forward
        context = torch.autocast(self.counter.device, dtype=dtype)
        function = getattr(forward, "__func__", None)
        if function is not None:
            wrapped = convert_outputs_to_fp32(context(function))
            self.model.forward = types.MethodType(wrapped, self.model)
        else:
            self.model.forward = convert_outputs_to_fp32(context(forward))

    def _label_parameters(self) -> None:
        for name, value in self.model.named_parameters():
            self.counter.relabel(value, "parameter", name)
        for name, value in self.model.named_buffers():
            self.counter.relabel(value, "parameter", name)

    def batch(self) -> dict[str, torch.Tensor]:
        """Token ids, labels and a mask of ones, int64."""
        shape = (self.recipe["batch_size"], self.recipe["seq_len"])
        return {name: torch.empty(shape, dtype=torch.int64) for name in self.input_names}

    def train(self, steps: int) -> None:
        """`Trainer`'s inner loop."""
        self.total = torch.zeros(())
        self.held: tuple[Any, ...] = ()
        for number in range(1, steps + 1):
            self.step(number)

    def step(self, number: int) -> None:
        counter, micro = self.counter, self.recipe["gradient_accumulation_steps"]
        counter.category = "activation"
        batches = [self.batch() for _ in range(micro)]
        items = torch.ones((), dtype=torch.int64)
        self.held = (
            batches,
            items,
        )  # the loop's names keep them until the next step's replace them
        for index in range(micro):
            tag = f"{number}:" if index == micro - 1 else f"{number}.{index}:"
            inputs = batches[index]
            loss = self.forward_backward(tag, number == 1 and index == 0, inputs, items)
            self.total += loss
            del loss, inputs
        with counter.measure(f"{number}:clip"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        with counter.measure(f"{number}:optimizer_step"):
            counter.category = "optimizer"
            self.optimizer.step()
            self._steps_to_host()
            counter.category = "activation"
        with counter.measure(f"{number}:step_end"):
            self.model.zero_grad()
        self.held += (norm,)

    def managed(self) -> int:
        """Bytes of the optimizer's states that are paged."""
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        return sum(v.numel() * v.element_size() for v in values if getattr(v, "is_paged", False))

    def _steps_to_host(self) -> None:
        """torch's optimizers keep their step counters on the host, unless they are fused."""
        if any(group.get("fused") for group in self.optimizer.param_groups):
            return
        for state in self.optimizer.state.values():
            step = state.get("step")
            if isinstance(step, torch.Tensor):
                self.counter.to_host(step)

    def forward_backward(
        self, tag: str, first: bool, inputs: dict[str, torch.Tensor], items: torch.Tensor
    ) -> torch.Tensor:
        counter = self.counter
        with counter.measure(f"{tag}forward"):
            if first:
                counter.keep(self.workspace, "cuBLAS workspace (forward thread)", "workspace")
            loss = self.compute_loss(inputs, items)
        del inputs
        held = [loss]
        del loss
        with counter.measure(f"{tag}backward"):
            if first:
                counter.keep(self.workspace, "cuBLAS workspace (autograd thread)", "workspace")
            return self.backward(held)

    def backward(self, held: list[torch.Tensor]) -> torch.Tensor:
        """The rest of `training_step`; the graph is let go when it returns."""
        self.counter.category = "gradient"
        self.counter.module = self.running[0] = ""
        loss = held.pop()
        if not self.loss_kwargs:
            loss = loss / self.recipe["gradient_accumulation_steps"]
        scaled = loss / 1  # accelerate's own division
        if self.scaler is not None:
            scaled = scaled * self.scaler
        scaled.backward()
        self.counter.category = "activation"
        return loss.detach()

    def compute_loss(self, inputs: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        kwargs = {"num_items_in_batch": items} if self.loss_kwargs else {}
        outputs = self.model(**inputs, **kwargs)
        loss = outputs["loss"]
        loss *= 1  # num_processes
        return loss
