"""Every key that DeepSpeed 0.19.8 reads of a ds_config.json, and what it means to an estimate.

Sources: runtime/config.py, runtime/constants.py, runtime/zero/config.py, runtime/zero/
offload_config.py, runtime/precision_config.py, runtime/activation_checkpointing/config.py,
runtime/swap_tensor/aio_config.py.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["honoured", "no memory", "no effect", "not modelled", "unknown"]
NOTHING: tuple[Any, ...] = (None, False, {}, [], 0, 1, "none", "auto")
"""Values that ask for nothing, of keys that have no default of their own here."""

HONOURED = frozenset(
    (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        *("bf16.enabled", "bfloat16.enabled", "fp16.enabled", "optimizer.type"),
        *("optimizer.params.torch_adam", "zero_optimization.cpu_offload"),
        "zero_optimization.cpu_offload_param",
    )
)
"""Beyond those that are a field of DeepSpeed."""

# A field of DeepSpeed (the dataclass), and its key under zero_optimization where it is another.
FIELDS = {
    "stage": "stage",
    "reduce_bucket_size": "reduce_bucket_size",
    "allgather_bucket_size": "allgather_bucket_size",
    "overlap_comm": "overlap_comm",
    "contiguous_gradients": "contiguous_gradients",
    "reduce_scatter": "reduce_scatter",
    "round_robin_gradients": "round_robin_gradients",
    "parameter_alignment": "parameter_alignment",
    "memory_efficient_linear": "memory_efficient_linear",
    "sub_group_size": "sub_group_size",
    "stage3_prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold": "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold": "stage3_model_persistence_threshold",
    "stage3_max_live_parameters": "stage3_max_live_parameters",
    "stage3_max_reuse_distance": "stage3_max_reuse_distance",
    "offload_optimizer": "offload_optimizer.device",
    "pin_memory": "offload_optimizer.pin_memory",
    "nvme_path": "offload_optimizer.nvme_path",
    "optimizer_buffer_count": "offload_optimizer.buffer_count",
    "pipeline_read": "offload_optimizer.pipeline_read",
    "pipeline_write": "offload_optimizer.pipeline_write",
    "fast_init": "offload_optimizer.fast_init",
    "offload_param": "offload_param.device",
    "pin_param_memory": "offload_param.pin_memory",
    "param_buffer_count": "offload_param.buffer_count",
    "param_buffer_size": "offload_param.buffer_size",
    "max_in_cpu": "offload_param.max_in_cpu",
}
ALSO = {"offload_param.nvme_path": "nvme_path"}
"""A second key of a field."""
ALIASES = {
    f"zero_optimization.{short}": f"zero_optimization.stage3_{short}"
    for short in (
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
        *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save"),
        *("module_granularity_threshold", "use_all_reduce_for_fetch_params"),
        "allgather_sequential",
    )
}
"""pydantic takes a field by its own name too (populate_by_name)."""

NO_MEMORY = frozenset(
    (
        *("gradient_clipping", "steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
        *("dump_state", "disable_python_gc", "dataloader_drop_last", "log_level", "scheduler"),
        *("tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "checkpoint", "timers"),
        *("aio", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "autotuning"),
        *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
        *("disable_allgather", "vocabulary_size", "use_data_before_expert_parallelism"),
        *("seq_parallel_communication_data_type", "datastates_ckpt", "optimizer.params"),
        *("optimizer.legacy_fusion", "bf16.immediate_grad_update", "bf16.check_grad_overflow"),
        *("fp16.auto_cast", "fp16.loss_scale", "fp16.initial_scale_power"),
        *("fp16.loss_scale_window", "fp16.hysteresis", "fp16.consecutive_hysteresis"),
        "fp16.min_loss_scale",
        *(
            f"zero_optimization.{key}"
            for key in (
                *("allgather_partitions", "use_multi_rank_bucket_allreduce", "elastic_checkpoint"),
                *("load_from_fp32_weights", "stage3_gather_16bit_weights_on_model_save"),
                *("stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters"),
                *("pipeline_loading_checkpoint", "override_module_apply", "legacy_stage1"),
                *("log_trace_cache_warnings", "enable_sanity_checks", "cpu_offload_use_pin_memory"),
                "offload_optimizer.cpuadam_cores_perc",
            )
        ),
    )
)
"""A key of a section stands for all that is in it."""

NO_EFFECT = {
    "activation_checkpointing": (
        "transformers' models don't call DeepSpeed's checkpointing: Trainer's "
        "gradient_checkpointing does it (--gradient-checkpointing)"
    ),
    "pipeline": "it is read by PipelineModule alone, which transformers' models are not",
}

NOT_MODELLED: dict[str, tuple[Any, ...]] = {
    "torch_autocast": ({"enabled": False}, {}),
    "communication_data_type": (),
    "data_types": ({},),
    "managed_gradient_accumulation": (True,),
    "tensor_parallel": ({}, {"autotp_size": 0}, {"autotp_size": 1}),
    "expert_parallel": ({}, {"enabled": False}),
    "hybrid_engine": ({}, {"enabled": False}),
    "weight_quantization": (),
    "compile": ({}, {"deepcompile": False}),
    "data_efficiency": ({}, {"enabled": False}),
    "flops_profiler": ({}, {"enabled": False}),
    "sequence_parallel_size": (),
    "inference": (),
    "msamp": ({"enabled": False},),
    "bf16.bf16_master_weights_and_grads": (),
    "bf16.bf16_optimizer_states": (),
    "fp16.fp16_master_weights_and_grads": (),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.stage3_module_granularity_threshold": (),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": (),
    "zero_optimization.stage3_allgather_sequential": (),
    "zero_optimization.zero_hpz_partition_size": (),
    "zero_optimization.zero_quantized_weights": (),
    "zero_optimization.zero_quantized_nontrainable_weights": (),
    "zero_optimization.zero_quantized_gradients": (),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (),
    "zero_optimization.leaf_module": (),
    "zero_optimization.zenflow": (),
    "zero_optimization.offload_optimizer.ratio": (1.0,),
    "zero_optimization.offload_optimizer.super_offload": (),
}
"""Keys that change memory, and the values, besides those of NOTHING, with which they don't."""

