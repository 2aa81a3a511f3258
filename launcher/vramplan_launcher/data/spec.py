"""What data a run is given, and how its rows become sequences. Light: nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from vramplan.errors import InvalidValue, UnknownName, UserError

Format = Literal["json", "csv", "parquet"]

SUFFIXES: Mapping[str, Format] = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""A file's format by the ending of its name; .gz, .bz2, .xz and .zst may follow."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FORMATS: tuple[Format, ...] = ("json", "csv", "parquet")
_NAMES = ("text_column", "prompt_column", "completion_column", "messages_column")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Where the rows are, which columns hold what is learned, and how they are cut to length.

    Raises UserError when made of what can't be.
    """

    source: str | None = None
    """A file, a folder of files or of `Dataset.save_to_disk`, or a `datasets` id; None is random
    tokens."""
    format: Format | None = None
    """json (one object a line, or one array), csv or parquet; None is as the file's name ends."""
    subset: str | None = None
    """Of a `datasets` id: its configuration."""
    split: str = "train"
    """Of a `datasets` id or a saved folder: the split that is trained on."""
    text_column: str | None = None
    """The column of plain text; None is "text", where no other kind is found."""
    prompt_column: str | None = None
    """None is "prompt"."""
    completion_column: str | None = None
    """None is "completion"."""
    messages_column: str | None = None
    """The column of conversations: lists of {"role", "content"}; None is "messages"."""
    packing: bool = True
    """Rows follow each other, EOS between, cut into full sequences; False pads each row."""
    padding_mask: bool = False
    """Of packing=False: hand the padding to the model as an attention mask (see load_data)."""
    eval_split: float | str | None = None
    """A share of the rows (0.05), a split's name, or another file; None is no evaluation."""
    template: str | None = None
    """A chat template in place of the tokenizer's: Jinja text, or a file that holds it."""
    limit: int | None = None
    """At most so many rows of the source; None is all."""

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise UnknownName("data format", self.format, FORMATS)
        if isinstance(self.eval_split, (int, float)) and not 0 < self.eval_split < 1:
            raise InvalidValue(
                "eval_split",
                self.eval_split,
                "a share of the rows above 0 and below 1, a split's name, or a file",
            )
        if self.limit is not None and (type(self.limit) is bool or self.limit < 1):
            raise InvalidValue("limit", self.limit, "a number of rows of at least 1")
        if self.padding_mask and self.packing:
            raise UserError(
                "padding_mask with packing: packed sequences have no padding. Leave one out"
            )
        self._check_columns()
        if self.source is None:
            self._check_synthetic()

    def _check_columns(self) -> None:
        kinds = [
            name
            for name, given in (
                ("text_column", self.text_column),
                ("prompt_column and completion_column", self.pair),
                ("messages_column", self.messages_column),
            )
            if given
        ]
        if len(kinds) > 1:
            raise UserError(f"{' and '.join(kinds)}: a row is one or the other. Leave one out")

    def _check_synthetic(self) -> None:
        given = [n for n in (*_NAMES, "format", "subset", "template") if getattr(self, n)]
        if given or isinstance(self.eval_split, str):
            raise UserError(
                f"{(given or ['eval_split'])[0]} without a source of data: random tokens have no "
                "columns or splits. Name a file or a dataset, or leave it out"
            )

    @property
    def pair(self) -> str | None:
        """Whichever column of a pair was named."""
        return self.prompt_column or self.completion_column

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSpec:
        """The reverse of `to_dict`; keys left out take their defaults. Raises UserError."""
        names = tuple(field.name for field in fields(cls))
        for key in values:
            if key not in names:
                raise UnknownName("data field", key, names)
        return cls(**values)


def format_of(name: str) -> Format | None:
    """The format that the ending of a file's name tells."""
    lowered = name.lower()
    for ending in COMPRESSED:
        lowered = lowered.removesuffix(ending)
    return next((kind for ending, kind in SUFFIXES.items() if lowered.endswith(ending)), None)
