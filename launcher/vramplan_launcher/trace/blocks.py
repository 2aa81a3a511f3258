"""The caching allocator's blocks, as torch's default settings cut them.

`torch.cuda.memory_allocated` counts blocks, not requests. With `expandable_segments:True` a block
is its request rounded to 512 bytes; with the default settings a block of the large pool is left
whole where at most 1 MiB of it would remain, and that remainder is counted with it.
Source: c10/cuda/CUDACachingAllocator.cpp (`get_pool`, `get_allocation_size`, `should_split`,
`free_block`), torch 2.13, one stream, no limit on memory.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

SMALL = 2**20
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20
MIN_LARGE = 10 * 2**20
ROUND_LARGE = 2 * 2**20
BLOCK = 512


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment; neighbours by `left` and `right`."""

    size: int
    address: int
    pool: int
    left: Block | None = None
    right: Block | None = None
    used: bool = False


class Blocks:
    """Hands out blocks; `take` returns one whose `size` is what torch counts as allocated."""

    def __init__(self) -> None:
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._at: dict[int, Block] = {}
        self._next = 1 << 40
        self.reserved = 0

    def take(self, size: int) -> Block:
        """A block for a request of `size` bytes, already rounded to 512."""
        size = max(size, BLOCK)
        pool = 0 if size <= SMALL else 1
        free = self._free[pool]
        where = bisect.bisect_left(free, (size, 0))
        block = self._at[free.pop(where)[1]] if where < len(free) else self._segment(size, pool)
        rest = block.size - size
        if rest >= BLOCK if pool == 0 else rest > SMALL:
            tail = Block(rest, block.address + size, pool, block, block.right)
            if block.right is not None:
                block.right.left = tail
            block.size, block.right = size, tail
            self._at[tail.address] = tail
            bisect.insort(free, (rest, tail.address))
        block.used = True
        return block

    def give_back(self, block: Block) -> None:
        """Frees a block and joins it with free neighbours."""
        free = self._free[block.pool]
        block.used = False
        left, right = block.left, block.right
        if left is not None and not left.used:
            free.remove((left.size, left.address))
            del self._at[block.address]
            left.size += block.size
            left.right = right
            if right is not None:
                right.left = left
            block = left
        if right is not None and not right.used:
            free.remove((right.size, right.address))
            del self._at[right.address]
            block.size += right.size
            block.right = right.right
            if right.right is not None:
                right.right.left = block
        bisect.insort(free, (block.size, block.address))

    def empty_cache(self) -> None:
        """Returns segments that are wholly free to the device."""
        for free in self._free:
            for entry in list(free):
                block = self._at[entry[1]]
                if block.left is None and block.right is None:
                    free.remove(entry)
                    del self._at[block.address]
                    self.reserved -= block.size

    def _segment(self, size: int, pool: int) -> Block:
        if pool == 0:
            length = SMALL_SEGMENT
        elif size < MIN_LARGE:
            length = LARGE_SEGMENT
        else:
            length = -(-size // ROUND_LARGE) * ROUND_LARGE
        block = Block(length, self._next, pool)
        self._next += length
        self._at[block.address] = block
        self.reserved += length
        return block
