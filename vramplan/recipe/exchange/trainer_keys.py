"""TrainingArguments' keys, and those that TRL and LLaMA-Factory share with it, by what they mean.

Sources: transformers 5.17, training_args.py (and names that older versions dump);
TRL 1.16, trainer/sft_config.py, trainer/base_config.py, trainer/model_config.py, scripts/utils.py.
"""

from __future__ import annotations

from vramplan.recipe.exchange.keys import MORE_TRAINED, OFFLOADED, OTHER_KERNEL, words

UNMODELLED: dict[str, str] = {
    "use_liger_kernel": f"{OTHER_KERNEL}, and the loss keeps far less of the logits: the estimate "
    "is high",
    "torch_compile": "compiled code keeps other activations",
    "auto_find_batch_size": "Trainer may halve the batch; the estimate is of the one that is given",
    "parallelism_config": "the estimate has every rank with whole sequences and layers",
    "tp_size": "the estimate has every rank with whole sequences and layers",
    "label_smoothing_factor": "the label smoother takes the log-softmax of all logits once more; "
    "the estimate is low",
    "use_cache": "keys and values are kept besides; the estimate is low",
    "neftune_noise_alpha": "noise as large as the embeddings' output is not counted",
    "include_for_metrics": "what metrics hold on to is not counted",
}

HARMLESS = words("""
    output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    average_tokens_across_devices logging_strategy logging_steps logging_first_step logging_dir
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy evaluation_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps batch_eval_metrics save_only_model save_strategy
    save_steps save_on_each_node save_total_limit save_safetensors enable_jit_checkpoint push_to_hub
    hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu tf32
    bf16_full_eval fp16_full_eval accelerator_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_in_order dataloader_multiprocessing_context remove_unused_columns label_names
    train_sampling_strategy length_column_name group_by_length ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    torch_compile_backend torch_compile_mode liger_kernel_config torch_empty_cache_steps debug
    skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap _n_gpu n_gpu
    overwrite_output_dir no_cuda use_mps_device use_ipex jit_mode_eval half_precision_backend
    fp16_opt_level fp16_backend past_index dataloader_pin_memory_device split_batches
    dispatch_batches torchdynamo ray_scope mp_parameters tpu_num_cores tpu_metrics_debug
    include_inputs_for_metrics include_tokens_per_second push_to_hub_model_id
    push_to_hub_organization push_to_hub_token use_legacy_prediction_loop deepspeed_plugin
    distributed_state ddp_timeout_delta predict_with_generate generation_max_length
    generation_num_beams generation_config sortish_sampler optim_args
    """)

TRL_UNMODELLED: dict[str, str] = {
    "activation_offloading": OFFLOADED,
    "padding_free": "rows are laid one after another: fewer tokens than full sequences",
    "lora_modules_to_save": MORE_TRAINED,
    "lora_target_parameters": MORE_TRAINED,
    "use_dora": "DoRA keeps a magnitude and the norms of the weights; the estimate is low",
    "bnb_4bit_quant_storage": "the bytes are the same, but stage 3 can partition some only",
}

TRL_HARMLESS = words("""
    model_revision trust_remote_code lora_task_type use_rslora chat_template_path
    dataset_text_field dataset_kwargs dataset_num_proc eos_token pad_token packing packing_strategy
    truncation_mode shuffle_dataset eval_packing completion_only_loss assistant_only_loss
    pad_to_multiple_of router_aux_loss_coef loss_type dataset_name dataset_config
    dataset_train_split dataset_test_split dataset_streaming datasets
    gradient_checkpointing_use_reentrant ignore_bias_buffers env config
    """)

TRL_OWN = words("""
    model_init_kwargs dataset_text_field max_length max_seq_length packing packing_strategy
    completion_only_loss assistant_only_loss activation_offloading padding_free
    use_peft lora_r dataset_name dataset_train_split loss_type chat_template_path
    """)
"""Keys by which a file of TRL's is told from plain TrainingArguments."""
