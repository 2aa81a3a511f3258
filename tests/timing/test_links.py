"""Collectives, offload, and what hides behind backward."""

from __future__ import annotations

import pytest

from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory.precision import policy_of
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import parameter_count
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.timing.clock import micro_batch
from vramplan.timing.links import exchange, link, paging_seconds, pcie
from vramplan.timing.step import StepTime, step_time
from vramplan.timing.stepping import step_of


def of(
    arch: Architecture,
    ranks: int,
    zero: DeepSpeed | None,
    gpu: str = "h100-80gb-pcie",
    **more: object,
) -> StepTime:
    recipe = Recipe(world_size=ranks, deepspeed=zero, **more)  # type: ignore[arg-type]
    return step_time(arch, recipe, parse_gpu(f"{ranks}x{gpu}"))


def test_one_rank_exchanges_nothing(llama: Architecture) -> None:
    step = of(llama, 1, None)
    assert step.parts["communication"] == step.parts["offload"] == 0


def test_tokens_are_those_of_all_ranks(llama: Architecture) -> None:
    assert of(llama, 4, None).tokens == 4 * 2048


def test_what_a_ring_moves(llama: Architecture) -> None:
    """DDP over PCIe 5.0 x16: 2 x 3/4 of the gradients, 80 % of backward hides some."""
    alone, four = of(llama, 1, None), of(llama, 4, None)
    gradients = 2 * parameter_count(llama)
    link = 0.80 * (32 * 10**9 * 16 * 128 // 130 // 8)  # 32 GT/s, 16 lanes, 128 bits in 130
    ring = 2 * 3 / 4 * gradients / link
    gpu = parse_gpu("h100-80gb-pcie").gpu
    spent = micro_batch(llama, policy_of(Recipe(world_size=4), llama, "9.0"), gpu, 1, 2048)
    waits = spent.total / sum(spent.parts)  # for the host: behind that it hides as well
    hidden = 0.8 * four.parts["backward"] * waits
    assert ring > hidden
    assert four.parts["communication"] == pytest.approx(ring - hidden, rel=1e-6)
    assert four.seconds > alone.seconds


def test_a_fast_link_hides_behind_backward(llama: Architecture) -> None:
    assert of(llama, 8, None, "h100-80gb", batch_size=8).parts["communication"] == 0


def test_stage_3_gathers_weights_and_the_stages_before_gather_once(llama: Architecture) -> None:
    """With nothing to hide behind."""

    def moved(stage: int, lora: LoRA | None = None) -> float:
        recipe = Recipe(world_size=4, deepspeed=DeepSpeed(stage=stage), lora=lora)
        gpus = parse_gpu("4xh100-80gb-pcie")
        policy = policy_of(recipe, llama, "9.0")
        step = step_of(llama, policy, recipe.optimizer, gpus.gpu)
        return exchange(llama, policy, recipe, gpus, step, (0.0, 0.0)).communication

    gather = 3 / 4 * 2 * parameter_count(llama) / link(parse_gpu("4xh100-80gb-pcie"), 4)
    assert moved(1) == pytest.approx(3 * gather, rel=1e-6)  # gradients twice, weights once
    assert moved(2) == pytest.approx(2 * gather, rel=1e-6)
    assert moved(3) == pytest.approx(3 * gather, rel=1e-6)  # weights twice, gradients once
    assert moved(2, LoRA()) < 0.1 * moved(3, LoRA())


def test_hooks_are_what_stage_3_costs_the_host(llama: Architecture) -> None:
    """One tensor's 1.9 ms, 146 of them; a module's 0.1 ms, at least thrice 16 layers of 13."""
    short = {"seq_len": 64}
    two, three = (of(llama, 4, DeepSpeed(stage=s), "h100-80gb", **short) for s in (2, 3))
    hooks = 1.37 * (146 * 1.9e-3 + 2 * 16 * 13 * 0.1e-3)
    engine = 1.37 * 146 * 0.2e-3
    more = three.parts["launch"] - two.parts["launch"]
    assert more == pytest.approx(hooks - engine, rel=0.05)


def test_more_ranks_share_the_update(llama: Architecture) -> None:
    two, four = (of(llama, n, DeepSpeed(stage=2)).parts["optimizer"] for n in (2, 4))
    assert four == pytest.approx(two / 2)


def test_offloaded_states_are_stepped_by_the_host(llama: Architecture) -> None:
    """1.24e9 parameters at 4.2e9 a second."""
    on_card = of(llama, 1, DeepSpeed(stage=2))
    on_host = of(llama, 1, DeepSpeed(stage=2, offload_optimizer="cpu"))
    assert on_host.parts["optimizer"] == pytest.approx(parameter_count(llama) / 4.2e9)
    assert on_host.parts["offload"] > 0 == on_card.parts["offload"]
    weights = of(llama, 1, DeepSpeed(stage=3, offload_optimizer="cpu", offload_param="cpu"))
    assert weights.parts["offload"] > on_host.parts["offload"]


def test_between_machines_the_network_decides(llama: Architecture) -> None:
    recipe = Recipe(world_size=16, deepspeed=DeepSpeed(stage=3))
    gpus = parse_gpu("16xh100-80gb")
    slow, fast = (step_time(llama, recipe, gpus, network=n) for n in (5e9, 50e9))
    assert slow.parts["communication"] > fast.parts["communication"]
    inside = of(llama, 8, DeepSpeed(stage=3), "h100-80gb")
    assert inside.parts["communication"] < slow.parts["communication"]


def test_pcie() -> None:
    hopper, ampere = parse_gpu("h200").gpu, parse_gpu("a10").gpu
    assert pcie(hopper) == pytest.approx(55e9, rel=0.01)  # measured 55.4
    assert pcie(ampere) == pytest.approx(0.87 * 16e9 * 16 * 128 / 130 / 8)


def test_paging_reads_and_writes() -> None:
    assert paging_seconds(13 * 10**9, parse_gpu("h200").gpu) == pytest.approx(2.0)
    assert paging_seconds(0, parse_gpu("t4").gpu) == 0
