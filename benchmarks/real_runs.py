"""Runs recipes for real on the GPUs of this machine, each in a process of its own, and times them.

    python benchmarks/real_runs.py RUNS.json OUT.jsonl [--seconds N] [--cpu]

RUNS.json is a list of {"id", "model", "recipe", "caps", "steps"}: `model` as `estimate` takes it,
`caps` the sizes in GiB of the cards to act as, the smallest first (a run that runs out of memory
under one is run again under the next), [] for the whole card. Several ranks are pretended: the
first one's memory and host are real, and nothing is communicated. Weights and tokens are random;
the weights are saved once under $VRAMPLAN_SCRATCH (a RAM disk is best).

The next process of a GPU imports its libraries while a model is loaded, and then waits: while steps
are timed the GPU and its part of the host have nothing else to do. Needs vramplan[launch].
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
READY, GO, RESULT = "READY", "GO", "RESULT "
SLOWEST = 240.0
"""Seconds after which a run is given up."""

Entry = dict[str, Any]


# --- one run, in a process of its own -------------------------------------------------------


def child(cpu: bool) -> None:
    """Imports everything, waits for an entry, loads, waits again, trains, says how it went."""
    sys.path[:0] = [str(ROOT), str(ROOT / "launcher")]
    import torch
    import vramplan_launcher.session  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line:
        return
    entry = json.loads(line)
    began = time.time()
    out: Entry = {"id": entry["id"], "cap_gib": entry.get("cap")}
    try:
        out |= run(entry, cpu) | {"ended": True}
    except torch.OutOfMemoryError as error:
        out |= {"ended": False, "error": str(error)[:240]}
    except Exception as error:
        out |= {"ended": None, "error": f"{type(error).__name__}: {error}"[:500]}
    if not cpu:
        out["retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    print("\n" + RESULT + json.dumps(out | {"seconds": time.time() - began}), flush=True)


def run(entry: Entry, cpu: bool) -> Entry:
    """The plain run of a recipe: seconds of each step, and the peak. Bytes."""
    import torch
    from transformers import Trainer
    from vramplan_launcher import build

    from vramplan.models.locate import locate
    from vramplan.recipe.recipe import Recipe

    recipe, steps = Recipe.from_dict(entry["recipe"]), int(entry.get("steps", 4))
    config = locate(entry["model"]).config
    device = "cpu" if cpu else "cuda:0"
    source = build.random_checkpoint(config, device)
    if not cpu:
        act_as(entry.get("cap"), recipe)
    arguments = arguments_of(entry, recipe, config, steps, cpu)
    placed = None if recipe.deepspeed is not None else device
    model = build.prepare_model(build.load_model(source, recipe, placed), recipe)
    data = tokens(recipe, config, steps)
    times: list[float] = []
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        data_collator=data.collator,
        callbacks=[clock(times, (lambda: None) if cpu else torch.cuda.synchronize)],
    )
    sys.stdin.readline()  # GO
    trainer.train()
    return {
        "step_seconds": [round(t, 5) for t in times],
        "peak_allocated": None if cpu else torch.cuda.max_memory_allocated(),
        "peak_reserved": None if cpu else torch.cuda.max_memory_reserved(),
    }


def act_as(cap: int | None, recipe: Any) -> None:
    """Caps the allocator at what a card of `cap` GiB has beside the CUDA context."""
    import torch

    from vramplan.memory import allocator
    from vramplan.units import GIB

    torch.zeros(1, device="cuda:0")
    torch.cuda.reset_peak_memory_stats()
    if cap is not None:
        left = cap * GIB - allocator.context(recipe.quantization)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(left / total)


def arguments_of(entry: Entry, recipe: Any, config: Any, steps: int, cpu: bool) -> Any:
    """TrainingArguments; with DeepSpeed its process group is there afterwards."""
    from transformers import TrainingArguments
    from vramplan_launcher import build
    from vramplan_launcher.job import Job
    from vramplan_launcher.session import pretend

    values = build.recipe_arguments(recipe, cpu=cpu)
    if recipe.deepspeed is not None:
        if recipe.world_size > 1:
            pretend(recipe.world_size)
        values["deepspeed"] = build.deepspeed_values(Job(model="-", recipe=recipe), config)
        if entry.get("torch_optimizer") or cpu:  # DeepSpeed's would have to be compiled
            values["deepspeed"].pop("optimizer", None)
            values["deepspeed"]["zero_allow_untested_optimizer"] = True
    made = TrainingArguments(
        **values,
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=steps,
        remove_unused_columns=False,
    )
    if cpu and recipe.deepspeed is not None:
        build.join_on_processor()
    return made


def tokens(recipe: Any, config: Any, steps: int) -> Any:
    """Random tokens for `steps` steps, and one more."""
    from vramplan_launcher.data import load_data

    samples = recipe.batch_size * recipe.gradient_accumulation_steps * (steps + 1)
    return load_data(
        None,
        None,
        seq_len=recipe.seq_len,
        seed=1,
        vocab_size=int(config.get("vocab_size") or config["text_config"]["vocab_size"]),
        samples=samples * recipe.world_size,
    )


def clock(times: list[float], wait: Callable[[], None]) -> Any:
    """A callback that appends the seconds of each optimizer step to `times`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **more: Any) -> None:
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            wait()
            times.append(time.perf_counter() - self.began)

    return Clock()


