"""Python that trains as a recipe says: with transformers' Trainer, or with TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any

from vramplan.recipe.exchange import python_text
from vramplan.recipe.exchange.result import Exported, Options
from vramplan.recipe.exchange.write_yaml import DATA, RATES
from vramplan.recipe.recipe import Recipe

_TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def training_arguments(model: str, recipe: Recipe, options: Options, ds_config: str) -> Exported:
    """A script with Trainer: exactly the run that is estimated."""
    settings = _settings(recipe, options, ds_config)
    parts = [
        _head(model, recipe, "transformers' Trainer"),
        _imports(recipe),
        f"MODEL = {_python(model)}\nDATA = {_python(options.data or DATA)}\n"
        f"SEQ_LEN = {recipe.seq_len}\nSETTINGS = {_table(settings)}\n",
        python_text.ARGUMENTS,
        _model(recipe),
        python_text.PACKED,
        python_text.MAIN.format(output=_python(options.output or "outputs")),
    ]
    return Exported(text=_file(parts))


def trl(model: str, recipe: Recipe, options: Options, ds_config: str) -> Exported:
    """A script with TRL 1.16's SFTTrainer, as near to the run that is estimated as it goes."""
    settings = _settings(recipe, options, ds_config)
    # TRL's own defaults are otherwise: bf16 and checkpointing on, 1024 tokens.
    settings |= {
        "max_length": recipe.seq_len,
        "packing": True,
        "packing_strategy": "wrapped",
        "model_init_kwargs": {
            "dtype": _TORCH[recipe.dtype],
            "attn_implementation": recipe.attention,
        },
    }
    notes = [
        "TRL computes its loss in chunks (1.16): it needs far less for the logits than estimated"
    ]
    if recipe.quantization is not None:
        notes.append(
            "TRL leaves embeddings, norms and the output head in 16 bits and turns adapters to "
            "bf16, where the estimate has fp32: it needs less"
        )
    elif recipe.lora is not None and recipe.lora.dtype != "fp32":
        notes.append("TRL's adapters are fp32 unless the model is quantized")
    parts = [
        _head(model, recipe, "TRL's SFTTrainer", notes),
        _trl_imports(recipe),
        f"MODEL = {_python(model)}\nDATA = {_python(options.data or DATA)}\n"
        f"SETTINGS = {_table(settings)}\n",
        python_text.SFT_CONFIG,
        python_text.SFT_MAIN.format(
            output=_python(options.output or "outputs"),
            adapters=_indented(_lora(recipe)),
            quantization=_indented(_quantization(recipe)),
        ),
    ]
    return Exported(text=_file(parts), notes=tuple(notes))


def _file(parts: list[str]) -> str:
    """The head and the imports, the constants, and each function after two empty lines."""
    first, second, third, *rest = (part.strip("\n") for part in parts)
    return "\n\n\n".join(["\n\n".join([first, second, third]), *rest]) + "\n"


def _settings(recipe: Recipe, options: Options, ds_config: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "bf16": recipe.mixed_precision == "bf16",
        "fp16": recipe.mixed_precision == "fp16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "optim": recipe.optimizer,
        "learning_rate": options.learning_rate or RATES["lora" if recipe.lora else "full"],
        "num_train_epochs": options.epochs or 1,
    }
    if recipe.gradient_checkpointing:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if recipe.optimizer.startswith(("galore", "apollo")):
        targets = recipe.optim_target_modules
        settings["optim_target_modules"] = targets if isinstance(targets, str) else list(targets)
        settings["optim_args"] = f"rank={recipe.optim_rank}"
    if options.max_steps is not None:
        settings["max_steps"] = options.max_steps
    if options.seed is not None:
        settings["seed"] = options.seed
    if recipe.deepspeed is not None:
        settings["deepspeed"] = ds_config
    return settings


def _head(model: str, recipe: Recipe, what: str, notes: list[str] | None = None) -> str:
    start = "python FILE"
    if recipe.world_size > 1 or recipe.deepspeed is not None:
        start = f"torchrun --nproc-per-node {recipe.world_size} FILE"
    if recipe.allocator == "expandable_segments":
        start = f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True {start}"
    plain = model.replace("\\", "\\\\").replace('"', "'")  # it stands in a docstring
    lines = [f'"""Fine-tunes {plain} with {what}.', "", f"    {start}"]
    for note in notes or ():
        lines += ["", f"Note: {note}."]
    return "\n".join([*lines, '"""'])


def _imports(recipe: Recipe) -> str:
    names = ["AutoModelForCausalLM", "AutoTokenizer", "Trainer", "TrainingArguments"]
    if recipe.quantization is not None:
        names.insert(2, "BitsAndBytesConfig")
    lines = ["import torch", "from datasets import load_dataset"]
    if recipe.lora is not None:
        kbit = ", prepare_model_for_kbit_training" if recipe.quantization is not None else ""
        lines.append(f"from peft import LoraConfig, get_peft_model{kbit}")
    return "\n".join([*lines, f"from transformers import {', '.join(names)}"])


