"""torchrun, ended without a traceback: `python -m mssr.launch --nproc-per-node 8 -m mssr train CONFIG`.

The arguments are torchrun's. After a signal it waits for its ranks to save, and exits with 128 + the signal's number;
torchrun itself kills them after 30 s (as does torch 2.11 here, which cannot be told otherwise) and exits with 1. If a rank
fails, the rank's message is the last one, and its exit status that of the launcher.
"""

import mssr.extras  # noqa: I001  first, for its message about a library that is not installed

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import mssr.environment  # noqa: F401  sets OMP_NUM_THREADS, about which torchrun would warn

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
SHUTDOWN_TIMEOUT_S = "900"


def main() -> None:
    for name in ("agent.server.api", "multiprocessing.api"):  # they tell of each signal that they forward
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT_S)  # its flag is newer than torch 2.11
    try:
        ignored = {"SIGHUP"} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # started by nohup
        handled = [name for name in SIGNALS if name not in ignored]
        run.main(["--signals-to-handle", ",".join(handled), *sys.argv[1:]])
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except KeyboardInterrupt:  # before torchrun handles signals
        sys.exit(128 + signal.SIGINT)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code = failure.exitcode
        ended = f"ended with exit status {code}; its message is above" if code >= 0 else f"was ended by {_name(-code)}"
        print(f"mssr: rank {rank} {ended}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


if __name__ == "__main__":
    main()
