"""The real model on fake tensors: transformers' class, peft's adapters, torch's optimizer."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vramplan_launcher.trace import quantized
from vramplan_launcher.trace.counting import Counter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TEXT = "text_config"
"""Where vision-language configs keep those of their text model."""


def hf_config(config: dict[str, Any], layers: int | None = None, code: str | None = None) -> Any:
    """A transformers config object of a `config.json`, cut to `layers` layers where given.

    `code` is a local folder whose own classes (`auto_map`) are run: its user trusts them.
    """
    from transformers import AutoConfig

    values = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
    values.pop("quantization_config", None)
    if layers is not None:
        values = cut_depth(values, layers)
    if code is not None:
        made = AutoConfig.from_pretrained(code, trust_remote_code=True)
        for key, value in values.items():
            if key in DEPTH_KEYS or key == TEXT or isinstance(value, list):
                setattr(made, key, value)
        return made
    values.pop("auto_map", None)
    model_type = values.pop("model_type")
    return AutoConfig.for_model(model_type, **values)


def cut_depth(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with `layers` layers; per-layer lists are cut too.

    Of a vision-language model, the text model is cut: text is what passes through it.
    """
    found = [k for k in DEPTH_KEYS if k in values]
    if not found and isinstance(values.get(TEXT), dict):
        return {**values, TEXT: cut_depth(values[TEXT], layers)}
    found = found or ["num_hidden_layers"]
    out = dict(values)
    depth = values.get(found[0])
    for key in found:
        out[key] = layers
    for key, value in values.items():
        if isinstance(value, list) and depth is not None and len(value) == depth:
            out[key] = value[:layers]
    return out


def model_class(config: Any) -> Any:
    """transformers' Auto class with a head that gives a loss over text for this config.

    Encoder-decoders before causal models: some (BART) have both, and the whole is what trains.
    Raises UserError where transformers has no such class.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    from vramplan.errors import UserError

    classes: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText]
    pairs = getattr(config, "is_encoder_decoder", False)
    classes.insert(0 if pairs else 2, AutoModelForSeq2SeqLM)
    own = getattr(config, "auto_map", None) or {}
    for auto in classes:
        if auto.__name__ in own or type(config) in auto._model_mapping:
            return auto
    raise UserError(
        f"transformers has no class that trains {config.model_type!r} on text (causal, "
        "encoder-decoder or image-text-to-text)"
    )


def skeleton(config: Any, recipe: dict[str, Any], code: str | None = None) -> nn.Module:
    """The model on the meta device, as `from_pretrained` makes it first."""
    trust = {} if code is None else {"trust_remote_code": True}
    auto, attention = model_class(config), recipe["attention"]
    family: Any = auto._model_mapping.get(type(config), None)
    if attention == "sdpa" and family is not None and not family._supports_sdpa:
        attention = "eager"  # as from_pretrained takes where nothing is asked for
    with torch.device("meta"):
        model = auto.from_config(
            config,
            dtype=DTYPES[recipe["dtype"]],
            attn_implementation=attention,
            **trust,
        )
    keep_in_fp32(model, DTYPES[recipe["dtype"]])
    if recipe["quantization"]:
        quantized.replace_linears(model, recipe, compute_dtype(recipe))
    return model


def keep_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """What the family's class keeps in fp32 whatever dtype is asked for.

    Source: transformers modeling_utils.py `_get_dtype_plan`, core_model_loading.py (5.17).
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = list(model._get_dtype_plan(dtype))
    if not plan:
        return
    wanted = build_glob_alternation(plan)[0]
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if wanted.search(name) and value.is_floating_point():
            value.data = value.data.to(torch.float32)


