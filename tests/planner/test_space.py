"""The space: legal by construction, pins honoured, and nothing left out that could be better."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from vramplan.errors import UserError
from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory.estimate import estimate, resolve
from vramplan.models.architecture import Architecture
from vramplan.planner.goal import Goal, method_of
from vramplan.planner.space import LOWER, MISSING, NO_BETTER, Draft, Space
from vramplan.recipe.recipe import Recipe
from vramplan.timing.step import step_time

CARD = parse_gpu("rtx-4090")


def drafts(arch: Architecture, goal: Goal = Goal(), card: str = "rtx-4090") -> list[Draft]:  # noqa: B008
    gpus = parse_gpu(card)
    return list(Space(arch, gpus.gpu, gpus.count, goal).drafts())


def test_attention_that_there_is_none_of_is_no_recipe() -> None:
    """transformers refuses BLOOM with sdpa by name; FlashAttention-2 has no kernel for Volta."""
    bloom = resolve("bigscience/bloom-560m")[1]
    assert not list(Space(bloom, CARD.gpu, 1, Goal(pins={"attention": "sdpa"})).drafts())
    volta = parse_gpu("v100-16gb").gpu
    llama = resolve("meta-llama/Llama-3.2-1B")[1]
    pinned = Goal(pins={"attention": "flash_attention_2"})
    assert not list(Space(llama, volta, 1, pinned).drafts())


def test_the_default_space_has_thousands_and_no_two_alike(llama_8b: Architecture) -> None:
    found = drafts(llama_8b)
    assert len(found) > 5_000
    assert len({draft.recipe for draft in found}) == len(found)
    assert {draft.method for draft in found} == {"full", "lora", "int8", "qlora"}


@pytest.mark.parametrize(
    "model",
    [
        "google/gemma-2-2b",
        "openai/gpt-oss-20b",
        "bigscience/bloom-560m",
        "mistralai/Mixtral-8x7B-v0.1",
    ],
)
def test_every_draft_is_accepted_by_the_facade(model: str) -> None:
    _, arch, _ = resolve(model)
    found = drafts(arch, Goal(effective_batch=2), "2xa100-80gb")
    for draft in found[::37]:
        estimate(arch, draft.recipe)  # raises what the libraries would refuse


def test_every_draft_makes_the_effective_batch(llama_8b: Architecture) -> None:
    for draft in drafts(llama_8b, Goal(effective_batch=12), "4xa100-80gb"):
        r = draft.recipe
        assert r.batch_size * r.gradient_accumulation_steps * r.world_size == 12
        assert draft.method == method_of(r)


def test_what_is_pinned_is_in_every_draft(llama_8b: Architecture) -> None:
    pins = {"dtype": "fp32", "attention": "eager", "optimizer": "adamw_torch", "batch_size": 4}
    found = drafts(llama_8b, Goal(seq_len=256, methods=("full",), pins=pins))
    assert found
    for draft in found:
        assert {name: getattr(draft.recipe, name) for name in pins} == pins
        assert draft.recipe.seq_len == 256
    # A pin is a decision: what would not be evaluated otherwise is.
    assert any(not draft.verdict for draft in found)


def test_an_offload_can_be_pinned_alone(llama_8b: Architecture) -> None:
    found = drafts(llama_8b, Goal(methods=("full",), pins={"offload_optimizer": "cpu"}))
    assert {d.recipe.deepspeed.stage for d in found if d.recipe.deepspeed} == {1, 2, 3}
    assert all(d.recipe.deepspeed and d.recipe.deepspeed.offload_optimizer for d in found)


def test_without_offloading(llama_8b: Architecture) -> None:
    pins = {"offload_optimizer": None, "offload_param": None}
    for draft in drafts(llama_8b, Goal(pins=pins)):
        zero = draft.recipe.deepspeed
        assert zero is None or not (zero.offload_optimizer or zero.offload_param)


def test_eight_bit_states_only_on_leave(llama_8b: Architecture) -> None:
    def optimizers(goal: Goal) -> set[str]:
        return {d.recipe.optimizer for d in drafts(llama_8b, goal)}

    assert not any("8bit" in name for name in optimizers(Goal()))
    assert {"adamw_8bit", "paged_adamw_8bit"} <= optimizers(Goal(allow_8bit_optim=True))


def test_a_card_without_bf16_is_offered_none(llama_1b: Architecture) -> None:
    for draft in drafts(llama_1b, card="t4"):
        assert draft.recipe.dtype != "bf16"
        assert draft.recipe.mixed_precision != "bf16"
        assert draft.recipe.attention != "flash_attention_2"


def test_a_family_without_sdpa_gets_eager() -> None:
    _, arch, _ = resolve("bigscience/bloom-560m")
    worth = [d for d in drafts(arch) if not d.verdict]
    assert {d.recipe.attention for d in worth} == {"eager"}


def test_adapted_experts_have_no_dropout() -> None:
    _, arch, _ = resolve("mistralai/Mixtral-8x7B-v0.1")
    adapted = [d.recipe.lora for d in drafts(arch, Goal(lora={"rank": 8})) if d.recipe.lora]
    assert {(lora.rank, lora.dropout) for lora in adapted} == {(8, 0.0)}


def test_verdicts_say_why(llama_8b: Architecture) -> None:
    for draft in drafts(llama_8b):
        assert draft.verdict in ("", NO_BETTER, LOWER, MISSING)
        assert bool(draft.why) == bool(draft.verdict)


def test_leaving_out_what_would_not_be_evaluated(llama_8b: Architecture) -> None:
    whole = [d for d in drafts(llama_8b) if not d.verdict]
    part = list(Space(llama_8b, CARD.gpu, 1, Goal(), whole=False).drafts())
    assert part == whole


def _better(recipe: Recipe) -> Recipe:
    """The recipe that NO_BETTER speaks of."""
    changes: dict[str, object] = {"attention": "sdpa", "allocator": "expandable_segments"}
    if recipe.optimizer == "adamw_torch":
        changes["optimizer"] = "adamw_torch_fused"
    if recipe.lora is not None or recipe.deepspeed is not None:
        changes["dtype"] = "bf16"
    return replace(recipe, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "openai-community/gpt2-medium"])
@pytest.mark.parametrize("seq_len", [128, 1024])
def test_no_better_is_true(model: str, seq_len: int) -> None:
    """The other one needs no more memory, and takes no more time than the clock's own noise."""
    _, arch, _ = resolve(model)
    found = [d for d in drafts(arch, Goal(seq_len=seq_len)) if d.verdict == NO_BETTER]
    lower = [d for d in found if d.recipe.mixed_precision == "bf16"]
    for draft in islice(lower, 0, None, 23):
        twin = _better(draft.recipe)
        mine, other = (estimate(arch, r, CARD).required for r in (draft.recipe, twin))
        # fused AdamW's step counts lie on the card: 512 bytes a tensor
        assert other <= mine * 1.0001, draft.recipe
        mine_s, other_s = (step_time(arch, r, CARD).seconds for r in (draft.recipe, twin))
        assert other_s <= mine_s * 1.01, draft.recipe


def test_refusals_are_remembered(llama_8b: Architecture) -> None:
    pins = {"zero": 3, "quantization": "nf4"}
    space = Space(llama_8b, CARD.gpu, 1, Goal(pins=pins))
    if not list(space.drafts()):
        assert "stage 3" in space.refused[0].reason
    with pytest.raises(UserError):
        Recipe(quantization="nf4")
