"""The tables of families: every row leads somewhere, and only what is asked for is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.errors import ConfigError
from vramplan.models import catalogue
from vramplan.models.blocks import FAMILIES, family
from vramplan.models.blocks.decoder import Decoder
from vramplan.models.hf_config import READERS, UnknownArchitecture, architecture
from vramplan.models.tensors import parameter_count

ROOT = Path(__file__).parents[2]
# A wrapper around another model_type, whose description it takes.
WRAPPERS = {"gemma3": "gemma3_text"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_description_is_a_decoder(name: str) -> None:
    assert issubclass(family(name), Decoder)
    assert family(name).__name__ == FAMILIES[name].partition(":")[2]


def test_what_can_be_read_is_described() -> None:
    assert {WRAPPERS.get(name, name) for name in READERS} == set(FAMILIES)


@pytest.mark.parametrize("model_id", [entry.id for entry in catalogue.entries()])
def test_bundled_checkpoints_have_their_published_size(model_id: str) -> None:
    checkpoint = catalogue.load(model_id)
    assert checkpoint is not None
    assert parameter_count(architecture(checkpoint.config)) == checkpoint.params_meta


def test_other_families_are_not_imported() -> None:
    code = (
        "import sys\n"
        "from vramplan import estimate\n"
        "estimate('meta-llama/Llama-3.1-8B')\n"
        "print(*(m for m in sys.modules if m.startswith('vramplan.models.blocks.')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert {name.rpartition(".")[2] for name in done.stdout.split()} == {"decoder", "llama"}


@pytest.mark.parametrize("model_type", ["lama", 7, ["llama"]])
def test_an_unknown_model_type_is_refused(model_type: object) -> None:
    with pytest.raises(UnknownArchitecture, match="not described"):
        architecture({"model_type": model_type})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_act": ["silu"]}, "activation function in the config is"),
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers"),
        ({"head_dim": 63}, "has 63 rotary dimensions a head"),
        ({"initializer_range": float("nan")}, "initializer_range in the config is nan"),
    ],
)
def test_figures_that_no_model_has(changed: dict[str, object], said: str) -> None:
    checkpoint = catalogue.load("meta-llama/Llama-3.2-1B")
    assert checkpoint is not None
    with pytest.raises(ConfigError, match=said):
        architecture({**checkpoint.config, **changed})
