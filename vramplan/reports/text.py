"""An Estimate as text for a terminal: plain strings, at most `width` columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vramplan.reports.assumptions import assumptions
from vramplan.units import format_bytes, format_count

if TYPE_CHECKING:
    from vramplan.memory.advice import Change
    from vramplan.memory.estimate import Estimate
    from vramplan.recipe.deepspeed import DeepSpeed
    from vramplan.recipe.recipe import LoRA, Recipe

Paint = Callable[[str, str], str]
"""(text, role) to the text in that role's colour; roles: good, bad, heading, bar."""

BLOCKS = " ▏▎▍▌▋▊▉█"
"""By eighths."""
_BAR = 30
_ROW = 52
"""Columns of a change's figures; its flags follow: 28 hold "--optimizer paged_adamw_8bit"."""
_PHASES = {
    "load": "load weights",
    "prepare": "prepare",
    "forward": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer step",
}
_CATEGORIES = {
    "parameter": "parameters",
    "gradient": "gradients",
    "optimizer": "optimizer states",
    "activation": "activations",
    "logits": "logits and loss",
    "temporary": "temporaries",
    "buffer": "communication",
    "workspace": "workspaces",
}


def plain(text: str, role: str) -> str:
    """No colour."""
    return text


class Look(NamedTuple):
    """What the terminal can show."""

    width: int = 80
    blocks: bool = False
    """Whether bars may use block characters; without, they are ASCII."""
    paint: Paint = plain


def show(
    needed: Estimate,
    *,
    no_gpu: str = "",
    changes: Sequence[Change] | None = None,
    combination: Change | None = None,
    command: str = "",
    look: Look = Look(),  # noqa: B008
) -> str:
    """The whole report. `no_gpu`: why no GPU is known; `changes`: None leaves that part out;
    `command`: the command line, lines and all, that estimates `combination`."""
    parts = [
        _answer(needed, no_gpu, look),
        _subject(needed, look),
        _totals(needed, look),
        _bars(needed, look),
        _phases(needed, look),
        _items("Warnings", needed.warnings, look),
    ]
    if changes is not None:
        parts.append(_advice(needed, changes, combination, command, look))
    parts.append(_items("Assumptions", assumptions(needed), look))
    return "\n\n".join("\n".join(part) for lines in parts if (part := list(lines)))


# --- the answer -----------------------------------------------------------------------------


def _answer(needed: Estimate, no_gpu: str, look: Look) -> Iterator[str]:
    required = f"{format_bytes(needed.required)} required"
    if needed.available is None:
        yield look.paint(f"{required}.", "heading")
        if no_gpu:
            hint = "For a verdict, name a GPU: --gpu 24GB or --gpu rtx-4090."
            yield from _wrap(f"{no_gpu} {hint}", look)
        return
    margin = format_bytes(abs(needed.available - needed.required))
    verdict = f"Fits: {margin} to spare." if needed.fits else f"Does not fit: {margin} short."
    yield look.paint(verdict, _verdict(bool(needed.fits)))
    free = "" if needed.gpu is None or needed.gpu.free is None else "now "
    available = f"{format_bytes(needed.available)} {free}available"
    yield from _wrap(f"{required}, {available}: {_card(needed)}.", look)


def _card(needed: Estimate) -> str:
    assert needed.gpu is not None
    count, name = needed.gpu.count, needed.gpu.gpu.name
    each = "each" if needed.recipe.world_size > 1 else "one"
    return f"{each} of {count} x {name}" if count > 1 else name


def _subject(needed: Estimate, look: Look) -> Iterator[str]:
    recipe = needed.recipe
    yield from _wrap(
        f"{needed.id}: {format_count(needed.parameters)} parameters, "
        f"{format_count(needed.trainable_parameters)} trained",
        look,
    )
    yield from _wrap(f"{_method(recipe)}; {'; '.join(_settings(recipe))}", look)


def _method(recipe: Recipe) -> str:
    if recipe.lora is None:
        return "full fine-tuning"
    four_bit = recipe.quantization in ("nf4", "fp4")
    return f"{'QLoRA' if four_bit else 'LoRA'} ({_lora(recipe.lora)})"


def _lora(lora: LoRA) -> str:
    targets = lora.target_modules
    shown = targets if isinstance(targets, str) else ", ".join(targets)
    return f"rank {lora.rank}, {shown}, dropout {lora.dropout:g}, {lora.dtype}"


