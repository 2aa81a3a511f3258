"""Jobs, run folders and measurements: what can be said of them without running anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vramplan_launcher.events import PREFIX, heard
from vramplan_launcher.files import write_json
from vramplan_launcher.job import Job, Training, read_job
from vramplan_launcher.measurement import assemble, measurement_of, outcome_of
from vramplan_launcher.needs import check_cards, free_stale_locks
from vramplan_launcher.run import (
    _plain_architectures,
    complete_checkpoints,
    drop_incomplete,
    folder_name,
    new_folder,
    resumed,
)
from vramplan_launcher.smaller import smaller

from vramplan.errors import InvalidValue, UnknownName, UserError
from vramplan.memory.estimate import estimate
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

JOB = Job(
    model="meta-llama/Llama-3.2-1B",
    recipe=Recipe(lora=LoRA(rank=4), batch_size=8, seq_len=512),
    data={"source": "rows.jsonl"},
    training=Training(max_steps=7, learning_rate=1e-3),
)


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = JOB.write(tmp_path, prediction={"peak_allocated": 5})
    assert read_job(path) == (JOB, {"prediction": {"peak_allocated": 5}})
    assert [p.name for p in tmp_path.iterdir()] == ["job.json"]  # nothing beside it is left


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pretend_ranks": 8}, "without ZeRO"),
        ({"cpu": True, "recipe": Recipe(dtype="fp32", mixed_precision="fp16")}, "fp16"),
        ({"training": {"epochs": 0}}, "more than 0"),
        ({"training": {"report_to": "tensorbord"}}, "nearest: 'tensorboard'"),
        ({"training": {"max_step": 3}}, "nearest: 'max_steps'"),
        ({"emulate": 0}, "at least 1"),
        ({"model": ""}, "Hub id"),
    ],
)
def test_a_wrong_job_says_what_is_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Job.from_dict({**JOB.to_dict(), **change})


def test_pretended_ranks_are_the_recipes_and_train_nothing() -> None:
    recipe = Recipe(deepspeed=DeepSpeed(stage=3), world_size=8)
    pretended = replace(JOB, recipe=recipe, pretend_ranks=8, data=None)
    assert pretended.processes == 1
    assert not pretended.trains
    with pytest.raises(UserError, match="contradict"):
        replace(pretended, pretend_ranks=4)
    with pytest.raises(UserError, match="leave out --data"):
        replace(pretended, data={"source": "x.jsonl"})


def test_unknown_fields_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match="nearest: 'model'"):
        Job.from_dict({**JOB.to_dict(), "modell": 1})
    with pytest.raises(InvalidValue):
        Training(learning_rate=float("nan"))


def test_learning_rates() -> None:
    assert Job(model="x", recipe=Recipe(lora=LoRA())).learning_rate == 2e-4
    assert Job(model="x", recipe=Recipe()).learning_rate == 2e-5
    assert JOB.learning_rate == 1e-3


# --- folders --------------------------------------------------------------------------------


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "a"
    assert new_folder(wanted, exactly=True) == wanted
    (wanted / "log.txt").write_text("mine")
    with pytest.raises(UserError, match="never overwritten"):
        new_folder(wanted, exactly=True)
    assert new_folder(wanted, exactly=False) == tmp_path / "runs" / "a-2"
    assert new_folder(wanted, exactly=False) == tmp_path / "runs" / "a-3"
    assert (wanted / "log.txt").read_text() == "mine"


def test_names() -> None:
    assert folder_name(JOB, "meta-llama/Llama-3.2-1B") == "Llama-3.2-1B-lora"
    nf4 = replace(JOB, recipe=replace(JOB.recipe, quantization="nf4"))
    assert folder_name(nf4, "a b/c d") == "c-d-qlora"
    zero = replace(JOB, recipe=Recipe(deepspeed=DeepSpeed(stage=2)))
    assert folder_name(zero, "x") == "x-full-zero2"


def checkpoints(folder: Path) -> None:
    for step in (5, 10, 40):
        made = folder / "checkpoints" / f"checkpoint-{step}"
        made.mkdir(parents=True)
        (made / "model.safetensors").touch()
        if step < 40:
            (made / "trainer_state.json").touch()


def test_a_cut_off_checkpoint_is_dropped_and_earlier_ones_kept(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]
    newest = str(tmp_path / "checkpoints" / "checkpoint-10")
    assert resumed(JOB, tmp_path).training.resume == newest
    assert drop_incomplete(tmp_path) == ["checkpoint-40"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert resumed(JOB, Path(newest)).training.resume == newest
    with pytest.raises(UserError, match="no complete checkpoint"):
        resumed(JOB, tmp_path / "checkpoints" / "checkpoint-5" / "..")


# --- measurements ---------------------------------------------------------------------------


def rank(number: int, **more: Any) -> dict[str, Any]:
    return {"rank": number, "outcome": "ended", "seconds": 9.0, "environment": {}, **more}


def test_the_worst_end_of_a_rank_is_the_runs() -> None:
    ends = [rank(0), rank(1, outcome="out_of_memory"), rank(2, outcome="failed")]
    assert outcome_of(ends, 3) == "out_of_memory"
    assert outcome_of(ends[:1], 1) == "ended"
    assert outcome_of(ends[:1], 2) == "failed"  # one wrote nothing: it was killed


def test_speed_leaves_the_marked_steps_out() -> None:
    """8 x 512 tokens a step; three marked steps of 9 s, then 1, 2 and 3 s: 2 s in the middle."""
    between = [9.0, 9.0, 9.0, 3.0, 1.0, 2.0]
    made = assemble(
        JOB, {}, [rank(0, seconds_between_steps=between)], name="a", expected=1, seconds=10
    )
    assert made["training"]["step_seconds"] == 2.0
    assert made["training"]["tokens_per_second"] == 8 * 512 / 2
    assert made["outcome"] == "ended"


def test_a_run_without_a_parent_is_put_together(tmp_path: Path) -> None:
    """As Slurm leaves it: a job and what its ranks wrote."""
    JOB.write(tmp_path, prediction={"peak_allocated": 5})
    write_json(tmp_path / "ranks" / "rank0.json", rank(0, peak_allocated=4))
    found = measurement_of(tmp_path)
    assert found["name"] == tmp_path.name
    assert found["prediction"] == {"peak_allocated": 5}
    assert found["ranks"][0]["peak_allocated"] == 4
    (tmp_path / "ranks" / "rank0.json").unlink()
    with pytest.raises(UserError, match="measurement"):
        measurement_of(tmp_path)


def test_events_are_heard_among_other_lines() -> None:
    line = PREFIX + json.dumps({"event": "step", "step": 3})
    assert heard(f"[default0]:{line}\n") == {"event": "step", "step": 3}
    assert heard("Loading weights: 100%\n") is None
    assert heard(f"{PREFIX}{{broken\n") is None


# --- what must be there ---------------------------------------------------------------------


def test_processes_need_a_card_each() -> None:
    with pytest.raises(UserError, match=r"no GPU to run on. No driver. Add --cpu"):
        check_cards(JOB, 0, "No driver.")
    check_cards(replace(JOB, cpu=True), 0, "No driver.")
    check_cards(JOB, 1, "")
    two = replace(JOB, recipe=replace(JOB.recipe, world_size=2))
    with pytest.raises(UserError, match="2 processes need as many GPUs, and this machine shows 1"):
        check_cards(two, 1, "")
    check_cards(two, 1, "", machines=2)


def test_only_locks_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    """As torch's FileBaton makes them: open while the build runs."""
    held, stale = tmp_path / "py311" / "a" / "lock", tmp_path / "py311" / "b" / "lock"
    for path in (held, stale):
        path.parent.mkdir(parents=True)
        path.touch()
    with held.open():
        assert free_stale_locks(tmp_path) == [stale]
    assert held.exists()
    assert not stale.exists()


