"""Two ranks on the CPU train with the files that `vramplan config` writes, through Trainer.

One `accelerate launch` for all of it. DeepSpeed compiles its optimizers at first use, for a minute
or two each; later runs find them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vramplan_launcher.deepspeed_config import Hyperparameters, ds_config
from vramplan_launcher.deepspeed_files import ACCELERATE, contents

from vramplan.models.hf_config import architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

for needed in ("deepspeed", "transformers", "accelerate", "peft"):
    pytest.importorskip(needed)
if shutil.which("g++") is None or sys.platform != "linux":
    pytest.skip("DeepSpeed compiles its optimizers by g++", allow_module_level=True)

CHILD = Path(__file__).with_name("deepspeed_train.py")
HYPER = Hyperparameters(learning_rate=1e-2, max_grad_norm=0.5)
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


OTHERS = {"adagrad": "Adagrad", "adafactor": "Adafactor", "sgd": "SGD"}


def run(zero: dict[str, Any], **values: Any) -> Recipe:
    return Recipe(deepspeed=DeepSpeed(**zero), world_size=2, seq_len=32, batch_size=2, **values)


RUNS = {
    "accelerate": run({"stage": 2}),
    "stage 0": run({"stage": 0}),
    "stage 1": run({"stage": 1}),
    "stage 2": run({"stage": 2, "reduce_bucket_size": 5000, "overlap_comm": False}),
    "stage 3": run({"stage": 3, "stage3_param_persistence_threshold": 0}),
    "auto": run({"stage": 3}, gradient_accumulation_steps=2),
    "fp32": run({"stage": 2}, dtype="fp32", mixed_precision="no"),
    "checkpointing": run({"stage": 2}, gradient_checkpointing=True),
    "offload": run({"stage": 2, "offload_optimizer": "cpu"}),
    "offload all": run({"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}),
    "lora": run({"stage": 2}, lora=LoRA(rank=4)),
    "lora 3": run({"stage": 3}, lora=LoRA(rank=4)),
    "adagrad": run({"stage": 2}, optimizer="adagrad"),
    "adafactor": run({"stage": 2}, optimizer="adafactor"),
    "sgd offload": run({"stage": 2, "offload_optimizer": "cpu"}, optimizer="sgd"),
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def ended(command: list[str], env: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit code and output; none of its processes outlives the time that it is given."""
    with subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank said of each run."""
    root = tmp_path_factory.mktemp("runs")
    cases, ports = [], free_ports(len(RUNS) + 1)
    for (name, recipe), port in zip(RUNS.items(), ports, strict=False):
        folder = root / name.replace(" ", "_")
        folder.mkdir()
        config = ds_config(architecture(TINY), recipe, hf_auto=name == "auto", hyper=HYPER)
        for file, text in contents(config, HYPER, folder, title=name).items():
            (folder / file).write_text(text)
        cases.append(
            {
                "folder": str(folder),
                "port": port,
                "lora": recipe.lora is not None,
                "by_accelerate": name == "accelerate",
            }
        )
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(Path(cases[0]["folder"]) / ACCELERATE)]
    command += ["--main_process_port", str(ports[-1]), str(CHILD), str(root / "cases.json")]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code, said = ended(command, env, seconds=900)
    assert code == 0, said[-3000:]
    return {
        name: [json.loads(Path(case["folder"], f"rank{n}.json").read_text()) for n in (0, 1)]
        for name, case in zip(RUNS, cases, strict=True)
    }


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_as_written(name: str, trained: dict[str, list[dict[str, Any]]]) -> None:
    recipe = RUNS[name]
    zero = recipe.deepspeed
    assert zero is not None
    for rank in trained[name]:
        assert "error" not in rank, rank["error"]
        losses = rank["losses"]
        assert len(losses) == 4
        assert all(map(math.isfinite, losses))
        assert losses[-1] < losses[0]
        assert (rank["stage"], rank["ranks"]) == (zero.stage, 2)
        assert rank["offload_optimizer"] == zero.offload_optimizer
        assert rank["offload_param"] == zero.offload_param
        assert rank["accumulation"] == recipe.gradient_accumulation_steps
        assert (rank["clipping"], rank["lr"]) == (0.5, 1e-2)
        assert rank["bf16"] is (recipe.mixed_precision == "bf16")
        assert rank["bucket"] == (zero.sizes(64)["reduce_bucket"] if zero.stage else int(5e8))
        adam = "DeepSpeedCPUAdam" if zero.offload_optimizer else "FusedAdam"
        assert rank["optimizer"] == OTHERS.get(recipe.optimizer, adam)


def test_the_stages_learn_the_same(trained: dict[str, list[dict[str, Any]]]) -> None:
    """Partitioning and offload change where numbers are, not what they are."""
    first = trained["stage 1"][0]["losses"]
    for name in ("accelerate", "stage 2", "stage 3", "checkpointing", "offload", "fp32"):
        assert trained[name][0]["losses"] == pytest.approx(first, rel=0.02), name


def test_stage_3_saves_whole_weights(
    trained: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from safetensors import safe_open

    root = tmp_path_factory.getbasetemp() / "runs0"
    with safe_open(root / "stage_3" / "saved" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").shape == (256, 64)
        assert file.get_tensor("lm_head.weight").shape == (256, 64)
    with safe_open(root / "lora_3" / "saved" / "adapter_model.safetensors", "pt") as file:
        shapes = {tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes >= {(4, 64), (64, 4), (128, 4), (4, 128)}
