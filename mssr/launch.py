"""torchrun, ended without a traceback: `python -m mssr.launch --nproc-per-node 8 -m mssr train CONFIG`.

The arguments are torchrun's. After a signal it waits for its ranks to save, and exits with 128 + the signal's number;
torchrun itself kills them after 30 s and exits with 1. If a rank fails, the rank's message is the last one, and its exit
status that of the launcher.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import mssr.environment  # noqa: F401  sets OMP_NUM_THREADS, about which torchrun would warn

DEFAULTS = ["--shutdown-timeout", "900", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


def main() -> None:
    for name in ("agent.server.api", "multiprocessing.api"):  # they tell of each signal that they forward
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run.main([*DEFAULTS, *sys.argv[1:]])
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        print(f"mssr: rank {rank} ended with exit status {code}; its message is above", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
