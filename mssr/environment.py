"""Settings that libraries read when they are imported: so this module is imported before any of them."""

import os
from pathlib import Path

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, WSL

DEFAULTS = {
    # OpenMP's own default, spinning at every barrier, is 10 to 20 times slower as soon as another process wants a core
    # (measured: 2 threads on 2 busy cores).
    "OMP_WAIT_POLICY": "PASSIVE",
    # Their progress bars and chatter would tear the live display; warnings of substance and errors still show.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
if not any(Path(driver).exists() for driver in _GPU_DRIVERS):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed otherwise warns that it found no GPU