def _trl_imports(recipe: Recipe) -> str:
    lines = ["import torch"] if recipe.quantization in ("nf4", "fp4") else []
    lines.append("from datasets import load_dataset")
    if recipe.lora is not None:
        lines.append("from peft import LoraConfig")
    if recipe.quantization is not None:
        lines.append("from transformers import BitsAndBytesConfig")
    return "\n".join([*lines, "from trl import SFTConfig, SFTTrainer"])


def _model(recipe: Recipe) -> str:
    """The function that loads the model, as the estimate has it."""
    lines = ["def load_model(arguments, model=MODEL):"]
    lines.append('    """The model, loaded after the arguments are made (ZeRO-3 looks at them)."""')
    loading = [
        f"dtype=torch.{_TORCH[recipe.dtype]}",
        f"attn_implementation={_python(recipe.attention)}",
    ]
    if recipe.quantization is not None:
        lines.append(f"    quantization = {_indented(_quantization(recipe), 4)}")
        loading.append("quantization_config=quantization")
    if recipe.deepspeed is None:
        loading.append('device_map={"": arguments.device}')
    lines.append("    model = AutoModelForCausalLM.from_pretrained(")
    lines += ["        model,", *(f"        {argument}," for argument in loading), "    )"]
    lines.append("    model.config.use_cache = False")
    if recipe.lora is None:
        return "\n".join([*lines, "    return model"])
    if recipe.quantization is not None:
        lines += [
            "    model = prepare_model_for_kbit_training(",
            "        model,",
            f"        use_gradient_checkpointing={recipe.gradient_checkpointing},",
            '        gradient_checkpointing_kwargs={"use_reentrant": False},',
            "    )",
        ]
    cast = "" if recipe.lora.dtype == "fp32" else ", autocast_adapter_dtype=False"
    lines.append(f"    adapters = {_indented(_lora(recipe), 4)}")
    lines.append(f"    model = get_peft_model(model, adapters{cast})")
    if recipe.lora.dtype not in ("fp32", _of_peft(recipe)):
        lines += [
            "    for name, parameter in model.named_parameters():",
            '        if "lora_" in name:',
            f"            parameter.data = parameter.data.to(torch.{_TORCH[recipe.lora.dtype]})",
        ]
    if recipe.gradient_checkpointing:
        lines.append("    model.enable_input_require_grads()")
    return "\n".join([*lines, "    return model"])


def _of_peft(recipe: Recipe) -> str:
    """The dtype of adapters that peft does not turn to fp32: that of the weights, where it is a
    floating one (peft 0.21, tuners_utils.py, _move_adapter_to_device_of_base_layer)."""
    if recipe.quantization == "int8":
        return "fp32"
    if recipe.quantization is None or recipe.mixed_precision == "no":
        return recipe.dtype
    return recipe.mixed_precision


def _lora(recipe: Recipe) -> str:
    if recipe.lora is None:
        return "None"
    lora = recipe.lora
    targets = (
        lora.target_modules if isinstance(lora.target_modules, str) else [*lora.target_modules]
    )
    alpha = lora.alpha if lora.alpha is not None else 2 * lora.rank
    fields = {
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
    }
    return _call("LoraConfig", {name: _python(value) for name, value in fields.items()})


def _quantization(recipe: Recipe) -> str:
    if recipe.quantization is None:
        return "None"
    if recipe.quantization == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    # As the launcher computes: in mixed precision's dtype, else the weights' (bf16 for fp32).
    compute = recipe.mixed_precision if recipe.mixed_precision != "no" else recipe.dtype
    fields = {
        "load_in_4bit": "True",
        "bnb_4bit_quant_type": _python(recipe.quantization),
        "bnb_4bit_use_double_quant": repr(recipe.double_quant),
        "bnb_4bit_compute_dtype": f"torch.{_TORCH['bf16' if compute == 'fp32' else compute]}",
    }
    return _call("BitsAndBytesConfig", fields)


def _call(name: str, fields: dict[str, str]) -> str:
    return f"{name}(\n" + "".join(f"    {k}={v},\n" for k, v in fields.items()) + ")"


def _indented(text: str, by: int = 8) -> str:
    return text.replace("\n", "\n" + " " * by)


def _table(settings: dict[str, Any]) -> str:
    body = "".join(f"    {_python(key)}: {_python(value)},\n" for key, value in settings.items())
    return f"{{\n{body}}}"


def _python(value: Any) -> str:
    """Python source, with the quotes that formatters like."""
    if isinstance(value, str):
        quoted = repr(value)
        return quoted if '"' in value else f'"{quoted[1:-1]}"'.replace("\\'", "'")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_python(k)}: {_python(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python, value)) + "]"
    return repr(value)
