"""A run beside its prediction: figures made up so that each can be counted by eye."""

from __future__ import annotations

from typing import Any

from vramplan.reports.archive import render as render_archive
from vramplan.reports.archive import summarise
from vramplan.reports.run import compare, render
from vramplan.units import GIB, MIB

PHASES = {
    "load": {"end": 2 * GIB, "peak": 2 * GIB},
    "prepare": {"end": 2 * GIB, "peak": 2 * GIB},
    "forward": {"end": 5 * GIB, "peak": 6 * GIB},
    "backward": {"end": 4 * GIB, "peak": 8 * GIB},
    "optimizer_step": {"end": 4 * GIB, "peak": 7 * GIB},
}


def measurement(**changes: Any) -> dict[str, Any]:
    """8 GiB predicted at the peak; measured are 8 GiB and 80 MiB, in backward."""
    measured = {name: dict(phase) for name, phase in PHASES.items()}
    measured["backward"]["peak"] += 80 * MIB
    document: dict[str, Any] = {
        "name": "tiny-full",
        "outcome": "ended",
        "model": {"id": "tiny"},
        "recipe": {"lora": None, "deepspeed": None, "quantization": None},
        "environment": {"device": "NVIDIA H200"},
        "prediction": {
            "peak_allocated": 8 * GIB,
            "required": 10 * GIB,
            "fits": True,
            "phases": PHASES,
            "overhead": {"context": 760 * MIB, "nccl": 0, "allocator_slack": 1288 * MIB},
            "recipe": {"deepspeed": None},
            "held": {"parameter": 2 * GIB, "optimizer": GIB, "gradient": GIB},
            "gpu": {"capacity": 24 * GIB, "free": None},
            "time": {"seconds": 2.2},
        },
        "ranks": [
            {
                "rank": 0,
                "peak_allocated": 8 * GIB + 80 * MIB,
                "phases": measured,
                "categories": {"optimizer": GIB, "gradient": GIB},
                "outside_allocator": 758 * MIB,
            }
        ],
        "training": {"step_seconds": 2.0, "tokens_per_second": 1024.0},
        "notes": ["random weights"],
    }
    return document | changes


def test_figures() -> None:
    c = compare(measurement())
    assert c.error is not None
    assert round(c.error, 4) == round(100 * -80 / (8 * 1024 + 80), 4)
    assert c.used == 8 * GIB + 80 * MIB + 758 * MIB
    assert c.held is True
    assert c.largest is not None
    assert (c.largest.name, c.largest.difference) == ("backward, peak", -80 * MIB)
    rest = next(pair for pair in c.categories if pair.name == "rest")
    assert (rest.predicted, rest.measured) == (5 * GIB, 5 * GIB + 80 * MIB)
    assert c.to_dict()["required_held"] is True


def test_text() -> None:
    text = render(compare(measurement()))
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "tiny (tiny-full): predicted -0.97 % at the peak" in flat
    assert "The largest difference is in backward, at its peak: -80.0 MiB." in flat
    assert "Required held: 10.0 GiB predicted; used were 8.1 GiB allocated and 758.0 MiB" in flat
    assert "A step took 2 s: 1,024 tokens/s (predicted 2.2 s, +10 %)." in flat


def test_required_that_did_not_hold() -> None:
    document = measurement()
    document["prediction"]["required"] = 8 * GIB
    assert "Required did not hold" in render(compare(document))
    document["ranks"][0]["outside_allocator"] = None
    assert "whether it held is not known" in " ".join(render(compare(document)).split())


def test_the_rank_that_needed_most_is_compared() -> None:
    document = measurement()
    other = {**document["ranks"][0], "rank": 1, "peak_allocated": 9 * GIB}
    c = compare({**document, "ranks": [*document["ranks"], other]})
    assert (c.rank, c.peak and c.peak.measured) == (1, 9 * GIB)
    assert "of rank 1" in render(c)


def test_under_deepspeed_backward_steps_too() -> None:
    document = measurement()
    document["prediction"]["recipe"] = {"deepspeed": {"stage": 2}}
    document["prediction"]["phases"] = {**PHASES, "optimizer_step": {"end": GIB, "peak": 9 * GIB}}
    c = compare(document)
    names = {pair.name for pair in c.phases}
    assert "optimizer_step, peak" not in names
    assert "prepare, end" not in names  # the engine is made later
    backward = next(pair for pair in c.phases if pair.name == "backward, peak")
    assert backward.predicted == 9 * GIB
    assert c.categories == ()


