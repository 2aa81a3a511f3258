from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from vramplan.cli.models import command
from vramplan.errors import ModelNotFound


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(command, arguments, env=environment)


def test_it_lists_every_model_within_80_columns() -> None:
    result = run(COLUMNS="80")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["model", "family", "parameters"]
    assert len(lines) == 1 + 88
    assert max(map(len, lines)) <= 80
    assert result.output.isascii()


def test_a_line_holds_id_family_and_parameters() -> None:
    line = run("llama-3.1-8b-instruct").output.splitlines()[1]
    assert line.split()[:2] == ["meta-llama/Llama-3.1-8B-Instruct", "llama"]
    assert "".join(line.split()[2:]) == "8.03B"  # 8,030,261,248


def test_every_word_of_a_query_must_match() -> None:
    output = run("qwen", "7b").output
    assert "Qwen/Qwen2.5-7B" in output
    assert "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B" in output
    assert "Qwen2.5-3B" not in output
    assert "Mistral-7B" not in output


def test_a_narrow_terminal_loses_no_part_of_an_id() -> None:
    output = run("distill-llama", COLUMNS="30").output
    first_column = "".join(line.split(" ")[0] for line in output.splitlines()[1:])
    assert first_column == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def test_json() -> None:
    result = run("opt-350m", "--json")
    assert json.loads(result.output) == {
        "schema": 1,
        "models": [
            {"id": "facebook/opt-350m", "model_type": "opt", "parameters": 331_196_416},
        ],
    }


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_query_that_matches_nothing_is_the_users_error(flags: tuple[str, ...]) -> None:
    result = run("Lama-3.1-8X", *flags)
    assert isinstance(result.exception, ModelNotFound)
    assert result.exception.exit_code == 2
    message = str(result.exception)
    assert "'Lama-3.1-8X'" in message
    assert "nearest: meta-llama/Llama-3.1-8B" in message
    assert result.output == ""


def test_json_and_help_import_no_rich() -> None:
    code = (
        "import sys\n"
        "from vramplan.cli.models import command\n"
        "command(['gpt2', '--json'], standalone_mode=False)\n"
        "assert 'rich' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
