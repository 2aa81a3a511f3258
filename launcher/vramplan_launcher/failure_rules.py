"""What libraries write when a run dies, and what that means. Each rule names where it is written.

Versions: torch 2.13, transformers 5.17, DeepSpeed 0.19.8, bitsandbytes 0.50.2, safetensors 0.8,
huggingface_hub 1.33.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """`what` and `advice` may name groups of `pattern`."""

    kind: str
    pattern: re.Pattern[str]
    what: str
    advice: str
    raised: bool = False
    """Whether it counts in an exception's message alone: libraries log the like and go on."""


def _rule(kind: str, pattern: str, what: str, advice: str, *, raised: bool = False) -> Rule:
    return Rule(kind, re.compile(pattern, re.MULTILINE), what, advice, raised)


_PIP_LAUNCH = "pip install 'vramplan[launch]'"
_DISK = "Free space or write elsewhere (--output), and resume: earlier checkpoints are whole."

# In the order in which they are tried: a message that also follows from another comes after it.
EXACT: tuple[Rule, ...] = (
    # c10/cuda/CUDACachingAllocator.cpp, malloc: with the figures of the card.
    _rule(
        "cuda_out_of_memory",
        r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+ \w+)",
        "the GPU ran out of memory (it asked for {asked} more)",
        "Take a smaller plan: vramplan fit, or --gradient-checkpointing, a smaller --batch-size "
        "with --gradient-accumulation-steps.",
    ),
    # The driver's own, and cuBLAS's when its handle finds no room (CUDABlas.cpp).
    _rule(
        "cuda_out_of_memory",
        r"CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED"
        r"|torch\.(?:cuda\.)?OutOfMemoryError",
        "the GPU ran out of memory",
        "Take a smaller plan: vramplan fit, or --gradient-checkpointing, a smaller --batch-size. "
        "Other processes on the card count too (nvidia-smi).",
    ),
    # c10/core/impl/alloc_cpu.cpp; errno 12 of anything else.
    _rule(
        "host_out_of_memory",
        r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (?P<asked>\d+) bytes"
        r"|\[Errno 12\] Cannot allocate memory|^MemoryError\b",
        "the host ran out of memory",
        "Offload less, load fewer ranks a machine, or take a machine with more memory.",
    ),
    # errno 28, 122 and 27, of Python, and of safetensors' Rust (os error).
    _rule(
        "disk_full",
        r"(?P<said>No space left on device|Disk quota exceeded|File too large)"
        r"(?: \(os error \d+\)|: '(?P<file>[^']+)')?",
        "a file could not be written: {said}",
        _DISK,
    ),
    # torch, caffe2/serialize/inline_container.cc: how torch.save tells of a full disk.
    _rule(
        "disk_full",
        r"PytorchStreamWriter failed writing file|inline_container\.cc:\d+\] \. unexpected pos",
        "a checkpoint could not be written whole: most likely the disk is full",
        _DISK,
    ),
    # torch/csrc/distributed/c10d/TCPStore and socket.cpp.
    _rule(
        "port_in_use",
        r"port: (?P<port>\d+).*EADDRINUSE|EADDRINUSE|\[Errno 98\] Address already in use",
        "port {port} where processes meet is in use",
        "Another run on this machine has it: end that, or give another (--rendezvous HOST:PORT, or "
        "MASTER_PORT with --hostfile).",
    ),
    # deepspeed/ops/op_builder/builder.py, assert_no_cuda_mismatch.
    _rule(
        "op_not_built",
        r"Installed CUDA version (?P<found>\S+) does not match the version torch was compiled with "
        r"(?P<torch>[^\s,]+), unable to compile",
        "DeepSpeed could not compile an op: the CUDA toolkit here is {found}, torch's is {torch}",
        "Install CUDA toolkit {torch} and point CUDA_HOME at it, or torch for {found}; "
        "DS_SKIP_CUDA_CHECK=1 tries regardless. Without --offload-optimizer no op is compiled.",
    ),
    # deepspeed/ops/op_builder/builder.py (jit_load); torch/utils/cpp_extension.py.
    _rule(
        "op_not_built",
        r"due to ninja not being installed|Ninja is required to load C\+\+ extensions",
        "DeepSpeed could not compile an op: ninja is not installed",
        "pip install ninja.",
    ),
    _rule(
        "op_not_built",
        r"CUDA_HOME does not exist, unable to compile|CUDA_HOME environment variable is not set"
        r"|Unable to run \S*nvcc",
        "DeepSpeed could not compile an op: there is no CUDA toolkit (nvcc)",
        "Install the toolkit of torch's CUDA version and set CUDA_HOME. Without "
        "--offload-optimizer no op is compiled.",
    ),
    # builder.py, compute_capability_args: int() of each part of TORCH_CUDA_ARCH_LIST.
    _rule(
        "op_not_built",
        r"invalid literal for int\(\) with base 10: '(?P<part>\d+[af])'",
        "DeepSpeed could not read TORCH_CUDA_ARCH_LIST: it knows no architecture with a letter "
        "({part})",
        "Set TORCH_CUDA_ARCH_LIST without the letter, such as 9.0.",
    ),
    _rule(
        "op_not_built",
        r"(?P<compiler>c\+\+|g\+\+|\S*/g\+\+\S*): (?:command )?not found"
        r"|No such file or directory: '(?P<other>c\+\+|g\+\+)'",
        "DeepSpeed could not compile an op: there is no C++ compiler ({compiler}{other})",
        "Install g++ (apt install build-essential). Without --offload-optimizer no op is compiled.",
    ),
    _rule(
        "op_not_built",
        r"Error building extension '(?P<op>\w+)'|requires the (?P<other>\w+) op, which failed",
        "DeepSpeed could not compile its op {op}{other}",
        "The compiler's messages are in the log. Without --offload-optimizer no op is compiled.",
    ),
    # c10/cuda/CUDAFunctions.cpp, device_count_impl.
    _rule(
        "driver_too_old",
        r"NVIDIA driver on your system is too old"
        r"|CUDA driver version is insufficient for CUDA runtime version",
        "the NVIDIA driver is too old for this torch",
        "Update the driver, or install torch built for an older CUDA (pytorch.org).",
    ),
    _rule(
        "no_gpu",
        r"Found no NVIDIA driver on your system|no CUDA-capable device is detected"
        r"|No CUDA GPUs are available|Torch not compiled with CUDA enabled",
        "no GPU can be used here",
        "nvidia-smi shows what the driver sees; torch must be a CUDA build; CUDA_VISIBLE_DEVICES "
        "must not hide the cards. --cpu runs a small model without one.",
    ),
    _rule(
        "no_kernel",
        r"no kernel image is available for execution on the device",
        "a library has no kernels for this GPU: it was built for other ones",
        "Install torch (or the extension that the traceback names) built for this card.",
    ),
    _rule(
        "too_few_gpus",
        r"CUDA error: invalid device ordinal|Duplicate GPU detected",
        "there are more processes than GPUs",
        "Set --world-size to the number of cards, and look at CUDA_VISIBLE_DEVICES.",
    ),
    # c10/cuda/CUDADeviceAssertionHost; most often an index into the embeddings.
    _rule(
        "device_assert",
        r"device-side assert triggered",
        "a kernel's check failed on the GPU: most often a token beyond the model's vocabulary",
        "Check that the tokenizer is the model's. CUDA_LAUNCH_BLOCKING=1 shows where it is.",
    ),
    # transformers/utils/hub.py; huggingface_hub/errors.py.
    _rule(
        "gated_model",
        r"You are trying to access a gated repo|GatedRepoError|is a gated repository",
        "the model is gated: its licence has to be accepted, and a token given",
        "Accept the licence on the model's page, then: hf auth login.",
        raised=True,
    ),
    _rule(
        "offline",
        r"We couldn't connect to '(?P<host>[^']+)'|outgoing traffic has been disabled"
        r"|OfflineModeIsEnabled|LocalEntryNotFoundError",
        "a file of the model is not in the local cache, and the Hub can't be reached",
        "Download it where there is a network (hf download MODEL), or unset HF_HUB_OFFLINE.",
        raised=True,
    ),
    _rule(
        "no_such_model",
        r"RepositoryNotFoundError|is not a local folder and is not a valid model identifier",
        "there is no such model on the Hub, or it is private",
        "Check the name; for a private one: hf auth login.",
        raised=True,
    ),
    # transformers/integrations/bitsandbytes.py, validate_bnb_backend_availability;
    # bitsandbytes/cextension.py.
    _rule(
        "bitsandbytes",
        r"None of the available devices .* are supported by the bitsandbytes version"
        r"|not available in CPU-only version of bitsandbytes"
        r"|bitsandbytes library load error|compiled without GPU support",
        "bitsandbytes can't use this GPU: it has no library for the CUDA version here",
        "python -m bitsandbytes says what it looks for; most often: pip install -U bitsandbytes. "
        "Or take a recipe without quantization and an optimizer of torch's.",
    ),
    # transformers/modeling_utils.py, _flash_attn_import_error.
    _rule(
        "flash_attention",
        r"FlashAttention2 has been toggled on.*doesn't seem to be installed"
        r"|No module named 'flash_attn",
        "attention flash_attention_2 needs the package flash-attn, which is not installed",
        "pip install flash-attn --no-build-isolation, or --attention sdpa: as little memory, and "
        "on most cards the same kernel.",
        raised=True,
    ),
    _rule(
        "flash_attention",
        r"FlashAttention only supports Ampere GPUs or newer",
        "flash-attn has no kernels for this GPU: it needs Ampere or newer",
        "--attention sdpa.",
    ),
    _rule(
        "flash_attention",
        r"flash_attn\S*: undefined symbol|FlashAttention2 has been toggled on",
        "flash-attn can't be used here: it was built for another torch, or for other cards",
        "Build it again (pip install --force-reinstall --no-build-isolation flash-attn), or "
        "--attention sdpa.",
    ),
    # transformers/training_args.py; accelerate/accelerator.py; deepspeed/runtime/engine.py.
    _rule(
        "no_bf16",
        r"Your setup doesn't support bf16|bf16 mixed precision requires"
        r"|Type bf16 is not supported on your device",
        "this GPU has no bf16",
        "--mixed-precision fp16 --dtype fp32 (full fine-tuning), or --dtype fp16 (LoRA).",
    ),
    _rule(
        "damaged_checkpoint",
        r"SafetensorError: Error while deserializing header|PytorchStreamReader failed",
        "a file of weights is damaged or cut short",
        "Download or copy it anew; to resume, take the checkpoint before it.",
    ),
    _rule(
        "missing_package",
        r"No module named '(?P<name>[\w.]+)'|PackageNotFoundError: (?P<other>[\w.-]+)"
        r"|requires the (?P<third>\w+) library but it was not found",
        "the package {name}{other}{third} is not installed",
        f"{_PIP_LAUNCH}, or the package itself.",
        raised=True,
    ),
    _rule(
        "broken_package",
        r"^ *ImportError: (?P<said>.+)",
        "a package could not be imported: {said}",
        "Two packages' versions don't match: pip check, and install both anew.",
        raised=True,
    ),
)
"""Messages that are a cause."""

