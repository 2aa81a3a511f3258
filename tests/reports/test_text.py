"""The text of an estimate: what it says, in which order, in how many columns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.hardware.catalogue import parse_gpu
from vramplan.hardware.gpu import GpuProcess
from vramplan.memory.advice import advise, combine
from vramplan.memory.estimate import Estimate, estimate
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.reports.text import Look, show, wrap
from vramplan.units import GIB, format_bytes

LARGE, SMALL = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
COMMAND = "vramplan estimate X \\\n    --lora"


@pytest.fixture(scope="module")
def short() -> Estimate:
    return estimate(LARGE, Recipe(), gpu="24GB")


def whole(needed: Estimate, look: Look = Look(), **more: object) -> str:  # noqa: B008
    return show(
        needed,
        changes=advise(needed),
        combination=combine(needed),
        command=COMMAND,
        look=look,
        **more,  # type: ignore[arg-type]
    )


def test_the_answer_comes_first(short: Estimate) -> None:
    lines = whole(short).splitlines()
    assert lines[0] == f"Does not fit: {format_bytes(short.required - 24 * GIB)} short."
    assert lines[1] == (f"{format_bytes(short.required)} required, 24.0 GiB available: 24 GB card.")


def test_the_answer_where_it_fits() -> None:
    needed = estimate(SMALL, Recipe(), gpu="rtx-4090")
    assert needed.available is not None
    lines = whole(needed).splitlines()
    assert lines[0] == f"Fits: {format_bytes(needed.available - needed.required)} to spare."
    assert lines[1].endswith(f"{format_bytes(needed.available)} available: GeForce RTX 4090.")


def test_the_order_of_its_parts(short: Estimate) -> None:
    text = whole(replace(short, recipe=replace(short.recipe, optimizer="paged_adamw_8bit")))
    marks = (
        "Does not fit",
        "8.03B parameters",
        "  peak ",
        "  + overhead ",
        "  = required ",
        "  available ",
        "At the peak",
        "Phases",
        "Single changes that help",
        "This fits",
        "vramplan estimate X",
        "Assumptions",
    )
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_every_category_has_its_bytes_and_a_bar_the_largest_first(short: Estimate) -> None:
    text = show(short, look=Look(blocks=True))
    part = text[text.index("At the peak, in backward") :].split("\n\n")[0].splitlines()[1:]
    shown = sorted((size for size in short.breakdown.values() if size), reverse=True)
    assert len(part) == len(shown)
    for line, size in zip(part, shown, strict=True):
        assert format_bytes(size) in line
        assert f"{100 * size / short.peak_allocated:.1f} %" in line
    assert part[0].count("█") == int(30 * shown[0] / short.peak_allocated)
    assert "#" not in text


def test_ascii_only_without_block_characters(short: Estimate) -> None:
    text = whole(short)
    assert text.isascii()
    assert "#####" in text


def test_the_phases(short: Estimate) -> None:
    text = show(short)
    text = text[text.index("Phases") :]
    for name, phase in short.timeline.phases().items():
        line = next(ln for ln in text.splitlines() if ln.startswith(f"  {name.split('_')[0]}"))
        assert format_bytes(phase.peak) in line
        assert format_bytes(phase.end) in line
        assert ("<- the peak" in line) == (name == short.peak_phase)


RECIPES = [
    Recipe(),
    Recipe(
        lora=LoRA(target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")),
        quantization="nf4",
        optimizer="paged_ademamix_32bit",
        batch_size=30,
        gradient_accumulation_steps=16,
        seq_len=200_000,
        attention="eager",
        allocator="default",
    ),
    Recipe(dtype="fp16", mixed_precision="no", attention="flash_attention_2"),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("gpu", [None, "8GB", "4xtesla-t4", "h100-80gb"])
@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_wider_than_the_terminal(recipe: Recipe, gpu: str | None, width: int) -> None:
    needed = estimate(SMALL, recipe, gpu=gpu)
    text = whole(needed, Look(width=width), no_gpu="This machine has no NVIDIA driver.")
    assert [line for line in text.splitlines() if len(line) > width] == []
    assert text == "\n".join(line.rstrip() for line in text.splitlines())


def test_a_long_name_is_broken(short: Estimate) -> None:
    text = show(replace(short, id="/home/" + 40 * "very_long/"))
    assert max(map(len, text.splitlines())) <= 80


def test_no_gpu_is_told_and_no_verdict_given() -> None:
    needed = estimate(SMALL, Recipe())
    text = show(needed, no_gpu="This machine has no NVIDIA driver.")
    assert text.startswith(f"{format_bytes(needed.required)} required.\n")
    assert "This machine has no NVIDIA driver. For a verdict, name a GPU: --gpu 24GB" in text
    assert "Fits" not in text
    assert "available" not in text
    advised = whole(needed)
    assert "Single changes that help" in advised
    assert " fits" not in advised


def test_a_card_in_this_machine_shows_what_is_free_and_who_uses_it() -> None:
    card = replace(
        parse_gpu("rtx-4090"),
        free=10 * GIB,
        others=(GpuProcess(pid=77, used=GIB), GpuProcess(pid=78, used=None)),
        indices=(0,),
    )
    text = show(estimate(SMALL, Recipe(), gpu=card))
    assert "10.0 GiB now available: GeForce RTX 4090." in text
    assert "free now, of " in text
    assert "in use by process 77: 1.0 GiB" in text
    assert "in use by process 78: an unknown amount" in text


def test_paged_states_are_shown_beside_the_total() -> None:
    needed = estimate(SMALL, Recipe(optimizer="paged_adamw_8bit"))
    assert needed.managed > GIB
    assert f"{format_bytes(needed.managed)} of optimizer states in managed memory" in show(needed)
    assert "managed" not in show(estimate(SMALL, Recipe()))


def test_warnings_are_shown() -> None:
    needed = estimate(SMALL, Recipe(), gpu="tesla-t4")
    assert needed.warnings
    flat = " ".join(show(needed).split())
    assert all(" ".join(warning.split()) in flat for warning in needed.warnings)


def test_what_alters_training_is_marked(short: Estimate) -> None:
    lines = whole(short).splitlines()
    assert any(line.startswith("  LoRA * ") for line in lines)
    assert any(line.startswith("  checkpointing ") and "*" not in line for line in lines)
    assert "  * changes what is learned" in lines


def test_nothing_that_helps_is_said() -> None:
    text = show(estimate(SMALL, Recipe()), changes=())
    assert "No single change that vramplan knows of lowers it." in text


def test_no_combination_is_said(short: Estimate) -> None:
    text = show(short, changes=advise(short), combination=None)
    assert "No combination of these fits" in text


def test_colour_is_the_callers(short: Estimate) -> None:
    painted = whole(short, Look(paint=lambda text, role: f"<{role}>{text}</>"))
    assert painted.startswith("<bad>Does not fit: ")
    for role in ("heading", "bar"):
        assert f"<{role}>" in painted
    assert (
        whole(estimate(SMALL, Recipe(), gpu="80GB"), Look(paint=lambda t, role: role[0] + t))[:5]
        == "gFits"
    )
    assert "<" not in whole(short).replace("<- the peak", "")


def test_wrap() -> None:
    assert wrap("one two  three", 7) == ["one two", "three"]
    assert wrap("a 123456789 b", 4) == ["a", "1234", "5678", "9 b"]
    assert wrap("", 4) == []
