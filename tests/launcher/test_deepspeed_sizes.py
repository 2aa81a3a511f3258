"""ZeRO's sizes for a card: spent where there is room, spared where there is not, for a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vramplan_launcher.deepspeed_config import Config, Hyperparameters, ds_config
from vramplan_launcher.deepspeed_sizes import BUCKETS

from vramplan.errors import IllegalRecipe, InvalidValue
from vramplan.hardware.catalogue import parse_gpu
from vramplan.hardware.gpu import Gpus
from vramplan.memory.estimate import estimate, resolve
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe


@pytest.fixture(scope="module")
def llama() -> Architecture:
    """Hidden size 2048, 1,235,814,400 parameters."""
    return resolve("meta-llama/Llama-3.2-1B")[1]


def recipe(zero: dict[str, Any], ranks: int = 4, **values: Any) -> Recipe:
    return Recipe(
        deepspeed=DeepSpeed(**zero), world_size=ranks, gradient_checkpointing=True, **values
    )


def card(nbytes: int) -> Gpus:
    """A card of so many bytes."""
    bare = parse_gpu("24GB")
    return replace(bare, gpu=replace(bare.gpu, memory=nbytes, usable=None))


def zero_of(config: Config) -> DeepSpeed:
    assert config.recipe.deepspeed is not None
    return config.recipe.deepspeed


def test_without_a_card_nothing_is_resized(llama: Architecture) -> None:
    run = recipe({"stage": 3})
    config = ds_config(llama, run)
    assert zero_of(config) == replace(
        DeepSpeed(stage=3),
        reduce_bucket_size=2048 * 2048,
        stage3_prefetch_bucket_size=3_774_873,  # int(0.9 * 2048 * 2048)
        stage3_param_persistence_threshold=20_480,
    )
    assert (config.required, config.available) == (None, None)
    assert estimate(llama, config.recipe).required == estimate(llama, run).required


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_bucket_takes_at_most_half_of_what_is_left(llama: Architecture, stage: int) -> None:
    run = recipe({"stage": stage})
    least = estimate(llama, run, card(80 << 30)).required
    chosen = []
    for left in (80 << 20, 400 << 20, 2 << 30, 20 << 30):
        config = ds_config(llama, run, gpus=card(least + left))
        bucket = zero_of(config).reduce_bucket_size
        assert config.required is not None
        assert config.required <= least + left // 2
        longer = [size for size in BUCKETS if size > int(bucket)]
        if longer:  # the next one would have taken more
            more = replace(zero_of(config), reduce_bucket_size=longer[-1])
            needs = estimate(llama, replace(run, deepspeed=more), card(80 << 30)).required
            assert needs > least + left // 2
        chosen.append(bucket)
        assert "left" in config.reasons["zero_optimization.reduce_bucket_size"] or (
            bucket == 2048 * 2048
        )
    assert chosen == sorted(chosen, key=int)
    assert chosen[-1] == 500_000_000


def test_no_longer_than_all_gradients(llama: Architecture) -> None:
    run = recipe({"stage": 2}, lora=LoRA(rank=1, target_modules=("q_proj",)))
    config = ds_config(llama, run, gpus=card(80 << 30))
    assert zero_of(config).reduce_bucket_size == 16 * (2048 + 2048)  # 16 layers, rank 1
    assert "all 65536 gradients" in config.reasons["zero_optimization.reduce_bucket_size"]


def test_one_rank_reduces_nothing(llama: Architecture) -> None:
    config = ds_config(llama, recipe({"stage": 2}, ranks=1), gpus=card(80 << 30))
    zero = zero_of(config)
    assert (zero.overlap_comm, zero.reduce_bucket_size) == (False, 2048 * 2048)
    assert "one rank" in config.reasons["zero_optimization.overlap_comm"]


def test_what_the_recipe_sets_stays(llama: Architecture) -> None:
    own = {"reduce_bucket_size": 7_000_000, "overlap_comm": False}
    config = ds_config(llama, recipe({"stage": 2, **own}), gpus=card(80 << 30))
    assert zero_of(config).reduce_bucket_size == 7_000_000
    assert zero_of(config).overlap_comm is False
    assert config.reasons["zero_optimization.reduce_bucket_size"] == "as the recipe says"
    assert config.reasons["zero_optimization.overlap_comm"] == "as the recipe says"


def test_sparing_until_it_fits(llama: Architecture) -> None:
    run = recipe({"stage": 3})
    needs = estimate(llama, run, card(80 << 30)).required
    assert ds_config(llama, run, gpus=card(needs)).required == needs
    tight = ds_config(llama, run, gpus=card(needs - 1))
    assert tight.required is not None
    assert tight.required < needs
    hopeless = ds_config(llama, run, gpus=card(1 << 30))
    assert hopeless.required is not None
    assert hopeless.available is not None
    assert hopeless.available < hopeless.required <= tight.required
    assert any("still too much" in reason for reason in hopeless.reasons.values())


def test_what_spares_nothing_stays(llama: Architecture) -> None:
    """In stage 2 this run's peak is the logits, when no bucket is there yet."""
    run = recipe({"stage": 2})
    tight = ds_config(llama, run, gpus=card(estimate(llama, run).required - 1))
    assert tight.recipe == ds_config(llama, run).recipe


