"""A tiny model with a tokenizer and data, and the real command line in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WORDS = ("a", "cat", "sat", "on", "the", "mat")


@pytest.fixture(scope="session")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json and no weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and a tokenizer of a token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    values = {k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model("llama", **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    known = {word: n for n, word in enumerate(("<unk>", "</s>", "<pad>", *WORDS))}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows of text: 7 tokens each, so 87 sequences of 32 and 16 tokens left over."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    line = json.dumps({"text": " ".join(WORDS)})
    path.write_text(f"{line}\n" * 400, encoding="utf-8")
    return path


class Run:
    """`vramplan` with arguments, in a folder of its own."""

    def __init__(self, folder: Path, arguments: tuple[str, ...]) -> None:
        self.folder = folder
        self.errors = folder / "stderr.txt"
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launcher'}",
            "XDG_DATA_HOME": str(folder / "share"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "VRAMPLAN_SCRATCH": str(folder / "scratch"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("MASTER_PORT", None)
        with self.errors.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vramplan", *arguments],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # A shell starts what is in its background with SIGINT ignored, tests included.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def end(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, self.errors.read_text(encoding="utf-8")

    def wait_for(self, there: Callable[[], object], timeout: float = 120) -> None:
        """Until `there()`; the run must not end before."""
        began = time.monotonic()
        while not there():
            assert self.process.poll() is None, self.errors.read_text(encoding="utf-8")
            assert time.monotonic() - began < timeout, self.errors.read_text(encoding="utf-8")
            time.sleep(0.05)

    def runs(self) -> list[Path]:
        """Run folders, in the order of their names."""
        return sorted((self.folder / "runs").glob("*"))

    def ranks(self) -> list[int]:
        """Process ids of the ranks that run now."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            mine = any(str(self.folder).encode() in word for word in words)
            if (
                mine
                and b"vramplan_launcher.train" in words
                and b"torch.distributed.run" not in words
            ):
                found.append(int(path.parent.name))
        return found


@pytest.fixture
def vramplan(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts the command line; whatever still runs at the end is ended."""
    started: list[Run] = []

    def start(*arguments: object) -> Run:
        started.append(Run(tmp_path, tuple(map(str, arguments))))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()
        if run.process.stdout is not None:
            run.process.stdout.close()
        for pid in run.ranks():
            os.kill(pid, signal.SIGKILL)


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.fixture
def measured() -> Callable[[Path], dict[str, Any]]:
    """Reads the measurement.json of a run's folder."""
    return lambda folder: read(folder / "measurement.json")
