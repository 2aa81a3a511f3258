"""What a card is, and what several equal ones are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Vendor = Literal["nvidia", "amd", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of card. Rates and bandwidths are decimal, per second, and per card (of a card with
    two dies that the system sees as two devices: per die)."""

    id: str
    """What a user types: "a100-80gb"."""
    name: str
    vendor: Vendor
    arch: str
    """The architecture ("ampere"); of AMD's the gfx name ("gfx942"); "" where it isn't known."""
    memory: int
    """Bytes that the driver reports as the card's total."""
    usable: int | None = None
    """Bytes of it that CUDA has for processes, where that is known. It moves with the driver."""
    memory_is_reported: bool = True
    """False: no driver's figure is known, `memory` is the size as sold."""
    bandwidth: int | None = None
    """Bytes a second, of the memory."""
    fp16: int | None = None
    """Dense matrix operations a second with fp32 accumulation."""
    bf16: int | None = None
    """The same of bf16; None where the hardware has no bf16, or the rate isn't known."""
    fp32: int | None = None
    """Operations a second of the vector units (no TF32)."""
    compute_capability: str | None = None
    """As CUDA writes it ("8.0"); None of AMD's."""
    supports_bf16: bool = True
    supports_flash_attention_2: bool = True
    link: str = ""
    """How two of them talk: "NVLink 4", "PCIe 4.0 x16"."""
    link_bandwidth: int | None = None
    """Bytes a second over `link`, in one direction."""
    year: int | None = None
    source: str = ""

    @property
    def capacity(self) -> int:
        """Bytes that processes can have: `usable` where it is known, else `memory`."""
        return self.memory if self.usable is None else self.usable


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProcess:
    """A process on a card. `used` is in bytes, None where the driver does not tell."""

    pid: int
    used: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """`count` equal cards."""

    gpu: Gpu
    count: int = 1
    nominal: bool = False
    """A bare size ("24GB"): the size as sold is all that is known of the card."""
    free: int | None = None
    """Bytes free now on the fullest of them; None of cards that are not in this machine."""
    others: tuple[GpuProcess, ...] = ()
    """Other processes that hold memory on them, as far as the driver tells."""
    indices: tuple[int, ...] = ()
    """The driver's numbers of the cards in this machine; empty of cards that are not here."""

    def __str__(self) -> str:
        return self.gpu.name if self.count == 1 else f"{self.count} x {self.gpu.name}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the card's fields, then the rest."""
        mine = {key: value for key, value in asdict(self).items() if key != "gpu"}
        mine |= {"others": list(mine["others"]), "indices": list(mine["indices"])}
        return {**asdict(self.gpu), "capacity": self.gpu.capacity, **mine}
