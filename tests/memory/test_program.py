"""Programs: repeated layers are arithmetic, and what must hold for every model holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vramplan import LoRA, Recipe, estimate
from vramplan.memory import record
from vramplan.memory.precision import Policy
from vramplan.memory.program import Program, compile_step, reduce_recording
from vramplan.memory.record import Mark, Recording, record_step
from vramplan.memory.states import layout
from vramplan.models import catalogue
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config import READERS, architecture

SHAPES = ((1, 1), (1, 17), (3, 64), (8, 333), (2, 4096))
POLICIES = {
    "full": Policy(),
    "checkpointing": Policy(checkpointing=True),
    "fp32 weights": Policy(dtype="fp32"),
    "accumulating": Policy(accumulating=True),
    "eager": Policy(attention="eager", single_sequence=True),
    "lora": Policy(rank=8, targets="all-linear", lora_dropout=0.1),
    "qlora": Policy(rank=8, targets="all-linear", quantization="nf4", checkpointing=True),
    "int8": Policy(rank=8, targets=("q_proj",), quantization="int8"),
    "windowed": Policy(beyond_window=True, checkpointing=True),
}


def config(layers: int = 6, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 640,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        **more,
    }


def models() -> dict[str, Architecture]:
    """Layers all alike, and in a pattern."""
    out = {"llama": architecture(config(7))}
    if "gemma2" in READERS:
        kinds = ["sliding_attention", "full_attention"] * 5
        out["gemma2"] = architecture(
            config(10, model_type="gemma2", head_dim=32, sliding_window=16, layer_types=kinds)
        )
    return out


MODELS = models()


def family_of(model_type: str) -> Architecture:
    """A bundled checkpoint's figures, its layers cut to three units of any pattern and a rest."""
    entry = next(e for e in catalogue.entries() if e.model_type == model_type)
    checkpoint = catalogue.load(entry.id)
    assert checkpoint is not None
    arch = architecture(checkpoint.config)
    layers = 20 if arch.layer_kinds else 6
    return replace(arch, layers=layers, layer_kinds=arch.layer_kinds[:layers])


