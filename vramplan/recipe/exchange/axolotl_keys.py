"""Axolotl's keys by what they mean to an estimate.

Source: axolotl 0.18, src/axolotl/utils/schemas/ (config.py, model.py, peft.py, training.py) and the
arguments of its plugins (src/axolotl/integrations/).
"""

from __future__ import annotations

from vramplan.recipe.exchange.keys import (
    LOGITS_SMALLER,
    MORE_TRAINED,
    OFFLOADED,
    OTHER_KERNEL,
    OTHER_MODEL,
    SHARDED,
    words,
)

_OTHER_METHOD = "another way of training, which is not modelled"

UNMODELLED: dict[str, str] = {
    "lora_modules_to_save": MORE_TRAINED,
    "lora_target_parameters": MORE_TRAINED,
    "peft_trainable_token_indices": MORE_TRAINED,
    "peft_use_dora": "DoRA keeps a magnitude and the norms of the weights; the estimate is low",
    "lora_rank_pattern": "all adapters are taken to have the rank lora_r",
    "peft_layers_to_transform": "adapters are taken to be on every layer; the estimate is high",
    "peft_layers_pattern": "adapters are taken to be on every layer; the estimate is high",
    "peft_layer_replication": OTHER_MODEL,
    "lora_on_cpu": "adapters are taken to be on the GPU",
    "unfrozen_parameters": "all parameters are taken to be trained; the estimate is high",
    "lisa_n_layers": _OTHER_METHOD,
    "relora": _OTHER_METHOD,
    "qat": _OTHER_METHOD,
    "cut_cross_entropy": LOGITS_SMALLER,
    "chunked_cross_entropy": LOGITS_SMALLER,
    "liger_fused_linear_cross_entropy": LOGITS_SMALLER,
    "liger_cross_entropy": "it works in place on the logits, and the estimate is high",
    "flash_attn_cross_entropy": OTHER_KERNEL,
    "liger_rope": OTHER_KERNEL,
    "liger_rms_norm": OTHER_KERNEL,
    "liger_layer_norm": OTHER_KERNEL,
    "liger_swiglu": OTHER_KERNEL,
    "liger_glu_activation": OTHER_KERNEL,
    "lora_mlp_kernel": OTHER_KERNEL,
    "lora_qkv_kernel": OTHER_KERNEL,
    "lora_o_kernel": OTHER_KERNEL,
    "lora_embedding_kernel": OTHER_KERNEL,
    "flash_attn_fuse_mlp": OTHER_KERNEL,
    "fused_attn_kernel": OTHER_KERNEL,
    "use_kernels": OTHER_KERNEL,
    "torch_compile": "compiled code keeps other activations",
    "deepcompile": "compiled code keeps other activations",
    "tiled_mlp": "the MLP works on a part of the sequence at a time, and the estimate is high",
    "activation_offloading": OFFLOADED,
    "layer_offloading": "frozen layers lie on the host, and the estimate is high",
    "selective_checkpointing": "every layer is taken to be recomputed whole",
    "fp8": "matrices are taken to be multiplied in the dtype of the weights",
    "quantize_moe_experts": "experts are taken to stay in 16 bits; the estimate is high",
    "use_sonicmoe": OTHER_KERNEL,
    "use_scattermoe": OTHER_KERNEL,
    "diffusion": _OTHER_METHOD,
    "expert_parallel_size": SHARDED,
    "sequence_parallel_degree": SHARDED,
    "context_parallel_size": SHARDED,
    "tensor_parallel_size": SHARDED,
    "dp_shard_size": SHARDED,
    "resize_token_embeddings_to_32x": "the vocabulary is taken as the model's",
    "tokens": "the vocabulary is taken as the model's",
    "shrink_embeddings": "the vocabulary is taken as the model's",
    "overrides_of_model_config": OTHER_MODEL,
    "overrides_of_model_kwargs": OTHER_MODEL,
    "model_quantization_config": "weights are taken as load_in_4bit and load_in_8bit say",
    "gptq": "weights are taken to be quantized by bitsandbytes",
    "auto_find_batch_size": "Trainer may halve the batch; the estimate is of the one that is given",
    "embeddings_skip_upcast": "the estimate has embeddings as peft leaves them",
    "fp32_norms": "the estimate has norms as peft leaves them",
    "gpu_memory_limit": "nothing is capped",
    "max_memory": "nothing is capped",
}
"""Set, they change memory, and nothing of it is modelled: why, for the warning."""

