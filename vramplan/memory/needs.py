"""What a run needs of a card, and whether the card has it: estimates of all kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vramplan.hardware.gpu import Gpus


class Needs:
    """Of an estimate, what follows from its peak, its overhead and its card. Sizes are bytes."""

    __slots__ = ()

    if TYPE_CHECKING:  # each kind of estimate has its own

        @property
        def gpu(self) -> Gpus | None: ...
        @property
        def peak_allocated(self) -> int: ...
        @property
        def overhead(self) -> dict[str, int]: ...

    @property
    def required(self) -> int:
        """The smallest device memory with which the run ends."""
        return self.peak_allocated + sum(self.overhead.values())

    @property
    def available(self) -> int | None:
        """Memory of the card that processes can have; of a card in this machine, what is free."""
        if self.gpu is None:
            return None
        return self.gpu.gpu.capacity if self.gpu.free is None else self.gpu.free

    @property
    def fits(self) -> bool | None:
        """Whether `required` is available; None where no GPU was given."""
        return None if self.available is None else self.required <= self.available


def document(e: Any) -> dict[str, Any]:
    """What estimates and traces of a training run have in common, as plain data for JSON."""
    return {
        "schema": 1,
        "model": {
            "id": e.id,
            "parameters": e.parameters,
            "trainable_parameters": e.trainable_parameters,
        },
        "recipe": e.recipe.to_dict(),
        "peak_allocated": e.peak_allocated,
        "peak_phase": e.peak_phase,
        "phases": {
            name: {"end": phase.end, "peak": phase.peak}
            for name, phase in e.timeline.phases().items()
        },
        "breakdown": dict(e.breakdown),
        "overhead": e.overhead,
        "required": e.required,
        "managed": e.managed,
        "gpu": None if e.gpu is None else e.gpu.to_dict(),
        "fits": e.fits,
        "warnings": list(e.warnings),
    }