@pytest.mark.parametrize("model_type", sorted({e.model_type for e in catalogue.entries()}))
def test_every_familys_repeats_equal_running_every_layer(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = family_of(model_type)
    every = [(range(i, i + 1), 1) for i in range(arch.layers)]
    policies = {n: replace(p, targets=p.targets and "all-linear") for n, p in POLICIES.items()}
    short = {name: reduce_recording(record_step(arch, p)) for name, p in policies.items()}
    monkeypatch.setattr(record, "layers_to_run", lambda kinds: every)
    for name, policy in policies.items():
        whole = reduce_recording(record_step(arch, policy))
        assert len(short[name].sections) < len(whole.sections)
        for shape in SHAPES:
            assert extremes(short[name], *shape) == extremes(whole, *shape), (name, shape)


def extremes(program: Program, batch: int, seq: int) -> list[int]:
    """End and peak of forward and backward."""
    out = []
    for phase in ("forward", "backward"):
        points = [p for p in program.walk(batch, seq) if p.section.phase == phase]
        out += [points[-1].end, max(p.peak for p in points)]
    return out


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", MODELS)
def test_repeats_equal_running_every_layer(
    model: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, chosen = MODELS[model], POLICIES[policy]
    short = reduce_recording(record_step(arch, chosen))
    every = [(range(i, i + 1), 1) for i in range(arch.layers)]
    monkeypatch.setattr(record, "layers_to_run", lambda kinds: every)
    whole = reduce_recording(record_step(arch, chosen))
    for batch, seq in SHAPES:
        assert extremes(short, batch, seq) == extremes(whole, batch, seq), (batch, seq)


@pytest.mark.parametrize("policy", [n for n, p in POLICIES.items() if not p.accumulating])
@pytest.mark.parametrize("model", MODELS)
def test_the_first_micro_batch_needs_no_more_than_the_last(model: str, policy: str) -> None:
    """So the last alone is told: gradients of others are there besides, and new ones are added."""
    arch, first = MODELS[model], POLICIES[policy]
    gradients = layout(arch, first, "expandable_segments").gradients
    alone = compile_step(arch, first)
    later = compile_step(arch, replace(first, accumulating=True))
    for shape in SHAPES:
        _, forward, end, backward = extremes(alone, *shape)
        _, later_forward, later_end, later_backward = extremes(later, *shape)
        assert forward <= gradients + later_forward
        assert backward <= gradients + later_backward
        assert end == gradients + later_end


def test_a_program_by_hand() -> None:
    """Four layers: each makes 2000 bytes a token, needs 3000 more for a while, keeps 1000."""
    sizes = [(2000, 0, 1), (1000, 0, 1), (3000, 0, 1)]
    events = [0, 2, ~2, 1, ~0]
    marks = (Mark("forward", "layers", 0, repeats=4), Mark("end", "end", len(events)))
    program = reduce_recording(Recording(marks, events, sizes, ["activation"] * 3))
    (point,) = program.walk(1, 1)
    # In blocks of 512 bytes: 2048, 1024, 3072.
    assert point.end == 4 * 1024
    assert point.peak == 3 * 1024 + 2048 + 3072
    assert point.last
    assert program.live_at([point], 0, 1, 1) == {"activation": point.peak}
    assert program.walk(1, 512)[0].end == 4 * 1000 * 512


def test_a_falling_section_is_highest_at_its_first_repeat() -> None:
    """Backward: every layer frees one of four storages made before it."""
    sizes = [(1024, 0, 0)] * 5
    events = [0, 1, 2, 3, 4, ~4, ~0]
    marks = (
        Mark("forward", "inputs", 0),
        Mark("backward", "layers", 4, repeats=4),
        Mark("end", "end", len(events)),
    )
    first, second = reduce_recording(Recording(marks, events, sizes, ["x"] * 5)).walk(1, 1)
    assert first.end == 4 * 1024
    assert second.end == 0
    assert second.peak == 5 * 1024
    assert not second.last


def test_a_gathering_section_frees_every_repetition() -> None:
    sizes = [(512, 0, 0)]
    marks = (
        Mark("forward", "layers", 0, repeats=9),
        Mark("forward", "exit", 1, gathers=True),
        Mark("end", "end", 2),
    )
    points = reduce_recording(Recording(marks, [0, ~0], sizes, ["x"])).walk(1, 1)
    assert [p.end for p in points] == [9 * 512, 0]


def test_cost_does_not_grow_with_layers() -> None:
    few, many = (compile_step(architecture(config(n)), Policy()) for n in (4, 126))
    assert len(many.sections) == len(few.sections)
    assert many.classes == few.classes


# -- what holds for every llama ---------------------------------------------------------------
@st.composite
def llamas(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    return {
        "model_type": "llama",
        "vocab_size": draw(st.integers(32, 5000)),
        "hidden_size": 32 * draw(st.integers(1, 32)),
        "intermediate_size": 32 * draw(st.integers(1, 80)),
        "num_hidden_layers": draw(st.integers(1, 9)),
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "num_key_value_heads": kv_heads,
        "head_dim": 8 * draw(st.integers(1, 16)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
    }


SIZES = st.fixed_dictionaries({"batch_size": st.integers(1, 16), "seq_len": st.integers(1, 4096)})
CHOICES = st.fixed_dictionaries(
    {
        "attention": st.sampled_from(["sdpa", "eager"]),
        "dtype": st.sampled_from(["bf16", "fp32"]),
        "mixed_precision": st.sampled_from(["bf16", "no"]),
    }
)
quick = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@quick
@given(llamas(), SIZES, CHOICES, st.booleans(), st.integers(1, 32))
def test_a_larger_batch_never_lowers_the_peak(
    model: dict[str, Any], size: dict[str, int], choice: dict[str, Any], saving: bool, more: int
) -> None:
    larger = {**size, "batch_size": size["batch_size"] + more}
    peaks = [
        estimate(model, Recipe(gradient_checkpointing=saving, **s, **choice)).peak_allocated
        for s in (size, larger)
    ]
    assert peaks[0] <= peaks[1]


@quick
@given(llamas(), SIZES, CHOICES)
def test_checkpointing_never_raises_what_forward_keeps(
    model: dict[str, Any], size: dict[str, int], choice: dict[str, Any]
) -> None:
    plain, saving = (
        estimate(model, Recipe(gradient_checkpointing=c, **size, **choice)).timeline.forward.end
        for c in (False, True)
    )
    assert saving <= plain


@quick
@given(llamas(), SIZES, CHOICES)
def test_accumulating_never_needs_less(
    model: dict[str, Any], size: dict[str, int], choice: dict[str, Any]
) -> None:
    once, four = (
        estimate(model, Recipe(gradient_accumulation_steps=n, **size, **choice)).peak_allocated
        for n in (1, 4)
    )
    assert once <= four


@quick
@given(llamas(), CHOICES, st.integers(1, 8))
def test_lora_keeps_less_state_than_full(
    model: dict[str, Any], choice: dict[str, Any], rank: int
) -> None:
    """Where adapters are smaller than what they adapt, their gradients and states are too."""
    full = estimate(model, Recipe(seq_len=1, **choice))
    lora = estimate(model, Recipe(seq_len=1, lora=LoRA(rank=rank, dtype=choice["dtype"]), **choice))
    if lora.trainable_parameters * 8 < full.trainable_parameters:
        assert lora.parts.layout.gradients < full.parts.layout.gradients
        assert lora.parts.stepping.states < full.parts.stepping.states


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"])
@pytest.mark.parametrize("size", [(1, 512), (1, 2048), (4, 2048)])
def test_lora_never_needs_more_than_full(model: str, size: tuple[int, int]) -> None:
    batch, seq = size
    for saving in (False, True):
        shape = {"batch_size": batch, "seq_len": seq, "gradient_checkpointing": saving}
        full = estimate(model, Recipe(**shape))  # type: ignore[arg-type]
        for lora in (LoRA(dropout=0.0, dtype="bf16"), LoRA(target_modules=("q_proj", "v_proj"))):
            small = estimate(model, Recipe(lora=lora, **shape))  # type: ignore[arg-type]
            assert small.peak_allocated <= full.peak_allocated
