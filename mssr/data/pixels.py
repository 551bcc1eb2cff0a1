"""Packs preprocessed pixels into an eighth of their bytes, without loss.

An image processor resizes to 8-bit pictures and only then scales and normalises. So each channel of its float32 output
has at most 256 different values, and each image is repeated for every frame of a temporal patch. The packed form is the
8-bit picture; a table of the processor's output for the 256 values unpacks it.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor

VALUES = 256  # of an 8-bit channel


class PixelTable:
    """Packs `pixel_values` [patches, channels * frames * area] float32 into [patches, channels, area] uint8.

    table: [channels, 256] float32, the processor's output for each 8-bit value. frames, area: of a patch.
    """

    def __init__(self, table: np.ndarray, frames: int, area: int) -> None:
        self._table = np.ascontiguousarray(table, dtype=np.float32)
        self._frames, self._area = frames, area
        self._step = (self._table[:, -1] - self._table[:, 0]) / (VALUES - 1)  # the table is a line but for rounding

    def pack(self, pixel_values: Tensor) -> Tensor | None:
        """Return the packed pixels, or None where `unpack` would not restore every bit: another layout, not 8-bit values."""
        channels, width = len(self._table), len(self._table) * self._frames * self._area
        if pixel_values.dtype != torch.float32 or pixel_values.dim() != 2 or pixel_values.shape[1] != width:
            return None
        given = pixel_values.numpy().reshape(-1, channels, self._frames, self._area)
        first = given[:, :, 0]
        packed = np.empty(first.shape, np.uint8)
        for channel in range(channels):
            values = np.rint((first[:, channel] - self._table[channel, 0]) / self._step[channel])
            packed[:, channel] = np.nan_to_num(values).clip(0, VALUES - 1)
        return torch.from_numpy(packed) if np.array_equal(self._unpack(packed), given) else None

    def unpack(self, packed: Tensor) -> Tensor:
        """Return what was packed: [patches, channels * frames * area] float32."""
        return torch.from_numpy(self._unpack(packed.numpy()).reshape(len(packed), -1))

    def _unpack(self, packed: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(packed), len(self._table), self._frames, self._area), np.float32)
        for channel, values in enumerate(self._table):
            pixels[:, channel, 0] = values.take(packed[:, channel], mode="clip")  # clip skips the check of every index
        pixels[:, :, 1:] = pixels[:, :, :1]
        return pixels


def pixel_table(processor: BaseImageProcessor | None) -> PixelTable | None:
    """Return the table of a Qwen-style processor; None for others, whose pixels are not packed."""
    sizes = [getattr(processor, name, None) for name in ("patch_size", "temporal_patch_size", "merge_size")]
    if not all(isinstance(size, int) for size in sizes):
        return None
    patch, frames, merge = sizes
    side = patch * merge
    ramp = np.arange(side * side).reshape(side, side, 1).repeat(3, axis=2).clip(0, VALUES - 1).astype(np.uint8)
    scaled, raw = (
        processor([ramp], do_resize=False, input_data_format="channels_last", return_tensors="np", **off)[
            "pixel_values"
        ]
        for off in ({}, {"do_rescale": False, "do_normalize": False})
    )
    if raw.shape != (merge * merge, 3 * frames * patch * patch):
        return None
    table = np.empty((3, VALUES), np.float32)
    for channel in range(3):
        values, numbers = (x.reshape(-1, 3, frames * patch * patch)[:, channel].ravel() for x in (raw, scaled))
        table[channel, values.astype(int)] = numbers
    return PixelTable(table, frames, patch * patch)