HARMLESS = words("""
    model_type tokenizer_type base_model_config cls_model_config tokenizer_config tokenizer_use_fast
    tokenizer_legacy tokenizer_use_mistral_common processor_type processor_kwargs
    tokenizer_save_jinja_files trust_remote_code experimental_skip_move_to_device use_onebitllms
    model_quantization_config_kwargs output_dir hub_model_id hub_strategy hub_revision
    save_safetensors special_tokens lora_model_dir lora_fan_in_fan_out lora_alpha_pattern peft
    peft_use_rslora peft_init_lora_weights peft_ensure_weight_tying qlora_sharded_model_loading
    loraplus_lr_ratio loraplus_lr_embedding merge_lora merge_method relora_prune_ratio
    relora_prune_method relora_cpu_offload eval_batch_size train_on_inputs group_by_length
    embedding_lr embedding_lr_scale weight_decay torchdistx_path lr_scheduler lr_scheduler_kwargs
    lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups
    adam_epsilon adam_epsilon2 adam_beta1 adam_beta2 adam_beta3 max_grad_norm strict
    resume_from_checkpoint auto_resume_from_checkpoints mean_resizing_embeddings reinit_weights
    trainer_cls trl vllm ebft quantization dynamic_checkpoint center_rewards_coefficient num_labels
    datasets test_datasets shuffle_merged_datasets shuffle_before_merging_datasets
    dataset_prepared_path dataset_shard_num dataset_shard_idx skip_prepare_dataset
    num_dataset_shards_to_save pretraining_dataset dataset_processes dataset_num_proc
    dataset_exact_deduplication dataset_keep_in_memory dataloader_pin_memory dataloader_num_workers
    dataloader_prefetch_factor dataloader_drop_last accelerator_config remove_unused_columns
    push_dataset_to_hub hf_use_auth_token device device_map world_size local_rank ddp ddp_timeout
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters do_causal_lm_eval
    eval_causal_lm_metrics do_bench_eval bench_dataset bench_split metric_for_best_model
    greater_is_better loss_watchdog_threshold loss_watchdog_patience gc_steps
    torch_empty_cache_steps gc_collect_steps fp8_enable_fsdp_float8_all_gather tf32
    freeze_mm_modules excess_length_strategy eval_sequence_len min_sample_len max_prompt_len
    sample_packing_group_size sample_packing_bin_size sample_packing_sequentially
    sample_packing_mp_start_method eval_sample_packing pad_to_multiple_of curriculum_sampling
    multipack_real_batches batch_flattening use_pose pose_split_on_token_ids pose_max_context_len
    pose_num_chunks pretrain_multipack_buffer_size pretrain_multipack_attn
    pretraining_sample_concatenation streaming streaming_multipack_buffer_size
    flex_attn_compile_kwargs large_head_attention experts_implementation scaling_softmax
    scaling_softmax_factor scaling_softmax_bias chunked_cross_entropy_num_chunks use_eaft eaft_alpha
    eaft_k tiled_mlp_num_shards tiled_mlp_use_original_mlp llama4_linearized_experts fsdp_version
    fp32_norm_classes fsdp_final_state_dict_type val_set_size dp_replicate_size heads_k_stride
    ring_attn_func added_tokens_overrides torch_compile_backend torch_compile_mode
    torch_compile_options warmup_steps warmup_ratio eval_steps evals_per_epoch eval_strategy
    save_steps saves_per_epoch save_strategy save_total_limit save_first_step logging_steps
    early_stopping_patience load_best_model_at_end save_only_model use_tensorboard profiler_steps
    profiler_steps_start include_tokens_per_second include_tkps neftune_noise_alpha orpo_alpha
    simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight rl_beta low_cpu_mem_usage
    chat_template chat_template_jinja chat_template_kwargs eot_tokens default_system_message
    fix_untrained_tokens is_preprocess preprocess_iterable total_num_tokens total_supervised_tokens
    sample_packing_eff_est axolotl_config_path is_falcon_derived_model is_llama_derived_model
    is_mistral_derived_model is_qwen_derived_model plugins generate_samples num_generation_samples
    generation_max_new_tokens generation_temperature generation_top_p generation_top_k
    generation_prompt_ratio generation_do_sample type_of_model revision_of_model rope_scaling
    noisy_embedding_alpha evaluation_strategy eval_table_size eval_max_new_tokens
    liger_use_token_scaling liger_rms_norm_gated xformers_attention
    wandb_project wandb_entity wandb_watch wandb_name wandb_log_model wandb_run_id wandb_mode
    use_wandb mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_mlflow
    hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name use_trackio
    trackio_project_name trackio_run_name trackio_space_id use_otel_metrics otel_metrics_host
    otel_metrics_port use_ray ray_run_name ray_num_workers resources_per_worker
    comet_experiment_config comet_experiment_key comet_mode comet_online gradio_title gradio_share
    gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature
    dpo_use_weighting dpo_loss_type dpo_loss_weights dpo_label_smoothing dpo_use_liger_kernel
    dpo_padding_free dpo_generate_during_eval dpo_norm_loss dpo_use_logits_to_keep dpo_beta
    precompute_ref_log_probs rpo_alpha qgalore_rank qgalore_update_proj_gap qgalore_scale
    qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size
    qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size dion_lr dion_momentum
    dion_rank_fraction dion_rank_multiple_of gemma4_hybrid_attn_impl lisa_layers_attribute
    lisa_step_interval max_packed_sequence_len flash_optimum flash_attn_rms_norm flash_attn_d512
    sdpa_varlen s2_attention image_size image_resize_algorithm role_boundaries
    lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear
    peft_autocast_adapter_dtype
    gptq_groupsize gptq_model_v1 gptq_disable_exllama adam_eps use_swanlab swanlab_project
    swanlab_experiment_name swanlab_description swanlab_mode swanlab_log_completions
    jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps debug
    """)
"""They cost no memory on the GPU, or nothing that an estimate counts."""

REFUSED: dict[str, str] = {
    "rl": "preferences and reinforcement hold more than one model or batch",
    "reward_model": "reward models have another head",
    "process_reward_model": "reward models have another head",
    "fsdp": "FSDP is not modelled; deepspeed's stage 3 shards as much",
    "fsdp_config": "FSDP is not modelled; deepspeed's stage 3 shards as much",
}
"""Set, the run is another one altogether, and there is no estimate of it."""
