"""The trace: what it counts, and what it knows about CUDA."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import Counter, autocast, quantized, reduction, trace, trace_deep  # noqa: E402  # noqa: E402
from vramplan_launcher.trace.blocks import Blocks  # noqa: E402

MIB = 2**20
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SMALL = {"batch_size": 2, "seq_len": 64}


def test_storages_are_counted_once_and_until_the_last_view_goes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Counter() as counter:
        whole = torch.empty(1000, dtype=torch.float32)  # 4000 bytes: 8 blocks of 512
        assert counter.live == 4096
        view = whole.view(10, 100)[:2]
        del whole
        assert counter.live == 4096
        total = view.sum()  # a scalar: one block
        assert counter.live == 4096 + 512
        del view
        assert counter.live == 512
        del total
        assert counter.live == 0
    assert counter.peak == 4096 + 512


def test_loading_takes_the_weights_each_rounded_to_512() -> None:
    load = trace(LLAMA, SMALL, steps=1).step(0)["load"]
    embedding, norms = 512 * 64 * 2, 5 * 512  # five norms of 128 bytes, one block each
    attention = 2 * (64 * 64 + 32 * 64) * 2
    mlp = 3 * 128 * 64 * 2
    frequencies = 2 * 512  # inv_freq and its copy, fp32 of 8
    assert load.end == embedding + norms + 2 * (attention + mlp) + frequencies
    assert load.peak == load.end


def test_adamw_keeps_two_copies_in_the_weights_dtype() -> None:
    result = trace(LLAMA, SMALL, steps=1)
    step = result.step(1)
    weights = result.parameters * 2
    states = step["optimizer_step"].end - step["optimizer_step"].start
    rounding = 5 * 3 * 512 + 20 * 512  # norms' states, and a step counter for each of 20 tensors
    assert 2 * weights <= states <= 2 * weights + rounding


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"mixed_precision": "no"},
        {"dtype": "fp32", "mixed_precision": "fp16"},
        {"attention": "eager", "gradient_checkpointing": True},
        {"lora": {"rank": 4, "dropout": 0.1}},
        {"optimizer": "adamw_torch"},
    ],
)
def test_equal_layers_add_equal_bytes(recipe: dict[str, object]) -> None:
    runs = [trace(LLAMA, {**SMALL, **recipe}, layers=n) for n in (3, 4, 5)]
    for name in ("forward", "backward", "optimizer_step", "step_end"):
        three, four, five = (run.step(2)[name].end for run in runs)
        assert five - four == four - three > 0, name


def test_checkpointing_keeps_one_boundary_a_layer() -> None:
    recipe = {**SMALL, "gradient_checkpointing": True, "mixed_precision": "no"}
    two, three = (trace(LLAMA, recipe, layers=n).step(1) for n in (2, 3))
    grown = [s["forward"].end - s["forward"].start for s in (two, three)]
    assert grown[1] - grown[0] == 2 * 64 * 64 * 2  # batch, sequence, hidden, bf16


def test_flash_attention_is_linear_in_sequence_and_eager_is_not() -> None:
    def kept(attention: str, length: int) -> int:
        recipe = {"attention": attention, "batch_size": 1, "seq_len": length}
        return trace(LLAMA, recipe, steps=1, layers=1).step(1)["forward"].end

    def curve(attention: str) -> int:
        one, two, three = (kept(attention, n) for n in (256, 512, 768))
        return three - 2 * two + one

    assert abs(curve("sdpa")) <= 8 * 512
    assert curve("eager") >= 2 * 256 * 256 * 4 * 4  # heads of fp32 scores, s squared


def test_autocast_knows_all_of_cudas_lists() -> None:
    cuda = autocast.registered("AutocastCUDA")
    here = {*autocast.FP32, *autocast.SET_OPT_DTYPE, *autocast.PROMOTE, *autocast.LOWER}
    assert here <= cuda
    shared = autocast.registered("AutocastCPU")
    rest = {
        name
        for name in cuda - here - shared
        if not any(part in name for part in autocast.NOT_MODELLED)
    }
    assert rest == {"_scaled_dot_product_flash_attention"}  # called below autocast


def test_autocast_runs_powers_in_fp32_as_cuda_does() -> None:
    half = torch.ones(4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert half.pow(2).dtype == torch.bfloat16
        with autocast.cuda_lists():
            assert half.pow(2).dtype == torch.float32
            assert torch.cat([half, half]).dtype == torch.bfloat16
        assert half.pow(2).dtype == torch.bfloat16


def test_a_bias_gradients_sum_takes_a_buffer() -> None:
    # 8192 outputs of 4096 rows on 132 multiprocessors: blocks of 32 × 4 threads with 4 outputs
    # each, 64 of them across; 2112 fit, so 33 share an output: 4 B × 8192 × 33 × 32 × 4.
    rows = torch.empty(4096, 8192, dtype=torch.float16, device="meta")
    assert reduction.buffer_bytes(rows, [0], reduction.Processors()) == 4 * 8192 * 33 * 128
    assert reduction.buffer_bytes(rows, [1], reduction.Processors()) == 0


def test_the_default_allocator_leaves_a_small_remainder_whole() -> None:
    blocks = Blocks()
    first = blocks.take(19 * MIB + 512 * 1024)  # a segment of 20 MiB, of which 0.5 remain
    assert first.size == 20 * MIB
    blocks.give_back(first)
    assert blocks.take(18 * MIB).size == 18 * MIB  # 2 MiB remain: cut off
    assert blocks.take(3 * MIB // 2).size == 2 * MIB  # they, with 0.5 too many to count
    assert blocks.reserved == 20 * MIB


def test_nf4_holds_half_a_byte_and_its_scales() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    recipe = {**SMALL, "quantization": "nf4", "lora": {"rank": 4}}
    with_double = trace(wide, recipe, steps=1)
    single = trace(wide, {**recipe, "double_quant": False}, steps=1)
    # An fp32 absmax of 64 against int8 ones with an fp32 of 256, a code of 256 fp32 and an offset;
    # q and o 512 × 512, k and v 256 × 512, three of 1024 × 512.
    saved = 0
    for rows, columns in [(512, 512)] * 2 + [(256, 512)] * 2 + [(1024, 512)] * 3:
        scales = rows * columns // 64
        saved += 4 * scales - scales - 512 - 1024 - 512
    dynamic_code = 1024
    difference = single.step(0)["load"].end - with_double.step(0)["load"].end
    assert difference == saved - dynamic_code


def test_a_weight_is_not_dequantized_for_few_rows() -> None:
    pytest.importorskip("bitsandbytes")
    processors = reduction.Processors()
    few = quantized.uses_custom_gemm(torch.bfloat16, 4, (4096, 4096), 64, "9.0", processors)
    many = quantized.uses_custom_gemm(torch.bfloat16, 2048, (4096, 4096), 64, "9.0", processors)
    assert few
    assert not many


@pytest.mark.parametrize(
    "recipe",
    [{"gradient_checkpointing": True}, {"lora": {"rank": 4}}, {"optimizer": "adamw_torch"}],
)
def test_a_deep_model_is_traced_exactly_from_shallow_ones(recipe: dict[str, object]) -> None:
    deep = {**LLAMA, "num_hidden_layers": 9}
    every, few = trace(deep, {**SMALL, **recipe}), trace_deep(deep, {**SMALL, **recipe})
    assert few.counter is not every.counter
    assert few.parameters == every.parameters
    for one, other in zip(every.phases, few.phases, strict=True):
        assert (one.name, one.start, one.end, one.peak) == (
            other.name,
            other.start,
            other.end,
            other.peak,
        )
