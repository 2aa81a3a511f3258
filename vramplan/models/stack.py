"""One layer's experts as transformers 5.17 keeps them: two 3-D parameters, and biases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """How many experts, how many of them a token visits, and their sizes."""

    name: str
    count: int
    active: int
    hidden: int
    width: int
    biased: bool = False
    transposed: bool = False
    """in x out, as products read it, not out x in."""
    former_gate_up: tuple[str, ...] = ()
    """Modules of transformers 4 that gate_up_proj holds; peft adapts it where they are targets."""
    former_down: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of the two weights by name."""
        if self.transposed:
            return {
                "gate_up_proj": (self.count, self.hidden, 2 * self.width),
                "down_proj": (self.count, self.width, self.hidden),
            }
        return {
            "gate_up_proj": (self.count, 2 * self.width, self.hidden),
            "down_proj": (self.count, self.hidden, self.width),
        }

    @property
    def outputs(self) -> dict[str, int]:
        """Rows that each weight makes."""
        return {"gate_up_proj": 2 * self.width, "down_proj": self.hidden}

    @property
    def former(self) -> dict[str, tuple[str, ...]]:
        """Former modules of each weight."""
        return {"gate_up_proj": self.former_gate_up, "down_proj": self.former_down}
