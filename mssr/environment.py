"""Environment variables that libraries read on import; import this module before them."""

import logging
import os
from pathlib import Path

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, WSL

DEFAULTS = {
    # One thread per rank, as torchrun sets it; to use more cores, start more ranks. For a CPU-sized model a second thread
    # is 1.3 to 1.4 times faster on idle cores, and over 10 times slower if another process needs one of them.
    "OMP_NUM_THREADS": "1",
    # Progress bars and info messages would break the live display; errors still show.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # vLLM's CPU build logs its NUMA policy
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
if not any(Path(driver).exists() for driver in _GPU_DRIVERS):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it DeepSpeed warns that it found no GPU
    # A torch built for CUDA gives the same warning if a CUDA toolkit is installed.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
