"""An explanation as plain text: every term with its formula, 80 columns at most."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from textwrap import wrap

from vramplan.memory.explain import Explanation
from vramplan.memory.terms import Term
from vramplan.units import format_bytes

WIDTH = 80
FIGURE = 11  # "1023.9 GiB"


def render(explanation: Explanation) -> str:
    """The text of `explanation`: categories, the largest first, and in them every term."""
    e = explanation
    lines = [f"{e.id}, batch {e.batch} x {e.seq} tokens"]
    lines += wrap(f"Peak: {_exact(e.peak_allocated)}, in {_where(e)}.", WIDTH)
    lines += wrap("It is the sum of these terms; n is a tensor's number of elements.", WIDTH)
    for category, terms in groupby(e.terms, key=lambda term: term.category):
        lines += _group(category, list(terms))
    if e.overhead:
        lines += _group("beyond the peak", list(e.overhead))
    lines += ["", *wrap(f"Required: {_exact(e.required)}, the peak and what is beyond it.", WIDTH)]
    return "\n".join(lines) + "\n"


def _where(e: Explanation) -> str:
    phase = e.phase.replace("_", " ")
    return f"{phase} ({e.where})" if e.where else phase


def _exact(size: int) -> str:
    return f"{format_bytes(size, digits=2)} ({size} B)"


def _group(category: str, terms: list[Term]) -> Iterator[str]:
    yield ""
    yield _row(category, sum(term.bytes for term in terms))
    for term in terms:
        what = wrap(term.what, WIDTH - FIGURE - 4, break_long_words=True)
        yield _row("  " + what[0], term.bytes)
        yield from (f"  {line}" for line in what[1:])
        yield from _indented(f"{term.formula} = {term.figures}" if term.formula else term.figures)
        if term.source:
            yield from _indented(f"[{term.source}]")


def _row(text: str, size: int) -> str:
    return f"{text:<{WIDTH - FIGURE}}{format_bytes(size):>{FIGURE}}"


def _indented(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent="      ", subsequent_indent="        ")
