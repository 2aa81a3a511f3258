"""One rank's run from job to last step: what is built, in which order, and what is measured."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from vramplan.errors import UserError
from vramplan.memory import allocator
from vramplan.models.locate import locate
from vramplan_launcher import build
from vramplan_launcher.callbacks import Progress, Stop
from vramplan_launcher.data import DataSpec, load_data
from vramplan_launcher.events import tell
from vramplan_launcher.job import VERIFIED_STEPS, Job
from vramplan_launcher.probe import Probe

CHECKPOINTS = "checkpoints"
RESULT = {"lora": "adapter", "full": "model"}


class Session:
    """A rank. `stop` listens already; `probe` is there from the beginning."""

    def __init__(self, job: Job, folder: Path, stop: Stop) -> None:
        self.job, self.folder, self.stop = job, folder, stop
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = None if job.cpu else int(os.environ.get("LOCAL_RANK", "0"))
        self.located = locate(job.model)
        self.probe = Probe(self.device, steps=job.marked_steps, timed=job.verify)
        self.progress: Progress | None = None
        self.facts: dict[str, Any] = {}
        """What is known of the model and its training so far."""

    # --- before training ---------------------------------------------------------------------

    def prepare(self) -> Trainer:
        """The trainer, ready to train, with the probe on it."""
        job = self.job
        if self.device is not None:
            if not torch.cuda.is_available():
                raise UserError(
                    "torch finds no GPU: its build or the driver may not suit. Or --cpu"
                )
            torch.cuda.set_device(self.device)
        if job.pretend_ranks:
            pretend(job.pretend_ranks)
        source = self._source()
        tell("stage", rank=self.rank, stage="data")
        data = self._data(source)
        if self.rank == 0 and self._reads:
            for note in data.notes:
                tell("note", text=note)
        arguments = self._training_arguments()
        tell("stage", rank=self.rank, stage="load")
        self.probe.begin()
        if job.emulate is not None:
            act_as_smaller(job.emulate, job, self.device)
        model = self._model(source)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=data.collator,
            callbacks=self._callbacks(),
        )
        self.probe.attach(trainer)
        return trainer

    def _callbacks(self) -> list[Any]:
        recipe = self.job.recipe
        tokens = recipe.batch_size * recipe.seq_len * recipe.gradient_accumulation_steps
        self.progress = Progress(tokens * self.world, self.probe.counters)
        return [self.probe, self.stop, *([self.progress] if self.rank == 0 else [])]

    def _source(self) -> str | Path:
        """Where `from_pretrained` finds the weights."""
        if self.job.random_weights:
            tell("stage", rank=self.rank, stage="random weights")
            device = "cpu" if self.device is None else f"cuda:{self.device}"
            return build.random_checkpoint(self.located.config, device)
        if self.located.source in ("folder", "file") and self.located.path is not None:
            folder = Path(self.located.path).parent
            if not any((*folder.glob("*.safetensors*"), *folder.glob("*.bin*"))):
                raise UserError(
                    f"{folder} has a config.json and no weights: add --random-weights to measure "
                    "without them"
                )
            return folder
        return self.located.id

    @property
    def _reads(self) -> bool:
        """Whether there is text; random tokens need no tokenizer."""
        return bool(self.job.data and self.job.data.get("source"))

    def _tokenizer(self, source: str | Path) -> Any:
        if not self._reads:
            return None
        from transformers import AutoTokenizer

        home = source
        if self.job.random_weights:  # its folder, where it has one
            path = self.located.path
            home = Path(path).parent if path is not None else self.located.id
        trust = self.job.trust_remote_code
        try:
            return AutoTokenizer.from_pretrained(home, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"no tokenizer for the data in {home}: {reason}") from error

    def _data(self, source: str | Path) -> Any:
        job, recipe = self.job, self.job.recipe
        spec = None if job.data is None else DataSpec.from_dict(job.data)
        steps = self.max_steps or 1
        samples = recipe.batch_size * recipe.gradient_accumulation_steps * (steps + 1)
        config = self.located.config
        return load_data(
            spec,
            self._tokenizer(source),
            seq_len=recipe.seq_len,
            seed=job.training.seed,
            vocab_size=int(config.get("vocab_size") or config["text_config"]["vocab_size"]),
            samples=samples * recipe.world_size,
        )

    @property
    def max_steps(self) -> int | None:
        """Of a run that only measures, a few."""
        given = self.job.training.max_steps
        if given is not None or self.job.trains:
            return given
        return max(VERIFIED_STEPS, self.job.marked_steps)

    def _training_arguments(self) -> TrainingArguments:
        made = TrainingArguments(**self._arguments())
        if self.job.cpu:
            build.on_the_processor(made)
        if self.job.cpu and self.job.recipe.deepspeed is not None:
            build.join_on_processor()
        return made

    def _arguments(self) -> dict[str, Any]:
        job, train = self.job, self.job.training
        values = build.recipe_arguments(job.recipe, cpu=job.cpu)
        steps = self.max_steps
        values |= {
            "output_dir": str(self.folder / CHECKPOINTS),
            "num_train_epochs": train.epochs,
            "max_steps": -1 if steps is None else steps,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": train.lr_scheduler,
            "warmup_steps": train.warmup,
            "weight_decay": train.weight_decay,
            "max_grad_norm": train.max_grad_norm,
            "seed": train.seed,
            "logging_steps": train.logging_steps or min(10, max(1, (steps or 100) // 10)),
            "report_to": train.report_to if job.trains else "none",
            "disable_tqdm": True,
            "prediction_loss_only": True,
            "remove_unused_columns": False,
            "save_total_limit": train.save_total_limit,
            "save_only_model": False,
            **_every("save", train.save_steps if job.trains else 0),
            **_every("eval", train.eval_steps if self._evaluates() else 0),
        }
        # transformers' TensorBoardCallback reads its folder from here (5.17).
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(self.folder / "tensorboard"))
        values["deepspeed"] = build.deepspeed_values(job, self.located.config)
        return values

    def _evaluates(self) -> bool:
        return bool(self.job.data and self.job.data.get("eval_split")) and self.job.trains

    def _model(self, source: str | Path) -> Any:
        job, recipe = self.job, self.job.recipe
        placed = "cpu" if self.device is None else f"cuda:{self.device}"
        began = time.perf_counter()
        model = build.load_model(
            source,
            recipe,
            None if recipe.deepspeed is not None else placed,
            trust_remote_code=job.trust_remote_code,
        )
        self.facts["load_seconds"] = time.perf_counter() - began
        self.probe.level("load", "prepare")
        model = build.prepare_model(model, recipe)
        self.probe.level("prepare", "prepare")
        self.facts["trainable_parameters"] = build.trainable(model)
        return model

    # --- training ----------------------------------------------------------------------------

    def train(self, trainer: Trainer) -> None:
        """All steps, and what they learned on disk. Sets `facts`."""
        tell("stage", rank=self.rank, stage="train")
        began = time.perf_counter()
        result = trainer.train(resume_from_checkpoint=self.job.training.resume)
        self.facts |= {
            "steps": trainer.state.global_step,
            "of_steps": trainer.state.max_steps,
            "loss": result.training_loss,
            "losses": self.progress.losses[-200:] if self.progress else [],
            "seconds_between_steps": self.progress.seconds if self.progress else [],
            "train_seconds": time.perf_counter() - began,
        }
        self.probe.detach()
        if self.job.trains and not self.stop.stopped:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """The adapter or the model, beside its tokenizer: written whole, then named."""
        name = RESULT["full" if self.job.recipe.lora is None else "lora"]
        beside, final = self.folder / f".{name}", self.folder / name
        trainer.save_model(str(beside))  # all ranks: ZeRO 3 gathers
        if self.rank == 0:
            if self._reads:
                self._tokenizer(self._home()).save_pretrained(beside)
            shutil.rmtree(final, ignore_errors=True)
            beside.rename(final)
            self.facts["saved"] = str(final)

    def _home(self) -> str | Path:
        return self.located.id if self.located.path is None else Path(self.located.path).parent


def _every(what: str, steps: int | None) -> dict[str, Any]:
    """`save_...` or `eval_...`: each epoch (None), never (0), or each so many steps."""
    if steps is None:
        return {f"{what}_strategy": "epoch"}
    if steps == 0:
        return {f"{what}_strategy": "no"}
    return {f"{what}_strategy": "steps", f"{what}_steps": steps}


def pretend(ranks: int) -> None:
    """Rank 0 of `ranks` in one process: collectives return at once.

    Memory is that rank's; what is computed is not (torch.testing._internal.distributed.fake_pg).
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(
        RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29511",
    )
    torch.distributed.init_process_group(
        backend="fake", store=FakeStore(), rank=0, world_size=ranks
    )


def act_as_smaller(size: int, job: Job, device: int | None) -> None:
    """Caps the allocator at what a card of `size` bytes has beside the CUDA context.

    On the processor the cap is on the process's data (RLIMIT_DATA), beyond what it holds now.
    """
    if device is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        left = size - allocator.context(job.recipe.quantization)
        if left <= 0 or left > total:
            raise UserError(f"a card of {size} bytes can't be emulated on one of {total}")
        torch.cuda.set_per_process_memory_fraction(left / total, device)
        return
    import resource

    status = Path("/proc/self/status").read_text(encoding="ascii")
    held = next(line for line in status.splitlines() if line.startswith("VmData:")).split()[1]
    resource.setrlimit(resource.RLIMIT_DATA, (int(held) * 1024 + size,) * 2)
