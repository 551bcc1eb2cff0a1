"""Saves and loads the optimiser's state by parameter name, independent of ZeRO stage and number of ranks.

DeepSpeed distributes master weights and moments over ranks: ZeRO-1 and -2 concatenate all parameters and give each rank one
range; ZeRO-3 splits each parameter; stage 0 keeps everything on every rank. In all layouts a rank's part of a parameter is
a range of its flattened elements, a piece. Saved pieces cover every parameter exactly once, so any other layout copies the
ranges that it needs. (DeepSpeed's universal checkpoint is an offline conversion that writes everything again, and does not
support stage 0.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.weights import whole_shape

VALUES = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Piece:
    """Elements start, start + 1, ... of a flattened parameter, as [n] float32 views of the optimiser's state."""

    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def cut(self, start: int, end: int) -> "Piece":
        """Return the part of the piece between elements start and end - 1 of the parameter."""
        first = max(start, self.start)
        count = max(0, min(end, self.start + len(self.master)) - first)
        values = (getattr(self, name).narrow(0, first - self.start if count else 0, count) for name in VALUES)
        return Piece(first, *values)


def held_pieces(engine, parameters: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, Piece]]:
    """Yield this rank's pieces of the trained parameters."""
    find = (_whole, _stretch, _stretch, _share)[engine.zero_optimization_stage()]
    optimizer = torch_optimizer(engine)
    for name, parameter in parameters.items():
        found = find(engine, parameter)
        if found is not None:
            start, flat, offset, count = found
            state = _moments(optimizer, flat)
            values = (value.detach().view(-1) for value in (flat, state["exp_avg"], state["exp_avg_sq"]))
            yield name, Piece(start, *(value.narrow(0, offset, count) for value in values))


def own_pieces(engine, parameters: dict[str, torch.nn.Parameter], world: World) -> Iterator[tuple[str, Piece]]:
    """Yield the pieces that this rank saves: over all ranks, every element once."""
    for name, piece in held_pieces(engine, parameters):
        if engine.zero_optimization_stage() == 0:  # every rank holds everything
            share = -(-len(piece.master) // world.size)
            piece = piece.cut(world.rank * share, (world.rank + 1) * share)
        if len(piece.master):
            yield name, piece


@torch.no_grad()
def load_pieces(engine, parameters: dict[str, torch.nn.Parameter], saved: "SavedPieces", updates: int) -> None:
    """Load masters, moments and the model's own weights. updates: made so far, for AdamW's bias correction."""
    for name, piece in held_pieces(engine, parameters):
        for value in VALUES:
            saved.fill(name, value, piece.start, getattr(piece, value))
    for state in torch_optimizer(engine).state.values():
        state["step"].fill_(updates)
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id"):
            share = parameter.ds_tensor.data
            start = _share_start(parameter)
            count = max(0, min(share.numel(), parameter.ds_numel - start))
            saved.fill(name, "master", start, share.view(-1)[:count])
        if parameter.numel():  # under ZeRO-3 only parameters that every rank keeps unsharded
            saved.fill(name, "master", 0, parameter.data.view(-1))


class SavedPieces:
    """The pieces in a checkpoint."""

    def __init__(self, pieces: list[dict[str, dict]]) -> None:
        """pieces: every rank's `save_pieces`."""
        self._found: dict[str, list[dict]] = {}
        for part in pieces:
            for name, piece in part.items():
                self._found.setdefault(name, []).append(piece)

    def fill(self, name: str, value: str, start: int, out: Tensor) -> None:
        """Copy elements start to start + n - 1 of a parameter's value into out, [n] of any dtype.

        Raises:
            UserError: elements are missing in the files.
        """
        missing = len(out)
        for piece in self._found.get(name, []):
            first = max(start, piece["start"])
            count = min(start + len(out), piece["start"] + len(piece[value])) - first
            if count > 0:
                out.narrow(0, first - start, count).copy_(piece[value].narrow(0, first - piece["start"], count))
                missing -= count
        if missing:
            raise UserError(f"checkpoint: {missing} elements of {name} are missing; is a rank's file gone?")


def save_pieces(pieces: Iterator[tuple[str, Piece]]) -> dict[str, dict]:
    """Copy pieces to host memory, in the format that `SavedPieces` reads."""
    copies = {}
    for name, piece in pieces:
        values = {value: getattr(piece, value).to("cpu", copy=True) for value in VALUES}
        copies[name] = {"start": piece.start, **values}
    return copies


def torch_optimizer(engine) -> torch.optim.Optimizer:
    """Return the AdamW inside DeepSpeed's wrapper, if there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def shapes(parameters: dict[str, torch.nn.Parameter]) -> dict[str, list[int]]:
    return {name: list(whole_shape(parameter)) for name, parameter in parameters.items()}


def _whole(engine, parameter: torch.nn.Parameter) -> tuple[int, Tensor, int, int]:
    """Return (first element's number, the tensor that AdamW updates, the piece's offset in it, its length)."""
    return 0, parameter, 0, parameter.numel()


def _stretch(engine, parameter: torch.nn.Parameter) -> tuple[int, Tensor, int, int] | None:
    """As `_whole`; None if the parameter is entirely on other ranks."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # Not DeepSpeed's links to the moments, which are stale after `PolicyEngine.optimizer_offloaded`.
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return mapping.lp_fragment_address.start, flat, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel


def _share(engine, parameter: torch.nn.Parameter) -> tuple[int, Tensor, int, int] | None:
    zero = engine.optimizer
    group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
    start = _share_start(parameter)
    count = min(count, parameter.ds_numel - start)  # the last shares are padded
    return (start, zero.fp32_partitioned_groups_flat[group], offset, count) if count > 0 else None


def _share_start(parameter: torch.nn.Parameter) -> int:
    return dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel


def _moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[flat]
    if not state:  # AdamW creates them in its first step, ZeRO at once
        zeros = {name: torch.zeros_like(flat, memory_format=torch.preserve_format) for name in VALUES[1:]}
        state.update(step=torch.zeros((), dtype=torch.float32, device=flat.device), **zeros)
    return state
