"""Block descriptions, one class a family, found by transformers' `model_type`.

A family's module is imported when one of its models is asked about.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vramplan.models.blocks.decoder import Decoder

# model_type: "module:class", the module in this folder.
FAMILIES = {
    "gemma": "gemma:Gemma",
    "gemma2": "gemma:Gemma2",
    "gemma3_text": "gemma:Gemma3",
    "bloom": "bloom:Bloom",
    "falcon": "falcon:Falcon",
    "gpt2": "gpt2:GPT2",
    "gpt_neox": "gpt_neox:GPTNeoX",
    "gptj": "gptj:GPTJ",
    "phi": "phi:Phi",
    "llama": "llama:Llama",
    "mistral": "llama_kin:Mistral",
    "qwen2": "llama_kin:Qwen2",
    "qwen3": "llama_kin:Qwen3",
    "smollm3": "llama_kin:SmolLM3",
    "granite": "llama_kin:Granite",
    "olmo": "llama_kin:Olmo",
    "olmo2": "llama_kin:Olmo2",
    "stablelm": "layer_norm_kin:StableLm",
    "starcoder2": "layer_norm_kin:Starcoder2",
    "cohere": "layer_norm_kin:Cohere",
    "glm": "fused:Glm",
    "glm4": "fused:Glm4",
    "phi3": "fused:Phi3",
    "opt": "opt:OPT",
    "mixtral": "moe:Mixtral",
    "qwen3_moe": "moe:Qwen3Moe",
    "olmoe": "moe:Olmoe",
    "gpt_oss": "gpt_oss:GptOss",
    "deepseek_v2": "deepseek:DeepseekV2",
    "deepseek_v3": "deepseek:DeepseekV3",
}


def family(name: str) -> type[Decoder]:
    """The description of a `model_type`. Raises KeyError for one that has none."""
    module, _, class_name = FAMILIES[name].partition(":")
    return cast("type[Decoder]", getattr(import_module(f"{__name__}.{module}"), class_name))
