"""The trace: what it counts, and what it knows about CUDA."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import (  # noqa: E402
    Counter,
    autocast,
    build,
    cuda_ops,
    engine,
    quantized,
    reduction,
    trace,
    trace_deep,
)
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


def steps(
    config: dict[str, object], recipe: dict[str, object], **options: object
) -> dict[str, object]:
    """A traced step's phases with the storages that were live at each peak and end."""
    return trace(config, {**SMALL, **recipe}, steps=1, watch_peak=True, **options).step(1)


def kept_by(phase: object, op: str) -> list[int]:
    return [s.size for s in phase.end_storages if op in s.op]


def test_cudnn_attention_is_taken_where_torch_prefers_it() -> None:
    hopper, ampere = (steps(LLAMA, {}, compute_capability=c)["forward"] for c in ("9.0", "8.0"))
    # of each of 2 layers: 2 x 4 x 64 x 16 in bf16, their log-sum-exp in fp32, a seed, an offset
    expected = sorted([2 * 4 * 64 * 16 * 2, 2 * 4 * 64 * 4, 512, 512] * 2)
    assert sorted(kept_by(hopper, "_cudnn_attention")) == expected
    assert not kept_by(hopper, "_flash_attention")
    assert kept_by(ampere, "_flash_attention")
    assert not kept_by(ampere, "_cudnn_attention")


def test_fp32_attention_is_the_efficient_kernel_everywhere() -> None:
    forward = steps(LLAMA, {"dtype": "fp32", "mixed_precision": "no"})["forward"]
    assert not kept_by(forward, "_cudnn_attention")


@pytest.mark.parametrize(
    ("kernel", "arguments", "need"),
    [
        # fp32 dq of 16 columns and a row sum, dk and dv of 4 heads where 2 are
        ("cudnn", [(2, 4, 64, 16), (2, 2, 64, 16)], 2 * 4 * 64 * 17 * 4 + 2 * 2 * 4 * 64 * 16 * 2),
        ("cudnn", [(2, 4, 64, 80), (2, 4, 64, 80)], 2 * 4 * 64 * 81 * 4),
    ],
)
def test_scratch_of_attentions_backward(
    kernel: str, arguments: list[tuple[int, ...]], need: int
) -> None:
    q, k = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in arguments)
    assert cuda_ops._cudnn_backward(None, (q, q, k, k), {}, None) == need


def test_scratch_of_efficient_attention_in_fp32_is_rounded_by_64_and_128() -> None:
    def need(width: int) -> int:
        q = torch.empty((2, 4, 64, width), device="meta")
        return cuda_ops._efficient_backward(None, (q, q, q, q), {}, None)

    assert need(48) == 2 * 4 * 64 * (64 + 2) * 4
    assert need(80) == 2 * 4 * 64 * (128 + 2) * 4


def test_scratch_of_softmax_and_embedding() -> None:
    grad = torch.empty(6, 50, device="meta")
    mask = torch.empty(6, 50, dtype=torch.bfloat16, device="meta")
    rules = cuda_ops.KERNEL_SCRATCH
    assert rules[torch.ops.aten._softmax_backward_data.default](None, (grad,), {}, None) == 1200
    assert rules[torch.ops.aten._safe_softmax.default](None, (mask,), {}, mask) == 300
    assert torch.ops.aten._log_softmax_backward_data.default not in rules
    few, many = (torch.empty(n, dtype=torch.int64, device="meta") for n in (3072, 5000))
    out = torch.empty(1000, 8, dtype=torch.bfloat16, device="meta")
    rule = rules[torch.ops.aten.embedding_dense_backward.default]
    assert rule(None, (grad, few, 1000), {}, out) == 0
    # 1000 segments, 500 sums more: int64 3 x 5000 + 2 x 1000 + 1500, fp32 sums of 8 columns
    assert rule(None, (grad, many, 1000), {}, out) == 8 * 18500 + 4 * 1500 * 8


def test_a_bias_makes_a_workspace_of_each_thread_that_adds_it() -> None:
    biased = {**LLAMA, "attention_bias": True}

    def workspaces(config: dict[str, object], recipe: dict[str, object]) -> int:
        ends = steps(config, recipe)["step_end"].end_storages
        return sum(s.size for s in ends if "cuBLASLt" in s.op)

    assert workspaces(LLAMA, {}) == 0
    assert workspaces(biased, {}) == MIB
    assert workspaces(biased, {"gradient_checkpointing": True}) == 2 * MIB


def test_families_without_sdpa_are_eager() -> None:
    config = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 16}
    sdpa, eager = (steps(config, {"attention": a}) for a in ("sdpa", "eager"))
    assert sdpa["forward"].end == eager["forward"].end
    assert sdpa["backward"].peak == eager["backward"].peak


