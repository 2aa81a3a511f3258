"""What the trace knows about CUDA: autocast's lists, kernels, what they keep and take inside."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import Counter, autocast, cuda_ops, flash, reduction  # noqa: E402

from tests.launcher.traced_llama import LLAMA, kept_by, steps  # noqa: E402

MIB = 2**20


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


# -- what a run on a GPU showed -----------------------------------------------------------------
def test_a_mask_that_is_trained_leaves_the_plain_products() -> None:
    q = torch.empty((2, 4, 64, 64), dtype=torch.bfloat16, device="meta")
    mask = torch.empty((1, 4, 64, 64), dtype=torch.bfloat16, device="meta")
    assert cuda_ops.choose_sdpa_kernel(q, q, q, mask, False, False) == "cudnn"
    mask.requires_grad_()  # T5's bias
    assert cuda_ops.choose_sdpa_kernel(q, q, q, mask, False, False) == "math"


def test_16_bit_logits_are_kept_twice_by_cross_entropy() -> None:
    """log_softmax keeps its 16-bit result, nll_loss the fp32 copy that autocast makes of it."""
    bart = {
        "model_type": "bart", "vocab_size": 1000, "d_model": 64, "encoder_layers": 1,
        "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    }  # fmt: skip
    kept = [s.size for s in steps(bart, {})["forward"].end_storages if s.shape == (128, 1000)]
    assert sorted(kept) == [2 * 128 * 1000, 4 * 128 * 1000]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own word on the second
@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_rms_norm_is_one_kernel_where_dtypes_agree(dtype: torch.dtype, fused: bool) -> None:
    """Its output and a deviation a row; otherwise what its parts keep as well."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with cuda_ops.cuda_paths(), FakeTensorMode(), Counter() as counter:
        x = torch.empty((8, 1024), dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(1024, dtype=dtype, requires_grad=True)
        before = len(counter.storages)
        out = torch.nn.functional.rms_norm(x, (1024,), weight)
        assert (len(counter.storages) - before == 2) is fused
        assert out.dtype == torch.bfloat16


# -- flash-attn ---------------------------------------------------------------------------------
def test_flash_attention_keeps_what_its_function_saves() -> None:
    forward = steps(LLAMA, {"attention": "flash_attention_2"})["forward"]
    made = [s for s in forward.end_storages if s.module == "model.layers.0.self_attn"]
    kept = [s.size for s in made if "aten.empty" in s.op]
    # the output, 2 x 64 x 4 x 16 in bf16; its log-sum-exp, 2 x 4 x 64 in fp32; a random state
    assert sorted(kept) == [512, 2 * 4 * 64 * 4, 2 * 64 * 4 * 16 * 2]


def test_flash_attention_pads_heads_and_takes_scratch_backward() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Counter() as counter:
        q = torch.empty((1, 100, 4, 20), dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty((1, 100, 2, 20), dtype=torch.bfloat16, requires_grad=True)
        out = flash.attention(q, k, k)
        assert out.shape == q.shape
        assert out.untyped_storage().nbytes() == 100 * 4 * 24 * 2
        padded = flash.pad(q, [0, 4]), flash.pad(k, [0, 4])
        before = counter.peak = counter.live
        flash._kernel_work(*padded)
        # rows to 128; a sum each, dq in fp32 by 32 columns, dk and dv of four heads for two
        need = [4 * 128 * 4, 128 * 4 * 32 * 4, *[100 * 4 * 24 * 2] * 2]
        assert counter.peak - before == sum(-(-n // 512) * 512 for n in need)


def test_flash_attention_takes_no_fp32() -> None:
    q = torch.empty((1, 8, 4, 16), device="meta")
    with pytest.raises(ValueError, match="fp16 and bf16"):
        flash.attention(q, q, q)
