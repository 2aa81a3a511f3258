"""Attention's memory by sequence length: draws docs/attention.svg, and prints docs/attention.md's
table, from the estimate and the runs of tests/measured/attention_gpu.json. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from measured import Run, runs

from vramplan.memory.estimate import estimate
from vramplan.recipe.recipe import ATTENTIONS, Attention, Recipe
from vramplan.units import GIB

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "attention.svg"
MODEL = "llama-3.2-1b"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
Key = tuple[int, Attention, bool]


def measured() -> dict[Key, Run]:
    """The runs of the whole model on one sequence, by length, attention and checkpointing."""
    return {
        (run.recipe.seq_len, run.recipe.attention, run.recipe.gradient_checkpointing): run
        for run in runs("attention_gpu")
        if run.case["model"] == MODEL
    }


def predicted(config: dict[str, object], key: Key) -> int:
    length, attention, checkpointing = key
    recipe = Recipe(seq_len=length, attention=attention, gradient_checkpointing=checkpointing)
    return estimate(config, recipe).peak_allocated


def rows(known: dict[Key, Run], config: dict[str, object]) -> Iterator[str]:
    for checkpointing in (False, True):
        for length in LENGTHS:
            cells = []
            for attention in ATTENTIONS:
                key = (length, attention, checkpointing)
                cells.append(f"{predicted(config, key) / GIB:.2f}")
                run = known.get(key)
                cells.append(f"{run.peak_allocated / GIB:.2f}" if run else "not run")
            yield f"| {'yes' if checkpointing else 'no'} | {length} | {' | '.join(cells)} |"


def draw(known: dict[Key, Run], config: dict[str, object]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vramplan"  # the same file each time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    styles = {"eager": ("tab:red", "o"), "sdpa": ("tab:blue", "s"), "flash_attention_2": ("k", "x")}
    for axis, checkpointing in zip(axes, (False, True), strict=True):
        for attention, (color, marker) in styles.items():
            sizes = [predicted(config, (n, attention, checkpointing)) / GIB for n in LENGTHS]
            axis.plot(LENGTHS, sizes, color=color, lw=1, label=f"{attention}, predicted")
            points = [n for n in LENGTHS if (n, attention, checkpointing) in known]
            peaks = [known[n, attention, checkpointing].peak_allocated / GIB for n in points]
            axis.plot(points, peaks, marker, color=color, ms=5, label=f"{attention}, measured")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylim=(8, 200))
        axis.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
        axis.set_yticks((10, 20, 40, 80, 160), ("10", "20", "40", "80", "160"))
        axis.minorticks_off()
        axis.set_title("with checkpointing" if checkpointing else "without checkpointing")
    axes[0].set_ylabel("peak allocated, GiB")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    known = measured()
    config = next(iter(known.values())).config
    head = " | ".join(f"{name} GiB | measured" for name in ATTENTIONS)
    print(f"| checkpointing | tokens | {head} |")
    print("|---|---:" + "|---:" * 2 * len(ATTENTIONS) + "|")
    print("\n".join(rows(known, config)))
    draw(known, config)


if __name__ == "__main__":
    main()
