"""What `model.generate` of transformers 5.17 takes: weights, KV cache, logits, activations.

The plain call is modelled: `AutoModelForCausalLM.from_pretrained(dtype=…, device_map={"": 0})`,
then `generate` of a batch of prompts of one length (no padding), greedy, with the default
DynamicCache. Beams, assistants, static caches and compiled decoding are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vramplan.errors import InvalidValue
from vramplan.hardware.catalogue import Gpu, Gpus, warnings_for
from vramplan.memory import allocator
from vramplan.memory.estimate import Model, cards, resolve
from vramplan.memory.generation import (
    BEFORE,
    CACHE,
    Serving,
    cache_bytes,
    decoding_program,
    prefill_program,
    slides,
)
from vramplan.memory.legality import check_positions
from vramplan.memory.needs import Needs
from vramplan.memory.program import Program
from vramplan.memory.states import layout
from vramplan.models.architecture import Architecture, Dropouts
from vramplan.recipe.recipe import Recipe

ALLOCATOR = "expandable_segments"
TOKEN = 8  # int64
THREADS = 1  # no autograd thread: one cuBLAS handle


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of generating: its most, and what that is made of. Bytes."""

    peak: int
    kv_cache: int
    logits: int
    activation: int


@dataclass(frozen=True, kw_only=True)
class InferenceEstimate(Needs):
    """What generating needs. Sizes are bytes on one GPU, parts those at the peak."""

    id: str
    architecture: Architecture
    dtype: str
    quantization: str | None
    attention: str
    batch_size: int
    context: int
    prompt: int
    gpu: Gpus | None
    weights: int
    workspace: int
    load_peak: int
    prefill: Stage
    decode: Stage | None
    """The highest later step; None where the prompt leaves room for one token only."""
    cache_end: int
    """Keys and values when the last token has been generated."""
    parameters: int
    notes: tuple[str, ...] = ()

    @property
    def _stage(self) -> Stage:
        stages = [self.prefill] if self.decode is None else [self.prefill, self.decode]
        return max(stages, key=lambda stage: stage.peak)

    @property
    def peak_allocated(self) -> int:
        """What torch.cuda.max_memory_allocated will say."""
        return max(self.load_peak, self._stage.peak)

    @property
    def peak_phase(self) -> str:
        """load, prefill or decode."""
        if self.load_peak > self._stage.peak:
            return "load"
        return "prefill" if self._stage is self.prefill else "decode"

    @property
    def kv_cache(self) -> int:
        """Keys and values at the peak of generating, the copies that an update makes included."""
        return self._stage.kv_cache

    @property
    def logits(self) -> int:
        return self._stage.logits

    @property
    def activation(self) -> int:
        """Activations and inputs."""
        return self._stage.activation

    @cached_property
    def overhead(self) -> dict[str, int]:
        """What the device holds beyond `peak_allocated`."""
        return {
            "context": allocator.context(self.quantization),
            "allocator_slack": allocator.slack(self.peak_allocated, ALLOCATOR),
        }

    @cached_property
    def breakdown(self) -> dict[str, int]:
        """Bytes by category at the peak; they add up to `peak_allocated`."""
        if self.peak_phase == "load":
            return {"parameter": self.weights, "temporary": self.load_peak - self.weights}
        return {
            "parameter": self.weights,
            "kv_cache": self.kv_cache,
            "logits": self.logits,
            "activation": self.activation,
            "workspace": self.workspace,
        }

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What may surprise, each with what to do."""
        out, arch = [], self.architecture
        if arch.max_positions and self.context > arch.max_positions:
            out.append(
                f"context {self.context} is beyond the {arch.max_positions} positions that the "
                "model was trained with: memory is as shown, quality needs position scaling"
            )
        window = arch.sliding_window
        if window and self.prompt > window and any(slides(arch, i) for i in range(arch.layers)):
            out.append(
                f"the prompt is longer than the sliding window of {window}: its whole cache stays "
                "allocated until the first decoding step"
            )
        if arch.experts and self.decode and self.decode.peak > self.prefill.peak:
            out.append(
                f"a later token copies the weights of the {arch.experts.active} experts that it "
                "visits, a layer at a time and for every sequence (transformers' batched_mm): "
                'from_pretrained(..., experts_implementation="eager") copies none and is slower'
            )
        if self.gpu is not None:
            out += warnings_for(
                self.gpu.gpu, uses_bf16=self.dtype == "bf16", attention=self.attention
            )
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        phases = {"load": self.load_peak, "prefill": self.prefill.peak}
        if self.decode is not None:
            phases["decode"] = self.decode.peak
        return {
            "schema": 1,
            "mode": "inference",
            "model": {"id": self.id, "parameters": self.parameters},
            "dtype": self.dtype,
            "quantization": self.quantization,
            "attention": self.attention,
            "batch_size": self.batch_size,
            "context": self.context,
            "prompt": self.prompt,
            "peak_allocated": self.peak_allocated,
            "peak_phase": self.peak_phase,
            "phases": {name: {"peak": peak} for name, peak in phases.items()},
            "breakdown": self.breakdown,
            "kv_cache_end": self.cache_end,
            "overhead": self.overhead,
            "required": self.required,
            "gpu": None if self.gpu is None else self.gpu.to_dict(),
            "fits": self.fits,
            "warnings": list(self.warnings),
        }


def estimate_inference(
    model: Model,
    *,
    dtype: str = "bf16",
    quantization: str | None = None,
    double_quant: bool = True,
    attention: str = "sdpa",
    batch_size: int = 1,
    context: int = 2048,
    prompt: int | None = None,
    gpu: str | Gpu | Gpus | None = None,
) -> InferenceEstimate:
    """Estimate the GPU memory of generating with `model`.

    `context`: tokens of the prompt and of the answer together. `prompt`: tokens of the prompt;
    None is whatever needs the most: all but one of the context for the prompt's forward, one for
    the later steps. The last token is never fed back, so the cache holds at most context - 1.

    Raises UserError for what is wrong with the input.
    """
    _check(dtype, quantization, double_quant, attention, batch_size, context)
    answered = 1 if prompt is None else prompt
    prompt = max(1, context - 1) if prompt is None else prompt
    if type(prompt) is not int or not 1 <= prompt < max(context, 2):
        raise InvalidValue("prompt", prompt, f"an integer from 1 to {max(1, context - 1)}")
    name, arch, notes = resolve(model)
    check_positions(arch, context)
    card = cards(gpu)
    policy = Serving(
        dtype=dtype,
        autocast=None,
        quantization=quantization,
        double_quant=double_quant,
        compute_dtype=dtype,
        attention=attention,
        single_sequence=batch_size == 1,
    )
    weights = layout(arch, policy, ALLOCATOR)
    capability = card.gpu.compute_capability if card is not None and not card.nominal else None
    workspace = allocator.workspaces(capability) * THREADS // allocator.WORKSPACES
    epilogues = prefill_program(_without_dropout(arch), policy).epilogues
    workspace += epilogues * allocator.WORKSPACE_LT
    base = weights.loaded + workspace
    prefill = _prefill(arch, policy, batch_size, prompt, base)
    decode = _decode(arch, policy, batch_size, context, answered, base)
    return InferenceEstimate(
        id=name,
        architecture=arch,
        dtype=dtype,
        quantization=quantization,
        attention=attention,
        batch_size=batch_size,
        context=context,
        prompt=prompt,
        gpu=card,
        weights=weights.loaded,
        workspace=workspace,
        load_peak=weights.load_peak,
        prefill=prefill,
        decode=decode,
        cache_end=cache_bytes(
            arch, dtype, batch_size, max(prompt, context - 1), decoded=context - 1 > prompt
        ),
        parameters=weights.parameters,
        notes=notes,
    )


def _check(
    dtype: str, quantization: str | None, double_quant: bool, attention: str, batch: int, seq: int
) -> None:
    """As a recipe checks them; adapters stand in for what inference does not train."""
    Recipe(
        dtype=dtype,  # type: ignore[arg-type]  # checked there
        mixed_precision="no",
        quantization=quantization,  # type: ignore[arg-type]
        double_quant=double_quant,
        attention=attention,  # type: ignore[arg-type]
        batch_size=batch,
        seq_len=seq,
        lora=True if quantization else None,  # type: ignore[arg-type]
    )


def _prefill(arch: Architecture, policy: Serving, batch: int, prompt: int, base: int) -> Stage:
    """The prompt's forward."""
    window = arch.sliding_window
    beyond = window is not None and prompt >= window  # _ignore_causal_mask_sdpa
    program = prefill_program(_without_dropout(arch), _with(policy, beyond))
    return _stage(program, batch, prompt, base, _inputs(arch, batch, prompt, None))


