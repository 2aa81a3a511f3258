"""Terms add up to the peak exactly, category by category, and say where they come from."""

from __future__ import annotations

import pytest

from vramplan import LoRA, Recipe, estimate
from vramplan.memory.explain import explain
from vramplan.memory.labels import labelled_step
from vramplan.memory.precision import policy_of
from vramplan.memory.record import record_step
from vramplan.memory.stepping_tape import record_stepping
from vramplan.models.hf_config import architecture
from vramplan.reports.explain import render

MODEL = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
RECIPES = {
    "full": Recipe(batch_size=2, seq_len=300),
    "accumulating": Recipe(gradient_accumulation_steps=4, seq_len=2048),
    "checkpointing": Recipe(gradient_checkpointing=True, batch_size=3, seq_len=777),
    "eager": Recipe(attention="eager", mixed_precision="no", seq_len=512),
    "fp32": Recipe(dtype="fp32", optimizer="adamw_bnb_8bit", seq_len=256),
    "foreach": Recipe(optimizer="adamw_torch", seq_len=16),
    "adafactor": Recipe(optimizer="adafactor", seq_len=16),
    "galore": Recipe(optimizer="galore_adamw", seq_len=16, optim_rank=64),
    "galore 8-bit": Recipe(optimizer="galore_adamw_8bit", seq_len=16),
    "torchao": Recipe(optimizer="adamw_torch_4bit", seq_len=16),
    "grokadamw": Recipe(optimizer="grokadamw", seq_len=16),
    "stable": Recipe(optimizer="stable_adamw", seq_len=16),
    "lomo": Recipe(optimizer="lomo", seq_len=16),
    "adalomo": Recipe(optimizer="adalomo", seq_len=16, lora=LoRA()),
    "layerwise": Recipe(optimizer="apollo_adamw_layerwise", seq_len=16),
    "lora": Recipe(lora=LoRA(rank=8), batch_size=2, seq_len=512),
    "qlora": Recipe(lora=LoRA(), quantization="nf4", gradient_checkpointing=True),
    "fp4 single": Recipe(lora=LoRA(), quantization="fp4", double_quant=False, seq_len=1),
    "int8": Recipe(lora=LoRA(dropout=0.0), quantization="int8", seq_len=128),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_terms_add_up_to_the_peak(name: str) -> None:
    e = estimate(MODEL, RECIPES[name])
    terms = explain(e).terms
    assert sum(term.bytes for term in terms) == e.peak_allocated
    assert min(term.bytes for term in terms) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_labelling_changes_nothing(name: str) -> None:
    arch = architecture(MODEL)
    policy = policy_of(RECIPES[name], arch)
    record = record_step if policy.in_backward is None else record_stepping
    assert labelled_step(arch, policy).recording == record(arch, policy)


@pytest.mark.parametrize("name", ["full", "checkpointing", "eager", "lora", "qlora"])
def test_categories_are_those_of_the_breakdown(name: str) -> None:
    e = estimate(MODEL, RECIPES[name])
    found = dict.fromkeys(e.breakdown, 0)
    for term in explain(e).terms:
        found[term.category] += term.bytes
    assert found == e.breakdown


def test_a_term_by_hand() -> None:
    """The feed-forward's product is saved by the linear that follows it, in all 6 layers."""
    explanation = explain(estimate(MODEL, RECIPES["full"]))
    (term,) = [t for t in explanation.terms if t.what == "Llama.mlp: mul, saved by linear"]
    assert term.formula == "6 layers x 2 B x 688 x batch x seq, in blocks of 512 B"
    assert term.figures == "6 x 2 x 688 x 2 x 300"
    assert term.bytes == 6 * (-(-2 * 688 * 2 * 300 // 512) * 512)
    assert "mul.Tensor" in term.source


def test_overhead_is_what_required_adds() -> None:
    e = estimate(MODEL)
    explanation = explain(e)
    added = sum(term.bytes for term in explanation.overhead)
    assert added == e.required - e.peak_allocated == explanation.required - e.peak_allocated
    assert all(term.source for term in explanation.overhead)


@pytest.mark.parametrize("name", RECIPES)
def test_the_report_fits_a_terminal(name: str) -> None:
    e = estimate("meta-llama/Llama-3.2-1B", RECIPES[name])
    text = render(explain(e))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert f"({e.peak_allocated} B)" in text
    assert text.isascii()
