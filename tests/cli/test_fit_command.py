"""`vramplan fit`: what it prints, how it ends, and what it makes of wrong input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vramplan.cli.main import cli
from vramplan.hardware.catalogue import parse_gpu
from vramplan.hardware.gpu import GpuProcess, Gpus

MODEL = "meta-llama/Llama-3.2-1B"
TIME = ("--objective", "time")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["fit", *arguments], catch_exceptions=False)


def test_the_report() -> None:
    result = run(MODEL, "--gpu", "rtx-4090")
    assert result.exit_code == 0
    text = result.output
    assert text.startswith("Take full fine-tuning on GeForce RTX 4090.")
    for said in (
        "Runner-up:",
        "The best of each method",
        "> full fine-tuning",
        "Memory against cost",
        "With more",
        "GeForce RTX 5090",
        "2 x GeForce RTX 4090",
        "legal recipes",
        "Quality comes first",
        "tokens/s",
    ):
        assert said in text
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    command = text[text.index("To run it") :].splitlines()[1:]
    assert command[0].startswith(f"  vramplan launch {MODEL} ")


def test_json_is_the_plan() -> None:
    result = run(MODEL, "--gpu", "24GB", "--method", "lora", "--tokens", "2M", "--json")
    assert result.exit_code == 0
    document = json.loads(result.output)
    assert document["schema"] == 1
    assert document["method"] == "lora"
    assert document["goal"]["tokens"] == 2_000_000
    assert document["prediction"]["fits"] is True
    assert document["prediction"]["required"] == document["pick"]["required"]
    assert [step["count"] for step in document["with_more"]] == [1, 2]


def test_options_are_decisions() -> None:
    result = run(
        *(MODEL, "--gpu", "24GB", "--method", "qlora,lora", "--effective-batch", "8"),
        *(
            "--seq-len",
            "1k",
            "--lora-rank",
            "64",
            "--no-gradient-checkpointing",
            "--batch-size",
            "2",
        ),
        *("--optimizer", "adamw_torch", "--price", "0.5", "--json"),
    )
    recipe = json.loads(result.output)["recipe"]
    assert (recipe["batch_size"], recipe["gradient_accumulation_steps"]) == (2, 4)
    assert (recipe["seq_len"], recipe["lora"]["rank"]) == (1024, 64)
    assert recipe["gradient_checkpointing"] is False
    assert recipe["optimizer"] == "adamw_torch"


def test_no_lora_and_lora_narrow_the_methods() -> None:
    full = json.loads(run(MODEL, "--gpu", "24GB", "--no-lora", "--json").output)
    assert set(full["best_of_methods"]) == {"full"}
    adapters = json.loads(run(MODEL, "--gpu", "24GB", "--lora", "--json").output)
    assert set(adapters["best_of_methods"]) == {"lora", "int8", "qlora"}


def test_nothing_fits_is_an_answer() -> None:
    result = run("meta-llama/Llama-3.1-70B", "--gpu", "12GB", "--zero", "no")
    assert result.exit_code == 1
    text = result.output
    assert text.startswith("Nothing fits on 12 GB card.")
    for method in ("full fine-tuning", "LoRA", "int8 LoRA", "QLoRA"):
        assert f"\n  {method} " in text
    assert "The smallest card that would do: " in text
    assert "too much" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--price", "-1"), "price is -1.0"),
        (("--price", "cheap"), "price is 'cheap'"),
        (("--method", "dora"), "unknown method 'dora'"),
        (("--tokens", "some"), "tokens is 'some'"),
        (("--objective", "speed"), "unknown objective"),
        (("--method", "full", "--quantization", "nf4"), "method full and quantization nf4"),
        (("--batch-size", "3"), "batch_size 3 and effective batch 16 contradict"),
        (
            ("--batch-size", "2", "--effective-batch", "16", "--gradient-accumulation-steps", "4"),
            "batch_size 2 x gradient_accumulation_steps 4 and effective batch 16 contradict",
        ),
        (("--no-lora", "--lora-rank", "8"), "--no-lora and options of LoRA contradict"),
        (("--lora", "--method", "full"), "--lora and --method full contradict"),
        (("--zero", "2", "--offload-param", "cpu"), "ZeRO stage 2 and offload_param cpu"),
        (("--world-size", "2"), "world_size 2 and 24 GB card contradict"),
        (("--optimizer", "adamv"), "unknown optimizer 'adamv'"),
        (("--max-steps", "3"), "--max-steps means nothing without --launch"),
        (("--cpu",), "--cpu means nothing without --launch"),
        (("--host-memory", "64"), "host memory is '64'"),
        (("--price", "inf"), "price is inf"),
        (("--method", ""), "unknown method ''"),
        (("--method", "full", "--lora-rank", "8"), "options of LoRA and --method full contradict"),
        (("--lora-targets", "q_porj"), "unknown target module 'q_porj'"),
        (("--method", "full,lora", "--lora-targets", "q_porj"), "nearest: 'q_proj'"),
        (("--nvme-path", "/mnt"), "nvme_path '/mnt' with nothing that goes there"),
        (("--gpu", "v100-16gb", "--attention", "flash_attention_2"), "can't run flash_attention"),
        (("--gpu", "v100-16gb,t4", "--attention", "flash_attention_2"), "Use sdpa"),
        (("--all",), "--all means nothing without --json"),
        (("--which-gpu", "--launch"), "--which-gpu and --launch contradict"),
        (("--which-gpu", "--save", "x.json"), "--which-gpu and --save contradict"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], said: str) -> None:
    result = run(MODEL, "--gpu", "24GB", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_every_candidate_with_its_verdict() -> None:
    result = run(MODEL, "--gpu", "12GB", "--method", "full", "--json", "--all")
    document = json.loads(result.output)
    rows = document["candidates"]
    assert len(rows) > 500
    for row in rows:
        if row["verdict"] == "too large":
            assert row["too_much"] > 0
        elif row["verdict"] == "fits":
            assert row["seconds"] > 0
            beater = row["beaten_by"]
            if beater is not None:
                assert rows[beater]["verdict"] == "fits"
                assert rows[beater]["seconds"] <= row["seconds"]
        else:
            assert row["verdict"] == "too much host memory" or row["why"]
    assert any(row.get("beaten_by") is not None for row in rows)


def test_another_tools_file(tmp_path: Path) -> None:
    path = tmp_path / "ax.yaml"
    path.write_text(
        "base_model: meta-llama/Llama-3.2-1B\nadapter: qlora\nload_in_4bit: true\nlora_r: 32\n"
        "lora_target_linear: true\nsequence_len: 1024\nmicro_batch_size: 2\n"
        "gradient_accumulation_steps: 4\noptimizer: adamw_torch_fused\nbf16: true\n"
    )
    result = run("--from", str(path), "--gpu", "24GB", "--json")
    assert result.exit_code == 0
    # click 8.1's runner puts what goes to stderr before it
    document = json.loads(result.stdout[result.stdout.index("{") :])
    assert document["method"] == "qlora"
    recipe = document["recipe"]
    assert (recipe["batch_size"], recipe["gradient_accumulation_steps"]) == (2, 4)
    assert document["goal"]["effective_batch"] == 8


def test_what_a_file_trains_stays(tmp_path: Path) -> None:
    """16-bit LoRA of one sequence at a time is neither QLoRA nor a batch of 16, though both are
    what a recipe's defaults leave open; options win."""
    path = tmp_path / "ax.yaml"
    path.write_text(
        "base_model: meta-llama/Llama-3.1-8B\nadapter: lora\nlora_r: 8\nsequence_len: 2048\n"
        "lora_target_linear: true\nmicro_batch_size: 1\ngradient_accumulation_steps: 1\n"
        "bf16: true\n"
    )

    def goal(*options: str) -> tuple[list[str], int]:
        output = run("--from", str(path), "--gpu", "24GB", "--json", *options).stdout
        document = json.loads(output[output.index("{") :])
        return document["goal"]["methods"], document["goal"]["effective_batch"]

    assert goal() == (["lora"], 1)
    assert goal("--lora-rank", "4") == (["lora"], 1)
    assert goal("--quantization", "nf4")[0] == ["lora", "int8", "qlora"]
    assert goal("--method", "int8,qlora", "--effective-batch", "4") == (["int8", "qlora"], 4)


