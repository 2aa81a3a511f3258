"""fit(): the plan as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vramplan
from vramplan.errors import IllegalRecipe, UnknownName, UserError
from vramplan.hardware.catalogue import parse_gpu
from vramplan.hardware.gpu import GpuProcess, Gpus
from vramplan.hardware.nvml import NoDriver
from vramplan.memory.estimate import estimate
from vramplan.planner.files import read_plan
from vramplan.planner.goal import Goal
from vramplan.planner.plan import Plan, fit
from vramplan.units import GIB

LLAMA_1B, LLAMA_8B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
ON_CARD = {"offload_optimizer": None, "offload_param": None}


def here(monkeypatch: pytest.MonkeyPatch, *groups: Gpus) -> None:
    def found() -> tuple[list[Gpus], str]:
        return list(groups), "" if groups else "This machine has no NVIDIA driver."

    monkeypatch.setattr("vramplan.hardware.nvml.gpus_here", found)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return fit(LLAMA_8B, "rtx-4090")


def test_it_is_public() -> None:
    assert vramplan.fit is fit
    assert vramplan.Plan is Plan
    assert vramplan.Goal is Goal


def test_the_pick_fits_and_is_best(plan: Plan) -> None:
    pick = plan.pick
    assert pick is not None
    assert pick.method == "lora"  # full fine-tuning of 8B has no room without host memory
    assert pick.required is not None
    assert pick.required <= plan.gpus.gpu.capacity
    assert pick in plan.front
    assert pick == plan.best["lora"]
    cheapest = min(c.card_seconds for c in plan.of_the_method if c.card_seconds is not None)
    assert (pick.card_seconds or 0) <= cheapest * 1.01
    assert plan.estimate is not None
    assert (
        plan.estimate.required
        == pick.required
        == estimate(LLAMA_8B, pick.recipe, "rtx-4090").required
    )


def test_no_candidate_that_fits_needs_more_than_the_card(plan: Plan) -> None:
    for candidate in plan.candidates:
        if candidate.fits:
            assert candidate.required is not None
            assert candidate.required <= plan.gpus.gpu.capacity
    assert sum(plan.counts.values()) == len(plan.candidates)


def test_fallbacks_need_less_and_less(plan: Plan) -> None:
    sizes = [plan.pick.required if plan.pick else 0, *(c.required for c in plan.fallbacks)]
    assert len(sizes) > 1
    assert sizes == sorted(sizes, key=lambda size: -(size or 0))
    assert len(set(sizes)) == len(sizes)
    assert {c.method for c in plan.fallbacks} == {"lora"}


def test_cost_is_time_by_cards_by_price() -> None:
    goal = Goal(methods=("lora",), tokens=1_000_000, price=2.0, pins={"world_size": 2})
    plan = fit(LLAMA_1B, "4xrtx-4090", goal)
    assert plan.pick is not None
    cost, step = plan.cost_of(plan.pick), plan.step_of(plan.pick)
    assert step.tokens == 16 * 2048
    assert cost.steps == 31  # 1,000,000 / 32,768 = 30.5
    assert cost.hours == pytest.approx(31 * step.seconds / 3600)
    assert cost.gpu_hours == pytest.approx(2 * cost.hours)  # two of the four are used
    assert cost.dollars == pytest.approx(2.0 * cost.gpu_hours)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_larger_card_is_never_dearer(method: str) -> None:
    goal = Goal(methods=(method,), pins={"zero": None})
    before = float("inf")
    for size in ("10GB", "12GB", "16GB", "24GB", "32GB", "48GB", "80GB"):
        pick = fit(LLAMA_1B, size, goal).pick
        cost = float("inf") if pick is None else pick.card_seconds or 0.0
        assert cost <= before, size
        before = cost


def test_quality_before_cost() -> None:
    plan = fit(LLAMA_1B, "24GB")
    assert plan.pick is not None
    assert plan.pick.method == "full"
    assert {"full", "lora", "int8", "qlora"} == set(plan.best)


def test_a_plan_goes_to_a_file_and_back(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    again = read_plan(path)
    assert again.pick == plan.pick
    assert again.recipe == plan.recipe
    assert again.fallbacks == plan.fallbacks
    document = json.loads(path.read_text())
    assert json.loads(json.dumps(plan.to_dict())) == document
    assert json.loads(json.dumps(again.to_dict())) == document
    assert document["prediction"]["required"] == plan.pick.required  # type: ignore[union-attr]
    assert document["time"]["tokens"] == 16 * 2048
    with pytest.raises(UserError, match="exists already"):
        plan.save(path)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"schema": 2}', '{"schema": 1, "model": {}}'])
def test_a_malformed_plan_is_a_users_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError):
        read_plan(path)


def test_nothing_fits() -> None:
    plan = fit(LLAMA_8B, "4GB", Goal(pins=ON_CARD))
    assert plan.pick is None
    assert plan.recipe is None
    assert set(plan.misses) == {"full", "lora", "int8", "qlora"}
    for miss in plan.misses.values():
        assert miss.too_much == (miss.required or 0) - 4 * GIB > 0
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.pick is None
    assert again.misses == plan.misses


def test_host_memory_limits_what_is_offloaded() -> None:
    goal = Goal(methods=("full",), pins={"offload_optimizer": "cpu"}, effective_batch=1)
    little = fit(LLAMA_8B, "24GB", Goal(**{**_fields(goal), "host_memory": 16 * GIB}))
    assert little.pick is None
    assert "too much host memory" in little.counts
    enough = fit(LLAMA_8B, "24GB", Goal(**{**_fields(goal), "host_memory": 512 * GIB}))
    assert enough.pick is not None
    assert enough.pick.offloads


def _fields(goal: Goal) -> dict:
    return {name: getattr(goal, name) for name in Goal.__slots__}


def test_the_cards_of_this_machine_and_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    card = parse_gpu("rtx-4090").gpu
    used = Gpus(gpu=card, free=8 * GIB, others=(GpuProcess(pid=7, used=15 * GIB),), indices=(0,))
    here(monkeypatch, used)
    plan = fit(LLAMA_1B, None, Goal(effective_batch=1))
    assert plan.pick is not None
    assert (plan.pick.required or 0) <= 8 * GIB
    assert any("other processes use it (7)" in note for note in plan.notes)
    assert any("What is free now is what counts" in note for note in plan.notes)
    assert plan.host_memory is not None  # this machine's


def test_unlike_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = parse_gpu("rtx-3060-12gb").gpu, parse_gpu("rtx-4090").gpu
    groups = [
        Gpus(gpu=gpu, free=gpu.capacity, indices=(k,)) for k, gpu in enumerate((small, large))
    ]
    here(monkeypatch, *groups)
    plan = fit(LLAMA_1B, None, Goal(methods=("lora",), effective_batch=4))
    assert plan.pick is not None
    assert any("The cards differ" in note for note in plan.notes)
    # Both together: the smaller one's room, and the slower one's rates.
    both = fit(LLAMA_1B, groups, Goal(methods=("lora",), pins={"world_size": 1}))
    assert both.pick is not None
    assert (both.pick.required or 0) <= large.capacity


def test_no_card_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    with pytest.raises(UserError, match="no NVIDIA driver. Name the card"):
        fit(LLAMA_1B)
    assert issubclass(NoDriver, Exception)


def test_contradictions_that_only_the_model_shows() -> None:
    with pytest.raises(IllegalRecipe, match="sequence length 4096"):
        fit("openai-community/gpt2", "24GB", Goal(seq_len=4096))
    with pytest.raises(IllegalRecipe, match="world_size 4 and .* contradict"):
        fit(LLAMA_1B, "2xrtx-4090", Goal(pins={"world_size": 4}))
    halves = {"dtype": "fp16", "mixed_precision": "fp16"}
    # DeepSpeed's engine keeps fp32 masters of fp16 weights: what is left is honoured.
    plan = fit(LLAMA_1B, "24GB", Goal(pins=halves, methods=("full",), host_memory=64 * GIB))
    assert plan.recipe is not None
    assert plan.recipe.deepspeed is not None
    with pytest.raises(IllegalRecipe, match="unscale FP16 gradients"):
        fit(LLAMA_1B, "24GB", Goal(pins={**halves, "zero": None}, methods=("full",)))
    pins = {"attention": "flash_attention_2", "optimizer": "sgd"}
    with pytest.raises(IllegalRecipe, match="attention flash_attention_2 leaves no legal recipe"):
        fit("bigscience/bloom-560m", "24GB", Goal(pins=pins))
    with pytest.raises(UnknownName, match="unknown GPU"):
        fit(LLAMA_1B, "rtx-4091-ti")


def test_a_wrong_target_is_named() -> None:
    goal = Goal(methods=("lora",), lora={"target_modules": ("q_prj",)})
    with pytest.raises(UserError, match="q_prj"):
        fit(LLAMA_1B, "24GB", goal)


def test_fallbacks_go_to_the_file_too(tmp_path: Path) -> None:
    plan = fit("google/gemma-3-1b-pt", "rtx-4090", Goal(effective_batch=7))
    assert len(plan.fallbacks) > 1
    plan.save(tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again.fallbacks == plan.fallbacks
    assert json.loads(json.dumps(again.to_dict())) == json.loads(json.dumps(plan.to_dict()))


def test_a_sequence_too_long_is_what_is_named() -> None:
    """GPT-2 has 1024 positions: fewer than a goal's default, which nobody chose here."""
    goal = Goal(seq_len=4096, pins={"gradient_checkpointing": False})
    with pytest.raises(IllegalRecipe, match=r"^sequence length 4096 leaves no legal recipe"):
        fit("openai-community/gpt2", "24GB", goal)
    goal = Goal(seq_len=512, pins={"optimizer": "galore_adamw", "zero": 3})
    with pytest.raises(UserError, match=r"galore_adamw and ZeRO stage 3 contradict"):
        fit("openai-community/gpt2", "24GB", goal)
