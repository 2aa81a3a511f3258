"""bitsandbytes on fake tensors: what quantized weights and their products take on CUDA."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import quantized, reduction, trace  # noqa: E402

from tests.launcher.traced_llama import LLAMA, SMALL, steps  # noqa: E402


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


@pytest.mark.parametrize("regime", [{"quantization": "int8"}, {"dtype": "fp32"}])
def test_adapters_have_the_dtype_that_is_asked_for(regime: dict[str, str]) -> None:
    """Though peft would make them in fp32, or in that of the weights."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from vramplan import Recipe, estimate

    wide = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 640}
    shape = {"batch_size": 2, "seq_len": 640, "optimizer": "sgd", **regime}
    for dtype in ("fp32", "bf16"):
        lora = {"rank": 64, "target_modules": "all-linear", "dtype": dtype}
        recipe = Recipe.from_dict({**shape, "lora": lora})
        needed, traced = estimate(wide, recipe), trace(wide, recipe.to_dict(), steps=2)
        assert abs(needed.peak_allocated / traced.peak_allocated - 1) < 1e-3


def test_a_weight_is_not_dequantized_for_few_rows() -> None:
    pytest.importorskip("bitsandbytes")
    processors = reduction.Processors()
    few = quantized.uses_custom_gemm(torch.bfloat16, 4, (4096, 4096), 64, "9.0", processors)
    many = quantized.uses_custom_gemm(torch.bfloat16, 2048, (4096, 4096), 64, "9.0", processors)
    assert few
    assert not many


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
