"""config.json -> Architecture: the one reader of Hugging Face's keys.

A family's module is imported when one of its models is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from vramplan.errors import ConfigError
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config.reader import Config

# model_type: "module:function", the module in this folder.
READERS = {
    "gemma": "gemma:gemma",
    "gemma2": "gemma:gemma2",
    "gemma3": "gemma:gemma3",
    "gemma3_text": "gemma:gemma3_text",
    "bloom": "bloom:bloom",
    "falcon": "falcon:falcon",
    "gpt2": "gpt2:gpt2",
    "gpt_neox": "gpt_neox:gpt_neox",
    "gptj": "gptj:gptj",
    "phi": "phi:phi",
    "llama": "llama:llama",
    "mistral": "llama_kin:mistral",
    "qwen2": "llama_kin:qwen2",
    "qwen3": "llama_kin:qwen3",
    "smollm3": "llama_kin:smollm3",
    "granite": "llama_kin:granite",
    "olmo": "llama_kin:olmo",
    "olmo2": "llama_kin:olmo2",
    "stablelm": "llama_kin:stablelm",
    "starcoder2": "llama_kin:starcoder2",
    "cohere": "llama_kin:cohere",
    "glm": "llama_kin:glm",
    "glm4": "llama_kin:glm",
    "phi3": "llama_kin:phi3",
    "opt": "opt:opt",
    "mixtral": "moe:mixtral",
    "qwen3_moe": "moe:qwen3_moe",
    "olmoe": "moe:olmoe",
    "gpt_oss": "gpt_oss:gpt_oss",
    "deepseek_v2": "deepseek:deepseek_v2",
    "deepseek_v3": "deepseek:deepseek_v3",
}

# Defaults of `initializer_range` that are not 0.02.
DEVIATIONS = {"starcoder2": 0.018042}


MOST_LAYERS = 10_000
"""The deepest known model has some hundreds; an inventory of more than this is a slip's."""


class UnknownArchitecture(ConfigError):
    """A `model_type` that has no block description."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The figures of a Hugging Face config.

    Raises ConfigError for a missing or malformed key, UnknownArchitecture for a `model_type`
    without a description.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError("the config has no 'model_type', so its architecture is not known")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise _unknown(str(model_type))
    reader = Config(config)
    deviation = reader.number("initializer_range", DEVIATIONS.get(model_type, 0.02), "init_std")
    read = _reader(model_type)(reader)
    _check(read)
    return replace(read, initializer_range=deviation)


def _check(arch: Architecture) -> None:
    """What no reader looks at by itself. Raises ConfigError."""
    if arch.layers > MOST_LAYERS:
        raise ConfigError(f"the config has {arch.layers} layers: no model has over {MOST_LAYERS}")
    if not isinstance(arch.activation, str):
        raise ConfigError(
            f"the activation function in the config is {arch.activation!r}; it must be a name"
        )
    if arch.rotary_dim % 2:
        raise ConfigError(
            f"the config has {arch.rotary_dim} rotary dimensions a head; they are turned in pairs"
        )


def _reader(model_type: str) -> Callable[[Config], Architecture]:
    module, _, function = READERS[model_type].partition(":")
    found = getattr(import_module(f"{__name__}.{module}"), function)
    return cast("Callable[[Config], Architecture]", found)


def _unknown(model_type: str) -> UnknownArchitecture:
    from vramplan.errors import nearest

    close = nearest(model_type, READERS)
    hint = f" The nearest that is known: {close!r}." if close else ""
    return UnknownArchitecture(
        f"the architecture {model_type!r} is not described in vramplan.{hint} Known: "
        f"{', '.join(sorted(READERS))}. If it is a renamed copy of a known one, set model_type in "
        "a copy of its config.json; CONTRIBUTING.md says how to add a family."
    )