def _decode(
    arch: Architecture, policy: Serving, batch: int, context: int, prompt: int, base: int
) -> Stage | None:
    """The highest of the later steps.

    The longest cache is the last step's. But where layers slide, the first step still finds the
    whole prompt in them, the later ones no more than the window.
    """
    quiet, window = _without_dropout(arch), arch.sliding_window
    first, last = prompt + 1, context - 1  # tokens in the cache after the step
    stages = []
    for tokens in sorted({first, last} if window is not None and prompt >= window else {last}):
        held = None
        if window is not None and tokens >= window:
            held = prompt if tokens == first else min(tokens - 1, window)
        step = decoding_program(quiet, _with(policy, held is not None), held)
        stages.append(_stage(step, batch, tokens, base, _inputs(arch, batch, prompt, tokens)))
    return max(stages, key=lambda stage: stage.peak) if first <= last else None


def _inputs(arch: Architecture, batch: int, prompt: int, tokens: int | None) -> int:
    """Bytes of input_ids, attention_mask and position_ids, int64 each.

    The prompt's forward has a clone of input_ids besides. In a later step `_sample` has all three
    with the new tokens, while `generate` still holds the prompt's. BLOOM takes no positions.
    """
    count = 2 if arch.family == "bloom" else 3
    asked = TOKEN * batch * prompt
    before = -(-asked // allocator.BLOCK) * allocator.BLOCK
    if tokens is None:
        return (count + 1) * before
    asked = TOKEN * batch * tokens
    return count * (before + -(-asked // allocator.BLOCK) * allocator.BLOCK)


def _stage(program: Program, batch: int, seq: int, base: int, inputs: int) -> Stage:
    points = program.walk(batch, seq)
    index = max(range(len(points)), key=lambda i: points[i].peak)
    live = program.live_at(points, index, batch, seq)
    peak = points[index].peak + inputs
    kv_cache = live.get(CACHE, 0) + live.get(BEFORE, 0)
    logits = live.get("logits", 0)
    return Stage(base + peak, kv_cache, logits, peak - kv_cache - logits)


def _without_dropout(arch: Architecture) -> Architecture:
    """model.eval()"""
    from dataclasses import replace

    return replace(arch, dropouts=Dropouts())


def _with(policy: Serving, beyond_window: bool) -> Serving:
    from dataclasses import replace

    return replace(policy, beyond_window=beyond_window)
