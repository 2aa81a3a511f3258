"""Architectures without description: traces against runs on a GPU, kept for docs/accuracy.md.

usage: python benchmarks/trace_undescribed.py

Runs are those of tests/measured/traced_gpu.json. What is traced is kept beside this file, in
trace_undescribed.json, so that `make accuracy` needs no torch.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from measured import FOLDER, recipe_of, run_of

KEPT = Path(__file__).resolve().with_suffix(".json")
RUNS = FOLDER / "traced_gpu.json"
ENDS = ("forward", "backward", "optimizer_step")
NOT_YET = {"2.11": {"rms_norm"}}
"""Operations on CUDA's autocast lists of torch 2.13 that were on none in a torch that ran."""

Entry = dict[str, Any]


def entries() -> list[Entry]:
    """The measured runs; what was released before the first step counts in none of its figures."""
    found: list[Entry] = json.loads(RUNS.read_text(encoding="utf-8"))
    for entry in found:
        released = entry.get("released", 0)
        entry["peak_allocated"] += released
        for mark in entry["timeline"]:
            for key in {"start", "end", "peak"} & {*mark}:
                mark[key] += released
    return found


def traced(entry: Entry, folder: Path) -> Entry:
    """Peak and ends of the phases, in bytes, with the lists of the torch that ran."""
    from vramplan_launcher.trace import autocast, trace

    case = entry["case"]
    code = own_code(case, folder) if "code" in case else None
    ran = ".".join(entry["environment"]["torch"].split(".")[:2])
    listed = autocast.registered

    def registered(key: str) -> set[str]:
        return listed(key) - (NOT_YET.get(ran, set()) if key == "AutocastCUDA" else set())

    with mock.patch.object(autocast, "registered", registered):
        result = trace(case["config"], recipe_of(case), code=code)
    step = result.step(2)
    return {
        "peak": result.peak_allocated,
        "ends": {name: step[name].end for name in ENDS},
        "parameters": result.base_parameters,
    }


def own_code(case: Mapping[str, Any], folder: Path) -> str:
    """A folder with a case's own Python files and its config.json."""
    path = folder / case["id"]
    path.mkdir()
    for name, text in case["code"].items():
        (path / name).write_text(text, encoding="utf-8")
    (path / "config.json").write_text(json.dumps(case["config"]), encoding="utf-8")
    return str(path)


def percent(found: int, measured: int, of: int | None = None) -> float:
    return 100 * (found - measured) / (of or measured)


def section() -> Iterator[str]:
    """The part of docs/accuracy.md about them."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    rows, errors = [], []
    for entry in entries():
        run, found = run_of(entry), kept["runs"].get(entry["case"]["id"])
        if found is None:
            rows.append(f"| {run.id} | {run.peak_allocated / 2**30:.3f} | not traced | | | | |")
            continue
        errors.append((percent(found["peak"], run.peak_allocated), run.id))
        ends = [
            f"{percent(found['ends'][name], run.ends[name], run.peak_allocated):+.3f} %"
            for name in ENDS
        ]
        rows.append(
            f"| {run.id} | {run.peak_allocated / 2**30:.3f} | {found['peak'] / 2**30:.3f} "
            f"| {errors[-1][0]:+.4f} % | {' | '.join(ends)} |"
        )
    worst, where = max(errors, key=lambda pair: abs(pair[0]))
    mean = sum(abs(error) for error, _ in errors) / len(errors)
    libraries = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    yield (
        "Encoder-decoders, vision-language models trained on text, decoders that vramplan does "
        "not describe, and one with code of its own (`--trust-remote-code`): "
        f"traced with {libraries}, against runs on one {entries()[0]['environment']['device']}. "
        f"{len(errors)} runs: mean absolute error {mean:.4f} %, worst {worst:+.4f} % ({where}). "
        "The runs had torch 2.11, whose autocast leaves `rms_norm` in 16 bits; that of 2.13 does "
        "not, so the model with its own code (`own`) is traced with the list of 2.11. "
        "Mamba's run had a second copy of "
        "the weights in its base, left by the maker of the checkpoint and freed in the first step: "
        "it is added back.\n"
    )
    yield "| run | measured GiB | trace GiB | peak | end of forward | backward | step |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    yield from rows


def main() -> None:
    from vramplan_launcher.trace import cache

    warnings.filterwarnings("ignore")
    found: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_MODULES_CACHE"] = str(Path(name) / "modules")
        for entry in entries():
            case = entry["case"]["id"]
            found[case] = traced(entry, Path(name))
            error = percent(found[case]["peak"], entry["peak_allocated"])
            print(f"{case:40} {error:+.4f} %", flush=True)
            lines = ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in found.items())
            head = json.dumps(cache.versions())
            KEPT.write_text(f'{{"versions": {head}, "runs": {{\n{lines}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
