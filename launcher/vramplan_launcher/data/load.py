"""`load_data`: rows of any source as training and evaluation sets of fixed-length sequences."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from vramplan.errors import UserError
from vramplan_launcher.data.encode import EMPTY, KEPT, NOTHING_TO_LEARN, Encoder, template_of
from vramplan_launcher.data.read import NAMED, columns_of, not_utf8, read_rows
from vramplan_launcher.data.sequences import Collator, Packer, Padder, RandomTokens
from vramplan_launcher.data.spec import DataSpec

_LAYOUT = 2
"""Goes up when the same rows become other sequences, so that no older conversion is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What became of the rows of one set."""

    rows: int
    empty: int = 0
    """Rows without text: dropped."""
    nothing_to_learn: int = 0
    """Rows without a completion, or none within the sequence length: dropped."""
    cut: int = 0
    """Rows longer than the sequence length that lost their end."""
    cut_tokens: int = 0
    tokens: int = 0
    """Tokens of the rows that were kept, their ends included."""
    left_over: int = 0
    """Of packing: tokens of no full sequence, or of one that holds prompts alone."""
    sequences: int = 0

    def sentences(self, what: str) -> tuple[str, ...]:
        """For a person: what was made, and what was left out."""
        rows, tokens = _some(self.rows, "row"), _some(self.tokens, "token")
        said = [f"{rows}, {tokens}, {_some(self.sequences, 'sequence')}"]
        if self.empty:
            said.append(f"{_some(self.empty, 'empty row')} dropped")
        if self.nothing_to_learn:
            said.append(
                f"{_some(self.nothing_to_learn, 'row')} dropped with nothing to learn (no turn of "
                "an assistant, or a prompt as long as the sequence)"
            )
        if self.cut:
            lost = _some(self.cut_tokens, "token")
            said.append(f"{_some(self.cut, 'row')} cut to the sequence length, {lost} lost")
        if self.left_over:
            said.append(f"{_some(self.left_over, 'token')} left over by packing")
        return tuple(f"{what}: {sentence}" for sentence in said)


def _some(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Datasets:
    """What Trainer is given, and what became of the rows on the way."""

    train: Any
    evaluation: Any | None
    collator: Collator
    counts: Counts
    evaluation_counts: Counts | None = None
    notes: tuple[str, ...] = ()
    """For a person: counts, what was dropped, and where conversions are kept."""
    cache: Path | None = None
    """Where converted rows are kept for the next run; None for random tokens."""


def load_data(
    spec: DataSpec | None,
    tokenizer: Any,
    *,
    seq_len: int,
    seed: int,
    vocab_size: int,
    at_least: int = 1,
    samples: int = 64,
    cache: Path | None = None,
    progress: bool = False,
) -> Datasets:
    """The rows of `spec` as sequences of `seq_len` tokens; the same for the same arguments.

    `at_least` is how many sequences an optimizer step takes (all ranks, all micro-batches).
    Conversions are kept under `cache` (None: in the `datasets` cache, HF_DATASETS_CACHE), never
    beside the user's files; each process of a run may call this, and the first to finish saves the
    others the work. Without a spec, or a source in it, `samples` sequences of random tokens are
    made, for which no tokenizer is needed.

    Packed rows fill every sequence: the fixed length that is estimated. Padded rows
    (packing=False) stand on the left of their sequences, their padding without labels. A causal
    model never looks to its right, so real tokens need no mask, and none is given: memory and time
    are those of full sequences. With `padding_mask` the model gets one: what a mixture of experts
    routes, and its balance loss, leave padding out; but sdpa then takes a kernel that reads a
    b x 1 x s x s mask, for which memory is not estimated.

    Raises UserError, which names the file, row and column at fault.
    """
    if spec is None or spec.source is None:
        held = None if spec is None else spec.eval_split
        return _synthetic(held, seq_len, seed, vocab_size, max(samples, at_least))
    if tokenizer is None:
        raise UserError(
            f"data {spec.source!r} needs the model's tokenizer, and there is none: name a model "
            "whose folder has one, or leave the data out to train on random tokens"
        )
    cache = _cache(cache)
    with _quiet(progress):
        make = _Maker(spec, tokenizer, seq_len, vocab_size, cache)
        train, evaluation = _sets(spec, make, seed)
        _check_enough(spec, train, at_least, seq_len)
        notes = train.counts.sentences("training")
        if evaluation is not None:
            if evaluation.counts.sequences == 0:
                raise UserError(
                    f"evaluation data {evaluation.name!r} fills no sequence of {seq_len} tokens "
                    f"(it has {evaluation.counts.tokens}): take a larger share, or --no-packing"
                )
            notes += evaluation.counts.sentences("evaluation")
    return Datasets(
        train=train.sequences,
        evaluation=None if evaluation is None else evaluation.sequences,
        collator=Collator(),
        counts=train.counts,
        evaluation_counts=None if evaluation is None else evaluation.counts,
        notes=(*notes, *_cautions(spec, tokenizer), f"converted rows are kept in {cache}"),
        cache=cache,
    )


def _synthetic(held: Any, seq_len: int, seed: int, vocab_size: int, rows: int) -> Datasets:
    made = {"vocab_size": vocab_size, "seq_len": seq_len}
    evaluation = None
    if held is not None:
        share = max(1, round(rows * held))
        evaluation = RandomTokens(rows=share, seed=seed + 1, **made)
    return Datasets(
        train=RandomTokens(rows=rows, seed=seed, **made),
        evaluation=evaluation,
        collator=Collator(),
        counts=Counts(rows=rows, tokens=rows * seq_len, sequences=rows),
        notes=("training: random tokens, from which nothing is learned",),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Set:
    name: str
    sequences: Any
    counts: Counts


def _sets(spec: DataSpec, make: _Maker, seed: int) -> tuple[_Set, _Set | None]:
    """What is trained on, and what is evaluated on."""
    source, held = spec.source, spec.eval_split
    assert source is not None
    rows = read_rows(spec, source, spec.split, make.cache)
    if isinstance(held, (int, float)):
        share = max(1, round(len(rows) * held))
        if share >= len(rows):
            raise UserError(f"data {source!r} has too few rows ({len(rows)}) to hold any back")
        # After encoding, which names rows by their place in the file; drawn here, as datasets' own
        # split writes its choice beside the rows, which for a saved folder is the user's.
        encoded = make.encoded(rows, source)
        drawn = set(random.Random(seed).sample(range(len(rows)), share))
        others = [i for i in range(len(rows)) if i not in drawn]
        train_part, part = (
            encoded.select(places, keep_in_memory=True) for places in (others, sorted(drawn))
        )
        kept = f"{source} ({held:.0%} held back)"
        return make.arranged(train_part, source), make.arranged(part, kept)
    train = make.arranged(make.encoded(rows, source), source)
    if held is None:
        return train, None
    other = replace(spec, limit=None)
    if Path(held).expanduser().exists():
        return train, make.arranged(
            make.encoded(read_rows(other, held, spec.split, make.cache), held), held
        )
    if Path(source).expanduser().is_file():
        raise UserError(
            f"no evaluation file {held!r} (a split's name means something of a dataset only, and "
            f"{source!r} is one file)"
        )
    named = f"{source} ({held})"
    return train, make.arranged(
        make.encoded(read_rows(other, source, held, make.cache), named), named
    )


class _Maker:
    """Rows to sequences, each of the two steps kept in a file of its own."""

    def __init__(
        self, spec: DataSpec, tokenizer: Any, seq_len: int, vocab_size: int, cache: Path
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.cache = cache
        self._tokens: str | None = None

    def encoded(self, rows: Any, name: str) -> Any:
        """Tokens, labels and fate of each row."""
        try:
            return self._encoded(rows, name)
        except UnicodeDecodeError as error:  # bytes that are no UTF-8 lie in Arrow unseen
            raise UserError(f"data {name!r}: {not_utf8(name, error)}") from error

    def _encoded(self, rows: Any, name: str) -> Any:
        from datasets import Features, List, Value

        columns = columns_of(self.spec, rows.column_names, name)
        first = next((v for v in rows[: min(len(rows), 100)][columns[0]] if v is not None), None)
        single = len(columns) == 1
        conversations = single and (
            bool(self.spec.messages_column)
            or (not self.spec.text_column and columns == (NAMED["messages"],))
        )
        template = None
        if conversations or isinstance(first, list):
            template = template_of(self.tokenizer, self.spec.template, columns[0])
        length = None if self.spec.packing else self.seq_len
        encoder = Encoder(
            self.tokenizer,
            columns=columns,
            conversations=conversations,
            source=name,
            vocab_size=self.vocab_size,
            length=length,
            template=template,
        )
        tokens = List(Value("int32"))
        features = {"input_ids": tokens, "labels": tokens, "status": Value("int8")}
        features |= {"cut": Value("int32"), "length": Value("int32")}
        key = self._key(rows, columns, conversations, template, length, self.vocab_size)
        return self._map(
            rows.select_columns(list(columns)),
            encoder,
            key,
            with_indices=True,
            remove_columns=list(columns),
            features=Features(features),
        )

    def arranged(self, encoded: Any, name: str) -> _Set:
        """The rows that have something to learn, as sequences of one length."""
        from datasets import Features, List, Value

        if self.spec.packing:
            function: Callable[..., Any] = Packer(self.seq_len)
            names = ["input_ids", "labels"]
        else:
            pad = self.tokenizer.pad_token_id
            pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
            function = Padder(self.seq_len, pad, self.spec.padding_mask)
            names = ["input_ids", "labels", *["attention_mask"] * self.spec.padding_mask]
        key = self._key(encoded, self.seq_len, self.spec.packing, self.spec.padding_mask)
        made = self._map(
            encoded,
            function,
            key,
            remove_columns=encoded.column_names,
            features=Features({name: List(Value("int32")) for name in names}),
        )
        counts = _counted(encoded)
        used = len(made) * self.seq_len if self.spec.packing else counts.tokens
        counts = replace(counts, sequences=len(made), left_over=counts.tokens - used)
        return _Set(name=name, sequences=made.with_format("numpy"), counts=counts)

    def _key(self, rows: Any, *choices: Any) -> str:
        self._tokens = self._tokens or _fingerprint_of(self.tokenizer)
        text = json.dumps([_LAYOUT, rows._fingerprint, self._tokens, *choices])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _map(self, rows: Any, function: Callable[..., Any], key: str, **options: Any) -> Any:
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            return rows.map(
                function,
                batched=True,
                # Written aside and renamed: processes that make the same file don't collide.
                cache_file_name=str(self.cache / f"{key}.arrow"),
                new_fingerprint=key,
                load_from_cache_file=True,
                **options,
            )
        except OSError as error:
            raise UserError(
                f"can't write converted rows to {str(self.cache)!r}: {error.strerror or error}"
            ) from error


def _counted(encoded: Any) -> Counts:
    pc: Any = import_module("pyarrow.compute")
    table = encoded.select_columns(["status", "cut", "length"]).with_format("arrow")[:]
    status = table["status"]
    kept = table.filter(pc.equal(status, KEPT))

    def total(values: Any) -> int:
        return pc.sum(values).as_py() or 0

    return Counts(
        rows=len(encoded),
        empty=total(pc.equal(status, EMPTY)),
        nothing_to_learn=total(pc.equal(status, NOTHING_TO_LEARN)),
        cut=total(pc.greater(kept["cut"], 0)),
        cut_tokens=total(kept["cut"]),
        tokens=total(kept["length"]),
    )


def _check_enough(spec: DataSpec, made: _Set, at_least: int, seq_len: int) -> None:
    counts = made.counts
    if counts.sequences >= max(1, at_least):
        return
    what = f"{_some(counts.sequences, 'sequence')} of {seq_len} tokens"
    dropped = counts.empty + counts.nothing_to_learn
    left_out = f" ({dropped} of {counts.rows} rows had nothing to learn)" if dropped else ""
    ways = "more data, a shorter seq_len, a smaller batch_size or gradient_accumulation_steps"
    if spec.packing:
        ways += ", or --no-packing"
    raise UserError(
        f"data {made.name!r} makes {what}{left_out}, and one step takes {max(1, at_least)}: {ways}"
    )


def _cautions(spec: DataSpec, tokenizer: Any) -> Iterator[str]:
    if tokenizer.eos_token_id is None:
        yield "the tokenizer has no EOS token: nothing marks where a row ends"
    if spec.padding_mask:
        yield (
            "an attention mask is kept for padding: sdpa then takes a kernel that reads it, for "
            "which memory is not estimated"
        )


def _fingerprint_of(tokenizer: Any) -> str:
    """Of everything about a tokenizer that its tokens depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        told = backend.to_str()
    else:
        told = json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = (told, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id)
    digest = hashlib.sha256()
    for part in (type(tokenizer).__name__, *parts):
        digest.update(str(part).encode())
    return digest.hexdigest()


def _cache(given: Path | None) -> Path:
    if given is not None:
        return Path(given)
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "vramplan"


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without `datasets`' bars, and its log lines on errors that are told here in one sentence."""
    import datasets
    from datasets.utils.logging import is_progress_bar_enabled

    logger = logging.getLogger("datasets")
    level = logger.level
    bars = is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    if not progress and bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not progress and bars:
            datasets.enable_progress_bars()
