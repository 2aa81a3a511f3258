"""config.json -> Architecture: the one reader of Hugging Face's keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vramplan.errors import ConfigError
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config.deepseek import deepseek_v2, deepseek_v3
from vramplan.models.hf_config.gemma import gemma, gemma2, gemma3, gemma3_text
from vramplan.models.hf_config.bloom import bloom
from vramplan.models.hf_config.falcon import falcon
from vramplan.models.hf_config.gpt2 import gpt2
from vramplan.models.hf_config.gpt_neox import gpt_neox
from vramplan.models.hf_config.gptj import gptj
from vramplan.models.hf_config.gpt_oss import gpt_oss
from vramplan.models.hf_config.llama import llama
from vramplan.models.hf_config.opt import opt
from vramplan.models.hf_config.phi import phi
from vramplan.models.hf_config.llama_kin import (
    cohere,
    glm,
    granite,
    mistral,
    olmo,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
)
from vramplan.models.hf_config.moe import mixtral, olmoe, qwen3_moe
from vramplan.models.hf_config.reader import Config

READERS: dict[str, Callable[[Config], Architecture]] = {
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3_text": gemma3_text,
    "bloom": bloom,
    "falcon": falcon,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "phi": phi,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
    "granite": granite,
    "olmo": olmo,
    "olmo2": olmo2,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
    "cohere": cohere,
    "glm": glm,
    "glm4": glm,
    "phi3": phi3,
    "opt": opt,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}


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
    if model_type not in READERS:
        raise _unknown(str(model_type))
    reader = Config(config)
    deviation = reader.number("initializer_range", 0.02, "init_std")
    return replace(READERS[model_type](reader), initializer_range=deviation)


def _unknown(model_type: str) -> UnknownArchitecture:
    from vramplan.errors import nearest

    close = nearest(model_type, READERS)
    hint = f" The nearest that is known: {close!r}." if close else ""
    return UnknownArchitecture(
        f"the architecture {model_type!r} is not described in vramplan.{hint} Known: "
        f"{', '.join(sorted(READERS))}. If it is a renamed copy of a known one, set model_type in "
        "a copy of its config.json; CONTRIBUTING.md says how to add a family."
    )
