"""What generating needs, as plain text: 80 columns at most."""

from __future__ import annotations

from textwrap import wrap

from vramplan.memory.inference import InferenceEstimate
from vramplan.units import format_bytes, format_count

WIDTH = 80
BAR = 30
LABELS = {
    "parameter": "weights",
    "kv_cache": "KV cache",
    "logits": "logits",
    "activation": "activations",
    "workspace": "workspace",
    "temporary": "while loading",
    "context": "CUDA context",
    "allocator_slack": "allocator's slack",
}


def render(e: InferenceEstimate) -> str:
    """The answer first, then where the bytes are at the peak, the phases, and what is assumed."""
    lines = [*wrap(_answer(e), WIDTH), ""]
    lines += wrap(
        f"{e.id}: {format_count(e.parameters)} parameters in {e.quantization or e.dtype}, "
        f"{e.batch_size} x {e.context} tokens ({e.prompt} of them the prompt), {e.attention}",
        WIDTH,
    )
    lines += ["", f"At the peak, in {e.peak_phase}:"]
    for category, size in e.breakdown.items():
        lines.append(_row(LABELS[category], size, e.required))
    lines.append(_row("peak allocated", e.peak_allocated))
    for name, size in e.overhead.items():
        lines.append(_row(LABELS[name], size, e.required))
    lines.append(_row("required", e.required))
    lines += ["", f"Peaks: {_phases(e)}"]
    lines += wrap(f"The cache at the end: {format_bytes(e.cache_end, digits=2)}.", WIDTH)
    lines += ["", *wrap(_ASSUMED, WIDTH)]
    for text in (*e.warnings, *e.notes):
        lines += wrap(text, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines) + "\n"


_ASSUMED = (
    "Assumed: generate of transformers with its default cache, greedy, prompts of one length "
    "without padding."
)


def _answer(e: InferenceEstimate) -> str:
    need = format_bytes(e.required)
    if e.available is None:
        return f"Needs {need}."
    spare = e.available - e.required
    on = f"{e.gpu}, which has {format_bytes(e.available)}"
    if spare >= 0:
        return f"Fits: needs {need} on {on}: {format_bytes(spare)} to spare."
    return f"Does not fit: needs {need} on {on}: {format_bytes(-spare)} too much."


def _row(label: str, size: int, whole: int = 0) -> str:
    bar = "#" * round(BAR * size / whole) if whole else ""
    return f"  {label:<20}{format_bytes(size, digits=2):>12}  {bar}".rstrip()


def _phases(e: InferenceEstimate) -> str:
    stages = [("load", e.load_peak), ("prefill", e.prefill.peak)]
    if e.decode is not None:
        stages.append(("decode", e.decode.peak))
    return ", ".join(f"{name} {format_bytes(peak, digits=2)}" for name, peak in stages)
