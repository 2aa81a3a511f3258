"""What is counted on the tape: products, attention, bytes, launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from vramplan.memory.estimate import resolve
from vramplan.memory.precision import policy_of
from vramplan.memory.record import layers_to_run, record_on
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config import architecture
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.timing.work import Stretch, WorkRecorder, count_work

# q, o: 2048 x 2048; k, v: 512 x 2048; gate, up: 8192 x 2048; down: 2048 x 8192
LAYER = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048
HEAD = 128256 * 2048
ADAPTERS = 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))  # rank x (in + out)


def work(arch: Architecture, recipe: Recipe) -> tuple[Stretch, ...]:
    return count_work(arch, policy_of(recipe, arch, "9.0"))


def products(stretches: tuple[Stretch, ...], kind: str = "product") -> Counter[tuple[str, str]]:
    """Multiplications a token, by part of the step and by what a product makes."""
    out: Counter[tuple[str, str]] = Counter()
    for s in stretches:
        for (part, kernel), count in s.kernels.items():
            if kernel.kind == kind:
                rows, n_in, n_out, _, of = kernel.figures[:5]
                out[part, of] += s.repeats * count * rows.numel * n_in * n_out
    return out


def kinds(stretches: tuple[Stretch, ...]) -> Counter[tuple[str, str]]:
    out: Counter[tuple[str, str]] = Counter()
    for s in stretches:
        for (part, kernel), count in s.kernels.items():
            out[part, kernel.kind] += s.repeats * count
    return out


def test_full_fine_tuning_multiplies_three_times(llama: Architecture) -> None:
    every = 16 * LAYER + HEAD
    assert products(work(llama, Recipe())) == {
        ("forward", "forward"): every,
        ("backward", "input"): every,
        ("backward", "weight"): every,
    }


def test_checkpointing_multiplies_the_layers_again(llama: Architecture) -> None:
    counted = products(work(llama, Recipe(gradient_checkpointing=True)))
    plain = products(work(llama, Recipe()))
    # but for the last one: recomputing stops when it has saved what backward needs
    assert counted["recompute", "forward"] == 16 * (LAYER - 8192 * 2048)
    assert {k: v for k, v in counted.items() if k[0] != "recompute"} == plain


def test_lora_spares_the_frozen_weights_their_gradients(llama: Architecture) -> None:
    counted = products(work(llama, Recipe(lora=LoRA(rank=16))))
    every = 16 * (LAYER + ADAPTERS) + HEAD
    assert counted["forward", "forward"] == every
    assert counted["backward", "weight"] == 16 * ADAPTERS
    # nothing before the first layer's adapters is trained: its q, k and v give no gradient further
    first = 2048 * (2048 + 2 * 512) + 3 * 16 * 2048
    assert counted["backward", "input"] == every - first


def test_attention_is_causal_and_its_backward_counted(llama: Architecture) -> None:
    counted = kinds(work(llama, Recipe()))
    assert counted["forward", "attention"] == counted["backward", "attention"] == 16
    causal = {
        kernel.figures[-1]
        for s in work(llama, Recipe())
        for _, kernel in s.kernels
        if kernel.kind == "attention"
    }
    assert causal == {True}


def test_eager_attention_multiplies_scores(llama: Architecture) -> None:
    counted = kinds(work(llama, Recipe(attention="eager")))
    assert counted["forward", "attention"] == 0
    # q k and p v; backward two for each
    assert counted["forward", "batched product"] == 16 * 2
    assert counted["backward", "batched product"] == 16 * 4


def test_weights_in_4_bits_are_dequantized_in_every_pass(llama: Architecture) -> None:
    recipe = Recipe(quantization="nf4", lora=LoRA(), gradient_checkpointing=True)
    counted = kinds(work(llama, recipe))
    assert counted["forward", "dequantize"] == 16 * 7
    assert counted["recompute", "dequantize"] == 16 * 7
    # with checkpointing the first layer's input has a gradient (enable_input_require_grads)
    assert counted["backward", "dequantize"] == 16 * 7


def test_int8_says_its_outliers(llama: Architecture) -> None:
    stretches = work(llama, Recipe(quantization="int8", lora=LoRA()))
    tails = {
        kernel.figures[1]: kernel.figures[-1]
        for s in stretches
        for _, kernel in s.kernels
        if kernel.kind == "int8"
    }
    assert tails[2048] == 0  # normalized inputs have none
    assert tails[8192] > 0  # the gated product has


def test_bytes_of_the_loss(llama: Architecture) -> None:
    """Logits are read in 16 bits and written in 32; log_softmax goes through them four times."""
    head = next(s for s in work(llama, Recipe()) if s.name == "head" and s.phase == "forward")
    traffic = head.traffic["forward", 3]
    vocabulary, hidden = 128256, 2048
    assert traffic.nbytes >= 4 * 4 * vocabulary
    assert traffic.nbytes < 4 * 4 * vocabulary + 40 * hidden
    # float() of logits has a wider result: element by element. So has the norm's of its input
    assert traffic.elements >= vocabulary
    assert traffic.elements < vocabulary + 10 * hidden


def test_experts_multiply_what_tokens_visit() -> None:
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 1024,
    }
    counted = products(work(architecture(config), Recipe()), "grouped product")
    active = 3 * 4 * (512 * 2 * 256 + 256 * 512)  # layers x experts visited x (gate and up, down)
    assert counted == {
        ("forward", "forward"): active,
        ("backward", "input"): active,
        ("backward", "weight"): active,
    }


def test_first_layer_and_the_others_are_one_stretch(llama: Architecture) -> None:
    layers = [s for s in work(llama, Recipe()) if s.name.startswith("layer")]
    assert [(s.phase, s.repeats) for s in layers] == [("forward", 16), ("backward", 16)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_launches(llama: Architecture, checkpointing: bool) -> None:
    recipe = Recipe(lora=LoRA(), gradient_checkpointing=checkpointing)
    host: Counter[str] = Counter()
    for s in work(llama, recipe):
        for what, count in s.host.items():
            host[what] += s.repeats * count
    runs = 2 if checkpointing else 1
    assert host["linear"] == host["adapter"] == runs * 16 * 7
    assert host["layer"] == runs * 16
    assert host["gradient"] == 16 * 7 * 2  # lora_A and lora_B
    assert (host["hook"] > 0) == (host["checkpoint"] == 16) == checkpointing


def test_one_layer_of_each_kind_stands_for_all_of_it() -> None:
    """Gemma 3's layers come in a pattern of six; the work is that of running it in its order."""

    class InOrder(WorkRecorder):
        def sections(self, kinds: Sequence[str]) -> list[tuple[range, int]]:
            return layers_to_run(kinds)

    _, arch, _ = resolve("google/gemma-3-1b-pt")
    policy = policy_of(Recipe(gradient_checkpointing=True), arch, "9.0")
    totals = []
    for kind in (WorkRecorder, InOrder):
        g = kind(policy)
        record_on(g, arch)
        total: Counter[str] = Counter()
        for stretch in g.stretches:
            for what, times in stretch.host.items():
                total[what] += stretch.repeats * times
        totals.append(total)
    assert totals[0] == totals[1]
    assert totals[0]["layer"] == 2 * 26  # forward, and recomputed
