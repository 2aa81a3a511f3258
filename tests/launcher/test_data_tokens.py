"""Where a completion begins among the tokens of a real kind of tokenizer: bytes, with any text."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from vramplan_launcher.data.encode import IGNORED, KEPT, Encoder

TEXT = st.text(alphabet=list("helo wrdcatm你é😀:\n"), max_size=20)


@cache
def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["hello world the cat sat 你好 café 😀 answer: yes "] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@settings(max_examples=300, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_the_completion_is_learned_whole_and_to_its_end(prompt: str, completion: str) -> None:
    tokenizer = byte_level()
    encode = Encoder(
        tokenizer,
        columns=("prompt", "completion"),
        conversations=False,
        source="rows",
        vocab_size=len(tokenizer),
        length=None,
    )
    out = encode({"prompt": [prompt], "completion": [completion]}, [0])
    ids, labels = out["input_ids"][0], out["labels"][0]
    assert (out["status"][0] == KEPT) is bool(completion.strip())
    if out["status"][0] != KEPT:
        return
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    assert labels == [IGNORED] * first + ids[first:]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == prompt + completion
    # A token across the border is learned, so what is learned may begin before the completion.
    learned = tokenizer.decode(ids[first:-1])
    assert learned.endswith(completion) or "\ufffd" in learned
    # ... but never by a whole token.
    assert not tokenizer.decode(ids[first + 1 : -1]).endswith(completion) or not completion
