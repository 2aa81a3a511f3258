"""A child process that has DeepSpeed and transformers read configs: one import for all of them.

stdin: {"cases": a list of {"values", "ranks", "settings", "hidden"}, "accelerate": paths of YAML,
"odd": configs to accept or refuse}; stdout's last line: what was read.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import deepspeed
from accelerate.commands.config.config_args import load_config_from_file
from deepspeed.runtime import config as ds
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero import config as zero
from deepspeed.runtime.zero import offload_config
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig


class Asked(dict[str, Any]):
    """A dict that remembers what it was asked for."""

    log: set[str]

    def __contains__(self, key: object) -> bool:
        self.log.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.log.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def parsed(values: dict[str, Any], ranks: int) -> dict[str, Any]:
    deepspeed.comm.get_rank = lambda *_: 0
    deepspeed.comm.get_world_size = lambda *_: ranks
    found = ds.DeepSpeedConfig(values)
    return {
        "train_batch_size": found.train_batch_size,
        "batch_size": found.train_micro_batch_size_per_gpu,
        "accumulation": found.gradient_accumulation_steps,
        "clipping": found.gradient_clipping,
        "bf16": found.bfloat16_config.enabled,
        "fp16": found.float16_config.enabled,
        "optimizer": found.optimizer_name,
        "params": found.optimizer_params,
        "zero": found.zero_config.model_dump(by_alias=True, mode="json"),
        "aio": found.aio_config,
    }


def filled(values: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """As Trainer does: TrainingArguments' values first, then the model's; a mismatch raises."""
    args = SimpleNamespace(
        world_size=case["ranks"],
        save_on_each_node=False,
        fp16_full_eval=False,
        bf16_full_eval=False,
        get_warmup_steps=lambda _: 0,
        **case["settings"],
    )
    config = HfTrainerDeepSpeedConfig(values)
    config.trainer_config_process(args)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=case["hidden"]))
    config.trainer_config_finalize(args, model, 10)
    assert isinstance(config.config, dict)
    return config.config


def accepts(values: dict[str, Any]) -> bool:
    deepspeed.comm.get_world_size = lambda *_: 1
    try:
        ds.DeepSpeedConfig(values)
    except Exception:
        return False
    return True


def names(model: Any) -> list[str]:
    fields = model.model_fields
    return [*fields, *(f.alias for f in fields.values() if f.alias)]


def known() -> dict[str, list[str]]:
    """Every key that DeepSpeed reads, by section."""
    asked = Asked({"train_batch_size": 1, "optimizer": {"type": "Adam"}})
    asked.log = set()
    deepspeed.comm.get_world_size = lambda *_: 1
    ds.DeepSpeedConfig(asked)
    return {
        "": sorted(asked.log),
        "zero_optimization": names(zero.DeepSpeedZeroConfig),
        "zero_optimization.offload_optimizer": names(
            offload_config.DeepSpeedZeroOffloadOptimizerConfig
        ),
        "zero_optimization.offload_param": names(offload_config.DeepSpeedZeroOffloadParamConfig),
        "bf16": names(DeepSpeedBF16Config),
        "fp16": names(DeepSpeedFP16Config),
        "removed": [
            *ds._REMOVED_TOP_LEVEL_CONFIG_KEYS,
            *(f"zero_optimization.{key}" for key in ds._REMOVED_ZERO_CONFIG_KEYS),
        ],
    }


def main() -> None:
    asked = json.load(sys.stdin)
    read = []
    for case in asked["cases"]:
        values = filled(case["values"], case)
        read.append({"filled": values, "parsed": parsed(values, case["ranks"])})
    odd = [accepts(values) for values in asked["odd"]]
    clusters = [load_config_from_file(path).to_dict() for path in asked["accelerate"]]
    found = {"read": read, "known": known(), "accelerate": clusters, "odd": odd}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