def test_options_override_a_ds_config(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    words = (MODEL, "--gpu", "2xh100-80gb", "--deepspeed", str(path), "--zero", "2", "--json")
    output = run(*words).stdout
    recipe = json.loads(output[output.index("{") :])["recipe"]
    assert recipe["deepspeed"]["stage"] == 2


def test_an_option_of_lora_decides_for_adapters() -> None:
    """As it does for `estimate`."""
    document = json.loads(run(MODEL, "--gpu", "80GB", "--lora-rank", "64", "--json").output)
    assert (document["method"], document["recipe"]["lora"]["rank"]) == ("lora", 64)
    both = run(MODEL, "--gpu", "80GB", "--method", "full,lora", "--lora-rank", "64", "--json")
    assert json.loads(both.output)["method"] == "full"


def test_what_rounding_takes_is_said() -> None:
    fused = run(MODEL, "--gpu", "80GB", "--method", "full").output
    assert "Weights, gradients and states are bf16: small updates round away." in fused
    paged = run(MODEL, "--gpu", "80GB", "--method", "full", "--optimizer", "paged_adamw_32bit")
    assert "- Weights and gradients are bf16: small updates round away." in paged.output
    wide = run(MODEL, "--gpu", "80GB", "--method", "full", "--dtype", "fp32").output
    assert "round away" not in wide


def test_of_unlike_cards_one_kind_may_be_enough() -> None:
    decided = ("--world-size", "2", "--attention", "flash_attention_2")
    result = run(MODEL, "--gpu", "v100-16gb,2x24GB", *decided, "--json")
    document = json.loads(result.output)
    assert (document["gpu"]["id"], document["recipe"]["world_size"]) == ("24gb", 2)


def test_saving(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert run(MODEL, "--gpu", "24GB", "--save", str(path)).exit_code == 0
    assert json.loads(path.read_text())["recipe"]
    again = run(MODEL, "--gpu", "24GB", "--save", str(path))
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_a_recipe_files_values_are_decisions(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('optimizer = "paged_adamw_32bit"\nseq_len = 512\n[lora]\nrank = 4\n')
    document = json.loads(run(MODEL, "--gpu", "24GB", "--recipe", str(path), "--json").output)
    assert document["recipe"]["optimizer"] == "paged_adamw_32bit"
    assert document["recipe"]["lora"]["rank"] == 4
    assert document["goal"]["seq_len"] == 512


def test_which_gpu() -> None:
    result = run(MODEL, "--gpu", "4090", "--which-gpu", "--method", "lora", "--price", "1")
    assert result.exit_code == 0
    assert "Take " in result.output
    assert "GeForce RTX 4090" in result.output
    assert "Without prices" not in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_which_gpu_passes_over_what_a_card_cannot_run() -> None:
    words = ("--which-gpu", "--method", "lora", "--attention", "flash_attention_2", "--json")
    offers = json.loads(run(MODEL, "--gpu", "v100-16gb,a40", *words).output)
    assert {offer["gpu"] for offer in offers} == {"a40"}
    assert run(MODEL, "--gpu", "v100-16gb,t4", *words).exit_code == 2
    several = json.loads(
        run(MODEL, "--gpu", "a40", "--which-gpu", "--world-size", "16", "--json").output
    )
    assert several[0]["count"] == 16


def test_which_gpu_is_quickest() -> None:
    words = ("--gpu", "h100-80gb,a40,rtx-4090", "--which-gpu", "--method", "lora", "--json")
    by_cost, by_time = (json.loads(run(MODEL, *words, *o).output) for o in ((), TIME))
    hours = [offer["cost"]["hours"] for offer in by_time]
    assert hours == sorted(hours)
    assert by_cost[0]["gpu"] != by_time[0]["gpu"] == "h100-80gb"


def test_a_run_sees_the_cards_of_its_plan_alone() -> None:
    from vramplan.cli.fit_launch import visible
    from vramplan.planner.goal import Goal
    from vramplan.planner.plan import fit

    plan = fit(MODEL, "4xrtx-4090", Goal(pins={"world_size": 2}))
    here = replace(plan, gpus=replace(plan.gpus, indices=(1, 3, 4, 6)))
    assert visible(here) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,3"}
    assert visible(replace(plan, gpus=replace(plan.gpus, indices=(0, 0)))) == {}


def test_launching_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramplan.hardware.nvml.gpus_here", lambda: ([], "No driver."))
    result = run(MODEL, "--gpu", "24GB", "--launch")
    assert result.exit_code == 2
    assert "--launch needs a GPU" in result.output
    assert "--cpu" in result.output


def in_use() -> list[Gpus]:
    """A 24 GB card of which another process has 10."""
    return [
        replace(
            parse_gpu("rtx-4090"),
            free=14 * 2**30,
            others=(GpuProcess(pid=77, used=9 * 2**30),),
            indices=(0,),
        )
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("fit", MODEL),
        ("max", MODEL),
        ("ladder", MODEL),
        ("sweep", MODEL, "--over", "seq=1k,2k"),
        ("fit", "meta-llama/Llama-3.1-405B"),
    ],
    ids=" ".join,
)
def test_free_memory_counts_and_is_said(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vramplan.hardware.nvml.gpus_here", lambda: (in_use(), ""))
    output = CliRunner().invoke(cli, list(words), catch_exceptions=False).output
    said = " ".join(output.split())
    assert "has 14.0 GiB free of 23.5 GiB; other processes use it (77)." in said
    assert "What is free now is what counts." in said
    if words == ("fit", MODEL):
        assert "GeForce RTX 4090 with nothing else on it:" in said
        assert "this command, with --launch" in said


def test_a_plan_for_a_larger_card_is_not_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vramplan.hardware.nvml.gpus_here", lambda: (in_use(), ""))
    monkeypatch.setattr("vramplan_launcher.needs.check_installed", lambda job: None)
    words = ("--gpu", "80GB", "--method", "full", "--launch", "--random-weights")
    result = run(MODEL, *words)
    assert result.exit_code == 1
    assert "It was not started: it does not fit." in result.output


def test_the_tiny_model_is_planned_for_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = {}

    def start(job: object, gpus: object, here: int, reason: str, way: object) -> int:
        started.update(job=job, way=way)
        way.output.mkdir(parents=True)  # type: ignore[attr-defined]
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vramplan.cli.launching.start", start)
    result = run(MODEL, "--launch", "--cpu", "--max-steps", "2")
    assert result.exit_code == 0
    job, way = started["job"], started["way"]
    assert (job.cpu, job.random_weights, job.verify) == (True, True, True)
    assert job.training.max_steps == 2
    assert job.recipe.lora is not None
    assert way.output.parent.name == "runs"
    assert json.loads((way.output / "plan.json").read_text())["model"]["id"] == "tiny-llama"
    run(MODEL, "--launch", "--cpu")
    assert started["way"].output == way.output.with_name(f"{way.output.name}-2")
    assert "runs on the processor" in result.output


def test_the_help_names_no_default_of_what_is_chosen() -> None:
    output = run("--help").output
    assert "per_device_train_batch_size.\n" in output
    assert "Tokens a sequence" in output
    assert "[2048]" in output
