"""Plans as files: plan.json, written once, and read on any machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import UserError
from vramplan.hardware.gpu import Gpu, GpuProcess, Gpus
from vramplan.memory.advice import recipe_flags
from vramplan.planner.candidates import Candidate
from vramplan.planner.goal import Goal
from vramplan.planner.rank import dominator, front

if TYPE_CHECKING:
    from vramplan.planner.plan import Plan

SCHEMA = 1


def document_of(plan: Plan) -> dict[str, Any]:
    """Plain data. The candidates that matter are listed; of the others, how many there are."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"id": plan.id, "source": _source(plan)},
        "recipe": None if plan.recipe is None else plan.recipe.to_dict(),
        "gpu": plan.gpus.to_dict(),
        "goal": plan.goal.to_dict(),
        "method": None if plan.pick is None else plan.pick.method,
        "prediction": None,
        "time": None,
        "cost": None,
        "pick": None if plan.pick is None else plan.pick.to_dict(),
        "runner_up": None if plan.runner_up is None else plan.runner_up.to_dict(),
        "best_of_methods": {m: c.to_dict() for m, c in plan.best.items()},
        "front": [c.to_dict() for c in plan.front],
        "fallbacks": [c.to_dict() for c in plan.fallbacks],
        "nearest_misses": {m: c.to_dict() for m, c in plan.misses.items()},
        "host_memory": plan.host_memory,
        "considered": {"evaluated": plan.evaluated, **plan.counts},
        "notes": list(plan.notes),
    }
    if plan.pick is None:
        from vramplan.planner.explain import smallest_card

        found = smallest_card(plan)
        document["smallest_card"] = None if found is None else {"gpu": found[0].id}
    else:
        needed = plan.estimate
        assert needed is not None
        step = plan.step_of(plan.pick)
        document["model"]["parameters"] = needed.parameters
        document["model"]["trainable_parameters"] = needed.trainable_parameters
        document["prediction"] = needed.to_dict()
        document["time"] = {
            "seconds": step.seconds,
            "tokens": step.tokens,
            "tokens_per_second": step.tokens_per_second,
            "parts": dict(step.parts),
            "notes": list(step.notes),
        }
        document["cost"] = {"tokens": plan.goal.tokens, **asdict(plan.cost_of(plan.pick))}
    return document


def table_of(plan: Plan) -> list[dict[str, Any]]:
    """Rows for JSON: `number` is a candidate's place, `beaten_by` another's."""
    place = {id(c): number for number, c in enumerate(plan.candidates)}
    fronts = {
        method: front((c for c in plan.candidates if c.method == method), plan.goal)
        for method in plan.best
    }
    rows = []
    for number, c in enumerate(plan.candidates):
        beater = dominator(c, fronts[c.method], plan.goal) if c.fits else None
        row: dict[str, Any] = {
            "number": number,
            "method": c.method,
            "verdict": c.verdict,
            "flags": list(recipe_flags(c.recipe)),
        }
        if c.why:
            row["why"] = c.why
        if c.required is not None:
            row |= {"required": c.required, "too_much": c.too_much, "at_least": c.at_least}
        if c.fits:
            row |= {"seconds": c.seconds, "beaten_by": place.get(id(beater))}
        rows.append(row)
    return rows


def _source(plan: Plan) -> Any:
    """What `estimate` takes to find the model again; None where it was given as figures."""
    if isinstance(plan.source, (str, Mapping)):
        return plan.source
    return os.fspath(plan.source) if isinstance(plan.source, os.PathLike) else None


def plan_of(document: Mapping[str, Any]) -> Plan:
    """The reverse: the candidates that the document lists are the plan's.

    Raises UserError for a document that is none, or whose model can't be found here.
    """
    from vramplan.memory.estimate import resolve
    from vramplan.planner.plan import Plan

    try:
        if document["schema"] != SCHEMA:
            raise UserError(f"plan of schema {document['schema']}: this version reads {SCHEMA}")
        source = document["model"]["source"]
        listed = [
            *([document["pick"]] if document["pick"] else []),
            *([document["runner_up"]] if document["runner_up"] else []),
            *document["best_of_methods"].values(),
            *document["front"],
            *document["fallbacks"],
            *document["nearest_misses"].values(),
        ]
        candidates = list(dict.fromkeys(Candidate.from_dict(values) for values in listed))
        gpus, goal = _gpus_of(document["gpu"]), Goal.from_dict(document["goal"])
        misses = [Candidate.from_dict(values) for values in document["nearest_misses"].values()]
        name, notes = document["model"]["id"], tuple(document["notes"])
        counts = dict(document["considered"])
        evaluated = counts.pop("evaluated")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"plan is malformed: {type(error).__name__} at {error}") from error
    if source is None:
        raise UserError(f"plan of {name}: its model was given as figures, which no file holds")
    return Plan(
        id=name,
        source=source,
        architecture=resolve(source)[1],
        gpus=gpus,
        goal=goal,
        candidates=candidates,
        pick=candidates[0] if document["pick"] else None,
        evaluated=evaluated,
        notes=notes,
        counts=counts,
        host_memory=document["host_memory"],
        _misses=tuple(misses),
    )


def _gpus_of(values: Mapping[str, Any]) -> Gpus:
    of_gpu = {f.name for f in fields(Gpu)}
    of_all = {f.name for f in fields(Gpus)} - {"gpu", "others", "indices"}
    return Gpus(
        gpu=Gpu(**{k: v for k, v in values.items() if k in of_gpu}),
        others=tuple(GpuProcess(**process) for process in values["others"]),
        indices=tuple(values["indices"]),
        **{k: v for k, v in values.items() if k in of_all},
    )


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes `plan` as JSON. Raises UserError if the file exists or can't be written."""
    text = json.dumps(document_of(plan), indent=2) + "\n"
    try:
        with Path(path).open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise UserError(f"{str(path)!r} exists already, and is not overwritten") from error
    except OSError as error:
        raise UserError(f"can't write plan {str(path)!r}: {error.strerror}") from error


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a plan.json. Raises UserError."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"can't read plan {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"plan {str(path)!r} is malformed: {error}") from error
    if not isinstance(document, Mapping):
        raise UserError(f"plan {str(path)!r} holds no table")
    return plan_of(document)
