"""What a run needs of a card, and whether the card has it: estimates of all kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