def merged_names(model: Any) -> dict[str, str]:
    """Parameters that loading puts together from several saved tensors: the name of the first.

    Source: transformers conversion_mapping.py, core_model_loading.py (`WeightConverter`; 5.17).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    out = {}
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        if not isinstance(conversion, WeightConverter):
            continue
        first = conversion.source_patterns[0].replace("*", "0")
        for target in conversion.target_patterns:
            for name, _ in model.named_parameters():
                if target in name:
                    out[name] = name.replace(target, first)
    return out


def materialize(model: Any, dtype: torch.dtype) -> None:
    """Gives every meta parameter and buffer a fake storage, in the order in which weights load.

    Shared ones stay shared; weights that bitsandbytes holds arrive in `dtype` and are quantized.
    Experts are saved one by one: while a layer's are merged, the parts are there as well. Threads
    load ahead, so then all the rest is there too, unless weights are quantized as they arrive.
    """
    from transformers.core_model_loading import dot_natural_key

    merged, tied = merged_names(model), getattr(model, "all_tied_weights_keys", None) or {}
    largest = 0

    modules = dict(model.named_modules())
    seen: dict[int, torch.Tensor] = {}

    def fake(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in seen:
            data = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if isinstance(value, nn.Parameter):
                data = nn.Parameter(data, requires_grad=value.requires_grad)
            seen[id(value)] = data
        return seen[id(value)]

    quantizes = quantized.installed()
    names: list[str] = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    saved = {**dict(zip(names, names, strict=True)), **merged}
    names.sort(key=lambda n: (n in tied, dot_natural_key(saved[n])))
    for full in names:
        owner, _, name = full.rpartition(".")
        module = modules[owner]
        value = module._parameters[name]
        if quantizes and name == "weight" and quantized.is_quantized_linear(module):
            quantized.load_weight(module, dtype)
        elif value is not None and value.device.type == "meta":
            module._parameters[name] = fake(value)
            if full in merged and getattr(model, "is_quantized", False):
                torch.empty_like(value, device="cpu")
            elif full in merged:
                largest = max(largest, value.numel() * value.element_size())
    torch.empty(largest, dtype=torch.uint8)
    for module in modules.values():
        for name, value in list(module._buffers.items()):
            if value is not None and value.device.type == "meta":
                module._buffers[name] = fake(value)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                setattr(module, name, fake(value))


def warm_up(model: nn.Module, counter: Counter) -> None:
    """`caching_allocator_warmup`: one segment of the model's size is reserved and given back."""
    if counter.blocks is None:
        return
    total = 0
    seen: set[int] = set()
    for module in model.modules():
        bnb = quantized.installed() and quantized.is_quantized_linear(module)
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            size = value.numel() * value.element_size()
            if bnb and name == "weight":
                size = value.numel() if hasattr(value, "SCB") else value.numel() // 2
            total += size
    block = counter.blocks.take(-(-total // 512) * 512)
    counter.blocks.give_back(block)


@contextlib.contextmanager
def plain_adapter_cast() -> Iterator[None]:
    """peft casts adapters by `module.to`, which swaps tensors and fails on fake ones.

    While open, a change of dtype assigns `Parameter.data` anew, as it does outside fake mode.
    """
    before = torch.__future__.get_swap_module_params_on_conversion()
    original = nn.Module._apply

    def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self.children():
                child._apply(fn)
        for name, param in self._parameters.items():
            if param is not None:
                with torch.no_grad():
                    new = fn(param)
                if new is not param:
                    self._parameters[name] = nn.Parameter(new, param.requires_grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]
        torch.__future__.set_swap_module_params_on_conversion(before)


def add_lora(model: Any, recipe: dict[str, Any]) -> nn.Module:
    """`get_peft_model` with the recipe's LoRA."""
    from peft import LoraConfig, get_peft_model

    lora = recipe["lora"]
    rank = lora["rank"]
    alpha = lora.get("alpha") or 2 * rank
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora.get("dropout", 0.05),
        target_modules=lora.get("target_modules", "all-linear"),
    )
    dtype = lora.get("dtype", "fp32")
    with plain_adapter_cast():
        adapted = get_peft_model(model, config, autocast_adapter_dtype=dtype == "fp32")
        cast_adapters(adapted, DTYPES[dtype])
    return adapted


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """peft makes adapters in fp32 or in the weights' dtype, of int8 weights in fp32 alone."""
    for module in model.modules():
        for name in ("lora_A", "lora_B"):
            adapters = getattr(module, name, None)
            if isinstance(adapters, nn.ModuleDict):
                adapters.to(dtype)


def layers_of(model: nn.Module) -> list[str]:
    """Names of the layers: the members of every module list that is in no other one."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists)]
    return [f"{name}.{i}" for name in outer for i in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def head_of(model: Any) -> str:
    """The name of the module that makes the logits; "" where the model does not tell."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


def input_names(model: Any) -> tuple[str, ...]:
    """What a text batch hands to the model: ids, labels and a mask, where its forward takes one."""
    names = ("input_ids", "labels", "attention_mask")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters
    return tuple(name for name in names if name in parameters)


def accepts_loss_kwargs(model: Any) -> bool:
    """As `Trainer.__init__` finds it: whether forward takes `num_items_in_batch`."""
    inner = model
    if hasattr(model, "get_base_model"):
        inner = model.get_base_model()
    if hasattr(inner, "accepts_loss_kwargs"):
        return bool(inner.accepts_loss_kwargs)
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def make_optimizer(model: Any, recipe: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that `Trainer.create_optimizer` makes, with CUDA's default of foreach."""
    import tempfile

    from transformers import Trainer, TrainingArguments
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decay = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in decay], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in decay], "weight_decay": 0.0},
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, optim=recipe["optimizer"], use_cpu=True, report_to="none"
        )
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if cls.__module__.startswith("torch.optim") and not kwargs.get("fused"):
        kwargs = {**kwargs, "foreach": True}
    optimizer = cls(groups, **kwargs)
    if "bitsandbytes" in str(cls) and kwargs.get("optim_bits") == 8:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def prepare_for_kbit(model: nn.Module, recipe: dict[str, Any]) -> nn.Module:
    """peft's `prepare_model_for_kbit_training`: what is left in 16 bits becomes fp32."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=bool(recipe["gradient_checkpointing"]),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def compute_dtype(recipe: dict[str, Any]) -> torch.dtype:
    """`bnb_4bit_compute_dtype`: that of mixed precision, else the weights' (bf16 for fp32)."""
    if recipe["mixed_precision"] != "no":
        return DTYPES[recipe["mixed_precision"]]
    return torch.bfloat16 if recipe["dtype"] == "fp32" else DTYPES[recipe["dtype"]]
