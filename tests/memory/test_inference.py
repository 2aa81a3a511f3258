"""Generating: the cache's bytes by arithmetic, and against the real `generate` on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName
from vramplan.memory.generation import cache_bytes
from vramplan.memory.inference import InferenceEstimate, estimate_inference
from vramplan.models.hf_config import architecture
from vramplan.reports.inference import render
from vramplan.units import GIB, MIB

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 8}
GEMMA2 = {
    **LLAMA,
    "model_type": "gemma2",
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_positions": 64, "n_embd": 64, "n_layer": 2}
FALCON = {**SMALL, "model_type": "falcon", "parallel_attn": True, "bias": False}
OTHERS = {
    "gpt2": {**GPT2, "n_head": 4},
    "gptj": {**GPT2, "model_type": "gptj", "n_head": 4, "rotary_dim": 8},
    "opt": {**SMALL, "model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 64},
    "bloom": {**SMALL, "model_type": "bloom", "n_layer": 2, "n_head": 4},
    "falcon 7b": {**FALCON, "multi_query": True},
    "falcon 40b": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon rw": {**FALCON, "multi_query": False, "alibi": True, "parallel_attn": False},
    "mixtral": MIXTRAL,
    "deepseek_v3": {
        **{**SMALL, "model_type": "deepseek_v3", "intermediate_size": 160},
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 64, "qk_rope_head_dim": 16},
        **{"v_head_dim": 64, "num_key_value_heads": 4, "first_k_dense_replace": 2},
    },
}
CONFIGS = {"llama": LLAMA, "mistral": MISTRAL, "gemma2": GEMMA2, **OTHERS}
MEASURED = Path(__file__).resolve().parents[1] / "measured" / "inference_gpu.json"
RUNS = json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]
WORST = 0.001


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
    assert cache_bytes(arch, "bf16", 1, 100, decoded=True) == 3 * 2 * 8 * one
    # ... and not what the prompt leaves: the cache's view keeps all of it allocated.
    assert cache_bytes(arch, "bf16", 1, 100, decoded=False) == 3 * 2 * 100 * one


def test_the_first_step_after_a_long_prompt_finds_all_of_it() -> None:
    two, many = (
        estimate_inference(MISTRAL, context=2000 + new, prompt=2000).decode for new in (2, 100)
    )
    assert two is not None
    assert many is not None
    # the same step, the first, is the highest
    assert many.kv_cache == two.kv_cache
    # three layers' prompts, and the layer's keys and values of a window's length
    assert many.kv_cache == (3 * 2000 + 8) * 2 * 2 * 16 * 2


@pytest.mark.parametrize(("name", "heads"), [("falcon 7b", 1), ("falcon 40b", 4), ("falcon rw", 4)])
def test_heads_in_falcons_cache(name: str, heads: int) -> None:
    """40b repeats its two keys for four queries before it caches them."""
    arch = architecture(CONFIGS[name])
    assert cache_bytes(arch, "bf16", 2, 10, decoded=True) == 2 * 2 * (2 * 10 * heads * 16 * 2)


def test_later_steps_copy_the_experts_that_tokens_visit() -> None:
    e = estimate_inference(MIXTRAL, batch_size=4, context=20, prompt=4)
    assert e.decode is not None
    # 4 tokens x 2 experts, each of gate and up (2 x 160 x 64) and down (160 x 64), in bf16
    copies = 4 * 2 * (3 * 160 * 64) * 2
    assert copies < e.decode.activation < copies + 32 * 1024
    assert any("experts_implementation" in text for text in e.warnings)
    assert estimate_inference(MIXTRAL, batch_size=4, context=20).peak_phase == "decode"
    one = estimate_inference(LLAMA, batch_size=4, context=20, prompt=4)
    assert not any("experts_implementation" in text for text in one.warnings)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: str(run["id"]))
def test_a_measured_run(run: dict[str, Any]) -> None:
    """Random weights made on the GPU: nothing was loaded, so the loading peak is left out."""
    e = estimate_inference(
        run["config"],
        dtype=run["dtype"],
        attention=run["attn"],
        batch_size=run["batch"],
        context=run["prompt"] + run["new"],
        prompt=run["prompt"],
    )
    assert e.decode is not None
    assert abs(e.weights - run["load"]) <= 512
    assert e.cache_end == run["kv"]
    assert abs(max(e.prefill.peak, e.decode.peak) / run["peak"] - 1) <= WORST
    # Where the prompt is short, its own highest instant are the first token's scores; the counter
    # was read before those.
    assert e.prefill.peak / run["prefill"] - 1 >= -WORST
    assert abs(e.decode.peak / run["decode"] - 1) <= WORST


def test_a_larger_batch_or_context_never_needs_less() -> None:
    peaks = [
        estimate_inference(LLAMA, batch_size=batch, context=context).peak_allocated
        for batch, context in ((1, 64), (1, 128), (2, 128), (4, 128), (4, 4096))
    ]
    assert peaks == sorted(peaks)


def test_quantized_weights_keep_the_rest_in_its_dtype() -> None:
    wide = {**LLAMA, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8}
    plain = estimate_inference(wide)
    nf4 = estimate_inference(wide, quantization="nf4")
    linear = 3 * (2 * 128 * 128 + 2 * 128 * 32 + 3 * 128 * 352)
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
    made["mixtral"].set_experts_implementation("batched_mm")  # as generate does on a GPU
    return made


LENGTHS = [(5, 6), (5, 7), (20, 21), (20, 22), (1, 10)]  # on both sides of the window


@pytest.mark.parametrize(
    ("name", "prompt", "context"),
    [(name, *lengths) for name in ("llama", "mistral", "gemma2") for lengths in LENGTHS]
    + [(name, 1, 4) for name in OTHERS]
    + [(name, 20, 21) for name in OTHERS if name != "mixtral"]
    + [("deepseek_v3", 1, 12)],  # a step's keys, expanded from the latents, are the most
)
def test_a_real_generate(models: dict[str, Any], name: str, prompt: int, context: int) -> None:
    """In fp32 on the CPU: the cache that generate returns, and every storage that it makes,
    rounded as CUDA's allocator rounds."""
    found, cache = _generate(models[name], prompt, context)
    e = estimate_inference(
        CONFIGS[name], dtype="fp32", attention="eager", batch_size=2, context=context, prompt=prompt
    )
    assert e.cache_end == cache
    expected = max(e.prefill.peak, e.decode.peak if e.decode else 0) - e.weights - e.workspace
    assert abs(expected - found) <= tolerance(e), (expected, found)


def tolerance(e: InferenceEstimate) -> int:
    """Scalars and vectors of int64 that generate keeps beside the inputs, 512 bytes each."""
    return 16 * 512


def _generate(model: Any, prompt: int, context: int) -> tuple[int, int]:
    """Bytes at the peak, and of the cache."""
    import torch
    from vramplan_launcher.trace.counting import Counter

    counter = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        counter._elsewhere.add(tensor.untyped_storage()._cdata)
    with counter:
        ids = torch.randint(0, 320, (2, prompt))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=context - prompt,
            do_sample=False,
            return_dict_in_generate=True,
        )
    tensors = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    return counter.peak, sum(t.untyped_storage().nbytes() for t in tensors)
