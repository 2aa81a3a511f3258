"""int8's outlier columns: inputs of a linear that LLM.int8 keeps in their own precision.

bitsandbytes' MatMul8bitLt takes every column of its input with an element of magnitude 6 or more
(`Linear8bitLt`'s threshold as transformers sets it) and keeps that part on its context, out of
checkpointing's reach. How many there are depends on the data. What is reckoned here is the model
as initialised: weights from N(0, initializer_range^2), normalized inputs, hence gate and up of a
gated feed-forward from N(0, s^2) with s = initializer_range x sqrt(hidden size); an element of
silu(gate) x up reaches 6 with probability p, a column of T tokens with 1 - (1 - p)^T. Measured on
random weights, a layer: Granite 724-810 of 8192 columns against 786 reckoned, Mistral 14129-14287
of 14336 against 14322, Llama-1B 561-737 against 786: its small embeddings meet the norm's epsilon,
which is not reckoned, and the first layers have fewer.
Trained checkpoints were not measured; few outliers are what the LLM.int8 paper reports.
"""

from __future__ import annotations

from functools import lru_cache
from math import erfc, exp, pi, sqrt

THRESHOLD = 6.0  # BitsAndBytesConfig.llm_int8_threshold
STEPS = 256  # of the integral over the gate
REACH = 6.0  # standard deviations of it

MICRO = 1_000_000  # a standard deviation is kept as an integer of millionths
ROWS = -2  # in a storage's size: (bytes a token, deviation, ROWS), outlier columns of every token
COLUMNS = -3  # (bytes of all columns, deviation, COLUMNS), outlier columns of a weight
TYPICAL_TOKENS = 4096  # for comparing instants; the highest is then evaluated exactly


@lru_cache(maxsize=64)
def probability(deviation: int) -> float:
    """That |silu(g) u| reaches the threshold, g and u from N(0, s^2), s = deviation / MICRO."""
    s = deviation / MICRO
    width = 2 * REACH * s / STEPS
    total = 0.0
    for step in range(STEPS):
        g = -REACH * s + (step + 0.5) * width
        gate = abs(g) / (1 + exp(-g))
        density = exp(-g * g / (2 * s * s)) / (s * sqrt(2 * pi))
        total += density * width * erfc(THRESHOLD / (gate * s * sqrt(2)))
    return total


def share(deviation: int, tokens: int) -> float:
    """Of the columns, how many have an outlier among `tokens` rows."""
    return 1 - (1 - probability(deviation)) ** tokens


def nbytes(n: int, deviation: int, kind: int, tokens: int) -> int:
    """Bytes of a storage whose size is kept as (n, deviation, kind)."""
    part = n * share(deviation, tokens)
    return int(part * tokens) if kind == ROWS else int(part)
