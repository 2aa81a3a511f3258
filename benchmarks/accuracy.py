"""Writes docs/accuracy.md: every measured run of tests/measured against its estimate.

usage: python benchmarks/accuracy.py [--check]     (--check: only compare with the file)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import accuracy_ranks
from measured import FOLDER, Run, phases_of, recipe_of, runs
from trace_undescribed import section as traced_alone

from vramplan.memory.estimate import Estimate, estimate
from vramplan.memory.inference import estimate_inference
from vramplan.units import GIB

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
FILES = tuple(
    (name, title)
    for name, title in (
        ("single_gpu", "One NVIDIA H200, default allocator"),
        ("deepspeed_rank0", "DeepSpeed 0.19.8: the first of 1 to 8 ranks on one NVIDIA H200"),
        ("families_gpu", "One NVIDIA H100: more families and regimes, expandable segments"),
        ("optimizers_gpu", "One NVIDIA H100: the optimizers of other packages"),
        ("attention_gpu", "One NVIDIA H200: flash_attention_2, sdpa and eager, 1k to 32k tokens"),
    )
    if (FOLDER / f"{name}.json").exists()
)

INTRO = """# Accuracy

`make accuracy` writes this page from the measured runs in `tests/measured` and the estimates of
this version. Every run is listed, also those that come out badly. A run is three optimizer steps
of transformers' `Trainer` on random tokens of a fixed length, with random weights, measured with
torch's allocator counters (`torch.cuda.max_memory_allocated`) phase by phase; software: torch
2.11, transformers 5.17, peft 0.21, accelerate 1.15, bitsandbytes 0.50.2. Errors are estimate
against measurement: plus is too much. "end of" columns are the bytes allocated when a phase ends,
as a share of the run's peak: a right peak for a wrong reason would show there. Among the
optimizers of other packages, GaLore and APOLLO renew their projections in the third step
(`update_proj_gap=2`), and schedule-free RAdam ran seven steps: its second moment counts from the
sixth.
"""


def percent(predicted: int, measured: int, of: int | None = None) -> float:
    return 100 * (predicted - measured) / (of or measured)


def table(pairs: Iterable[tuple[Run, Estimate]]) -> Iterator[str]:
    yield "| run | measured GiB | estimate GiB | peak | end of forward | backward | step |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for run, e in pairs:
        phases = phases_of(run, e)
        ends = [
            f"{percent(phases[name].end, run.ends[name], run.peak_allocated):+.2f} %"
            for name in ("forward", "backward", "optimizer_step")
        ]
        yield (
            f"| {run.id} | {run.peak_allocated / GIB:.3f} | {e.peak_allocated / GIB:.3f} "
            f"| {percent(e.peak_allocated, run.peak_allocated):+.2f} % | {' | '.join(ends)} |"
        )


def summary(errors: list[tuple[float, str]]) -> str:
    worst = max(errors, key=lambda pair: abs(pair[0]))
    mean = sum(abs(e) for e, _ in errors) / len(errors)
    signed = sum(e for e, _ in errors) / len(errors)
    return (
        f"{len(errors)} runs: mean absolute error {mean:.2f} %, signed mean {signed:+.2f} %, "
        f"worst {worst[0]:+.2f} % ({worst[1]})."
    )


def caps() -> Iterator[str]:
    """`required` against the smallest cap on the allocator under which a run still ended."""
    models = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
    yield "| run | survived at | needs at least GiB | required GiB | over |"
    yield "|---|---:|---:|---:|---:|"
    for entry in json.loads((FOLDER / "smallest_cap.json").read_text(encoding="utf-8")):
        case = entry["case"]
        if entry["alloc_conf"] is None:
            continue
        e = estimate(models[case["model"]], recipe_of(case))
        ratio = min(float(r) for r, outcome in entry["tried"].items() if outcome == "ok")
        least = int(ratio * entry["peak_allocated"]) + e.overhead["context"]
        yield (
            f"| {case['id']} | {ratio} x peak | {least / GIB:.3f} | {e.required / GIB:.3f} "
            f"| {percent(e.required, least):+.2f} % |"
        )


def inference_table() -> Iterator[str]:
    """The highest of prefill and later steps, and those steps alone, against measured runs."""
    errors: list[tuple[float, str]] = []
    rows = []
    file = json.loads((FOLDER / "inference_gpu.json").read_text(encoding="utf-8"))
    for run in file["runs"]:
        e = estimate_inference(
            run["config"],
            dtype=run["dtype"],
            attention=run["attn"],
            batch_size=run["batch"],
            context=run["prompt"] + run["new"],
            prompt=run["prompt"],
        )
        assert e.decode is not None
        peak = max(e.prefill.peak, e.decode.peak)
        phase = "prefill" if peak == e.prefill.peak else "decode"
        errors.append((percent(peak, run["peak"]), run["id"]))
        rows.append(
            f"| {run['id']} | {run['batch']} x ({run['prompt']} + {run['new']}) | {phase} "
            f"| {run['peak'] / GIB:.3f} | {peak / GIB:.3f} | {errors[-1][0]:+.3f} % "
            f"| {percent(e.decode.peak, run['decode']):+.3f} % "
            f"| {e.cache_end - run['kv']:+d} B of {run['kv'] / GIB:.3f} GiB |"
        )
    yield summary(errors) + "\n"
    yield "| run | tokens | peak in | measured GiB | estimate GiB | peak | decode | cache at end |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    yield from rows


def matrix_summary() -> Iterator[str]:
    """What `make trace-matrix` found, from its own page."""
    text = (PAGE.parent / "trace-matrix.md").read_text(encoding="utf-8")
    yield next(part for part in text.split("\n\n") if part.startswith("**")) + "\n"
    yield "By regime, family and optimizer: [trace-matrix.md](trace-matrix.md).\n"


def page() -> str:
    lines = [INTRO]
    everything: list[tuple[float, str]] = []
    sections: list[str] = []
    for name, title in FILES:
        pairs = [(run, run.estimate()) for run in runs(name)]
        errors = [(percent(e.peak_allocated, r.peak_allocated), r.id) for r, e in pairs]
        everything += errors
        sections += [f"## {title}\n", summary(errors) + "\n", *table(pairs), ""]
    ranked, errors = accuracy_ranks.sections(summary)
    everything += errors
    lines += [f"**All of them.** {summary(everything)}\n", *sections, *ranked]
    lines += [
        "## The smallest device\n",
        "Runs under a cap on the allocator (expandable segments), the smallest that survived plus",
        "the CUDA context, against `required`.\n",
        *caps(),
        "",
        "## Against the trace\n",
        *matrix_summary(),
        "",
        "## Traced alone\n",
        *traced_alone(),
        "",
        "## Inference\n",
        "`generate` on one NVIDIA H100 (transformers 5.17, expandable segments). Models were made",
        "on the GPU from their configurations, so there is no peak of loading among these.\n",
        *inference_table(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == text else "docs/accuracy.md is stale")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(text.split("\n## ")[0].splitlines()[-2], file=sys.stderr)


if __name__ == "__main__":
    main()
