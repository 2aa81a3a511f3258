"""GPT-2, OPT, BLOOM and Falcon: the closed form against a trace of the real code, by phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vramplan import LoRA, Recipe
from vramplan.memory.precision import policy_of
from vramplan.memory.program import reduce_recording
from vramplan.memory.record import record_step
from vramplan.memory.tape import Tape
from vramplan.memory.values import Value
from vramplan.models.hf_config import architecture

pytestmark = pytest.mark.filterwarnings("ignore")

GPT2: dict[str, Any] = {
    "vocab_size": 1000,
    "n_embd": 512,
    "n_layer": 3,
    "n_head": 8,
    "n_positions": 1024,
}
OPT: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "ffn_dim": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
BLOOM: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 512, "n_layer": 3, "n_head": 8}
FALCON: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
DROPOUTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2-upcast": {**GPT2, "reorder_and_upcast_attn": True},
    "opt": OPT,
    "opt-projected": {**OPT, "word_embed_proj_dim": 256, "do_layer_norm_before": False},
    "bloom": BLOOM,
    "bloom-dropouts": {**BLOOM, **DROPOUTS, "apply_residual_connection_post_layernorm": True},
    "falcon": {**FALCON, "hidden_size": 448, "num_attention_heads": 7},
    "falcon-grouped": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-old": {
        **FALCON,
        **DROPOUTS,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
}
FULL = Recipe(batch_size=2, seq_len=512)
ADAPTED = replace(FULL, lora=LoRA(rank=8, dropout=0.05, target_modules="all-linear"))
RECIPES: dict[str, Recipe] = {
    "full": FULL,
    "one-sequence": replace(FULL, batch_size=1, seq_len=384),
    "eager": replace(FULL, attention="eager"),
    "eager-checkpointing": replace(FULL, attention="eager", gradient_checkpointing=True),
    "eager-lora": replace(ADAPTED, attention="eager"),
    "eager-one-sequence": replace(FULL, batch_size=1, seq_len=384, attention="eager"),
    "eager-nf4": replace(
        ADAPTED, attention="eager", quantization="nf4", gradient_checkpointing=True
    ),
    "fp32": replace(FULL, dtype="fp32", mixed_precision="no"),
    "fp32-fp16": replace(FULL, dtype="fp32", mixed_precision="fp16", gradient_checkpointing=True),
    "lora": ADAPTED,
    "lora-checkpointing": replace(ADAPTED, gradient_checkpointing=True),
    "nf4": replace(ADAPTED, quantization="nf4"),
}
SDPA = ("gpt2", "opt", "opt-projected", "falcon", "falcon-grouped", "falcon-old")
CASES = [
    *[(v, "full") for v in SDPA],
    *[(v, "eager-checkpointing") for v in VARIANTS],
    *[("bloom", r) for r in ("eager-lora", "eager-one-sequence", "eager-nf4")],
    *[("gpt2", r) for r in ("fp32", "lora-checkpointing", "nf4")],
    *[("opt-projected", r) for r in ("eager", "fp32-fp16", "lora", "nf4")],
    *[("falcon", r) for r in ("one-sequence", "nf4")],
    ("falcon-grouped", "one-sequence"),
    ("falcon-old", "fp32-fp16"),
]


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trace on fake tensors does otherwise than a run, on both sides.

    The engine never adds in place to a tensor subclass (input_buffer.cpp,
    can_accumulate_inplace); and what _safe_softmax (SoftMax.cpp) makes inside, a mask, is not seen.
    """
    torch = pytest.importorskip("torch")
    cuda_ops = pytest.importorskip("vramplan_launcher.trace.cuda_ops")

    def added(self: Tape, old: Value, grad: Value) -> Value:
        return self.new(old.size, old.dtype)

    def mask(func: Any, args: Any, kwargs: Any, out: Any) -> int:
        return int(out.numel())

    monkeypatch.setattr(Tape, "_accumulate", added)
    monkeypatch.setitem(cuda_ops.KERNEL_SCRATCH, torch.ops.aten._safe_softmax.default, mask)


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize(("variant", "name"), CASES)
def test_closed_form_is_the_trace(variant: str, name: str) -> None:
    """End and peak of forward and backward, within a thousandth of the step's peak."""
    tracing = pytest.importorskip("vramplan_launcher.trace.steps")
    config = {"model_type": variant.partition("-")[0], **VARIANTS[variant]}
    recipe = RECIPES[name]

    traced = tracing.trace(config, recipe).step(2)
    forward, backward = traced["forward"], traced["backward"]
    start = forward.start
    expected = [p - start for p in (forward.end, forward.peak, backward.end, backward.peak)]

    arch = architecture(config)
    program = reduce_recording(record_step(arch, policy_of(recipe, arch)))
    points = program.walk(recipe.batch_size, recipe.seq_len)
    ahead = [p for p in points if p.section.phase == "forward"]
    back = [p for p in points if p.section.phase == "backward"]
    found = [ahead[-1].end, max(p.peak for p in ahead), back[-1].end, max(p.peak for p in back)]

    assert found == pytest.approx(expected, rel=0, abs=max(expected) / 1000)
