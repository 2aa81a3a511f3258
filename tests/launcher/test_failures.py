"""Logs of runs that died, as libraries write them: each to one sentence."""

from __future__ import annotations

import pytest
from vramplan_launcher.failure_rules import EXACT, LOOSE
from vramplan_launcher.failures import diagnose

# Messages that need a GPU, a network or another driver, word for word; from where is beside each.
SAID = {
    # c10/cuda/CUDACachingAllocator.cpp, DeviceCachingAllocator::malloc
    "cuda_out_of_memory": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total "
        "capacity of 23.52 GiB of which 1.21 GiB is free. Including non-PyTorch memory, this "
        "process has 22.30 GiB memory in use.",
        "the GPU ran out of memory (it asked for 1.96 GiB more)",
    ),
    # c10/cuda/CUDAException.cpp, c10_cuda_check_implementation
    "driver's own": (
        "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be "
        "asynchronously reported at some other API call",
        "the GPU ran out of memory",
    ),
    # ATen/cuda/CublasHandlePool.cpp, createCublasHandle
    "cuBLAS": (
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "the GPU ran out of memory",
    ),
    # deepspeed/ops/op_builder/builder.py, assert_no_cuda_mismatch
    "CUDA mismatch": (
        "op_builder.builder.CUDAMismatchException: >- DeepSpeed Op Builder: Installed CUDA version "
        "12.1 does not match the version torch was compiled with 13.0, unable to compile cuda/cpp "
        "extensions without a matching cuda version.",
        "DeepSpeed could not compile an op: the CUDA toolkit here is 12.1, torch's is 13.0",
    ),
    # deepspeed/ops/op_builder/builder.py, installed_cuda_version
    "no toolkit": (
        "deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable "
        "to compile CUDA op(s)",
        "DeepSpeed could not compile an op: there is no CUDA toolkit (nvcc)",
    ),
    # deepspeed/ops/op_builder/builder.py, compute_capability_args
    "architecture": (
        "ValueError: invalid literal for int() with base 10: '0a'",
        "DeepSpeed could not read TORCH_CUDA_ARCH_LIST: it knows no architecture with a letter "
        "(0a)",
    ),
    # c10/cuda/CUDAFunctions.cpp, device_count_impl
    "driver_too_old": (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please "
        "update your GPU driver by downloading and installing a new version from the URL: "
        "http://www.nvidia.com/Download/index.aspx",
        "the NVIDIA driver is too old for this torch",
    ),
    # c10/cuda/CUDAFunctions.cpp, device_count_impl
    "no_gpu": (
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA "
        "GPU and installed a driver from http://www.nvidia.com/Download/index.aspx",
        "no GPU can be used here",
    ),
    # CUDA runtime, cudaErrorNoKernelImageForDevice
    "no_kernel": (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the "
        "device",
        "a library has no kernels for this GPU: it was built for other ones",
    ),
    # CUDA runtime, cudaErrorInvalidDevice
    "too_few_gpus": (
        "torch.AcceleratorError: CUDA error: invalid device ordinal",
        "there are more processes than GPUs",
    ),
    # CUDA runtime, cudaErrorAssert
    "device_assert": (
        "torch.AcceleratorError: CUDA error: device-side assert triggered",
        "a kernel's check failed on the GPU: most often a token beyond the model's vocabulary",
    ),
    # transformers/utils/hub.py, cached_files
    "gated_model": (
        "OSError: You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/meta-llama/Llama-3.1-8B.\n401 Client Error.",
        "the model is gated: its licence has to be accepted, and a token given",
    ),
    # transformers/utils/hub.py, cached_files
    "no_such_model": (
        "OSError: meta-lama/Llama is not a local folder and is not a valid model identifier listed "
        "on 'https://huggingface.co/models'",
        "there is no such model on the Hub, or it is private",
    ),
    # transformers/integrations/bitsandbytes.py, validate_bnb_backend_availability
    "bitsandbytes": (
        "RuntimeError: None of the available devices `available_devices = {'cuda'}` are supported "
        "by the bitsandbytes version you have installed: `bnb_supported_devices = {'cpu'}`. ",
        "bitsandbytes can't use this GPU: it has no library for the CUDA version here",
    ),
    # transformers/modeling_utils.py, _flash_attn_import_error
    "flash_attention": (
        "ImportError: FlashAttention2 has been toggled on, but it cannot be used due to the "
        "following error: the package for FlashAttention2 doesn't seem to be installed.",
        "attention flash_attention_2 needs the package flash-attn, which is not installed",
    ),
    # csrc/flash_attn/flash_api.cpp, mha_fwd
    "flash_attention on an old card": (
        "RuntimeError: FlashAttention only supports Ampere GPUs or newer.",
        "flash-attn has no kernels for this GPU: it needs Ampere or newer",
    ),
    "flash_attention of another torch": (
        "ImportError: /x/flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: "
        "_ZN3c105ErrorC2ENS_14SourceLocationESs",
        "flash-attn can't be used here: it was built for another torch, or for other cards",
    ),
    # transformers/training_args.py, TrainingArguments._validate_args
    "no_bf16": (
        "ValueError: Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want "
        "to train the model on CPU.",
        "this GPU has no bf16",
    ),
    # torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, WorkNCCL::checkTimeout
    "timed_out": (
        "[rank0]:[E1218 20:27:21.426415540 ProcessGroupNCCL.cpp:629] [Rank 0] Watchdog caught "
        "collective operation timeout: WorkNCCL(SeqNum=1, OpType=BROADCAST, NumelIn=131072000, "
        "NumelOut=131072000, Timeout(ms)=600000) ran for 600081 milliseconds before timing out.",
        "ranks waited for each other in vain (NCCL BROADCAST timed out)",
    ),
    # torch/csrc/distributed/c10d/NCCLUtils.hpp, C10D_NCCL_CHECK
    "nccl": (
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled cuda error "
        "(run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call "
        "to CUDA function failed.",
        "NCCL failed between the ranks",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_libraries_say(case: str) -> None:
    text, what = SAID[case]
    log = f"Traceback (most recent call last):\n  File 'a.py', line 1, in <module>\n{text}\n"
    made = diagnose(1, log, log_path="RUN/log.txt")
    assert made.sentence == f"{what} (log: RUN/log.txt)"
    assert made.advice
    ranked = "\n".join(f"[rank3]: {line}" for line in log.splitlines())
    assert diagnose(1, ranked, log_path="RUN/log.txt") == made


def test_every_kind_is_told_of_once_at_least() -> None:
    kinds = {diagnose(1, text).kind for text, _ in SAID.values()}
    others = {"host_out_of_memory", "disk_full", "port_in_use", "offline"}
    others |= {"missing_package", "broken_package", "damaged_checkpoint"}  # real ones: see below
    assert {rule.kind for rule in (*EXACT, *LOOSE)} == kinds | others


@pytest.mark.parametrize("code", [-9, 137])
def test_killed_without_a_word(code: int) -> None:
    made = diagnose(code, "step 12\n", log_path="log.txt", host_needed=61 * 2**30)
    assert made.kind == "host_out_of_memory"
    assert made.sentence == (
        "killed from outside (SIGKILL): most likely the host ran out of memory (it was said to "
        "need 61.0 GiB) (log: log.txt)"
    )


def test_signals() -> None:
    assert diagnose(-11, "").kind == "segmentation_fault"
    assert diagnose(-7, "").kind == "shared_memory_full"
    assert diagnose(-15, "").sentence == "stopped from outside (SIGTERM)"
    assert diagnose(-6, "").sentence == "died of SIGABRT"
    assert diagnose(128 + 2, "").kind == "interrupted"
    assert diagnose(-2, "Traceback\nKeyboardInterrupt\n").kind == "interrupted"
    assert diagnose(0, "CUDA out of memory. Tried to allocate 1 GiB").kind == "finished"


def test_a_message_comes_before_the_signal_that_followed_it() -> None:
    log = "RuntimeError: No space left on device (os error 28)\n"
    assert diagnose(-9, log).kind == "disk_full"  # the launcher then killed what was left
    assert diagnose(-6, "NCCL error in: a.cpp").kind == "nccl"  # NCCL's watchdog aborts


def test_deepspeeds_launcher_tells_the_code() -> None:
    # deepspeed/launcher/launch.py, main
    log = "[ERROR] [launch.py:325:sigkill_handler] ['python'] exits with return code = -9\n"
    assert diagnose(1, log).kind == "host_out_of_memory"


def test_vramplans_own_errors_are_sentences_already() -> None:
    said = "data 'a.jsonl', row 3, column 'text' holds 5, not text: mend or drop the row"
    log = f"Traceback (most recent call last):\n  a\nvramplan.errors.UserError: {said}\n"
    made = diagnose(1, log, log_path="log.txt")
    assert (made.kind, made.sentence) == ("input", f"{said} (log: log.txt)")


def test_what_no_rule_knows() -> None:
    log = "Traceback (most recent call last):\n  a\nlibrary.sub.OddError: a thing broke\n"
    assert diagnose(1, log).sentence == "ended with OddError: a thing broke"
    warned = f"{log}/a.py:1: FutureWarning: later: not now\n"
    assert diagnose(1, warned).sentence == "ended with OddError: a thing broke"
    assert diagnose(3, "").sentence == "ended with exit code 3, and no message"


def test_what_libraries_log_and_go_on_from_is_no_cause() -> None:
    # bitsandbytes 0.50.2 on the CPU, and huggingface_hub when it falls back to the cache.
    logged = (
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. "
        "Please make sure you already `pip install kernels`\n"
        "Couldn't reach the Hub, outgoing traffic has been disabled: taking the cache\n"
    )
    log = f"{logged}Traceback (most recent call last):\n  a\nAssertionError: 3 is not 4\n"
    assert diagnose(1, log).sentence == "ended with AssertionError: 3 is not 4"
    assert diagnose(-9, logged).kind == "host_out_of_memory"
    missing = f"{logged}Traceback (most recent call last):\n  a\n"
    missing += "ModuleNotFoundError: No module named 'peft'\n"
    assert diagnose(1, missing).sentence == "the package peft is not installed"


def test_colours_are_no_part_of_a_message() -> None:
    log = "\x1b[31mValueError\x1b[0m: \x1b[1mbad\x1b[0m\n"
    assert diagnose(1, log).sentence == "ended with ValueError: bad"


BLAMED = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
vramplan_launcher.train FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-28_01:21:16
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 21924)
  error_file: <N/A>
  traceback : -
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-28_01:21:16
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 4 (pid: 21923)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


def test_a_rank_that_was_killed_is_the_cause_of_what_others_raised() -> None:
    lost = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:50062"
    killed = diagnose(4, lost + BLAMED.format(code=-9))
    assert (killed.kind, killed.rank) == ("host_out_of_memory", 1)
    # Those that torchrun itself ended (SIGTERM) are none; then all that is known is this.
    ended = diagnose(4, lost + BLAMED.format(code=-15))
    assert (ended.kind, ended.rank) == ("peer_lost", 0)
    assert ended.sentence.startswith("rank 0: the connection to another rank was lost")


def test_machines_that_do_not_come() -> None:
    last = "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError\n"
    made = diagnose(1, f"    raise RendezvousTimeoutError\n{last}")
    assert (made.kind, made.sentence) == ("timed_out", "machines waited for each other in vain")
    assert "same rendezvous" in made.advice