def _settings(recipe: Recipe) -> Iterator[str]:
    if recipe.quantization is None:
        yield f"{recipe.dtype} weights"
    else:
        double = ", double quant" if recipe.double_quant and recipe.quantization != "int8" else ""
        yield f"{recipe.quantization} weights{double} (the rest loaded in {recipe.dtype})"
    mixed = recipe.mixed_precision
    yield "no mixed precision" if mixed == "no" else f"{mixed} mixed precision"
    yield recipe.optimizer
    yield f"{recipe.attention} attention"
    if recipe.deepspeed is not None:
        yield _zero(recipe.deepspeed)
    yield f"gradient checkpointing {'on' if recipe.gradient_checkpointing else 'off'}"
    each = " a rank" if recipe.world_size > 1 else ""
    batch = f"batch {recipe.batch_size} x {recipe.seq_len} tokens{each}"
    steps = recipe.gradient_accumulation_steps
    yield batch if steps == 1 else f"{batch}, accumulated {steps} times"


def _zero(zero: DeepSpeed) -> str:
    said = f"ZeRO stage {zero.stage}"
    if zero.offload_optimizer:
        said += f", optimizer on {zero.offload_optimizer}"
    return said + (f", weights on {zero.offload_param}" if zero.offload_param else "")


def _host(needed: Estimate, look: Look) -> Iterator[str]:
    """What each rank keeps outside its GPU."""
    host, ranks = needed.host, needed.recipe.world_size
    if host is None:
        return
    if ranks > 1:
        yield from _wrap(
            f"These are the figures of each of {ranks} ranks, one a GPU.", look, indent=2
        )
    places = (
        ("pinned", host.pinned),
        ("pageable", host.pageable),
        ("on NVMe", host.nvme),
    )
    kept = [f"{format_bytes(size)} {where}" for where, size in places if size]
    if kept:
        total = ranks * (host.pinned + host.pageable)
        node = f"; all {ranks} ranks: {format_bytes(total)} of memory" if ranks > 1 else ""
        yield from _wrap(f"Host, a rank: {', '.join(kept)}{node}.", look, indent=2)
    if host.loading:
        every = f", of all {ranks} {format_bytes(ranks * host.loading)}" if ranks > 1 else ""
        yield from _wrap(
            f"While loading, each rank has the weights in host memory: "
            f"{format_bytes(host.loading)}{every}; a node's ranks share what is mapped from "
            "safetensors and not converted.",
            look,
            indent=2,
        )


def _totals(needed: Estimate, look: Look) -> Iterator[str]:
    overhead = needed.overhead
    phase = _PHASES[needed.peak_phase]
    rows = [
        ("peak", needed.peak_allocated, f"allocated by torch, in {phase} (max_memory_allocated)"),
        ("+ overhead", sum(overhead.values()), _overhead(overhead)),
        ("= required", needed.required, "the smallest device memory with which the run ends"),
    ]
    if needed.available is not None and needed.gpu is not None:
        of = f"free now, of {format_bytes(needed.gpu.gpu.capacity)}"
        what = _card(needed) if needed.gpu.free is None else of
        rows.append(("available", needed.available, what))
    for name, size, what in rows:
        first, *more = _wrap(what, look, columns=look.width - 25) or [""]
        yield f"  {name:<11}{format_bytes(size):>10}  {first}".rstrip()
        yield from (" " * 25 + line for line in more)
    if needed.managed:
        yield from _wrap(
            f"Besides, {format_bytes(needed.managed)} of optimizer states in managed memory "
            "(paged): outside torch's counters, on the card while there is room and else in host "
            "memory, so have that much of it free. Paging costs time.",
            look,
            indent=2,
        )
    yield from _host(needed, look)
    if needed.gpu is not None:
        for process in needed.gpu.others:
            used = "an unknown amount" if process.used is None else format_bytes(process.used)
            yield f"  in use by process {process.pid}: {used}"


def _overhead(overhead: dict[str, int]) -> str:
    names = {"context": "CUDA context", "nccl": "NCCL", "allocator_slack": "allocator's slack"}
    return ", ".join(f"{names[k]} {format_bytes(v)}" for k, v in overhead.items() if v)


# --- where the bytes are --------------------------------------------------------------------


def _bars(needed: Estimate, look: Look) -> Iterator[str]:
    peak = needed.peak_allocated
    yield look.paint(f"At the peak, in {_PHASES[needed.peak_phase]}", "heading")
    order = sorted(needed.breakdown.items(), key=lambda item: -item[1])
    for category, size in order:
        if size:
            bar = look.paint(_bar(size, peak, look), "bar")
            name = _CATEGORIES.get(category, category)
            yield f"  {name:<17}{format_bytes(size):>10}{100 * size / peak:6.1f} %  {bar}".rstrip()


