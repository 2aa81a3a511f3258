"""Optimizers' states and steps: integers by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest

from vramplan import LoRA, Recipe, estimate
from vramplan.errors import IllegalRecipe
from vramplan.memory import optimizer_steps, record
from vramplan.memory.optimizer_states import optimizer_tables, state_tensors
from vramplan.memory.optimizer_steps import LowRank, counted, gesvdj_workspace, in_order
from vramplan.memory.optimizers import _order, projections, stepping
from vramplan.memory.precision import Policy, Projection
from vramplan.memory.program import Program, reduce_recording
from vramplan.memory.states import Trained, layout
from vramplan.memory.stepping_tape import record_stepping
from vramplan.models import catalogue
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config import architecture
from vramplan.recipe.optimizers import LIBRARIES, OPTIMIZERS

ALLOCATOR = "expandable_segments"
LOSS = 512  # a scalar in a block of its own
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def weight(*shape: int, itemsize: int = 2, name: str = "w", count: int = 1) -> Trained:
    return Trained(name, prod(shape), itemsize, count, False, shape, linear=len(shape) == 2)


def states(name: str, t: Trained, low: LowRank | None = None) -> list[int]:
    return [nbytes for nbytes, _ in state_tensors(OPTIMIZERS[name], t, low)]


# --- states, by hand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "itemsize", "expected"),
    [
        # 64 x 128 elements: 8192. Codes, an fp32 scale for 256, a table; twice.
        ("adamw_torch_8bit", 2, [8192, 32 * 4, 256 * 4] * 2),
        ("adamw_torch_4bit", 4, [4096, 32 * 4, 16 * 4] * 2),
        ("grokadamw", 2, []),
        ("lomo", 2, []),
        ("adalomo", 2, [64 * 4, 128 * 4]),
        ("adafactor", 2, [64 * 4, 128 * 4, 4]),
        ("schedule_free_adamw", 2, [8192 * 2] * 2),
        ("schedule_free_radam", 4, [8192 * 4] * 2),
        ("schedule_free_sgd", 2, [8192 * 2]),
        # Two moments and Kahan's compensation; in fp32 a byte stands in for it.
        ("stable_adamw", 2, [8192 * 2, 8192 * 2, 8192 * 2, 2, 4]),
        ("stable_adamw", 4, [8192 * 4, 8192 * 4, 1, 4, 4]),
    ],
)
def test_states(name: str, itemsize: int, expected: list[int]) -> None:
    assert states(name, weight(64, 128, itemsize=itemsize)) == expected


def test_torchao_leaves_small_and_odd_tensors() -> None:
    assert states("adamw_torch_8bit", weight(4095)) == [4095 * 2] * 2
    assert states("adamw_torch_4bit", weight(4100)) == [4100 * 2] * 2  # no whole blocks of 256


def test_states_of_a_projected_gradient() -> None:
    """512 x 256 to rank 128: the shorter side is projected, moments are 512 x 128."""
    low = LowRank(512, 256, 128)
    t, wide = weight(512, 256), weight(512, 256, itemsize=4)
    assert states("galore_adamw", t, low) == [128 * 256 * 2, 512 * 128 * 2, 512 * 128 * 2]
    # In fp32 the projection is a view: all of Vh stays, 256 x 256.
    assert states("galore_adamw", wide, low) == [256 * 256 * 4, 512 * 128 * 4, 512 * 128 * 4]
    assert states("galore_adafactor", t, low) == [256 * 256 * 4, 512 * 4, 128 * 4, 4]
    # 65536 elements in 8 bits, an absmax for 256; and bitsandbytes' unorm_vec.
    eight = [65_536, 65_536 // 256 * 4]
    assert states("galore_adamw_8bit", t, low) == [128 * 256 * 2, *eight, *eight, 4]
    assert optimizer_tables(OPTIMIZERS["galore_adamw_8bit"]) == 2 * 1024
    # An optimizer for each parameter: each its own tables.
    each = [*eight, 1024]
    layerwise = states("galore_adamw_8bit_layerwise", t, low)
    assert layerwise == [128 * 256 * 2, 65_536, 1024, 1024, 65_536, 1024, 1024, 4]
    assert sorted(layerwise) == sorted([128 * 256 * 2, *each, *each, 4])
    assert optimizer_tables(OPTIMIZERS["galore_adamw_8bit_layerwise"]) == 0
    # A norm of the last step's gradient besides.
    moments = [512 * 128 * 2, 512 * 128 * 2]
    assert states("apollo_adamw", t, low) == [128 * 256 * 2, 2, *moments]


def test_whose_gradients_are_projected() -> None:
    trained = (
        replace(weight(1000, 256, name="model.embed_tokens.weight"), linear=False),
        weight(256, 256, name="model.layers.{layer}.self_attn.q_proj.weight", count=4),
        weight(64, 256, name="model.layers.{layer}.self_attn.k_proj.weight", count=4),
    )
    every = projections(trained, Projection("all-linear", 128, "svd"))
    assert {t.module.rpartition(".")[2]: low for t, low in every.items()} == {
        "q_proj": LowRank(256, 256, 128),
        "k_proj": LowRank(64, 256, 64),  # no more singular vectors than rows
    }
    drawn = projections(trained, Projection(("k_proj",), 128, "random"))
    assert list(drawn.values()) == [LowRank(64, 256, 128)]  # a drawn matrix may be wider
    assert projections(trained, None) == {}


def test_adalomo_keeps_states_of_what_is_frozen() -> None:
    """Rows and columns of every parameter in fp32; of a packed one (n/2, 1), rows and one."""
    arch = architecture(MODEL)
    lora = estimate(arch, Recipe(optimizer="adalomo", lora=LoRA(rank=8)))
    qlora = estimate(arch, Recipe(optimizer="adalomo", lora=LoRA(rank=8), quantization="nf4"))
    rows = {"q": (256, 256), "k": (64, 256), "v": (64, 256), "o": (256, 256)}
    rows |= {"gate": (512, 256), "up": (512, 256), "down": (256, 512)}

    def blocks(nbytes: int) -> int:
        return -(-nbytes // 512) * 512

    plain = sum(blocks(4 * a) + blocks(4 * b) for a, b in rows.values())
    packed = sum(blocks(4 * (a * b // 2)) + blocks(4) for a, b in rows.values())
    difference = qlora.parts.stepping.states - lora.parts.stepping.states
    assert difference == 4 * (packed - plain)


def test_adalomo_steps_matrices_only() -> None:
    layout = estimate(MODEL, Recipe()).parts.layout
    stacked = layout._replace(trained=(weight(4, 64, 64, name="experts.gate_up_proj"),))
    with pytest.raises(IllegalRecipe, match=r"experts\.gate_up_proj.*3 dimensions"):
        stepping(OPTIMIZERS["adalomo"], stacked, ALLOCATOR)


def test_states_on_the_host() -> None:
    e = estimate(MODEL, Recipe(optimizer="grokadamw"))
    assert e.parts.stepping.states == 0
    assert e.host is not None
    assert e.host.pageable == 3 * 2 * e.trainable_parameters
    assert e.to_dict()["host"]["pageable"] == e.host.pageable
    assert estimate(MODEL, Recipe()).host is None


# --- steps, by hand -------------------------------------------------------------------------

# cuSOLVER 12.0's own answers to cusolverDnSgesvdj_bufferSize, in floats.
WORKSPACES = {
    (1024, 1024): 2_168_864,
    (2048, 2048): 8_539_200,
    (8192, 8192): 135_013_632,
    (2816, 1024): 5_245_184,
    (1024, 2816): 8_128_768,
    (8192, 2048): 24_187_136,
    (1024, 1000): 3_071_712,
    (2048, 1536): 7_188_032,
    (2816, 2048): 12_733_504,
    (256, 1024): 1_049_344,
    (1024, 128): 786_592,
    (16, 2048): 819_264,
    (2048, 14_336): 67_703_040,
}


@pytest.mark.parametrize("shape", WORKSPACES)
def test_workspace_of_an_svd(shape: tuple[int, int]) -> None:
    assert gesvdj_workspace(*shape) == pytest.approx(WORKSPACES[shape], abs=64)


def test_a_compiled_step_of_torchao() -> None:
    """8192 elements: two moments in fp32 and two scales; in 4 bits two int64 codes as well."""
    t = weight(64, 128)
    moments = 2 * 8192 * 4 + 2 * 512  # 32 scales, in a block of 512 bytes
    step = optimizer_steps.adamw_torch_8bit
    assert counted(step, [(t, None)], ALLOCATOR).peak == moments
    step = optimizer_steps.adamw_torch_4bit
    assert counted(step, [(t, None)], ALLOCATOR).peak == moments + 2 * 8192 * 8
    assert counted(step, [(weight(4095), None)], ALLOCATOR).peak == 0


def test_a_step_of_galore_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous parameter's `denom` and `norm_grad` are there while the next is projected."""
    monkeypatch.setattr(optimizer_steps, "svd_temporaries", lambda rows, columns: (1024,))
    head, t = weight(4096, 256), weight(512, 256)
    low = LowRank(512, 256, 128)
    full, small = 4096 * 256 * 2, 512 * 128 * 2
    decomposed = 512 * 256 * 4 + (512 * 256 + 256 + 256 * 256) * 4  # fp32 copy; U, s, Vh
    product = 512 * 128 * 4
    order = [(head, None), (t, low)]
    # After the decomposition: U s, while it is made from U and diag(s); then V's rows in bf16.
    making = product + max(1024, 128 * 128 * 4)
    making = max(making, product + 128 * 256 * 2)
    peak = 2 * full + decomposed + making
    assert counted(optimizer_steps.galore_adamw, order, ALLOCATOR).peak == peak
    # Alone: the projected gradient, denom and norm_grad; then two of the full size.
    alone = max(decomposed + making, 3 * small + 2 * 512 * 256 * 2)
    assert counted(optimizer_steps.galore_adamw, [(t, low)], ALLOCATOR).peak == alone


