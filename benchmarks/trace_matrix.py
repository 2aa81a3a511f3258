"""Traces of families and regimes, kept; writes docs/trace-matrix.md, estimates against them.

usage: python benchmarks/trace_matrix.py [--minutes N] [--workers N] [--only WORD ...] [--report]

A cell is one family (the catalogue's smallest checkpoint of it, cut to a few layers) under one
recipe. What was traced is kept in benchmarks/trace_matrix.json with a stamp of what it depends on:
the tracer's code (comments aside), the versions of the libraries and the cell's own recipe. A cell
whose stamp is another one today is traced again. Estimates take no time, so they are not kept: the
page is always of the estimate's present code. Cells come in rounds, each of which holds every
family under every regime once, so what ran first already covers all of both.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
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
CELLS = HERE / "trace_matrix.json"
TRACER = HERE.parent / "launcher" / "vramplan_launcher" / "trace"
COUNTS = (
    "autocast", "blocks", "build", "counting", "cuda_ops", "engine", "reduction", "scaling",
    "steps",
)  # fmt: skip
"""Modules of the tracer that decide what is counted in a cell."""
OUTLIERS = HERE.parent / "vramplan" / "memory" / "outliers.py"
QUANTIZED = (TRACER / "quantized.py", OUTLIERS)
"""... and these where bitsandbytes runs; the number of outliers is the estimate's own rule."""
LAYERS = 3
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
    out = [
        cell(
            "llama",
            models["llama"],
            f"optimizer {name}",
            optimizer=name,
            dtype="fp32" if OPTIMIZERS[name].refuses_bf16_gradients else "bf16",
        )
        for name in traced_optimizers()
    ]
    points = {family: list(variants_for(model)) for family, model in models.items()}
    # A family's cells of a round have the same shapes, which torch's fake tensors remember.
    for number in range(len(next(iter(points.values())))):
        for place, (family, model) in enumerate(models.items()):
            variants = points[family]
            variant = variants[(number + place) % len(variants)]
            out += [cell(family, model, name, **{**REGIMES[name], **variant}) for name in REGIMES]
    return out


def traced_optimizers() -> list[str]:
    """Those whose code a trace runs; the others come with packages of their own."""
    known = ("torch", "transformers", "bitsandbytes")
    return [name for name, optimizer in OPTIMIZERS.items() if optimizer.package in known]


def variants_for(model: str) -> Iterator[dict[str, Any]]:
    arch = architecture(config_of(model))
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


@functools.cache
def config_of(model: str) -> dict[str, Any]:
    """A bundled checkpoint's config.json."""
    found = catalogue.load(model)
    assert found is not None
    return found.config


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


def cut(config: dict[str, Any], layers: int = LAYERS) -> dict[str, Any]:
    """The config with few layers; of a mixture with dense layers first, one of the others too."""
    from vramplan_launcher.trace.build import cut_depth

    first = config.get("first_k_dense_replace") or 0
    return cut_depth(config, max(layers, first + 1))


# --- stamps ---------------------------------------------------------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def tracer(quantized: bool) -> str:
    """A digest of all code that a traced number comes from, and of the libraries' versions."""
    from vramplan_launcher.trace import cache

    files = [TRACER / f"{name}.py" for name in COUNTS]
    files += QUANTIZED if quantized else ()
    return digest(json.dumps([cache.versions(), *map(code_of, files)]))


def code_of(path: Path) -> str:
    """A module's code without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [n for n in body if not is_text(n)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)


def is_text(node: ast.AST) -> bool:
    """A docstring, or a string below a constant."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def stamp(asked: Cell) -> str:
    """Changes with all that the traced side of a cell depends on."""
    config = cut(config_of(asked["model"]))
    recipe = recipe_of(asked["fields"], config)
    library = OPTIMIZERS[recipe.optimizer].package
    code = tracer(recipe.quantization is not None or library == "bitsandbytes")
    return digest(json.dumps([code, config, recipe.to_dict()], sort_keys=True, default=str))