def _bar(part: int, whole: int, look: Look) -> str:
    cells = _BAR if look.width >= 70 else max(5, look.width - 42)
    if not look.blocks:
        return "#" * round(cells * part / whole)
    eighths = round(8 * cells * part / whole)
    return (BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8]).rstrip()


def _phases(needed: Estimate, look: Look) -> Iterator[str]:
    yield look.paint(f"{'Phases':<19}{'peak':>10}{'at its end':>13}", "heading")
    for name, phase in needed.timeline.phases().items():
        mark = "  <- the peak" if name == needed.peak_phase else ""
        peak, end = format_bytes(phase.peak), format_bytes(phase.end)
        yield f"  {_PHASES.get(name, name):<17}{peak:>10}{end:>13}{mark}"


# --- what would help ------------------------------------------------------------------------


def _advice(
    needed: Estimate,
    changes: Sequence[Change],
    combination: Change | None,
    command: str,
    look: Look,
) -> Iterator[str]:
    if not changes:
        yield look.paint("What would help", "heading")
        yield from _wrap("No single change that vramplan knows of lowers it.", look, indent=2)
    else:
        yield from _changes(needed, changes, look)
    if combination is not None:
        yield ""
        yield from _combination(combination, command, look)
    elif needed.fits is False:
        yield ""
        yield from _wrap(
            "No combination of these fits: it takes a larger card or a smaller model.", look
        )


def _changes(needed: Estimate, changes: Sequence[Change], look: Look) -> Iterator[str]:
    fits = "" if needed.fits is None else " fits"
    yield look.paint(
        f"{'Single changes that help':<25}{'required':>10}{'saves':>10}{fits}", "heading"
    )
    for change in changes:
        marks = ("*" if change.alters_training else "") + ("+" if change.managed else "")
        name = f"{change.name} {marks}"
        row = f"  {name:<23}{format_bytes(change.required):>10}{format_bytes(change.saving):>10}"
        if change.fits is not None:
            row += look.paint(f"{'yes' if change.fits else 'no':>5}", _verdict(change.fits))
        row = f"{row}{'':7}" if change.fits is None else f"{row}  "
        pairs = _pairs(change.flags)
        if all(len(pair) <= look.width - _ROW for pair in pairs):
            first, *more = _filled(pairs, look.width - _ROW)
            yield row + first
            yield from (" " * _ROW + line for line in more)
        else:
            yield row.rstrip()
            yield from (f"      {line}" for line in _filled(pairs, look.width - 6))
    if any(change.alters_training for change in changes):
        yield "  * changes what is learned"
    if managed := max((change.managed for change in changes), default=0):
        yield f"  + pages up to {format_bytes(managed)} of states to host memory"


def _filled(pieces: Iterable[str], columns: int) -> list[str]:
    """Lines of as many pieces as have room."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + 1 + len(piece) <= columns:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def _pairs(flags: Iterable[str]) -> list[str]:
    """Options with their values."""
    pairs: list[str] = []
    for flag in flags:
        if flag.startswith("--") or not pairs:
            pairs.append(flag)
        else:
            pairs[-1] += f" {flag}"
    return pairs


def _combination(combination: Change, command: str, look: Look) -> Iterator[str]:
    altered = "; it changes what is learned" if combination.alters_training else ""
    yield from _wrap(
        f"This fits, with {format_bytes(combination.required)} required: "
        f"{combination.name}{altered}.",
        look,
    )
    yield from (f"  {line}" for line in command.splitlines())


# --- lines ----------------------------------------------------------------------------------


def _items(title: str, sentences: Sequence[str], look: Look) -> Iterator[str]:
    if sentences:
        yield look.paint(title, "heading")
    for sentence in sentences:
        first, *more = wrap(sentence, look.width - 4)
        yield f"  - {first}"
        yield from (f"    {line}" for line in more)


def _verdict(fits: bool) -> str:
    return "good" if fits else "bad"


def _wrap(text: str, look: Look, indent: int = 0, columns: int | None = None) -> list[str]:
    width = (columns or look.width) - indent
    return [" " * indent + line for line in wrap(text, width)]


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken at blanks, and where a word has no room by itself.

    textwrap does this too; to import it takes longer than to print a report.
    """
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines += [word[at : at + width] for at in range(0, len(word), width)]
    return lines