def test_the_second_bucket_is_spared() -> None:
    """Hidden size 768: a bucket of 768 x 768 gradients in bf16 is 1.1 MiB."""
    gpt2 = resolve("gpt2")[1]
    run = recipe({"stage": 2}, ranks=64, seq_len=32)
    both = estimate(gpt2, run).required
    tight = ds_config(gpt2, run, gpus=card(both - 1))
    assert zero_of(tight).overlap_comm is False
    assert zero_of(tight).reduce_bucket_size == 768 * 768
    assert "the second bucket is spared" in tight.reasons["zero_optimization.overlap_comm"]
    roomy = ds_config(gpt2, run, gpus=card(both + (1 << 20)))
    assert zero_of(roomy).overlap_comm is True


def test_stage_3_spares_the_cheapest_first(llama: Architecture) -> None:
    """The head's logits meet gathered weights: max_live_parameters counts, sub-groups do not."""
    run = recipe({"stage": 3})
    needs = estimate(llama, run, card(80 << 30)).required
    zero = zero_of(ds_config(llama, run, gpus=card(needs - (100 << 20))))
    assert zero.sub_group_size == 1_000_000_000
    assert zero.stage3_max_live_parameters < 1_000_000_000
    assert zero.stage3_max_reuse_distance == zero.stage3_max_live_parameters
    assert zero.reduce_bucket_size == 2048 * 2048


def test_nvme(llama: Architecture) -> None:
    both = {"offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "/nvme"}
    config = ds_config(llama, recipe({"stage": 3, **both}, ranks=2), gpus=card(80 << 30))
    zero = zero_of(config)
    assert zero.param_buffer_size == 128_256 * 2048 // 2  # the embedding's part
    assert zero.sub_group_size == 100_000_000
    section = config.values["zero_optimization"]
    assert section["offload_optimizer"] == {
        "device": "nvme",
        "pin_memory": True,
        "nvme_path": "/nvme",
        "buffer_count": 4,
        "pipeline_read": False,
        "pipeline_write": False,
        "fast_init": False,
    }
    assert section["offload_param"]["buffer_size"] == 131_334_144
    assert config.values["aio"]["block_size"] == 1 << 20


def test_every_value_has_a_reason(llama: Architecture) -> None:
    for stage, offload in ((0, None), (1, "cpu"), (2, None), (3, "cpu")):
        for gpus in (None, card(24 << 30)):
            config = ds_config(
                llama, recipe({"stage": stage, "offload_optimizer": offload}), gpus=gpus
            )
            for key in leaves(config.values):
                parts = key.split(".")
                names = [".".join(parts[: i + 1]) for i in range(len(parts))]
                assert any(config.reasons.get(name) for name in names), key


def leaves(table: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in table.items():
        inner = leaves(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}"]
        found += inner
    return found


def test_what_is_refused(llama: Architecture) -> None:
    with pytest.raises(IllegalRecipe, match="add a ZeRO stage"):
        ds_config(llama, Recipe())
    with pytest.raises(InvalidValue, match="learning_rate is True"):
        Hyperparameters(learning_rate=True)
    with pytest.raises(InvalidValue, match="weight_decay is nan: it must be a number"):
        Hyperparameters(weight_decay=float("nan"))