def test_ddp_makes_its_buckets_after_what_marks_can_see_of_preparing() -> None:
    document = measurement()
    document["prediction"]["recipe"] = {"deepspeed": None, "world_size": 2}
    names = {pair.name for pair in compare(document).phases}
    assert "prepare, end" not in names
    assert "load, end" in names
    assert compare(document).categories


def test_out_of_memory() -> None:
    short = {
        "of": "device",
        "phase": "backward",
        "step": 1,
        "allocated": 20 * GIB,
        "wanted": 500 * MIB,
    }
    document = measurement(outcome="out_of_memory")
    document["ranks"][0] |= {"out_of_memory": short}
    text = " ".join(render(compare(document)).split())
    assert "Out of device memory in backward of step 1, with up to 20.0 GiB allocated" in text
    assert "500.0 MiB more wanted" in text
    assert "10.0 GiB required, which is less than the card's 24.0 GiB: the prediction was" in text
    document["prediction"]["required"] = 30 * GIB
    text = " ".join(render(compare(document)).split())
    assert "more than the card's 24.0 GiB: as predicted" in text


def test_without_figures_or_prediction() -> None:
    bare = measurement(ranks=[{"rank": 0, "peak_allocated": None, "phases": {}}])
    text = " ".join(render(compare(bare)).split())
    assert "Predicted: 8.0 GiB at the peak, 10.0 GiB required. The peak was not measured" in text
    assert "difference" not in text
    nothing = measurement(prediction={})
    assert render(compare(nothing)).startswith("tiny (tiny-full): ended.")


def test_what_was_counted_without_a_gpu_is_compared() -> None:
    counted = {"parameter": 2 * GIB, "optimizer": GIB + MIB, "gradient": GIB}
    rank = {"rank": 0, "peak_allocated": None, "phases": {}, "categories": counted}
    c = compare(measurement(ranks=[rank]))
    assert [(p.name, p.difference) for p in c.categories] == [
        ("parameter", 0),
        ("optimizer", -MIB),
        ("gradient", 0),
    ]
    assert (c.error, c.held, c.phases) == (None, None, ())
    text = render(c)
    assert "The peak was not measured." in text
    assert "-1.0 MiB   -0.098 %" in text
    assert compare(measurement(ranks=[rank], outcome="failed")).categories == ()


def test_archive_is_summed_up_by_card_and_method() -> None:
    """Errors of 0 and -80/8272 of the peak: a mean of half that, and as much below zero."""
    exact = measurement()
    exact["ranks"][0]["peak_allocated"] = 8 * GIB
    lora = measurement(recipe={"lora": {}, "deepspeed": {"stage": 3}, "quantization": None})
    short = measurement(outcome="out_of_memory")
    on_cpu = measurement(ranks=[{"rank": 0, "peak_allocated": None}])
    failed = measurement(outcome="failed")  # it never reached its peak
    summary = summarise([measurement(), exact, lora, short, on_cpu, failed])
    full, adapters = sorted(summary.classes, key=lambda each: each.method, reverse=True)
    assert (full.method, full.runs, adapters.method) == ("full", 2, "LoRA, ZeRO 3")
    half = 100 * 80 / (8 * 1024 + 80) / 2
    assert round(full.mean_absolute, 6) == round(half, 6)
    assert round(full.signed_mean, 6) == round(-half, 6)
    assert round(full.worst, 6) == round(-2 * half, 6)
    assert (full.required_held, full.required_known) == (2, 2)
    assert (summary.compared, summary.unmeasured, summary.failed) == (3, 1, 1)
    assert compare(failed).error is None
    assert (summary.out_of_memory, summary.out_of_memory_predicted_to_fit) == (1, 1)
    text = render_archive(summary, "/somewhere")
    assert max(map(len, text.splitlines())) <= 80
    assert "1 ran out of memory, of which 1 were predicted to fit" in " ".join(text.split())
    assert "No runs yet" in render_archive(summarise([]), "/somewhere")