def stale(asked: Cell, held: Cell) -> bool:
    """Whether a cell must be traced anew; one that was refused or failed is asked again."""
    return "peak" not in held or held["stamp"] != stamp(asked)


# --- running them ---------------------------------------------------------------------------


def run(asked: Cell) -> Cell:
    """The traced side of one cell, in bytes; or why there is none."""
    warnings.filterwarnings("ignore")
    began = time.time()
    out: Cell = {"id": asked["id"], "stamp": stamp(asked)}
    try:
        out |= traced(asked)
    except UserError as error:
        out["refused"] = str(error)
    except Exception as error:
        out["failed"] = f"{type(error).__name__}: {error}"[:300]
    return {**out, "seconds": round(time.time() - began, 1)}


def traced(asked: Cell) -> Cell:
    from vramplan_launcher.trace import api

    config = cut(config_of(asked["model"]))
    recipe = recipe_of(asked["fields"], config)
    estimate(config, recipe)  # what it refuses needs no trace
    deep = api.run(config, recipe)
    found = api.traced(deep, asked["model"], recipe)
    ahead = next(p for p in deep.trace.phases if p.name == "2:forward")
    ends = found.timeline.phases()
    return {
        "peak": found.peak_allocated,
        "peak_phase": found.peak_phase,
        "saved": ahead.end - ahead.start,
        "ends": {name: ends[name].end for name in ENDS},
    }


def read() -> dict[str, Cell]:
    if not CELLS.exists():
        return {}
    return {c["id"]: c for c in json.loads(CELLS.read_text(encoding="utf-8"))["cells"]}


def write(done: dict[str, Cell]) -> None:
    from vramplan_launcher.trace import cache

    lines = ",\n".join(json.dumps(done[name]) for name in sorted(done))
    head = json.dumps({"versions": cache.versions(), "layers": LAYERS})
    part = CELLS.with_suffix(".part")
    part.write_text(f'{head[:-1]}, "cells": [\n{lines}\n]}}\n', encoding="utf-8")
    part.replace(CELLS)


def differing(before: Cell, after: Cell) -> list[str]:
    """What an earlier tracer made of a cell otherwise: the peak, saved bytes, ends of phases."""
    out = [name for name in ("peak", "saved") if before[name] != after[name]]
    return out + [f"end of {n}" for n in ENDS if before["ends"][n] != after["ends"][n]]


def work(todo: list[Cell], options: argparse.Namespace, done: dict[str, Cell]) -> None:
    from trace_page import line_of, pair_of

    stop = time.time() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    asked = {c["id"]: c for c in todo}
    with context.Pool(options.workers, maxtasksperchild=220) as pool:
        for number, result in enumerate(pool.imap_unordered(run, todo), 1):
            before = done.get(result["id"], {})
            if "peak" in before and "peak" in result:
                result["differs"] = differing(before, result)
            done[result["id"]] = result
            shown = line_of(pair_of(asked[result["id"]], result))
            print(f"{number}/{len(todo)} {shown} ({result['seconds']} s)", flush=True)
            if number % 20 == 0:
                write(done)
            if time.time() > stop:
                pool.terminate()
                break
    write(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so many")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="cells whose id holds all of these")
    parser.add_argument("--report", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    from trace_page import PAGE, headline, page

    wanted, done = cells(), read()
    named = {c["id"] for c in wanted}
    done = {name: c for name, c in done.items() if name in named}
    todo = [c for c in wanted if all(w in c["id"] for w in options.only)]
    todo = [c for c in todo if stale(c, done.get(c["id"], {}))]
    todo.sort(key=lambda c: c["id"] in done)  # what was never traced comes first
    if not options.report and todo:
        work(todo, options, done)
    PAGE.write_text(page(wanted, done), encoding="utf-8")
    print(headline(wanted, done), file=sys.stderr)


if __name__ == "__main__":
    main()
