"""Where a reward function is, and loading it in a worker.

A `Function` is made in the trainer, which never imports the user's code: the workers do. A file's source travels with it,
so that a worker that is restarted runs the code that the run began with.
"""

import importlib
import inspect
import io
import linecache
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mssr.errors import UserError, shortened

BUILTIN = Path(__file__).parent / "builtin"  # NAME.py has the function NAME

_OURS = re.compile(r"importlib|mssr/rewards/(function|worker)\.py$")

Kind = Literal["sync", "async", "batched"]


@dataclass(frozen=True)
class Function:
    """A reward function as the configuration names it.

    where: "file.py:name", "package.module:name", the name of a built-in, or, for a Python object, what to call it.
    label: the part that a float is, and the function's name in errors. timeout_s: its own, instead of `reward.timeout_s`.
    source: of the file. pickled: the Python object, by cloudpickle.
    """

    where: str
    label: str = "accuracy"
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    source: bytes | None = None
    pickled: bytes | None = None


class Loaded:
    """A function that was imported.

    kind: how it is called. images: whether it may look at the row's images: not if its module says `USES_IMAGES = False`.
    timeout_s: of a call, where the function has this attribute: a built-in's own.
    """

    def __init__(self, call: Callable, options: Mapping[str, Any]) -> None:
        self.call, self.options = call, options
        self.kind = _kind(call)
        module = sys.modules.get(getattr(call, "__module__", None) or "")
        self.images = bool(getattr(module, "USES_IMAGES", True))
        self.timeout_s: float | None = getattr(call, "timeout_s", None)


def named(
    where: str, *, label: str = "accuracy", options: Mapping[str, Any] | None = None, timeout_s: float | None = None
) -> Function:
    """Return the function that `where` names.

    Raises:
        UserError: there is no such file or built-in, or the text names no function.
    """
    place, _, name = where.rpartition(":")
    source = None
    if place == "__main__" or "<" in name:
        raise UserError(
            f"reward.function {where}: a function of another Python process; give it again: train(config, reward=...), or "
            "write it into a file, and set reward.function=path/to/file.py:NAME"
        )
    if place.endswith(".py") or "/" in place:
        path = Path(place).expanduser().absolute()
        source, where = _read(path, where), f"{path}:{name}"
    elif not place and (where.endswith(".py") or "/" in where):
        raise UserError(f"reward.function {where}: name the function in the file too: {where}:NAME")
    elif not place and where not in builtins():
        raise UserError(
            f"reward.function {where}: no such built-in; one of {', '.join(builtins())}, or path/to/file.py:NAME, "
            "or package.module:NAME"
        )
    return Function(where, label, dict(options or {}), timeout_s, source)


def handed_over(call: Callable, *, label: str = "accuracy") -> Function:
    """Return a Python object as a function that can be sent to the workers: also a lambda, or one of a notebook.

    Raises:
        UserError: the object, or what it refers to, cannot be sent to another process.
    """
    import cloudpickle

    name = getattr(call, "__qualname__", type(call).__qualname__)
    if not callable(call):
        raise UserError(f"reward: a {name} is no function; give a function (response, row), or reward.function as text")
    try:
        pickled = cloudpickle.dumps(call)
    except Exception as error:
        raise UserError(
            f"reward: {name} cannot be sent to another process ({type(error).__name__}: {shortened(error)}); "
            "create inside of it what it refers to, or name it as reward.function=path/to/file.py:NAME"
        ) from None
    return Function(name, label, pickled=pickled)


def builtins() -> list[str]:
    """Return the names of the functions that need no file."""
    return sorted(path.stem for path in BUILTIN.glob("[a-z]*.py"))


def load(function: Function) -> Loaded:
    """Import the function, in a worker.

    Raises:
        UserError: its module cannot be imported, has no such function, or the function does not take the options.
    """
    try:
        call = _find(function)
    except UserError:
        raise
    except BaseException as error:  # also sys.exit at the top of a file
        raise UserError(f"reward.function {function.where}: importing it fails with {described(error)}") from error
    loaded = Loaded(call, function.options)
    _check_options(function, loaded)
    return loaded


def described(error: BaseException, file: str | None = None) -> str:
    """Return the exception on one line, with the innermost place in the file, or else the innermost of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return shortened(f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})", 400)
    if isinstance(error, UserError):
        return shortened(error, 400)
    text = shortened(traceback.format_exception_only(error)[0], 300)
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not _OURS.search(each.filename)]
    frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1] if frames else None)
    return f"{text} ({frame.filename}, line {frame.lineno})" if frame else text


def _find(function: Function) -> Callable:
    if function.pickled is not None:
        import cloudpickle

        return cloudpickle.loads(function.pickled)
    place, _, name = function.where.rpartition(":")
    if function.source is not None:
        module = _executed(Path(place), function.source)
    elif place:
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(place)
    else:
        module = importlib.import_module(f"mssr.rewards.builtin.{name}")
    call = getattr(module, name, None)
    if not callable(call) or inspect.isclass(call):
        found = [
            key for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
        ]  # fmt: skip
        what = f"the functions in it are {', '.join(found)}" if found else "there is no function in it"
        raise UserError(f"reward.function {function.where}: no function {name} there; {what}")
    return call


def _executed(path: Path, source: bytes) -> types.ModuleType:
    """Return the module of a file with this source. It may import its neighbours, as a script may."""
    sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"reward_{path.stem}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look there
    lines = io.TextIOWrapper(io.BytesIO(source), encoding="utf-8", errors="replace").read().splitlines(keepends=True)
    linecache.cache[str(path)] = (len(source), None, lines, str(path))  # for tracebacks, if the file changes
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def _read(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"reward.function {where}: {path}: {error.strerror}") from None


def _kind(call: Callable) -> Kind:
    parameters = list(_signature(call).parameters)
    if parameters and parameters[0] == "responses":
        return "batched"
    return "async" if is_async(call) else "sync"


def is_async(call: Callable) -> bool:
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


def _signature(call: Callable) -> inspect.Signature:
    try:
        return inspect.signature(call)
    except (TypeError, ValueError):  # some functions written in C
        return inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("response", "row")]
        )


def _check_options(function: Function, loaded: Loaded) -> None:
    signature = _signature(loaded.call)
    try:
        signature.bind("", None, **function.options)
        if check := getattr(loaded.call, "check", None):
            check(**function.options)
    except UserError as error:
        raise UserError(f"reward.function {function.where}: {error}") from None
    except TypeError as error:
        takes = "(responses, rows)" if loaded.kind == "batched" else "(response, row)"
        name = function.where.rpartition(":")[2]
        raise UserError(
            f"reward.function {function.where}: {error}; it is called with {takes} and its options "
            f"({', '.join(function.options) or 'none'}), and its definition is {name}{shortened(signature, 300)}"
        ) from None