def test_int8_keeps_the_outlier_columns_of_a_gated_product() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from vramplan.memory import outliers

    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "initializer_range": 0.08}
    forward = steps(wide, {"quantization": "int8", "lora": {"rank": 4}})["forward"]
    deviation = int(0.08 * 512**0.5 * outliers.MICRO)
    columns = int(1024 * outliers.share(deviation, 2 * 64))
    assert 0 < columns < 1024
    # beside the outliers' values of 2 layers: results of 16 bits and fp32 are no larger
    kept = [s for s in forward.end_storages if "int8_mixed" in s.op and s.shape == (128, columns)]
    assert [s.size for s in kept] == [-(-128 * columns * 4 // 512) * 512] * 2


def test_adding_outlier_columns_copies_all_three_operands_under_autocast() -> None:
    tokens, inputs, outputs, columns = 64, 256, 128, 32
    rows = torch.empty(tokens, inputs, device="meta")
    weight = torch.empty(outputs, inputs, dtype=torch.int8, device="meta")
    kept = torch.empty(tokens, columns, device="meta")

    def need(dtype: torch.dtype) -> int:
        out = torch.empty(tokens, outputs, dtype=dtype, device="meta")
        return quantized._int8_mixed_scratch(None, (rows, rows, weight), {}, (out, kept))

    wide, result = 4 * outputs * columns, tokens * outputs
    # the weight's columns in fp32; the int32 product, fp16 and fp32 results, one of them counted
    assert need(torch.float32) == wide + result * (4 + 2 + 4) - result * 4
    # now the one that is counted comes after: fp32 result, 16-bit copies of it and both factors
    lowered = 2 * (result + tokens * columns + outputs * columns)
    product = wide + result * (4 + 2 + 4) - result * 2
    assert need(torch.bfloat16) == max(wide + 4 * result + lowered, product)


def test_experts_are_there_twice_while_they_are_merged() -> None:
    experts = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 128}
    load = trace(experts, SMALL, steps=1).step(0)["load"]
    weights = load.end - 2 * 512  # inv_freq and its copy come last
    assert load.peak - weights == 4 * 2 * 128 * 64 * 2  # a layer's gate and up in bf16


def test_what_a_class_keeps_in_fp32_is_loaded_so() -> None:
    config = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 16}
    half = build.skeleton(
        build.hf_config(config), {"dtype": "fp16", "attention": "eager", "quantization": None}
    )
    kept = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in half.named_parameters() if "norm" in n}


def test_adagrad_has_its_states_before_the_first_step() -> None:
    result = trace(LLAMA, {**SMALL, "optimizer": "adagrad"}, steps=1)
    states = result.step(1)["forward"].start - result.step(0)["prepare"].end
    assert states >= result.parameters * 2


# -- how the engine adds gradients that meet ---------------------------------------------------
SIZES = {**LLAMA, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MEETINGS = {
    "llama": SIZES,
    "gemma2": {**SIZES, "head_dim": 16},
    "phi3": {**SIZES, "num_key_value_heads": 4},
    "gpt2": {**GPT, "bos_token_id": 1, "eos_token_id": 2},
    "gptj": {**GPT, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def step_on(model: object, ids: object, checkpointing: bool) -> None:
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids).loss.backward()


def sums_seen(model: object, checkpointing: bool) -> list[tuple[bool, tuple[int, ...]]]:
    """The engine's sums on real tensors: whether in place, and of what shape, in their order."""
    with torch.profiler.profile(record_shapes=True) as profiler:
        step_on(model, torch.randint(3, 100, (2, 16)), checkpointing)
    sums = [e for e in profiler.events() if e.name in ("aten::add", "aten::add_")]
    sums.sort(key=lambda e: e.time_range.start)
    engines = "autograd::engine::evaluate_function"
    return [
        (e.name == "aten::add_", tuple(e.input_shapes[0]))
        for e in sums
        if e.cpu_parent is not None and e.cpu_parent.name.startswith(engines)
    ]


def sums_traced(
    model: object, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[bool, tuple[int, ...]]]:
    """The same of the trace's rule, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: list[tuple[bool, tuple[int, ...]]] = []
    rule = engine.adds_in_place

    def watched(args: object, kwargs: object) -> bool:
        in_place = rule(args, kwargs)
        frame = engine.called_by_engine()
        if frame:
            seen.append((in_place, tuple(args[0].shape)))
        return in_place

    monkeypatch.setattr(engine, "WRAPPERS", (*engine.WRAPPERS, __name__))
    monkeypatch.setattr(engine, "adds_in_place", watched)
    counter = Counter(answer=cuda_ops.answer_scalar, replaced=dict(cuda_ops.REPLACED))
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        build.materialize(model, torch.float32)
        step_on(model, torch.zeros((2, 16), dtype=torch.int64), checkpointing)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", MEETINGS)
def test_gradients_that_meet_are_added_as_the_engine_adds_them(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"dtype": "fp32", "attention": "eager", "quantization": None}
    config = build.hf_config({**MEETINGS[family], "model_type": family})
    real = build.skeleton(config, recipe).to_empty(device="cpu")
    real.tie_weights()
    for value in (*real.parameters(), *real.buffers()):
        if value.is_floating_point():
            torch.nn.init.constant_(value, 0.1)
    expected = sums_seen(real, checkpointing)
    assert any(in_place for in_place, _ in expected)
    assert sums_traced(build.skeleton(config, recipe), checkpointing, monkeypatch) == expected