LOOSE: tuple[Rule, ...] = (
    # torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, WorkNCCL::checkTimeout; Gloo's own.
    _rule(
        "timed_out",
        r"Watchdog caught collective operation timeout: WorkNCCL\(.*?OpType=(?P<op>\w+)",
        "ranks waited for each other in vain (NCCL {op} timed out)",
        "One rank stopped or fell behind: look for the first message of each rank in the log; "
        "NCCL_DEBUG=INFO tells more. Between machines, NCCL_SOCKET_IFNAME names the network.",
    ),
    _rule(
        "timed_out",
        r"Timed out waiting \d+ms for|(?:client|server) socket has timed out|waitForInput: .*timed"
        r"|wait timeout after \d+ms",
        "ranks waited for each other in vain",
        "Did every machine start, with the same rendezvous? Does a firewall close the port?",
    ),
    # torch, distributed/elastic/rendezvous/dynamic_rendezvous.py: after ten minutes.
    _rule(
        "timed_out",
        r"RendezvousTimeoutError|RendezvousConnectionError",
        "machines waited for each other in vain",
        "Did every machine start, with the same rendezvous? Does a firewall close the port, or "
        "has another program it?",
    ),
    _rule(
        "nccl",
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclRemoteError|ncclInternalError",
        "NCCL failed between the ranks",
        "NCCL_DEBUG=INFO tells more; between machines, NCCL_SOCKET_IFNAME names the network.",
    ),
)
"""Messages that most often follow from another rank's death."""
