"""Estimate against trace over families and regimes; writes docs/trace-matrix.md.

usage: python benchmarks/trace_matrix.py [--full] [--minutes N] [--workers N] [--only WORD ...]
                                         [--report]

A cell is one family (the catalogue's smallest checkpoint of it, cut to a few layers unless --full)
under one recipe. Cells that were run are kept in benchmarks/trace_matrix.json with the bytes of
both sides, and are not run again: remove the file to begin anew. Cells come in rounds, each of
which holds every family under every regime once, so what ran first already covers all of both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from vramplan.errors import UserError
from vramplan.memory.estimate import estimate
from vramplan.models import catalogue
from vramplan.models.hf_config import architecture
from vramplan.models.tensors import inventory
from vramplan.recipe.optimizers import OPTIMIZERS
from vramplan.recipe.recipe import LoRA, Recipe

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "trace-matrix.md"
CELLS = HERE / "trace_matrix.json"
LAYERS = 3
LIMIT = 0.5
"""Percent: a cell beyond it is listed by name."""
POINTS = ((2, 512), (1, 2048))
ENDS = ("load", "prepare", "forward", "backward", "optimizer_step")

Cell = dict[str, Any]

REGIMES: dict[str, dict[str, Any]] = {
    "bf16, autocast": {},
    "bf16, no autocast": {"mixed_precision": "no"},
    "fp32, bf16 autocast": {"dtype": "fp32"},
    "fp32, fp16 autocast": {"dtype": "fp32", "mixed_precision": "fp16"},
    "LoRA attention": {"lora": ("attention", 0.0)},
    "LoRA attention, dropout": {"lora": ("attention", 0.05)},
    "LoRA all-linear": {"lora": ("all-linear", 0.0)},
    "LoRA all-linear, dropout": {"lora": ("all-linear", 0.05)},
    "NF4, double quant": {"quantization": "nf4", "lora": ("all-linear", 0.05)},
    "NF4": {"quantization": "nf4", "double_quant": False, "lora": ("all-linear", 0.05)},
    "int8": {"quantization": "int8", "lora": ("all-linear", 0.05)},
}


# --- the cells ------------------------------------------------------------------------------


def checkpoints() -> dict[str, str]:
    """The smallest bundled checkpoint of every family."""
    found: dict[str, catalogue.Entry] = {}
    for entry in catalogue.entries():
        held = found.get(entry.model_type)
        if held is None or entry.params < held.params:
            found[entry.model_type] = entry
    return {family: found[family].id for family in sorted(found)}


def cells() -> list[Cell]:
    """All of them, in rounds; every optimizer first."""
    models = checkpoints()
    optimizers = [
        cell(
            "llama",
            models["llama"],
            f"optimizer {name}",
            optimizer=name,
            dtype="fp32" if OPTIMIZERS[name].refuses_bf16_gradients else "bf16",
        )
        for name in OPTIMIZERS
    ]
    rounds: list[tuple[int, str, Cell]] = []
    for (family, model), (regime, fields) in product(models.items(), REGIMES.items()):
        variants = [
            cell(family, model, regime, **fields, **variant) for variant in variants_for(model)
        ]
        variants.sort(key=lambda c: digest(c["id"]))
        rounds += [(n, digest(c["id"]), c) for n, c in enumerate(variants)]
    return optimizers + [c for _, _, c in sorted(rounds, key=lambda r: r[:2])]


def variants_for(model: str) -> Iterator[dict[str, Any]]:
    found = catalogue.load(model)
    assert found is not None
    arch = architecture(found.config)
    longest = arch.max_positions if arch.learned_positions else None
    for checkpointing, attention, (batch, seq) in product((False, True), ("sdpa", "eager"), POINTS):
        yield {
            "gradient_checkpointing": checkpointing,
            "attention": attention,
            "batch_size": batch,
            "seq_len": min(seq, longest or seq),
        }


def cell(family: str, model: str, regime: str, **fields: Any) -> Cell:
    fields = {"batch_size": 2, "seq_len": 512, **fields}
    words = [family, regime, fields.get("attention", "sdpa")]
    words += ["checkpointing"] if fields.get("gradient_checkpointing") else []
    words.append(f"{fields['batch_size']} x {fields['seq_len']}")
    return {
        "id": ", ".join(words),
        "family": family,
        "model": model,
        "regime": regime,
        "fields": fields,
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_of(fields: dict[str, Any], config: dict[str, Any]) -> Recipe:
    fields = dict(fields)
    if fields.get("lora"):
        targets, dropout = fields["lora"]
        if targets == "attention":
            targets = attention_modules(config)
        elif fields.get("quantization") and architecture(config).experts is not None:
            dropout = 0.0  # peft refuses dropout on experts
        fields["lora"] = LoRA(rank=16, dropout=dropout, target_modules=targets)
    return Recipe(**fields)


def attention_modules(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the linears in a family's attention."""
    names = set()
    for tensor in inventory(architecture(config)):
        path = tensor.name.removesuffix(".weight").split(".")
        if tensor.adaptable and any("attn" in p or "attention" in p for p in path[:-1]):
            names.add(path[-1])
    return tuple(sorted(names))


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with few layers; of a mixture with dense layers first, one of the others too."""
    from vramplan_launcher.trace.build import cut_depth

    first = config.get("first_k_dense_replace") or 0
    return cut_depth(config, max(layers, first + 1))


# --- running them ---------------------------------------------------------------------------


def run(task: tuple[Cell, bool]) -> Cell:
    """Both sides of one cell, in bytes; or why there is none."""
    asked, full = task
    warnings.filterwarnings("ignore")
    began = time.time()
    out = {key: asked[key] for key in ("id", "family", "model", "regime")}
    try:
        out |= both(asked, full)
    except UserError as error:
        out["refused"] = str(error)
    except Exception as error:
        out["failed"] = f"{type(error).__name__}: {error}"[:300]
    return {**out, "seconds": round(time.time() - began, 1)}


def both(asked: Cell, full: bool) -> Cell:
    from vramplan_launcher.trace import api

    found = catalogue.load(asked["model"])
    assert found is not None
    config = found.config if full else cut(found.config, LAYERS)
    recipe = recipe_of(asked["fields"], config)
    needed = estimate(config, recipe)
    deep = api.run(config, recipe)
    traced = api.traced(deep, found.id, recipe)
    ahead = next(p for p in deep.trace.phases if p.name == "2:forward")
    e, t = needed.timeline.phases(), traced.timeline.phases()
    return {
        "peak": [needed.peak_allocated, traced.peak_allocated],
        "peak_phase": [needed.peak_phase, traced.peak_phase],
        "saved": [e["forward"].end - needed.timeline.resident, ahead.end - ahead.start],
        "ends": {name: [e[name].end, t[name].end] for name in ENDS},
    }


def read() -> dict[str, Cell]:
    if not CELLS.exists():
        return {}
    return {c["id"]: c for c in json.loads(CELLS.read_text(encoding="utf-8"))["cells"]}


def write(done: dict[str, Cell], depth: str) -> None:
    from vramplan_launcher.trace import cache

    lines = ",\n".join(json.dumps(done[name]) for name in sorted(done))
    head = json.dumps({"versions": cache.versions(), "layers": depth})
    CELLS.write_text(f'{head[:-1]}, "cells": [\n{lines}\n]}}\n', encoding="utf-8")


def work(todo: list[Cell], options: argparse.Namespace, done: dict[str, Cell]) -> None:
    stop = time.time() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    depth = "all" if options.full else str(LAYERS)
    with context.Pool(options.workers, maxtasksperchild=60) as pool:
        results = pool.imap_unordered(run, ((c, options.full) for c in todo))
        for number, result in enumerate(results, 1):
            done[result["id"]] = result
            print(f"{number}/{len(todo)} {line_of(result)}", flush=True)
            if number % 10 == 0:
                write(done, depth)
            if time.time() > stop:
                pool.terminate()
                break
    write(done, depth)


# --- the report -----------------------------------------------------------------------------


def percent(pair: Iterable[int]) -> float:
    mine, traced = pair
    return 100 * (mine - traced) / traced if traced else 0.0


def worst_of(c: Cell) -> tuple[float, str]:
    """The largest error of a cell, and where."""
    errors = [(percent(c["peak"]), "peak")]
    errors += [(percent(pair), f"end of {name}") for name, pair in c["ends"].items()]
    return max(errors, key=lambda e: abs(e[0]))


def line_of(c: Cell) -> str:
    if "peak" not in c:
        return f"{c['id']}: {c.get('refused') or c['failed']}"
    error, where = worst_of(c)
    return f"{c['id']}: peak {percent(c['peak']):+.3f} %, worst {error:+.3f} % ({where})"


def table(ran: list[Cell], key: str) -> Iterator[str]:
    heads = ("cells", "mean of peak", "worst of peak", "worst of an end", "saved, to 1 in 1000")
    yield f"| {key} | {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in sorted({c[key] for c in ran}):
        mine = [c for c in ran if c[key] == name]
        peaks = [percent(c["peak"]) for c in mine]
        ends = [percent(pair) for c in mine for pair in c["ends"].values()]
        exact = sum(abs(percent(c["saved"])) <= 0.1 for c in mine)
        yield (
            f"| {name} | {len(mine)} | {mean(peaks):.3f} % | {most(peaks):+.3f} % "
            f"| {most(ends):+.3f} % | {exact} of {len(mine)} |"
        )


def mean(errors: list[float]) -> float:
    return sum(map(abs, errors)) / len(errors)


def most(errors: list[float]) -> float:
    return max(errors, key=abs)


def page(done: dict[str, Cell]) -> str:
    head = json.loads(CELLS.read_text(encoding="utf-8"))
    ran = [c for c in done.values() if "peak" in c]
    refused = [c for c in done.values() if "refused" in c]
    failed = [c for c in done.values() if "failed" in c]
    beyond = [c for c in ran if abs(worst_of(c)[0]) > LIMIT]
    peaks = [percent(c["peak"]) for c in ran]
    worst = max(ran, key=lambda c: abs(percent(c["peak"])))
    libraries = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        "# Estimate against trace\n",
        "`make trace-matrix` writes this page: every family of the catalogue (its smallest",
        f"checkpoint; layers: {head['layers']}) under every regime, estimated and traced. Traced",
        f"with {libraries}. Errors are estimate against trace, of the phase's own bytes; plus is",
        "too much.\n",
        f"**{len(ran)} of {len(cells())} cells ran** (with {len(refused)} refused by the libraries "
        f"and {len(failed)} that failed): at the peak, mean absolute error {mean(peaks):.3f} %, "
        f"signed mean {sum(peaks) / len(peaks):+.3f} %, worst {percent(worst['peak']):+.3f} % "
        f"({worst['id']}). Beyond {LIMIT} % at the peak or at a phase's end: {len(beyond)}.\n",
        "## By regime\n",
        *table([c for c in ran if not c["regime"].startswith("optimizer")], "regime"),
        "\n## By family\n",
        *table([c for c in ran if not c["regime"].startswith("optimizer")], "family"),
        "\n## By optimizer\n",
        *table([c for c in ran if c["regime"].startswith("optimizer")], "regime"),
        f"\n## Beyond {LIMIT} %\n",
        *(f"- {line_of(c)}" for c in sorted(beyond, key=lambda c: -abs(worst_of(c)[0]))),
        *(["None."] if not beyond else []),
        "\n## Not compared\n",
        *reasons(refused + failed),
        "",
    ]
    return "\n".join(lines)


def reasons(without: list[Cell]) -> Iterator[str]:
    """Cells without a result, by reason."""
    grouped: dict[str, list[str]] = {}
    for c in without:
        grouped.setdefault(c.get("refused") or c["failed"], []).append(c["id"])
    for reason, ids in sorted(grouped.items()):
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        yield f"- {'; '.join(ids[:3])}{more}: {reason}"
    if not grouped:
        yield "Every cell was compared."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="all layers of every checkpoint")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="cells whose id holds all of these")
    parser.add_argument("--report", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    done = read()
    todo = [c for c in cells() if c["id"] not in done and all(w in c["id"] for w in options.only)]
    if not options.report and todo:
        work(todo, options, done)
    text = page(done)
    PAGE.write_text(text, encoding="utf-8")
    print(text.partition("\n## By regime")[0].splitlines()[-2], file=sys.stderr)


if __name__ == "__main__":
    main()
