"""Rows to sequences: what is learned, what is dropped, and that it is the same each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("datasets")

import torch
from transformers import PreTrainedTokenizerFast
from vramplan_launcher.data import DataSpec, load_data

# One token a word: what is expected can be counted by eye.
WORDS = [*"abcdef", "the", "cat", "sat", "on", "mat", "hello", "world"]
WORDS += ["<user>", "<assistant>", "<system>"]
SPECIAL = ["<unk>", "</s>", "<pad>", "<s>"]
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
EOS, PAD, BOS = (VOCABULARY[name] for name in ("</s>", "<pad>", "<s>"))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(*, bos: bool = False, template: str | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
    )
    wrapped.chat_template = template
    return wrapped


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def learned(text: str) -> list[int]:
    """Labels: a word in brackets is not learned."""
    return [-100 if word[0] == "(" else VOCABULARY[word] for word in text.split()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, *, seq_len: int = 4, tokens: Any = None, seed: int = 0, **spec: Any) -> Any:
    at_least = spec.pop("at_least", 1)
    return load_data(
        DataSpec(source=str(path), **spec),
        tokens or tokenizer(),
        seq_len=seq_len,
        seed=seed,
        vocab_size=len(VOCABULARY),
        at_least=at_least,
        cache=path.parent / "cache",
    )


def listed(rows: Any, column: str = "input_ids") -> list[list[int]]:
    return [row[column].tolist() for row in rows]


def test_packed_rows_follow_each_other_with_eos_between(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "sat on mat"}, {"text": "a"}])
    made = load(path)
    # the cat </s> sat | on mat </s> a | </s> is left over: 3 + 4 + 2 = 9 tokens
    assert listed(made.train) == [ids("the cat </s> sat"), ids("on mat </s> a")]
    assert listed(made.train, "labels") == listed(made.train)
    assert (made.counts.tokens, made.counts.sequences, made.counts.left_over) == (9, 2, 1)


def test_a_row_longer_than_a_sequence_is_packed_without_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a b c d e f"}, {"text": "a"}])
    made = load(path, seq_len=3)
    assert listed(made.train) == [ids("a b c"), ids("d e f"), ids("</s> a </s>")]
    assert made.counts.cut == 0


def test_padded_rows_stand_left_and_long_ones_are_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "a b c d e"}])
    made = load(path, packing=False)
    assert listed(made.train) == [ids("the cat </s> <pad>"), ids("a b c d")]
    assert listed(made.train, "labels") == [learned("the cat </s> (pad)"), ids("a b c d")]
    # a b c d e </s>: two of six tokens are lost
    assert (made.counts.cut, made.counts.cut_tokens, made.counts.left_over) == (1, 2, 0)
    assert "training: 1 row cut to the sequence length, 2 tokens lost" in made.notes
    assert "attention_mask" not in made.train[0]
    masked = load(path, packing=False, padding_mask=True)
    assert listed(masked.train, "attention_mask") == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert any("sdpa" in note for note in masked.notes)


def test_of_a_pair_the_completion_is_learned(tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": "sat"}, {"prompt": None, "completion": "a b"}]
    made = load(write(tmp_path / "a.jsonl", rows), packing=False)
    # Prompt and completion are one text: the blank between belongs to either.
    assert listed(made.train, "labels")[1] == learned("a b </s> (pad)")


def test_a_pair_is_one_text_and_its_prompt_is_not_learned(tmp_path: Path) -> None:
    rows = [{"prompt": "the cat ", "completion": "sat on"}]
    made = load(
        write(tmp_path / "a.jsonl", rows), packing=False, seq_len=6, tokens=tokenizer(bos=True)
    )
    assert listed(made.train) == [ids("<s> the cat sat on </s>")]
    assert listed(made.train, "labels") == [learned("(s) (the) (cat) sat on </s>")]


def test_of_a_conversation_the_assistants_turns_are_learned(tmp_path: Path) -> None:
    turns = [("system", "a"), ("user", "the cat"), ("assistant", "sat"), ("user", "b")]
    turns += [("assistant", "on mat")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]}]
    made = load(
        write(tmp_path / "a.jsonl", rows),
        packing=False,
        seq_len=20,
        tokens=tokenizer(bos=True, template=TEMPLATE),
    )
    text = "<system> a </s> <user> the cat </s> <assistant> sat </s> <user> b </s> <assistant>"
    assert listed(made.train)[0][:17] == ids(f"{text} on mat </s>")  # no <s>: the template's affair
    assert listed(made.train, "labels")[0] == learned(
        "(system) (a) (eos) (user) (the) (cat) (eos) (assistant) sat </s> (user) (b) (eos) "
        "(assistant) on mat </s> (pad) (pad) (pad)"
    )


def test_an_answer_to_nothing_is_not_learned(tmp_path: Path) -> None:
    """Templates refuse an empty conversation, so that nothing shows where such a turn begins."""
    strict = "{% if not messages %}{{ raise_exception('empty') }}{% endif %}" + TEMPLATE
    said = [{"role": r, "content": c} for r, c in (("assistant", "a"), ("user", "b"))]
    rows = [{"messages": [*said, {"role": "assistant", "content": "d"}]}]
    made = load(
        write(tmp_path / "a.jsonl", rows),
        packing=False,
        seq_len=9,
        tokens=tokenizer(template=strict),
    )
    assert listed(made.train, "labels") == [
        learned("(assistant) (a) (eos) (user) (b) (eos) (assistant) d </s>")
    ]


def test_a_pair_of_conversations_learns_the_second(tmp_path: Path) -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    prompt = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    rows = [{"prompt": prompt, "completion": [said("assistant", "d")]}]
    made = load(
        write(tmp_path / "a.jsonl", rows),
        packing=False,
        seq_len=12,
        tokens=tokenizer(template=TEMPLATE),
    )
    assert listed(made.train, "labels") == [
        learned("(u) (a) (eos) (a) (b) (eos) (u) (c) (eos) (assistant) d </s>")
    ]


def test_a_template_that_rewrites_earlier_turns_loses_those_only(tmp_path: Path) -> None:
    # As templates do that show the thoughts of the last turn alone.
    rewriting = (
        "{% for m in messages %}<{{ m.role }}> {% if loop.last and m.role == 'assistant' %}hello "
        "{% endif %}{{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]}]
    made = load(
        write(tmp_path / "a.jsonl", rows),
        packing=False,
        seq_len=13,
        tokens=tokenizer(template=rewriting),
    )
    assert listed(made.train, "labels") == [
        learned("(u) (a) (eos) (a) (b) (eos) (u) (c) (eos) (assistant) hello d </s>")
    ]


def test_a_template_may_be_given(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    path = write(tmp_path / "a.jsonl", rows)
    jinja = tmp_path / "chat.jinja"
    jinja.write_text(TEMPLATE)
    for given in (TEMPLATE, str(jinja)):
        made = load(path, packing=False, seq_len=6, template=given)
        assert listed(made.train) == [ids("<user> a </s> <assistant> b </s>")]


def test_what_has_nothing_to_learn_is_dropped_and_told(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [
                {"role": "user", "content": "a b c d e f"},
                {"role": "assistant", "content": "b"},
            ]
        },
    ]
    made = load(
        write(tmp_path / "a.jsonl", rows),
        packing=False,
        seq_len=6,
        tokens=tokenizer(template=TEMPLATE),
    )
    assert listed(made.train) == [ids("<user> a </s> <assistant> b </s>")]
    # The last row's answer lies beyond the sixth token.
    assert (made.counts.rows, made.counts.empty, made.counts.nothing_to_learn) == (5, 2, 2)
    assert "training: 2 empty rows dropped" in made.notes


def test_a_packed_sequence_of_prompts_alone_is_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": "a b c d e ", "completion": "f"}]
    made = load(write(tmp_path / "a.jsonl", rows * 2), seq_len=3)
    # a b c | d e f | </s> a b | c d e | f </s>: of the first and the fourth nothing is learned.
    # Of the third, </s> is, but as its first token, which nothing predicts.
    assert listed(made.train) == [ids("d e f")]
    assert (made.counts.tokens, made.counts.left_over) == (14, 11)


FORMATS = {
    "a.json": '[{"text": "the cat"}, {"text": "sat on"}]',
    "a.ndjson": '{"text": "the cat"}\n\n{"text": "sat on"}\n',
    "a.csv": 'n,text\n1,"the cat"\n2,sat on\n',
    "a.tsv": "n\ttext\n1\tthe cat\n2\tsat on\n",
    "a[1]*.jsonl": '{"text": "the cat"}\n{"text": "sat on"}\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FORMATS[name])
    assert listed(load(path, seq_len=3).train) == [ids("the cat </s>"), ids("sat on </s>")]


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["the cat", "sat on"]})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    expected = [ids("the cat </s>"), ids("sat on </s>")]
    assert listed(load(tmp_path / "a.parquet", seq_len=3).train) == expected
    before = sorted((tmp_path / "saved").rglob("*"))
    assert listed(load(tmp_path / "saved", seq_len=3, eval_split=0.5).train)
    assert sorted((tmp_path / "saved").rglob("*")) == before  # nothing is written beside the rows
    made = load(tmp_path / "splits", seq_len=3, eval_split="test")
    assert (listed(made.train), listed(made.evaluation)) == (expected, expected[:1])


def test_words_of_a_csv_that_pandas_takes_for_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nNA\nnull\n")
    assert load(path, seq_len=2).counts.empty == 0


def test_evaluation_is_held_back_and_the_same_for_a_seed(tmp_path: Path) -> None:
    rows = [{"text": word} for word in WORDS]
    path = write(tmp_path / "a.jsonl", rows)
    parts = {}
    for seed in (1, 1, 2):
        made = load(path, seq_len=2, eval_split=0.25, seed=seed)
        train, held = listed(made.train), listed(made.evaluation)
        assert (len(train), len(held)) == (12, 4)
        assert sorted(train + held) == sorted(ids(f"{word} </s>") for word in WORDS)
        assert parts.setdefault(seed, held) == held
    assert parts[1] != parts[2]


def test_evaluation_in_another_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the cat"}])
    other = write(tmp_path / "b.jsonl", [{"text": "sat on"}])
    made = load(path, seq_len=3, eval_split=str(other))
    assert listed(made.evaluation) == [ids("sat on </s>")]


def test_conversions_are_kept_and_follow_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the cat"}])
    assert listed(load(path, seq_len=3).train) == [ids("the cat </s>")]
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.arrow")}
    assert len(kept) == 2  # rows as tokens, and as sequences
    again = load(path, seq_len=3)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("*.arrow")} == kept
    assert again.counts == load(path, seq_len=3).counts
    assert again.counts.tokens == 3  # told of kept rows too
    assert listed(load(path, seq_len=3, tokens=tokenizer(bos=True)).train) == [ids("<s> the cat")]
    write(path, [{"text": "sat on"}, {"text": "mat"}])
    assert listed(load(path, seq_len=5).train) == [ids("sat on </s> mat </s>")]
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl", "cache"}


def test_a_batch_is_as_trainers_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "sat on"}])
    made = load(path, seq_len=3)
    batch = made.collator([made.train[0], made.train[1]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    for value in batch.values():
        assert (value.shape, value.dtype) == ((2, 3), torch.int64)
    assert batch["attention_mask"].all()


def test_random_tokens_need_no_tokenizer() -> None:
    made = load_data(None, None, seq_len=16, seed=0, vocab_size=50, samples=3, at_least=5)
    assert len(made.train) == 5  # as many as a step takes
    item = made.train[4]
    # The generator of each sequence is seeded with its place, as plain scripts do.
    expected = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(item["input_ids"], expected)
    assert torch.equal(item["labels"], expected)
    assert item["attention_mask"].tolist() == [1] * 16
    other = load_data(None, None, seq_len=16, seed=1, vocab_size=50)
    assert not torch.equal(other.train[4]["input_ids"], expected)
    assert len(list(other.train)) == 64
    held = load_data(DataSpec(eval_split=0.1), None, seq_len=16, seed=1, vocab_size=50)
    assert len(held.evaluation) == 6


def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def test_padding_without_a_mask_changes_no_loss(tmp_path: Path) -> None:
    rows = [{"text": "the cat"}, {"text": "a b c d e f"}]
    path = write(tmp_path / "a.jsonl", rows)
    model, losses = tiny(), []
    for mask in (False, True):
        made = load(path, packing=False, seq_len=7, padding_mask=mask)
        batch = made.collator([made.train[0], made.train[1]])
        assert bool(batch["attention_mask"].all()) is not mask
        losses.append(model(**batch).loss.item())
    # What stands to the right of a token is not looked at: the mask adds nothing but its kernel.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_mask_of_ones_is_dropped_and_one_of_padding_is_not() -> None:
    from transformers.masking_utils import create_causal_mask

    def mask(ones: torch.Tensor) -> Any:
        return create_causal_mask(
            config=tiny().config,
            inputs_embeds=torch.zeros(2, 4, 16),
            attention_mask=ones,
            past_key_values=None,
        )

    ones = torch.ones(2, 4, dtype=torch.long)
    assert mask(ones) is None  # sdpa is then called with is_causal=True
    padded = ones.clone()
    padded[0, -1] = 0
    assert mask(padded).shape == (2, 1, 4, 4)


def test_trainer_takes_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    path = write(tmp_path / "a.jsonl", [{"text": "the cat sat on mat"}] * 8)
    made = load(path, seq_len=6, eval_split=0.25)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=tiny(),
        args=arguments,
        train_dataset=made.train,
        eval_dataset=made.evaluation,
        data_collator=made.collator,
    )
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
