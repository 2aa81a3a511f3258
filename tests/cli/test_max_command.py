"""`vramplan max`."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from vramplan.cli.main import cli

MODEL = "meta-llama/Llama-3.2-1B"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["max", *arguments], catch_exceptions=False)


def test_both_limits() -> None:
    result = run(MODEL, "--gpu", "rtx-4090", "--lora")
    assert result.exit_code == 0
    assert "longest sequence" in result.output
    assert "largest batch" in result.output
    assert "too much" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_what_is_given_chooses_the_other() -> None:
    def fields(*arguments: str) -> list[str]:
        document = json.loads(run(MODEL, "--gpu", "24GB", "--lora", "--json", *arguments).output)
        return [limit["field"] for limit in document["limits"]]

    assert fields("--seq-len", "1024") == ["batch_size"]
    assert fields("--batch-size", "2") == ["seq_len"]
    assert fields("--seq-len", "1024", "--batch-size", "2") == ["seq_len", "batch_size"]


def test_not_even_one() -> None:
    result = run("meta-llama/Llama-3.1-8B", "--gpu", "24GB")
    assert result.exit_code == 1
    assert "none, even 1 " in result.output


def test_the_default_sequence_is_one_that_the_model_has() -> None:
    document = json.loads(run("openai-community/gpt2", "--gpu", "24GB", "--json").output)
    assert [limit["recipe"]["seq_len"] for limit in document["limits"]] == [1024, 1024]
    assert run("openai-community/gpt2", "--gpu", "24GB", "--seq-len", "2048").exit_code == 2


def test_long_names_are_wrapped() -> None:
    long = ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "--gpu", "rtx-pro-6000-server", "--lora")
    assert max(map(len, run(*long).output.splitlines())) <= 80


def test_wrong_input() -> None:
    result = run(MODEL, "--gpu", "nothing")
    assert result.exit_code == 2
    assert "unknown GPU" in result.output


def test_one_is_no_plural() -> None:
    output = run(MODEL, "--gpu", "rtx-4090", "--lora").output
    assert "in batches of 1 sequence\n" in output
    assert "1 of 2,048 tokens" in run("meta-llama/Llama-3.1-8B", "--gpu", "24GB").output


def test_zero_is_over_all_cards() -> None:
    def ranks(*arguments: str) -> list[int]:
        document = json.loads(run(MODEL, "--zero", "3", "--json", *arguments).output)
        return [limit["recipe"]["world_size"] for limit in document["limits"]]

    assert ranks("--gpu", "4xA100-80GB") == [4, 4]
    assert ranks("--gpu", "4xA100-80GB", "--world-size", "2") == [2, 2]