def test_lomo_lets_the_gradient_go_between_its_copies() -> None:
    t = weight(64, 128)  # 16 KiB in bf16: a copy in fp32, the gradient goes, another copy
    assert counted(optimizer_steps.lomo, [(t, None)], ALLOCATOR).peak == 2 * 8192 * 4 - 8192 * 2
    assert counted(optimizer_steps.lomo, [(weight(64, 128, itemsize=4), None)], ALLOCATOR).peak == 0


def test_layers_stand_twice() -> None:
    names = [weight(8, 8, name=n, count=c) for n, c in (("e", 1), ("q", 9), ("k", 9), ("h", 1))]
    assert [t.name for t in in_order(names)] == ["e", "q", "k", "q", "k", "h"]


def test_an_8_bit_step_leaves_projected_gradients() -> None:
    e = estimate(MODEL, Recipe(optimizer="galore_adamw_8bit", optim_target_modules=("mlp",)))
    start, step = e.timeline.resident + e.parts.layout.gradients, e.timeline.optimizer_step
    # gate, up and down of 4 layers: 512 x 256 each, projected to 512 x 128, in bf16.
    assert start - step.end == 4 * 3 * (512 * 256 - 512 * 128) * 2


# --- within backward ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lomo", "apollo_adamw_layerwise"])
def test_backward_leaves_no_gradients(name: str) -> None:
    e = estimate(MODEL, Recipe(optimizer=name, seq_len=64))
    assert e.timeline.backward.end == e.timeline.resident + LOSS
    assert e.timeline.optimizer_step == (e.timeline.resident, e.timeline.resident)
    plain = estimate(
        MODEL, Recipe(optimizer=name.removesuffix("_layerwise").replace("lomo", "sgd"))
    )
    gradients = plain.parts.layout.gradients
    assert plain.timeline.backward.end == plain.timeline.resident + gradients + LOSS


