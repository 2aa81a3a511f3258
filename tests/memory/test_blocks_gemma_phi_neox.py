"""Gemma, Phi, GPT-NeoX and GPT-J: the closed form against a trace of the real code, by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vramplan import LoRA, Recipe
from vramplan.memory import record
from vramplan.memory.precision import Policy
from vramplan.memory.program import Program, compile_step, reduce_recording
from vramplan.memory.record import layers_to_run, record_step
from vramplan.models.hf_config import architecture

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 64}
GPTJ: dict[str, Any] = {
    "vocab_size": 1000,
    "n_embd": 512,
    "n_layer": 3,
    "n_head": 8,
    "n_positions": 512,
    "rotary_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DROPOUTS = {"embd_pdrop": 0.1, "resid_pdrop": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma": GEMMA,
    "gemma-single-key-head": {**GEMMA, "num_key_value_heads": 1},
    "gemma2": GEMMA,
    "gemma2-window": {**GEMMA, "sliding_window": 128},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 6},
    "gemma3_text-window": {
        **GEMMA,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "sliding_window": 128,
    },
    "phi": SIZES,
    "phi-dropouts": {**SIZES, **DROPOUTS, "attention_dropout": 0.1},
    "gpt_neox": {**SIZES, "hidden_act": "gelu_fast"},
    "gpt_neox-serial": {
        **SIZES,
        "use_parallel_residual": False,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "rotary_pct": 1.0,
    },
    "gptj": GPTJ,
    "gptj-dropouts": {**GPTJ, **DROPOUTS, "attn_pdrop": 0.1},
}
FULL = Recipe(batch_size=2, seq_len=256)
ADAPTED = replace(FULL, lora=LoRA(rank=8, dropout=0.05, target_modules="all-linear"))
RECIPES: dict[str, Recipe] = {
    "full": FULL,
    "checkpointing": replace(FULL, gradient_checkpointing=True),
    "one-sequence": replace(FULL, batch_size=1, seq_len=333),
    "eager": replace(FULL, attention="eager"),
    "eager-checkpointing": replace(FULL, attention="eager", gradient_checkpointing=True),
    "fp16": replace(FULL, dtype="fp16", mixed_precision="no"),
    "fp32": replace(FULL, dtype="fp32", mixed_precision="no"),
    "fp32-fp16": replace(FULL, dtype="fp32", mixed_precision="fp16", gradient_checkpointing=True),
    "lora": ADAPTED,
    "lora-eager": replace(ADAPTED, attention="eager"),
    "nf4": replace(ADAPTED, quantization="nf4", gradient_checkpointing=True),
}
CASES = [
    *[(variant, "full") for variant in VARIANTS if not variant.startswith("gptj")],  # no sdpa
    ("gemma", "fp16"),
    ("gemma-single-key-head", "one-sequence"),
    ("gemma-single-key-head", "eager-checkpointing"),
    ("gemma2", "lora-eager"),
    ("gemma2-window", "checkpointing"),
    ("gemma3_text", "fp32-fp16"),
    ("gemma3_text-window", "eager-checkpointing"),
    ("gemma3_text-window", "nf4"),
    ("phi", "fp32"),
    ("phi", "nf4"),
    ("phi-dropouts", "eager-checkpointing"),
    ("phi-dropouts", "lora"),
    ("gpt_neox", "one-sequence"),
    ("gpt_neox", "fp32-fp16"),
    ("gpt_neox", "lora"),
    ("gpt_neox", "nf4"),
    ("gpt_neox-serial", "fp16"),
    ("gpt_neox-serial", "eager-checkpointing"),
    ("gptj", "eager"),
    ("gptj", "lora-eager"),
    ("gptj-dropouts", "eager-checkpointing"),
]


def config_of(variant: str) -> dict[str, Any]:
    return {"model_type": variant.partition("-")[0], **VARIANTS[variant]}


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_closed_form_is_the_trace(
    variant: str, name: str, agrees_with_trace: Callable[[dict[str, Any], Recipe], None]
) -> None:
    config = config_of(variant)
    agrees_with_trace(config, RECIPES[name])


PATTERNS = {
    # alone: the first unit and what follows the last whole one
    "one": ("a", [1], [1]),
    "four alike": ("aaaa", [1, 1], [1, 3]),
    "many alike": ("a" * 80, [1, 1], [1, 79]),
    "alternating": ("sf" * 13, [1, 1, 2], [1, 1, 12]),
    "one in six": ("sssssf" * 4 + "ss", [1] * 6 + [6, 1, 1], [1] * 6 + [3, 1, 1]),
    "a dense one first": ("d" + "m" * 26, [1, 1, 1], [1, 1, 25]),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_layers_to_run(name: str) -> None:
    kinds, lengths, repeats = PATTERNS[name]
    sections = layers_to_run(list(kinds))
    assert [len(layers) for layers, _ in sections] == lengths
    assert [times for _, times in sections] == repeats
    stood_for = "".join("".join(kinds[i] for i in layers) * times for layers, times in sections)
    assert stood_for == kinds


POLICIES = {
    "beyond the window": Policy(beyond_window=True),
    "beyond the window, recomputed": Policy(beyond_window=True, checkpointing=True),
    "eager, recomputed": Policy(attention="eager", checkpointing=True),
    "adapted": Policy(beyond_window=True, rank=8, targets="all-linear", lora_dropout=0.1),
    "fp32 weights": Policy(beyond_window=True, dtype="fp32"),
}
SHAPES = ((1, 17), (2, 512), (5, 333), (1, 8192))


def phases(program: Program, batch: int, seq: int) -> dict[str, tuple[int, int]]:
    """End and peak of forward and backward."""
    out: dict[str, tuple[int, int]] = {}
    for point in program.walk(batch, seq):
        peak = max(point.peak, out.get(point.section.phase, (0, 0))[1])
        out[point.section.phase] = (point.end, peak)
    return out


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("family", "layers"), [("gemma2", 26), ("gemma3_text", 26)])
def test_patterns_equal_running_every_layer(
    family: str, layers: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = architecture({**config_of(family), "num_hidden_layers": layers, "sliding_window": 16})
    scaled = reduce_recording(record_step(arch, POLICIES[policy]))
    every = [(range(i, i + 1), 1) for i in range(layers)]
    monkeypatch.setattr(record, "layers_to_run", lambda kinds: every)
    whole = reduce_recording(record_step(arch, POLICIES[policy]))
    assert len(scaled.sections) < len(whole.sections)
    for batch, seq in SHAPES:
        assert phases(scaled, batch, seq) == phases(whole, batch, seq)


def test_cost_of_a_pattern_does_not_grow_with_depth() -> None:
    config = {**config_of("gemma2"), "sliding_window": 16}
    policy = Policy(beyond_window=True)
    few, many = (
        compile_step(architecture({**config, "num_hidden_layers": n}), policy) for n in (8, 80)
    )
    assert len(many.sections) == len(few.sections)
    assert many.classes == few.classes
