"""Runs that really die, here and now, on the CPU: what their logs say is what is told."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from vramplan_launcher.command import environment_for
from vramplan_launcher.failures import Diagnosis, diagnose

from vramplan import Recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def died(program: str, folder: Path, *arguments: str, **variables: str) -> Diagnosis:
    """What is told of a Python program that died."""
    script = folder / "program.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, *arguments, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
        env={**os.environ, **environment_for(Recipe()), **variables},
    )
    assert done.returncode != 0
    made = diagnose(done.returncode, done.stdout, log_path="log.txt")
    assert "\n" not in made.sentence
    assert made.sentence.endswith(" (log: log.txt)"), made
    return made


# Two ranks of gloo; the second dies in its own way, the first of the second's death.
RANKS = """
import ctypes, os, signal, time
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
@record
def main():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        {what}
    dist.barrier()
main()
"""
DEATHS = {
    "host_out_of_memory": "os.kill(os.getpid(), signal.SIGKILL)",
    "segmentation_fault": "ctypes.string_at(0)",
    "disk_full": "raise OSError(28, 'No space left on device', '/out/model.safetensors')",
    "unknown": "raise ValueError('the second rank broke')",
}


@pytest.mark.parametrize("kind", DEATHS)
def test_of_two_ranks_the_one_that_died_first_is_told(tmp_path: Path, kind: str) -> None:
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    made = died(RANKS.format(what=DEATHS[kind]), tmp_path, *arguments)
    assert (made.kind, made.rank) == (kind, 1)
    if kind == "unknown":
        assert (
            made.sentence == "rank 1: ended with ValueError: the second rank broke (log: log.txt)"
        )


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = (
            "import torch.distributed as dist\n"
            f"dist.init_process_group('gloo', 'tcp://127.0.0.1:{port}', rank=0, world_size=1)"
        )
        made = died(program, tmp_path)
    assert made.kind == "port_in_use"
    assert made.sentence.startswith(f"port {port} where processes meet is in use")


# A limit on the size of files stands for a disk that fills.
FULL = """
import resource, signal, torch
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
weights = {{"a": torch.zeros(100_000)}}
{save}
"""


@pytest.mark.parametrize("save", ["save_file(weights, {!r})", "torch.save(weights, {!r})"])
def test_a_disk_that_fills_at_a_checkpoint(tmp_path: Path, save: str) -> None:
    pytest.importorskip("resource")
    made = died(FULL.format(save=save.format(str(tmp_path / "out"))), tmp_path)
    assert made.kind == "disk_full"
    assert "earlier checkpoints are whole" in made.advice


def test_host_memory_that_cannot_be_had(tmp_path: Path) -> None:
    made = died("import torch; torch.empty(10**15)", tmp_path)
    assert made.kind == "host_out_of_memory"


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    program = (
        "from transformers import AutoConfig\nAutoConfig.from_pretrained('meta-llama/Llama-3.1-8B')"
    )
    made = died(program, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert made.kind == "offline"


def test_weights_cut_short(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    program = (
        f"from safetensors.torch import load_file\nload_file({str(tmp_path / 'a.safetensors')!r})"
    )
    assert died(program, tmp_path).kind == "damaged_checkpoint"


def test_a_package_that_is_not_here(tmp_path: Path) -> None:
    made = died("import a_package_that_is_not_here", tmp_path)
    assert made.sentence == "the package a_package_that_is_not_here is not installed (log: log.txt)"
    made = died("from os import nothing_of_that_name", tmp_path)
    assert made.kind == "broken_package"
    assert "nothing_of_that_name" in made.sentence


def test_flash_attention_that_is_not_here(tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    program = (
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "config = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1,\n"
        "    intermediate_size=8, vocab_size=8)\n"
        "AutoModelForCausalLM.from_config(config, attn_implementation='flash_attention_2')"
    )
    made = died(program, tmp_path)
    assert made.kind == "flash_attention"
    assert "--attention sdpa" in made.advice


def test_data_that_is_broken(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 5, b}\n')
    program = (
        "from vramplan_launcher.data import DataSpec, load_data\n"
        f"load_data(DataSpec(source={str(tmp_path / 'a.jsonl')!r}), object(), seq_len=2, seed=0,\n"
        "    vocab_size=4)"
    )
    path = f"{ROOT}{os.pathsep}{ROOT / 'launcher'}"
    made = died(program, tmp_path, PYTHONPATH=path, HF_HOME=str(tmp_path))
    assert made.kind == "input"
    assert f"data file '{tmp_path / 'a.jsonl'}': line 2 is no JSON" in made.sentence


# DeepSpeed's CPU-Adam is compiled when it is first made.
ADAM = """
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(10))])
"""
LACKING = {
    "there is no C++ compiler (c++)": ("sh", "cat", "env", "uname", "which", "ninja"),
    "ninja is not installed": ("sh", "cat", "env", "uname", "which", "c++", "g++", "as", "ld"),
}


@pytest.mark.parametrize("lacks", LACKING)
def test_an_op_that_cannot_be_compiled(tmp_path: Path, lacks: str) -> None:
    pytest.importorskip("deepspeed")
    if not all(shutil.which(tool) for tool in ("ninja", "c++")):
        pytest.skip("ninja and c++ are taken away here: they have to be there")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in LACKING[lacks]:
        (tools / tool).symlink_to(shutil.which(tool) or "/bin/false")
    extensions = str(tmp_path / "extensions")
    made = died(ADAM, tmp_path, PATH=str(tools), TORCH_EXTENSIONS_DIR=extensions)
    assert (made.kind, lacks in made.sentence) == ("op_not_built", True), made