def test_lomo_holds_no_gradients_between_micro_batches() -> None:
    e = estimate(MODEL, Recipe(optimizer="lomo", gradient_accumulation_steps=4))
    assert e.timeline.held_gradients == 0
    assert not e.policy.accumulating


# Layers alike and in patterns, norms before and after, tied and not, experts.
FAMILIES = ("llama", "gpt2", "gpt_neox", "olmo2", "gemma3_text", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_repeats_equal_running_every_layer(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = cut(model_type)
    layerwise = Policy(
        in_backward="apollo_adamw_layerwise", projection=Projection("all-linear", 64, "random")
    )
    policies = [Policy(in_backward="lomo")]
    if model_type != "gpt2":  # Conv1D alone, which transformers projects nothing of
        policies.append(layerwise)
    short = [reduce_recording(record_stepping(arch, policy)) for policy in policies]
    every = [(range(i, i + 1), 1) for i in range(arch.layers)]
    monkeypatch.setattr(record, "layers_to_run", lambda kinds: every)
    for program, policy in zip(short, policies, strict=True):
        whole = reduce_recording(record_stepping(arch, policy))
        assert extremes(program) == extremes(whole)
        assert program.walk(2, 64)[-1].end == LOSS  # no gradient stays


def cut(model_type: str) -> Architecture:
    entry = next(e for e in catalogue.entries() if e.model_type == model_type)
    checkpoint = catalogue.load(entry.id)
    assert checkpoint is not None
    arch = architecture(checkpoint.config)
    layers = 14 if arch.layer_kinds else 5
    return replace(arch, layers=layers, layer_kinds=arch.layer_kinds[:layers])


def extremes(program: Program) -> list[int]:
    return [max(p.peak for p in program.walk(*shape)) for shape in ((1, 16), (4, 256))]


def test_the_packages_are_those_that_no_launch_has() -> None:
    assert {one.package for one in OPTIMIZERS.values()} == {
        *LIBRARIES,
        *("torchao", "galore_torch", "apollo_torch", "lomo_optim", "grokadamw", "schedulefree"),
        "optimi",
    }


def test_no_linear_to_project() -> None:
    """GPT-2's matrices are Conv1D, and its head is its embedding's table."""
    with pytest.raises(IllegalRecipe, match=r"nn\.Linear"):
        estimate("openai-community/gpt2", Recipe(optimizer="galore_adamw", seq_len=512))


def test_expert_biases_step_with_the_biases() -> None:
    """Trainer goes by the name: of gpt-oss the head follows the last layer's down_proj."""
    trained = layout(cut("gpt_oss"), Policy(), "expandable_segments").trained
    names = [t.name for t in _order(trained, {})]
    assert names.index("lm_head.weight") < min(
        names.index(name) for name in names if name.endswith("_proj_bias")
    )
