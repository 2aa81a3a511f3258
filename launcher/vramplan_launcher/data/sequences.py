"""Tokens to sequences of one length: packed, padded or random; and the batch they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from vramplan_launcher.data.encode import IGNORED, KEPT


class Packer:
    """A batched function for `Dataset.map`: rows one after another, cut every `length` tokens.

    What is left at the end is no full sequence, and is dropped. Positions run on through a
    sequence, and attention reaches from a row into those before it in the same sequence, as in
    pre-training: that is the plain causal run that is estimated, without a mask.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.ids: list[int] = []
        self.labels: list[int] = []

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        for ids, labels, status in zip(
            batch["input_ids"], batch["labels"], batch["status"], strict=True
        ):
            if status == KEPT:
                self.ids += ids
                self.labels += labels
        full = len(self.ids) - len(self.ids) % self.length
        cuts = range(0, full, self.length)
        ids = [self.ids[i : i + self.length] for i in cuts]
        labels = [self.labels[i : i + self.length] for i in cuts]
        del self.ids[:full], self.labels[:full]
        # A batch of nothing but long prompts has a loss of 0/0.
        learned = [any(label != IGNORED for label in sequence[1:]) for sequence in labels]
        return {
            "input_ids": [x for x, keep in zip(ids, learned, strict=True) if keep],
            "labels": [x for x, keep in zip(labels, learned, strict=True) if keep],
        }


class Padder:
    """A batched function for `Dataset.map`: each row filled up to `length` on its right."""

    def __init__(self, length: int, pad: int, mask: bool) -> None:
        self.length = length
        self.pad = pad
        self.mask = mask

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        out: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        if self.mask:
            out["attention_mask"] = []
        for ids, labels, status in zip(
            batch["input_ids"], batch["labels"], batch["status"], strict=True
        ):
            if status != KEPT:
                continue
            missing = self.length - len(ids)
            out["input_ids"].append([*ids, *[self.pad] * missing])
            out["labels"].append([*labels, *[IGNORED] * missing])
            if self.mask:
                out["attention_mask"].append([1] * len(ids) + [0] * missing)
        return out


_SPREAD = 2_654_435_761
"""2^32 over the golden ratio, odd: seeds next to each other start far apart. torch's generator on
the CPU takes the lowest 32 bits of a seed (ATen/CPUGeneratorImpl.cpp, mt19937)."""


class RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """`rows` sequences of random tokens: the same for a seed, whatever order they are read in."""

    def __init__(self, *, vocab_size: int, seq_len: int, rows: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        generator = torch.Generator().manual_seed((self.seed * _SPREAD + index) % 2**32)
        ids = torch.randint(0, self.vocab_size, (self.seq_len,), generator=generator)
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


class Collator:
    """Sequences of one length to a batch: int64 ids, labels and mask, as Trainer's own makes.

    Without padding the mask is all ones, which transformers drops (masking_utils.py,
    `_ignore_causal_mask_sdpa`, 5.17): attention is plainly causal.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            name: torch.stack([torch.as_tensor(row[name], dtype=torch.long) for row in rows])
            for name in rows[0]
        }
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        return batch
