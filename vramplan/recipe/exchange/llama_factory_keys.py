"""LLaMA-Factory's keys by what they mean to an estimate.

Source: LLaMA-Factory 0.9.6, src/llamafactory/hparams/ (model_args.py, data_args.py,
finetuning_args.py, training_args.py); the rest are TrainingArguments'.
"""

from __future__ import annotations

from vramplan.recipe.exchange.keys import (
    LOGITS_SMALLER,
    MORE_TRAINED,
    OTHER_KERNEL,
    OTHER_MODEL,
    words,
)

_OTHER_STEP = "another optimizer or loss, which is not modelled"

UNMODELLED: dict[str, str] = {
    "use_unsloth": f"Unsloth's {OTHER_KERNEL}",
    "use_unsloth_gc": "boundaries of checkpointing go to the host, and the estimate is high",
    "enable_liger_kernel": f"{OTHER_KERNEL}; {LOGITS_SMALLER}",
    "use_v1_kernels": OTHER_KERNEL,
    "shift_attn": "attention is taken to reach over the whole sequence",
    "mixture_of_depths": OTHER_MODEL,
    "upcast_layernorm": "norms are taken as they are loaded",
    "upcast_lmhead_output": "logits are taken as they are made",
    "additional_target": MORE_TRAINED,
    "use_dora": "DoRA keeps a magnitude and the norms of the weights; the estimate is low",
    "use_llama_pro": OTHER_MODEL,
    "use_galore": _OTHER_STEP,
    "use_apollo": _OTHER_STEP,
    "use_badam": "one block is trained at a time, and the estimate is high",
    "use_adam_mini": "Adam-mini keeps far less state, and the estimate is high",
    "use_muon": _OTHER_STEP,
    "use_dft_loss": _OTHER_STEP,
    "use_asft_loss": "a reference model is held besides, and the estimate is low",
    "use_eaft_loss": _OTHER_STEP,
    "fp8": "matrices are taken to be multiplied in the dtype of the weights",
    "use_kt": "experts are computed on the host",
    "use_mca": "Megatron's engine is another one",
    "use_megatron_bridge": "Megatron's engine is another one",
    "use_hyper_parallel": "the estimate has every rank with whole sequences and layers",
    "resize_vocab": "the vocabulary is taken as the model's",
    "add_tokens": "the vocabulary is taken as the model's",
    "add_special_tokens": "the vocabulary is taken as the model's",
    "neat_packing": "a mask of s x s keeps packed rows apart, and is not counted with sdpa",
    "quantization_device_map": "the whole model is taken to lie on the GPU",
}

HARMLESS = words("""
    adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer split_special_tokens
    new_special_tokens_config init_special_tokens model_revision low_cpu_mem_usage rope_scaling
    moe_aux_loss_coef train_from_scratch infer_backend offload_folder use_kv_cache infer_dtype
    hf_hub_token ms_hub_token om_hub_token print_param_status trust_remote_code image_max_pixels
    image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels
    video_fps video_maxlen use_audio_in_video audio_sampling_rate export_dir export_size
    export_device export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util
    vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction
    sglang_tp_size sglang_config sglang_lora_backend kt_cpu_activation kt_weight_path
    template dataset eval_dataset dataset_dir media_dir train_on_prompt mask_history streaming
    buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size
    preprocessing_num_workers max_samples eval_num_beams ignore_pad_token_for_loss val_size
    eval_on_each_dataset tool_format default_system enable_thinking preserve_thinking tokenized_path
    data_shared_file_system freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
    loraplus_lr_ratio loraplus_lr_embedding use_rslora pissa_init pissa_iter pissa_convert
    create_new_adapter galore_target galore_rank galore_update_interval galore_scale
    galore_proj_type galore_layerwise apollo_target apollo_rank apollo_update_interval apollo_scale
    apollo_proj apollo_proj_type apollo_layerwise apollo_scale_type apollo_scale_front badam_mode
    badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode
    badam_verbose use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode
    swanlab_api_key swanlab_logdir freeze_vision_tower freeze_multi_modal_projector
    freeze_language_model compute_accuracy disable_shuffling early_stopping_steps plot_loss
    include_effective_tokens_per_second ray_num_workers ray_init_kwargs master_addr master_port
    ray_run_name ray_storage_path resources_per_worker placement_strategy fp8_backend
    fp8_enable_fsdp_float8_all_gather enable_torch_profiler profiler_output_dir asft_alpha
    eaft_alpha ref_model ref_model_adapters ref_model_quantization_bit reward_model
    reward_model_adapters reward_model_quantization_bit reward_model_type pref_beta pref_loss
    pref_ftx pref_bco_weight dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma
    ld_alpha ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards oft_rank
    oft_block_size oft_target module_dropout profiler_wait_steps profiler_warmup_steps
    profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory
    profiler_with_stack profile_modules swanlab_lark_webhook_url swanlab_lark_secret
    export_quantization_bit export_quantization_dataset export_quantization_nsamples
    export_quantization_maxlen kt_non_expert_weight_path kt_expert_checkpoint_path
    kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size hyper_parallel_args
    hyper_parallel_cp_size
    """)
