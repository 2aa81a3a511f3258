"""The trace: what it counts, from loading to the optimizer's step."""

from __future__ import annotations

from copy import deepcopy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import Counter, build, trace  # noqa: E402
from vramplan_launcher.trace.blocks import Blocks  # noqa: E402

from tests.launcher.traced_llama import LLAMA, SMALL, steps  # noqa: E402

MIB = 2**20


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


def test_the_default_allocator_leaves_a_small_remainder_whole() -> None:
    blocks = Blocks()
    first = blocks.take(19 * MIB + 512 * 1024)  # a segment of 20 MiB, of which 0.5 remain
    assert first.size == 20 * MIB
    blocks.give_back(first)
    assert blocks.take(18 * MIB).size == 18 * MIB  # 2 MiB remain: cut off
    assert blocks.take(3 * MIB // 2).size == 2 * MIB  # they, with 0.5 too many to count
    assert blocks.reserved == 20 * MIB


def test_families_without_sdpa_are_eager() -> None:
    config = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 16}
    sdpa, eager = (steps(config, {"attention": a}) for a in ("sdpa", "eager"))
    assert sdpa["forward"].end == eager["forward"].end
    assert sdpa["backward"].peak == eager["backward"].peak


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


def test_a_trace_leaves_the_config_as_it_was() -> None:
    """transformers completes tables of a config in place; the caller's dict is the caller's."""
    from vramplan_launcher.trace import api

    from vramplan.recipe.recipe import Recipe

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = {**LLAMA, "rope_scaling": scaling}
    before = deepcopy(config)
    api.run(config, Recipe(batch_size=1, seq_len=64))
    assert config == before