# --- the processes of each GPU --------------------------------------------------------------


class Lane:
    """A GPU: one process that runs, one that has imported already and waits."""

    def __init__(self, gpu: int, todo: queue.Queue[Entry], out: TextIO, end: float, cpu: bool):
        self.gpu, self.todo, self.out, self.end, self.cpu = gpu, todo, out, end, cpu
        self.next = self.spawn()

    def spawn(self) -> subprocess.Popen[str]:
        env = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "" if self.cpu else str(self.gpu),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, "--child", *(["--cpu"] if self.cpu else [])]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def work(self) -> None:
        """Entries until there are none, or no time."""
        while time.time() < self.end:
            try:
                entry = self.todo.get_nowait()
            except queue.Empty:
                break
            caps = entry.get("caps") or [None]
            mine, self.next = self.next, self.spawn()
            result = self.one(mine, {**entry, "cap": caps[0]})
            self.out.write(json.dumps({"entry": entry, **result}) + "\n")
            self.out.flush()
            if result["ended"] is False and len(caps) > 1:
                self.todo.put({**entry, "caps": caps[1:]})
        self.next.kill()

    def one(self, process: subprocess.Popen[str], entry: Entry) -> Entry:
        """Runs an entry in a process that is ready, and starts its steps when the next one is."""
        watchdog = threading.Timer(SLOWEST, process.kill)
        watchdog.start()
        assert process.stdin
        assert self.next.stdout
        process.stdin.write(json.dumps(entry) + "\n")
        process.stdin.flush()
        while self.next.stdout.readline().strip() not in (READY, ""):
            pass
        try:
            text, _ = process.communicate(GO + "\n")
        finally:
            watchdog.cancel()
        found = [line for line in text.splitlines() if line.startswith(RESULT)]
        if not found:
            return {"id": entry["id"], "ended": None, "error": f"exit code {process.returncode}"}
        result: Entry = json.loads(found[-1].removeprefix(RESULT))
        return {"gpu": self.gpu, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start none later")
    parser.add_argument("--cpu", action="store_true", help="on the processor, to try it out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.cpu)
        return
    if options.runs is None or options.out is None:
        parser.error("RUNS.json and OUT.jsonl are needed")
    end = time.time() + options.seconds
    todo: queue.Queue[Entry] = queue.Queue()
    for entry in json.loads(options.runs.read_text(encoding="utf-8")):
        todo.put(entry)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    gpus = [0] if options.cpu else [int(gpu) for gpu in shown.split(",")]
    with options.out.open("a", encoding="utf-8") as out:
        lanes = [Lane(gpu, todo, out, end, options.cpu) for gpu in gpus]
        threads = [threading.Thread(target=lane.work) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
