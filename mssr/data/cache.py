"""Prepared prompts in host memory, their pixels packed."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from threading import Lock

from torch import Tensor

from mssr.batch import Prompt
from mssr.data.pixels import PixelTable


@dataclass(frozen=True, eq=False)
class _Kept:
    """A prompt; packed: its pixels, which it then lacks itself. nbytes: of both."""

    prompt: Prompt
    packed: Tensor | None
    nbytes: int


class PromptCache:
    """At most `capacity` bytes of prompts by row. The least recently used leave first, the reserved ones never.

    Safe to use from several threads.
    """

    def __init__(self, capacity: int, pixels: PixelTable | None) -> None:
        self.capacity = capacity
        self._pixels = pixels
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._reserved: frozenset[int] = frozenset()
        self._nbytes = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __contains__(self, row: int) -> bool:
        with self._lock:
            return row in self._kept

    def get(self, row: int) -> Prompt | None:
        with self._lock:
            kept = self._kept.get(row)
            if kept is None:
                return None
            self._kept.move_to_end(row)
        return (
            kept.prompt if kept.packed is None else replace(kept.prompt, pixel_values=self._pixels.unpack(kept.packed))
        )

    def put(self, row: int, prompt: Prompt) -> None:
        """Keeps the prompt, unless there is no room for it beside the reserved ones."""
        kept = self._pack(prompt)
        with self._lock:
            if row in self._kept:
                return
            leaving, room = [], self.capacity - self._nbytes
            for other, theirs in self._kept.items():
                if room >= kept.nbytes:
                    break
                if other not in self._reserved:
                    leaving.append(other)
                    room += theirs.nbytes
            if room < kept.nbytes:
                return
            for other in leaving:
                del self._kept[other]
            self._kept[row] = kept
            self._nbytes = self.capacity - room + kept.nbytes

    def reserve(self, rows: Iterable[int]) -> None:
        """From now on these rows stay, once they are in; the ones reserved before may leave."""
        with self._lock:
            self._reserved = frozenset(rows)

    def _pack(self, prompt: Prompt) -> _Kept:
        packed = None
        if self._pixels is not None and prompt.pixel_values is not None:
            packed = self._pixels.pack(prompt.pixel_values)
            if packed is not None:
                prompt = replace(prompt, pixel_values=None)
        values = [getattr(prompt, field.name) for field in fields(prompt)]
        tensors = [value for value in (*values, packed) if isinstance(value, Tensor)]
        nbytes = sum(tensor.nbytes for tensor in tensors) + sum(len(image) for image in prompt.images)
        return _Kept(prompt, packed, nbytes)
