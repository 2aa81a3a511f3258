"""Block descriptions, one class a family, found by transformers' `model_type`."""

from __future__ import annotations

from vramplan.models.blocks.bloom import Bloom
from vramplan.models.blocks.decoder import Decoder
from vramplan.models.blocks.deepseek import DeepseekV2, DeepseekV3
from vramplan.models.blocks.falcon import Falcon
from vramplan.models.blocks.fused import Glm, Glm4, Phi3
from vramplan.models.blocks.gemma import Gemma, Gemma2, Gemma3
from vramplan.models.blocks.gpt2 import GPT2
from vramplan.models.blocks.gpt_neox import GPTNeoX
from vramplan.models.blocks.gptj import GPTJ
from vramplan.models.blocks.gpt_oss import GptOss
from vramplan.models.blocks.layer_norm_kin import Cohere, StableLm, Starcoder2
from vramplan.models.blocks.llama import Llama
from vramplan.models.blocks.llama_kin import (
    Granite,
    Mistral,
    Olmo,
    Olmo2,
    Qwen2,
    Qwen3,
    SmolLM3,
)
from vramplan.models.blocks.moe import Mixtral, Olmoe, Qwen3Moe
from vramplan.models.blocks.opt import OPT
from vramplan.models.blocks.phi import Phi

FAMILIES: dict[str, type[Decoder]] = {
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "bloom": Bloom,
    "falcon": Falcon,
    "gpt2": GPT2,
    "gpt_neox": GPTNeoX,
    "gptj": GPTJ,
    "phi": Phi,
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "smollm3": SmolLM3,
    "granite": Granite,
    "olmo": Olmo,
    "olmo2": Olmo2,
    "stablelm": StableLm,
    "starcoder2": Starcoder2,
    "cohere": Cohere,
    "glm": Glm,
    "glm4": Glm4,
    "phi3": Phi3,
    "opt": OPT,
    "mixtral": Mixtral,
    "qwen3_moe": Qwen3Moe,
    "olmoe": Olmoe,
    "gpt_oss": GptOss,
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
}


def family(name: str) -> type[Decoder]:
    return FAMILIES[name]
