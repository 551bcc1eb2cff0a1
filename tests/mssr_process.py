"""Run `mssr` commands in separate processes, without six seconds of imports for each.

A server imports torch, transformers and DeepSpeed once and forks for every command; the child runs `mssr.cli.main` and
exits as `python -m mssr` would. `at` interrupts a command at an exact moment: Python reports file operations to audit
hooks, and the one that matches sends the process a signal or makes its writes fail as on a full disk.

    mssr("train", config, at=Moment("os.rename", "step_000004", "kill"))
    mssr("-m", "bench.study", "run", study)
"""

import atexit
import gc
import json
import os
import random
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120  # a hang fails the test


@dataclass(frozen=True)
class Moment:
    """The nth audit event of this name ("": any name) whose first argument contains `path`.

    then: "kill" is kill -9; with "full" no file can grow beyond 100 kB any more, so that writes fail with an OSError;
    "term" is a SIGTERM, "usr1" a SIGUSR1, "int" a SIGINT (Ctrl-C), "twice" two SIGTERMs; "tee" is a SIGINT that has ended
    the reader of the output as well.
    """

    event: str
    path: str
    then: str = "kill"
    nth: int = 1


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: exit status, -N if signal N killed it."""

    code: int
    out: str
    err: str

    def check(self) -> "Ended":
        assert self.code == 0, self.err
        return self

    @property
    def line(self) -> str:
        """The one-line message of a user's mistake (exit status 2)."""
        return self._line_with(2)

    @property
    def divergence(self) -> str:
        """The one-line message of a run whose policy diverged (exit status 3, so that the study runner can tell)."""
        return self._line_with(3)

    def _line_with(self, code: int) -> str:
        assert self.code == code, f"exit {self.code}: {self.err}"
        (line,) = self.err.splitlines()
        return line.removeprefix("mssr: ")


class Started:
    def __init__(self, launcher: "Launcher", pid: int, name: str) -> None:
        self.pid = pid
        self._launcher = launcher
        self._name = name

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds. Fails if the process ends first."""
        while not condition():
            assert not ends_within(self.pid, 0.01) or condition(), self.wait()

    def wait(self) -> Ended:
        code = self._launcher.request(wait=self.pid)
        out, err = (self._launcher.folder / f"{self._name}.{stream}" for stream in ("out", "err"))
        assert code is not None, f"no end after {TIMEOUT_S} s: {err.read_text()}"
        return Ended(code, out.read_text(), err.read_text())


class Launcher:
    """Starts commands. folder: for their output. model: any model directory, loaded once to fill the libraries' caches."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self._numbers = count()

    def __enter__(self) -> "Launcher":
        # One thread: a process that has started OpenMP's threads must not fork.
        env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        return self

    def __exit__(self, *_) -> None:
        self._server.stdin.close()
        self._server.wait()

    def __call__(self, *arguments: str | Path, at: Moment | None = None, **env: str) -> Ended:
        return self.start(*arguments, at=at, **env).wait()

    def start(self, *arguments: str | Path, at: Moment | None = None, **env: str) -> Started:
        name = f"{next(self._numbers):03d}_{arguments[0]}"
        moment = asdict(at) if at else None
        pid = self.request(arguments=list(map(str, arguments)), at=moment, env=env, name=str(self.folder / name))
        return Started(self, pid, name)

    def ranks(self, size: int, *arguments: str | Path, at: Moment | None = None) -> list[Ended]:
        """Run the command on several ranks. `at` applies to rank 0."""
        port = str(free_port())
        started = [
            self.start(
                *arguments, at=None if rank else at,
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )
            for rank in range(size)
        ]  # fmt: skip
        return [process.wait() for process in started]

    def request(self, **message):
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def free_port() -> int:
    """Return a free port below the ephemeral range, so that no connection takes it before a server has started."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def serve() -> None:
    """Answer requests until the input ends. Returns only in the forked children."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            answer = wait(message["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                return become(**message)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.exit()


def wait(pid: int) -> int | None:
    if ends_within(pid, TIMEOUT_S):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def ends_within(pid: int, seconds: float) -> bool:
    """Wait at most `seconds` for the process to end. Return whether it has."""
    with os.fdopen(os.pidfd_open(pid)) as process:
        return bool(select.select([process], [], [], seconds)[0])


def become(arguments: list[str], at: dict | None, env: dict[str, str], name: str) -> None:
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    sys.argv = arguments[1:] if arguments[0] == "-m" else ["mssr", *arguments]
    if at:
        sys.addaudithook(hook(Moment(**at)))


def end(command: Callable[[], None]) -> None:
    """Run the command and exit as the interpreter would, without the seconds it takes to unload torch."""
    code = 0
    try:
        command()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hook(moment: Moment) -> Callable:
    numbers = count(1)

    def audit(event: str, args: tuple) -> None:
        if args and event == (moment.event or event) and moment.path in str(args[0]) and next(numbers) == moment.nth:
            reach(moment)

    return audit


def reach(moment: Moment) -> None:
    signals = {
        "kill": [signal.SIGKILL],
        "term": [signal.SIGTERM],
        "usr1": [signal.SIGUSR1],
        "int": [signal.SIGINT],
        "tee": [signal.SIGINT],
        "twice": [signal.SIGTERM] * 2,
    }
    if moment.then == "tee":
        reader, writer = os.pipe()
        os.close(reader)
        for descriptor in (1, 2):
            os.dup2(writer, descriptor)
    if moment.then in signals:
        for number in signals[moment.then]:
            os.kill(os.getpid(), number)
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


if __name__ == "__main__":
    import io

    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer
    import torch
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import mssr.observe.plots
    import mssr.training.loop  # noqa: F401
    from mssr.data.prompts import load_processors
    from mssr.policy.loading import load_policy

    figure = Figure()  # the first one finds the fonts
    figure.subplots().set_title("step")
    figure.savefig(io.BytesIO())
    getattr(deepspeed.ops, "__compatible_ops__")  # noqa: B009  probes for a compiler
    load_policy(sys.argv[1], torch.float32)
    load_processors(sys.argv[1])
    gc.freeze()  # garbage collection in the children does not touch the shared pages
    serve()
    end(lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True))
