"""`vramplan estimate` of wrong input: one clear sentence, exit 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.cli.main import main

SMALL = "meta-llama/Llama-3.2-1B"
Captured = pytest.CaptureFixture[str]

WRONG = {
    "unknown model": (("meta-lama/Llama-3.1-8B", "--offline"), "meta-llama/Llama-3.1-8B"),
    "no such file": (("./nowhere/config.json",), "no such file or folder"),
    "unknown GPU": ((SMALL, "--gpu", "rtx-4900"), "nearest: 'rtx-4090'"),
    "GPU of no size": ((SMALL, "--gpu", "0GB"), "more than zero"),
    "zero batch": ((SMALL, "--batch-size", "0"), "batch_size is 0: it must be an integer"),
    "negative sequence": ((SMALL, "--seq-len", "-5"), "seq_len is '-5'"),
    "sequence of no number": ((SMALL, "--seq-len", "long"), "seq_len is 'long'"),
    "zero accumulation": ((SMALL, "--gradient-accumulation-steps", "0"), "at least 1"),
    "zero rank": ((SMALL, "--lora-rank", "0"), "lora.rank is 0"),
    "dropout of 1": ((SMALL, "--lora-dropout", "1"), "lora.dropout is 1.0"),
    "alpha of no number": ((SMALL, "--lora-alpha", "x"), "'x' is not a valid float"),
    "beyond learned positions": (("gpt2", "--seq-len", "2048"), "at most 1024"),
    "unknown dtype": (
        (SMALL, "--dtype", "float16"),
        "allowed are fp32, bf16, fp16; nearest: 'fp16'",
    ),
    "unknown precision": ((SMALL, "--mixed-precision", "fp8"), "allowed are no, bf16, fp16"),
    "unknown quantization": ((SMALL, "--quantization", "4bit", "--lora"), "nearest: 'nf4'"),
    "unknown optimizer": ((SMALL, "--optim", "adamv"), "nearest: 'adamw_torch"),
    "optimizer elsewhere": ((SMALL, "--optim", "adamw_torch_xla"), "no CUDA GPU runs it"),
    "projection of nothing": (
        (SMALL, "--optim", "galore_adamw", "--optim-target-modules", "c_attn"),
        "allowed are down_proj, gate_proj",
    ),
    "no such paged one": ((SMALL, "--optim", "paged_sgd"), "adamw, ademamix and lion only"),
    "unknown attention": ((SMALL, "--attention", "flash"), "nearest: 'flash_attention_2'"),
    "unknown allocator": ((SMALL, "--allocator", "x"), "expandable_segments, default"),
    "targets that match nothing": ((SMALL, "--lora-targets", "c_attn"), "q_proj"),
    "no targets": ((SMALL, "--lora-targets", ","), "lora.target_modules"),
    "int8 with full fine-tuning": ((SMALL, "--quantization", "int8"), "Add LoRA adapters"),
    "fp16 unscaled": (
        (SMALL, "--dtype", "fp16", "--mixed-precision", "fp16"),
        "Attempting to unscale FP16 gradients",
    ),
    "LoRA and not": ((SMALL, "--no-lora", "--lora-rank", "8"), "--no-lora"),
    "unknown mode": ((SMALL, "--mode", "serving"), "allowed are training, inference"),
    "not of this mode": ((SMALL, "--mode", "inference", "--optim", "sgd"), "--optimizer means"),
    "not of training": ((SMALL, "--prompt", "5"), "--prompt means nothing with --mode training"),
    "no recipe file": ((SMALL, "--recipe", "nowhere.toml"), "can't read recipe file"),
    "unknown option": ((SMALL, "--quantisation", "nf4"), "--quantization"),
    "no model": ((), "Missing argument 'MODEL'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case: str, capsys: Captured) -> None:
    arguments, words = WRONG[case]
    assert main(["estimate", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert shown.err.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "llama", "hidden_size": 64,', "config.json"),
        ("", "config.json"),
        ("[1, 2]", "config.json"),
        ('{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 9}', "hidden_size"),
        ('{"hidden_size": 64}', "model_type"),
        ('{"model_type": "lama", "hidden_size": 64}', "llama"),
    ],
)
def test_a_broken_config(text: str, words: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "config.json").write_text(text)
    assert main(["estimate", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.startswith("Error: ")
    assert shown.err.count("\n") == 1


def test_a_malformed_recipe_file(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "run.json"
    for text, words in (("{", "malformed"), ('{"batchsize": 2}', "nearest: 'batch_size'")):
        file.write_text(text)
        assert main(["estimate", SMALL, "--recipe", str(file)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--zero", "4"), "deepspeed.stage is 4"),
        (("--zero", "x"), "deepspeed.stage is 'x'"),
        (("--offload-optimizer", "cpu"), "--offload-optimizer without ZeRO"),
        (("--zero", "2", "--offload-param", "cpu"), "offload_param with stage 2"),
        (("--zero", "2", "--offload-optimizer", "disk"), "offload_optimizer 'disk'"),
        (("--zero", "2", "--via", "trace"), "without DeepSpeed"),
    ],
)
def test_zero_options_that_mean_nothing(
    flags: tuple[str, ...], said: str, capsys: Captured
) -> None:
    assert main(["estimate", SMALL, *flags]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
