"""Generating: the cache's bytes by arithmetic, and against the real `generate` on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName
from vramplan.memory.generation import cache_bytes
from vramplan.memory.inference import InferenceEstimate, estimate_inference
from vramplan.models.hf_config import READERS, architecture
from vramplan.reports.inference import render
from vramplan.units import GIB, MIB

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
GEMMA2 = {
    **LLAMA,
    "model_type": "gemma2",
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}
CONFIGS = {c["model_type"]: c for c in (LLAMA, MISTRAL, GEMMA2) if c["model_type"] in READERS}


def test_the_parts_add_up_to_the_peak() -> None:
    for options in ({}, {"prompt": 1}, {"batch_size": 3, "attention": "eager"}):
        e = estimate_inference("meta-llama/Llama-3.1-8B", **options)  # type: ignore[arg-type]
        assert sum(e.breakdown.values()) == e.peak_allocated


def test_figures_of_llama_8b() -> None:
    e = estimate_inference("meta-llama/Llama-3.1-8B", context=8193, gpu="24GB")
    # 32 layers x 2 x 8 heads x 128 x 8192 tokens x 2 bytes
    assert e.cache_end == 32 * 2 * 8 * 128 * 8192 * 2 == GIB
    assert e.kv_cache == GIB
    # 8,030,261,248 parameters in bf16, and two tables of 64 fp32 frequencies
    assert e.weights == 8_030_261_248 * 2 + 2 * 512
    assert e.workspace == 32 * MIB  # one handle: nothing runs backward
    # The last layer's feed-forward. Held: the embedding's output and the block's input by the
    # model's forward, the residual and its norm by the block; gate, up and product; cos and sin.
    tokens = 8192 * 2
    inputs = 4 * 8 * 8192
    assert e.activation == (4 * 4096 + 3 * 14336 + 2 * 128) * tokens + inputs
    assert e.fits is True


def test_a_decoding_step_doubles_one_layers_keys() -> None:
    e = estimate_inference("meta-llama/Llama-3.1-8B", context=2049, prompt=1)
    assert e.peak_phase == "decode"
    one = 2048 * 8 * 128 * 2
    # In the last layer: the others have the newest token; its keys are there with and without it
    # (2 KiB a token), its values without.
    assert e.kv_cache == 31 * 2 * one + one + 2 * (one - 8 * 128 * 2)
    assert e.cache_end == 32 * 2 * one


def test_a_window_bounds_what_decoding_keeps() -> None:
    arch = architecture(MISTRAL)
    one = 2 * 16 * 2  # two heads of 16 elements in bf16
    assert cache_bytes(arch, "bf16", 1, 100, decoded=True) == 5 * 2 * 16 * one
    # ... and not what the prompt leaves: the cache's view keeps all of it allocated.
    assert cache_bytes(arch, "bf16", 1, 100, decoded=False) == 5 * 2 * 100 * one


def test_a_larger_batch_or_context_never_needs_less() -> None:
    peaks = [
        estimate_inference(LLAMA, batch_size=batch, context=context).peak_allocated
        for batch, context in ((1, 64), (1, 128), (2, 128), (4, 128), (4, 4096))
    ]
    assert peaks == sorted(peaks)


def test_quantized_weights_keep_the_rest_in_its_dtype() -> None:
    plain = estimate_inference(LLAMA)
    nf4 = estimate_inference(LLAMA, quantization="nf4")
    linear = 5 * (2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 352)
    others = plain.weights - linear * 2
    packed = nf4.weights - others
    assert linear // 2 < packed < linear  # 0.5 bytes an element and absmax in blocks of 512


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "bfloat16"}, UnknownName),
        ({"attention": "flash"}, UnknownName),
        ({"quantization": "4bit"}, UnknownName),
        ({"batch_size": 0}, InvalidValue),
        ({"context": -1}, InvalidValue),
        ({"context": 100, "prompt": 100}, InvalidValue),
        ({"attention": "flash_attention_2", "dtype": "fp32"}, IllegalRecipe),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        estimate_inference(LLAMA, **options)


def test_the_report_fits_a_terminal() -> None:
    text = render(estimate_inference("meta-llama/Llama-3.1-8B", gpu="24GB", quantization="nf4"))
    assert "KV cache" in text
    assert all(len(line) <= 80 for line in text.splitlines())


# -- against transformers ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}
    for name, config in CONFIGS.items():
        made[name] = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), attn_implementation="eager"
        ).eval()
        made[name].generation_config.eos_token_id = None
    return made


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("prompt", "context"), [(7, 8), (7, 12), (40, 41), (40, 42), (5, 25)])
def test_the_cache_of_a_real_generate(
    models: dict[str, Any], name: str, prompt: int, context: int
) -> None:
    """Allocated bytes of the DynamicCache that generate returns, in fp32."""
    import torch

    ids = torch.randint(0, 320, (2, prompt))
    out = models[name].generate(
        ids, max_new_tokens=context - prompt, do_sample=False, return_dict_in_generate=True
    )
    tensors = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    found = sum(t.untyped_storage().nbytes() for t in tensors)
    e = estimate_inference(
        CONFIGS[name], dtype="fp32", attention="eager", batch_size=2, context=context, prompt=prompt
    )
    assert e.cache_end == found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("prompt", "context"), [(64, 65), (1, 25), (20, 30)])
def test_the_peak_of_a_real_generate(
    models: dict[str, Any], name: str, prompt: int, context: int
) -> None:
    """Every storage that eager generation makes on the CPU, rounded as CUDA's allocator rounds."""
    found = _peak(models[name], prompt, context)
    e = estimate_inference(
        CONFIGS[name], dtype="fp32", attention="eager", batch_size=2, context=context, prompt=prompt
    )
    expected = e.peak_allocated - e.weights - e.workspace
    assert abs(expected - found) <= tolerance(e), (expected, found)


def tolerance(e: InferenceEstimate) -> int:
    """Scalars and vectors of int64 that generate keeps beside the inputs, 512 bytes each."""
    return 16 * 512


def _peak(model: Any, prompt: int, context: int) -> int:
    import torch
    from vramplan_launcher.trace.counting import Counter

    counter = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        counter._elsewhere.add(tensor.untyped_storage()._cdata)
    with counter:
        ids = torch.randint(0, 320, (2, prompt))
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=context - prompt, do_sample=False)
    return counter.peak
