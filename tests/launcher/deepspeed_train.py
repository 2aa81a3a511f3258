"""Two ranks that train with written configs, one after the other: imported once, forked for each.

argv: a JSON list of cases {"folder", "port", "lora", "by_accelerate"}; a case's folder is what
`vramplan config` writes. Each rank leaves FOLDER/rank<N>.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import peft
import torch
import transformers

RANK = int(os.environ["RANK"])
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One sequence, again and again: its loss has to fall."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(32) * 7 % 256
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def checkpoint(folder: Path) -> Path:
    """A tiny random model, saved by the first rank."""
    path, done = folder / "tiny", folder / "tiny" / "DONE"
    if RANK == 0:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**TINY)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
        done.touch()
    while not done.exists():
        time.sleep(0.05)
    return path


def arguments(folder: Path, by_accelerate: bool) -> Any:
    """What training_arguments.py of the folder makes; by accelerate's config, all but deepspeed."""
    spec = importlib.util.spec_from_file_location(
        "training_arguments", folder / "training_arguments.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    more: dict[str, Any] = {"deepspeed": None} if by_accelerate else {}
    return module.training_arguments(
        str(folder / "out"),
        max_steps=4,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **more,
    )


def train(case: dict[str, Any], tiny: Path) -> dict[str, Any]:
    folder = Path(case["folder"])
    # As accelerate does where there are GPUs (state.py, PartialState); zero.Init needs to know.
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    args = arguments(folder, case["by_accelerate"])
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    if case["lora"]:
        torch.manual_seed(0)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        model = peft.get_peft_model(model, lora)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Rows())
    trainer.train()
    engine = trainer.deepspeed
    trainer.save_model(str(folder / "saved"))
    offload = engine.zero_offload_optimizer()
    param = engine.zero_offload_param()
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "stage": int(engine.zero_optimization_stage()),
        "ranks": engine.world_size,
        "bucket": engine.zero_reduce_bucket_size(),
        "clipping": engine.gradient_clipping(),
        "accumulation": engine.gradient_accumulation_steps(),
        "optimizer": type(engine.basic_optimizer).__name__,
        "offload_optimizer": offload.device if offload else None,
        "offload_param": param.device if param else None,
        "lr": engine.basic_optimizer.param_groups[0]["lr"],
        "bf16": engine.bfloat16_enabled(),
    }


def forked(case: dict[str, Any], tiny: Path) -> None:
    """A case in a process of its own: neither a process group nor a patch of ZeRO's outlives it."""
    result = Path(case["folder"]) / f"rank{RANK}.json"
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.environ.update(MASTER_PORT=str(case["port"]), TORCHELASTIC_USE_AGENT_STORE="False")
    if not case["by_accelerate"]:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
    try:
        found = train(case, tiny)
    except BaseException:
        found = {"error": traceback.format_exc()[-3000:]}
    result.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    tiny = checkpoint(Path(sys.argv[1]).parent)
    for case in cases:
        forked(case, tiny)


if __name__ == "__main__":
    main()
