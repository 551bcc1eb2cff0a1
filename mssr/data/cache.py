"""Prepared prompts in host memory, their pixels packed."""

import pickle
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from threading import Lock

from torch import Tensor

from mssr.batch import Prompt
from mssr.data.pixels import PixelTable


@dataclass(frozen=True, eq=False)
class _Kept:
    """A prompt in the cache. packed: its pixels, which are then left out of the prompt. nbytes: size of both together."""

    prompt: Prompt
    packed: Tensor | None
    nbytes: int


class PromptCache:
    """Keeps at most `capacity` bytes of prompts, by row. Evicts the least recently used first, reserved ones never.

    Safe to use from several threads.
    """

    def __init__(self, capacity: int, pixels: PixelTable | None) -> None:
        self.capacity = capacity
        self._pixels = pixels
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._reserved: frozenset[int] = frozenset()
        self.nbytes = 0
        self._lock = Lock()

    def __contains__(self, row: int) -> bool:
        with self._lock:
            return row in self._kept

    def get(self, row: int) -> Prompt | None:
        with self._lock:
            kept = self._kept.get(row)
            if kept is None:
                return None
            self._kept.move_to_end(row)
        if kept.packed is None:
            return kept.prompt
        return replace(kept.prompt, pixel_values=self._pixels.unpack(kept.packed))

    def put(self, row: int, prompt: Prompt) -> None:
        """Keep the prompt, unless there is no room for it beside the reserved ones."""
        kept = self._pack(prompt)
        with self._lock:
            if row in self._kept:
                return
            leaving, room = [], self.capacity - self.nbytes
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
            self.nbytes = self.capacity - room + kept.nbytes

    def reserve(self, rows: Iterable[int]) -> None:
        """Exempt these rows from eviction once they are in the cache; rows reserved before may be evicted again."""
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
        if prompt.columns:
            nbytes += len(pickle.dumps(prompt.columns))
        return _Kept(prompt, packed, nbytes)
