"""Writes docs/examples.md: commands worth knowing, with what they predict and what their runs took.

The measured figures are those of tests/measured/launched_gpu.json: runs that these commands started
on one NVIDIA H200. Predictions are this version's.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from measured import FOLDER

from vramplan.memory.estimate import Estimate, estimate
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import Recipe
from vramplan.units import GIB

PAGE = Path(__file__).resolve().parent.parent / "docs" / "examples.md"

INTRO = """# Examples

`python benchmarks/examples.py` writes this page. Each command was run on one NVIDIA H200 as it
stands here, the last one on four H100 (`vramplan verify`: a few steps on random weights and tokens;
torch 2.11, transformers 5.17, flash-attn 2.8.3), and compared itself with its prediction.
`vramplan launch` with `--data` trains the same for real; `vramplan estimate` with the same options
predicts it without a GPU.
"""

# Title, what to see there, and the runs by id.
SECTIONS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "The memory ladder: Llama 3.1 8B",
        "Each step adds to the one before, but for the first: its fp32 weights leave room for 512 "
        "tokens alone. In the end weights and optimizer states are what is left, and only training "
        "less than all of them (QLoRA) helps. `vramplan ladder meta-llama/Llama-3.1-8B` predicts "
        "such a ladder for any model and card.",
        (
            (
                "fp32 weights, fp16 mixed precision, eager, 512 tokens",
                "llama8b-fp32-fp16amp-eager-b1-s512",
            ),
            ("bf16 weights, eager, 2048 tokens", "llama8b-bf16-eager-b1-s2048"),
            ("+ checkpointing", "llama8b-bf16-eager-gc-b1-s2048"),
            ("+ FlashAttention-2", "llama8b-bf16-flash-gc-b1-s2048"),
            ("+ QLoRA, rank 16", "llama8b-qlora16-flash-gc-b1-s2048"),
            ("the same with sdpa", "llama8b-qlora16-sdpa-gc-b1-s2048"),
        ),
    ),
    (
        "The rank of LoRA: OPT-350m",
        "32 times the rank costs 2 GiB here, an eighth: activations are what a run of adapters is "
        "made of.",
        (
            ("rank 8", "opt350m-lora8-b8-s1024"),
            ("rank 128", "opt350m-lora128-b8-s1024"),
            ("rank 256", "opt350m-lora256-b8-s1024"),
        ),
    ),
    (
        "The batch, with and without checkpointing: OPT-350m",
        "Checkpointing halves what grows with the batch here: logits and the loss stay as large as "
        "they were.",
        tuple(
            (f"batch {n}{', checkpointing' if gc else ''}", f"opt350m-full{gc}-b{n}-s1024")
            for n in (4, 8, 16)
            for gc in ("", "-gc")
        ),
    ),
    (
        "LoRA and QLoRA: polyglot-ko-1.3b",
        "On a small model 4-bit weights save little: activations weigh more than 1.3 billion "
        "weights.",
        (
            ("LoRA, rank 16", "polyglot-lora16-b4-s1024"),
            ("QLoRA, rank 16", "polyglot-qlora16-b4-s1024"),
        ),
    ),
    (
        "4k to 16k tokens with FlashAttention-2: Llama 3.2 1B",
        "Full fine-tuning with checkpointing. Attention adds nothing that grows with the square of "
        "the length; [attention.md](attention.md) has eager beside it.",
        tuple(
            (f"{n // 1024}k tokens", f"llama1b-flash-full-gc-b1-s{n}") for n in (4096, 8192, 16384)
        ),
    ),
)


ZERO = (
    "On four H100 it was run; on eight cards, and with offload, it is predicted only. Of ZeRO-3 on "
    "an 8B and a 70B model, at 8 to 1024 ranks, a rank was measured: [accuracy.md](accuracy.md)."
)
ON_FOUR = (("ZeRO-3 on four H100", "13b-zero3-w4"),)
OFFLOADS = ("offload_optimizer", "offload_param")


def launched() -> dict[str, dict[str, Any]]:
    """The launched runs by id."""
    document = json.loads((FOLDER / "launched_gpu.json").read_text(encoding="utf-8"))
    return {run["id"].removeprefix("seed-"): run for run in document["runs"]}


def rows(known: dict[str, dict[str, Any]], runs: tuple[tuple[str, str], ...]) -> Iterator[str]:
    yield "| | predicted GiB | measured GiB | error | required GiB |"
    yield "|---|---:|---:|---:|---:|"
    for label, name in runs:
        run = known[name]
        e = estimate(run["model"], Recipe.from_dict(run["recipe"]), run.get("gpu"))
        peak = run["measured"]["peak_allocated"]
        yield (
            f"| {label} | {e.peak_allocated / GIB:.2f} | {peak / GIB:.2f} "
            f"| {100 * (e.peak_allocated / peak - 1):+.3f} % | {e.required / GIB:.2f} |"
        )


def sharded(known: dict[str, dict[str, Any]]) -> Iterator[str]:
    """ZeRO-3 on a 13B model: measured on four cards, predicted for each rank of eight."""
    model, card = "meta-llama/Llama-2-13b-hf", "8xA100-80GB"
    stage_3 = DeepSpeed(stage=3)
    yield "## ZeRO-3 on a 13B model: Llama 2 13B\n"
    yield textwrap.fill(ZERO, 100) + "\n"
    yield from rows(known, ON_FOUR)
    yield "\n| on eight A100 | predicted GiB | required GiB | host, 8 ranks |"
    yield "|---|---:|---:|---:|"
    commands = [shlex.join(known[name]["command"]) for _, name in ON_FOUR]
    for label, zero in (
        ("ZeRO-3", stage_3),
        ("+ optimizer offloaded", replace(stage_3, offload_optimizer="cpu")),
        ("+ weights offloaded", replace(stage_3, offload_optimizer="cpu", offload_param="cpu")),
    ):
        recipe = Recipe(deepspeed=zero, world_size=8, gradient_checkpointing=True)
        e: Estimate = estimate(model, recipe, gpu=card)
        host = f"{(e.host.pinned + e.host.pageable) * 8 / GIB:.0f} GiB" if e.host else ""
        yield f"| {label} | {e.peak_allocated / GIB:.2f} | {e.required / GIB:.2f} | {host} |"
        offload = [f"--{k.replace('_', '-')} cpu" for k in OFFLOADS if getattr(zero, k)]
        words = ["vramplan estimate", model, "--gpu", card, "--zero 3", *offload]
        commands.append(" ".join([*words, "--gradient-checkpointing"]))
    yield "\n```\n" + "\n".join(commands) + "\n```\n"


def page() -> str:
    known = launched()
    lines = [INTRO]
    for title, text, runs in SECTIONS:
        commands = "\n".join(shlex.join(known[name]["command"]) for _, name in runs)
        lines += [
            f"## {title}\n",
            f"{textwrap.fill(text, 100)}\n",
            *rows(known, runs),
            "",
            f"```\n{commands}\n```\n",
        ]
    lines += sharded(known)
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