REMOVED = frozenset(
    (
        *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients"),
        *("eigenvalue", "sparse_attention", "elasticity", "graph_harvesting"),
        *("curriculum_learning", "progressive_layer_drop"),
        "zero_optimization.mics_shard_size",
        "zero_optimization.mics_hierarchical_params_gather",
        "zero_optimization.zeropp_loco_param",
    )
)
"""runtime/config.py refuses a file that has one (_reject_removed_config_keys)."""

OPEN = ("optimizer", "bf16", "bfloat16", "fp16", "zero_optimization")
"""Sections that are looked into; of others the section's own key is known, and no more."""
STRICT = ("bf16", "bfloat16", "fp16", "zero_optimization")
"""DeepSpeedConfigModel (runtime/config_utils.py) refuses what it does not know."""

_FIELD_KEYS = frozenset(f"zero_optimization.{key}" for key in (*FIELDS.values(), *ALSO))
SECTIONS = frozenset(
    f"{key.rpartition('.')[0]}" for key in (*_FIELD_KEYS, *HONOURED, *NO_MEMORY) if "." in key
) - {"optimizer.params"}
KNOWN = frozenset(
    (*_FIELD_KEYS, *HONOURED, *NO_MEMORY, *NO_EFFECT, *NOT_MODELLED, *ALIASES, *SECTIONS)
)


def kind_of(key: str, value: Any) -> Kind:
    """What a key, dotted, means with this value."""
    key = ALIASES.get(key, key)
    if key.startswith("optimizer.params.") and key not in HONOURED:
        return "no memory"
    if key in _FIELD_KEYS or key in HONOURED:
        return "honoured"
    if key in NO_MEMORY:
        return "no memory"
    if key in NO_EFFECT:
        asked = value.values() if isinstance(value, dict) else (value,)
        return "no effect" if any(map(_asks, asked)) else "no memory"
    if key in NOT_MODELLED:
        harmless = NOT_MODELLED[key]
        idle = value in harmless or value is None if harmless else not _asks(value)
        return "no memory" if idle else "not modelled"
    return "unknown"


def _asks(value: Any) -> bool:
    return value is True or value not in NOTHING
