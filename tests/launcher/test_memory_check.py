"""MemoryCheck in a script of one's own, and the recipe that it reads off it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)
from vramplan_launcher import MemoryCheck, MemoryWarning  # noqa: E402
from vramplan_launcher.observed import recipe_of  # noqa: E402

from vramplan.errors import UserError  # noqa: E402
from vramplan.memory.estimate import estimate  # noqa: E402
from vramplan.recipe.recipe import LoRA, Recipe  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore", "error::vramplan_launcher.MemoryWarning")
CONFIG: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class Rows(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(24) + index
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def model(lora: bool) -> Any:
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **CONFIG), dtype=torch.bfloat16
    )
    if not lora:
        return made
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(made, config)


def trainer(folder: Path, check: MemoryCheck, lora: bool = False) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model=model(lora), args=arguments, train_dataset=Rows(), callbacks=[check])


def test_it_predicts_before_the_first_step_and_compares_at_the_end(tmp_path: Path) -> None:
    said = io.StringIO()
    check = MemoryCheck(gpu="24GB", stream=said)
    trainer(tmp_path, check, lora=True).train()
    wanted = Recipe(
        lora=LoRA(rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj")),
        batch_size=2,
        seq_len=24,
        gradient_accumulation_steps=2,
        allocator="default",
    )
    assert check.estimate is not None
    assert check.estimate.recipe == wanted
    first, *rest = said.getvalue().splitlines()
    needed = estimate({"model_type": "llama", **CONFIG}, wanted, "24GB")
    assert check.estimate.peak_allocated == needed.peak_allocated
    assert first.startswith("vramplan: this run will need ")
    assert "of 24.0 GiB" in first
    assert check.comparison is not None
    assert check.comparison.error is None  # no GPU: nothing to compare with
    assert "no GPU memory figures" in " ".join(rest)


def test_it_warns_of_what_will_not_fit(tmp_path: Path) -> None:
    check = MemoryCheck(gpu="1GB", seq_len=100_000, stream=io.StringIO())
    with pytest.raises(MemoryWarning, match="more than there is"):
        trainer(tmp_path, check).train()


def test_what_it_cannot_read_is_said_and_stops_nothing(tmp_path: Path) -> None:
    said = io.StringIO()
    check = MemoryCheck(stream=said)
    run = trainer(tmp_path, check)
    run.args.optim = "no_such"
    with pytest.raises(UserError, match="no_such"):
        recipe_of(run.model, run.args, Rows())
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]
    )
    other = trainer(tmp_path, check)
    other.model = other.model_wrapped = peft.get_peft_model(model(False), config)
    other.callback_handler.model = other.model
    other.train()
    assert "no prediction: peft's IA3 is not modelled" in said.getvalue()
    assert other.state.global_step == 4


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|v_proj)$"])
def test_adapters_are_read_off_the_model(tmp_path: Path, targets: str) -> None:
    """Of a small model peft keeps "all-linear" as fourteen full names, and a pattern as it is."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    run = trainer(tmp_path, MemoryCheck(stream=io.StringIO()))
    lora = recipe_of(peft.get_peft_model(model(False), config), run.args, Rows()).lora
    assert lora is not None
    attention = {"k_proj", "o_proj", "q_proj", "v_proj"} if targets == "all-linear" else set()
    mlp = {"down_proj", "gate_proj", "up_proj"} if targets == "all-linear" else set()
    assert set(lora.target_modules) == attention | mlp | {"q_proj", "v_proj"}
    some = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], layers_to_transform=[0]
    )
    with pytest.raises(UserError, match="LoRA on 1 of 2 modules named q_proj is not modelled"):
        recipe_of(peft.get_peft_model(model(False), some), run.args, Rows())


def test_the_length_is_the_limit_or_the_longest_row(tmp_path: Path) -> None:
    run = trainer(tmp_path, MemoryCheck(stream=io.StringIO()))
    assert recipe_of(run.model, run.args, Rows()).seq_len == 24
    run.args.max_length = 48  # TRL's SFTConfig
    assert recipe_of(run.model, run.args, Rows()).seq_len == 48
    del run.args.max_length
    with pytest.raises(UserError, match=r"MemoryCheck\(seq_len=…\)"):
        recipe_of(run.model, run.args, None)


def test_a_models_forward_ends_before_the_loss_is_let_go() -> None:
    """The logits are still there then, so only its peak can be compared."""
    check = MemoryCheck()
    trained = torch.nn.Linear(1, 1)
    check._after_forward(trained, None, None)
    assert check._phases["forward"]["end"] is None
    check._after_forward(trained.eval(), None, None)
    assert set(check._phases) == {"forward"}
