"""Settings that libraries read when they are imported: so this module is imported before any of them."""

import logging
import os
from pathlib import Path

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, WSL

DEFAULTS = {
    # As torchrun does: a thread a rank; to use more cores, start more ranks. For a model of CPU size a second thread
    # gains 1.3 to 1.4 times on idle cores, and costs 10 times and more as soon as another process wants one.
    "OMP_NUM_THREADS": "1",
    # Their progress bars and chatter would tear the live display; warnings of substance and errors still show.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # vLLM's CPU build tells of its NUMA policy
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
if not any(Path(driver).exists() for driver in _GPU_DRIVERS):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed otherwise warns that it found no GPU
    # A torch built for CUDA otherwise warns of the same where there is a CUDA toolkit.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