def test_architectures_are_told_as_deepspeed_reads_them() -> None:
    given = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a 10.0+PTX"}
    assert _plain_architectures(given) == {"TORCH_CUDA_ARCH_LIST": "8.0;9.0 10.0+PTX"}
    assert _plain_architectures({"TORCH_CUDA_ARCH_LIST": "9.0"}) == {}


# --- smaller plans --------------------------------------------------------------------------


def test_smaller_plans_teach_the_same_and_need_less() -> None:
    base = estimate("meta-llama/Llama-3.2-1B", Recipe(batch_size=4, seq_len=1024))
    rungs = smaller(base, 9)
    sizes = [base.required, *(rung.required for rung in rungs)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(rungs) >= 2
    assert rungs[0].recipe == replace(base.recipe, gradient_checkpointing=True)
    for rung in rungs:
        recipe = rung.recipe
        assert recipe.batch_size * recipe.gradient_accumulation_steps == 4
        assert (recipe.seq_len, recipe.lora) == (1024, None)
        assert recipe.optimizer == base.recipe.optimizer
    lighter = smaller(base, 9, allow_8bit=True)
    assert lighter[-1].required < rungs[-1].required
    assert lighter[-1].recipe.optimizer == "paged_adamw_8bit"


def test_with_zero_the_last_rungs_offload() -> None:
    recipe = Recipe(
        gradient_checkpointing=True, seq_len=512, deepspeed=DeepSpeed(stage=3), world_size=2
    )
    rungs = smaller(estimate("meta-llama/Llama-3.2-1B", recipe), 9)
    zero = rungs[-1].recipe.deepspeed
    assert zero is not None
    assert (zero.offload_optimizer, zero.offload_param) == ("cpu", "cpu")
