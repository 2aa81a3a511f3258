"""Rows to tokens: text, prompts with completions, and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vramplan.errors import UserError

IGNORED = -100
"""The label that torch's cross-entropy leaves out (its `ignore_index`)."""

KEPT, EMPTY, NOTHING_TO_LEARN = 0, 1, 2
"""What became of a row."""

Pieces = list[tuple[str, bool]]
"""A row's text in parts, each with whether it is learned."""


class Encoder:
    """A batched function for `Dataset.map`: tokens and labels of each row, and what became of it.

    Labels are the tokens where something is learned, else IGNORED: the whole of a text, the
    completion after a prompt, an assistant's turns of a conversation. EOS ends each row.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        columns: tuple[str, ...],
        conversations: bool,
        source: str,
        vocab_size: int,
        length: int | None,
        template: str | None = None,
    ) -> None:
        """`length` cuts rows (None: packing cuts nothing); `source` is named in errors."""
        self.tokenizer = tokenizer
        self.columns = columns
        self.conversations = conversations
        self.source = source
        self.vocab_size = vocab_size
        self.length = length
        self.template = template

    def __call__(self, batch: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, Any]:
        made = [
            self._pieces(tuple(batch[name][i] for name in self.columns), row + 1)
            for i, row in enumerate(rows)
        ]
        out: dict[str, list[Any]] = {"input_ids": [], "labels": [], "status": []}
        out |= {"cut": [], "length": []}
        encoded: list[Any] = [None] * len(made)
        for templated in (False, True):  # a template writes its own special tokens
            group = {i: m[0] for i, m in enumerate(made) if m is not None and m[1] is templated}
            tokens_of = self._tokens(list(group.values()), special=not templated)
            for i, tokens in zip(group, tokens_of, strict=True):
                encoded[i] = tokens
        for row, item, tokens in zip(rows, made, encoded, strict=True):
            self._add(out, item, tokens, row + 1)
        return out

    def _add(self, out: dict[str, list[Any]], item: Any, tokens: Any, row: int) -> None:
        ids, labels = tokens if tokens is not None else ([], [])
        cut = 0
        if self.length is not None and len(ids) > self.length:
            cut = len(ids) - self.length
            ids, labels = ids[: self.length], labels[: self.length]
        status = EMPTY if item is None else KEPT
        # The first label is never predicted: the loss compares each token with those before it.
        if status == KEPT and all(label == IGNORED for label in labels[1:]):
            status = NOTHING_TO_LEARN
        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            raise UserError(
                f"{self._place(row)}: the tokenizer made token {largest}, and the model has "
                f"{self.vocab_size} embeddings: it is another model's tokenizer, or tokens were "
                "added without resizing the embeddings"
            )
        out["input_ids"].append(ids)
        out["labels"].append(labels)
        out["status"].append(status)
        out["cut"].append(cut)
        out["length"].append(len(ids))

    # --- a row's text ---------------------------------------------------------------------

    def _pieces(self, values: tuple[Any, ...], row: int) -> tuple[Pieces, bool] | None:
        """The row's text and whether a template wrote it; None of an empty row."""
        if self.conversations:
            messages = self._messages(values[0], row, self.columns[0])
            return (self._turns(messages, 0, row), True) if messages else None
        if len(values) == 1:
            text = self._text(values[0], row, self.columns[0])
            return ([(text, True)], False) if text.strip() else None
        prompt, completion = values
        if isinstance(prompt, list) or isinstance(completion, list):
            before = self._messages(prompt, row, self.columns[0])
            after = self._messages(completion, row, self.columns[1])
            return (self._turns(before + after, len(before), row), True) if after else None
        said = self._text(completion, row, self.columns[1])
        pieces = [(self._text(prompt, row, self.columns[0]), False), (said, True)]
        return (pieces, False) if said.strip() else None

    def _text(self, value: Any, row: int, column: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"{self._place(row, column)} holds {_short(value)}, not text: mend or drop the row"
            )
        return value

    def _messages(self, value: Any, row: int, column: str) -> list[dict[str, Any]]:
        if value is None:
            return []
        if not isinstance(value, list):
            raise UserError(
                f"{self._place(row, column)} holds {_short(value)}, not a list of messages with "
                '"role" and "content"'
            )
        kept = []
        for number, message in enumerate(value, start=1):
            if not _is_message(message):
                raise UserError(
                    f"{self._place(row, column)}: message {number} is {_short(message)}, not "
                    'an object with "role" and "content"'
                )
            # Arrow gives every message all keys that any has; a template asks which are there.
            kept.append({k: v for k, v in message.items() if v is not None or k == "content"})
        return kept

    def _turns(self, messages: list[dict[str, Any]], first: int, row: int) -> Pieces:
        """The conversation as the template writes it; assistant's turns from `first` on learned.

        A turn that the template writes otherwise once more follows it (as those do that drop
        earlier thoughts) can't be told from the rest, nor can one that opens the conversation:
        templates refuse an empty one. Neither is learned.
        """
        whole = self._render(messages, row)
        pieces: Pieces = []
        done = 0
        for i in range(max(first, 1), len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            before = self._render(messages[:i], row, prompt=True)
            after = whole if i + 1 == len(messages) else self._render(messages[: i + 1], row)
            if whole.startswith(before) and whole.startswith(after) and len(before) >= done:
                pieces += [
                    (whole[done : len(before)], False),
                    (whole[len(before) : len(after)], True),
                ]
                done = len(after)
        return [*pieces, (whole[done:], False)]

    def _render(self, messages: list[dict[str, Any]], row: int, prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise UserError(
                f"{self._place(row, self.columns[-1])}: the chat template refuses the "
                f"conversation: {error}"
            ) from error

    def _place(self, row: int, column: str | None = None) -> str:
        named = f", column {column!r}" if column else ""
        return f"data {self.source!r}, row {row}{named}"

    # --- a row's tokens -------------------------------------------------------------------

    def _tokens(self, rows: Sequence[Pieces], special: bool) -> list[tuple[list[int], list[int]]]:
        if not rows:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            return [self._piecewise(pieces, special) for pieces in rows]
        # Where rows are learned whole, nobody asks where their tokens lie.
        whole = all(learned for pieces in rows for _, learned in pieces)
        encoded = self.tokenizer(
            ["".join(text for text, _ in pieces) for pieces in rows],
            add_special_tokens=special,
            return_offsets_mapping=not whole,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets = [()] * len(rows) if whole else encoded["offset_mapping"]
        return [
            self._ended(list(ids), _labels(ids, lie, pieces), pieces)
            for ids, lie, pieces in zip(encoded["input_ids"], offsets, rows, strict=True)
        ]

    def _piecewise(self, pieces: Pieces, special: bool) -> tuple[list[int], list[int]]:
        """Of a tokenizer written in Python, which does not tell where its tokens lie."""
        ids: list[int] = []
        labels: list[int] = []
        for number, (text, learned) in enumerate(pieces):
            made = self.tokenizer(text, add_special_tokens=special and number == 0, verbose=False)
            ids += made["input_ids"]
            labels += made["input_ids"] if learned else [IGNORED] * len(made["input_ids"])
        return self._ended(ids, labels, pieces)

    def _ended(self, ids: list[int], labels: list[int], pieces: Pieces) -> Any:
        """The row with EOS after it, unless it ends so already (a line break may follow EOS)."""
        eos = self.tokenizer.eos_token_id
        learned = next((learned for text, learned in reversed(pieces) if text), False)
        if eos is not None and eos not in ids[-2:]:
            ids.append(eos)
            labels.append(IGNORED)
        if ids and ids[-1] == eos and learned:  # one that the tokenizer added has no place in text
            labels[-1] = eos
        return ids, labels


def _labels(ids: Sequence[int], offsets: Sequence[tuple[int, int]], pieces: Pieces) -> list[int]:
    """Tokens that reach into a learned piece; a token across the border is learned."""
    if all(learned for _, learned in pieces):
        return list(ids)
    labels = [IGNORED] * len(ids)
    start = token = 0
    for text, learned in pieces:
        end = start + len(text)
        while token < len(ids) and offsets[token][0] < end:
            left, right = offsets[token]
            if left < right and learned:
                labels[token] = ids[token]
            if right > end:
                break  # the next piece has a part in it
            token += 1
        start = end
    return labels


def template_of(tokenizer: Any, given: str | None, column: str) -> str | None:
    """The chat template to use: the text or file given, or None for the tokenizer's own.

    Raises UserError where there is none.
    """
    if given is None:
        if getattr(tokenizer, "chat_template", None):
            return None
        raise UserError(
            f"column {column!r} holds conversations, and the tokenizer has no chat template: it is "
            "a base model's. Give a template (a Jinja file, such as the chat_template.jinja of the "
            "model's Instruct variant), use that variant, or name a text_column"
        )
    path = Path(given).expanduser()
    try:
        return path.read_text(encoding="utf-8") if len(given) < 4096 and path.is_file() else given
    except OSError as error:
        raise UserError(f"can't read the chat template {given!r}: {error.strerror}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_message(value: Any) -> bool:
    """A role, and text or a list of parts; an assistant that only calls tools says nothing."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if content is None:
        return value["role"] == "assistant"
    parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    return parts or isinstance(content, str)
