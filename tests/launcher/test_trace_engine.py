"""Gradients that meet: the trace adds them as autograd's engine does, in place or not."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import Counter, build, cuda_ops, engine  # noqa: E402

from tests.launcher.traced_llama import LLAMA  # noqa: E402

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
