"""Writes the policy as a Hugging Face directory, which plain transformers loads, and its adapter as peft's directory."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mssr.distributed import World
from mssr.outputs import replace, write_new
from mssr.policy.lora import adapted_layers, own_name, write_adapter
from mssr.policy.model import Policy
from mssr.policy.weights import BUCKET_BYTES, gathered, named_weights, untied_names

Files = dict[str, bytes]  # name -> content


def save_trained(
    policy: Policy, processors: tuple, run_dir: Path, world: World, cards: Mapping[str, Files] | None = None
) -> None:
    """Write the trained policy to `run_dir/model`; with LoRA also the adapter alone to `run_dir/adapter`.

    Those of an earlier session of the run are replaced. Collective; arguments and errors as `save_model`.

    cards: on rank 0, what to add to each of the two folders, by its name.
    """
    cards = cards or {}
    if adapted_layers(policy):
        save_adapter(policy, run_dir / "adapter", world, run_dir, cards.get("adapter"))
    save_model(policy, processors, run_dir / "model", world, run_dir, cards.get("model"))


def save_model(
    policy: Policy,
    processors: tuple,
    folder: Path,
    world: World,
    run_dir: Path | None = None,
    added: Files | None = None,
) -> Path:
    """Write weights (adapters merged), config, tokenizer and image processor; return the folder.

    The folder appears only when it is complete. Collective, because ZeRO-3 gathers the weights; rank 0 writes.

    processors: the tokenizer and the others that belong to the model, each with `save_pretrained`, or None.
    run_dir: of the run that may replace its own folder; None: nothing may be there.
    added: other files to write into the folder.

    Raises:
        UserError: something else is there, or it could not be written (disk full, permission).
    """
    weights = _unsharded_weights(policy, world) if adapted_layers(policy) or policy.partitioned else None

    def write(partial: Path) -> None:
        policy.model.save_pretrained(partial, state_dict=weights)
        for processor in processors:
            if processor is not None:
                processor.save_pretrained(partial)

    _write_folder(folder, write, world, run_dir, added)
    return folder


def save_adapter(
    policy: Policy, folder: Path, world: World, run_dir: Path | None = None, added: Files | None = None
) -> None:
    """Write the adapter as peft's directory. Collective; run_dir, added and errors as `save_model`."""
    weights = adapter_weights(policy)
    _write_folder(folder, lambda partial: write_adapter(policy, weights, partial), world, run_dir, added)


def _write_folder(
    folder: Path, write: Callable[[Path], None], world: World, run_dir: Path | None, added: Files | None
) -> None:
    """Call `write` on rank 0 with a temporary folder, which is renamed to `folder` when it is complete."""

    def write_all(partial: Path) -> None:
        write(partial)
        for name, content in (added or {}).items():
            (partial / name).write_bytes(content)

    def write_or_replace() -> None:
        try:
            if run_dir is None:
                write_new(folder, write_all)
            else:
                replace(run_dir, folder.name, write_all)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from None

    remedy = "make room and run again (train: with --resume)"
    world.on_main(write_or_replace, f"{folder}: could not be saved", remedy)


@torch.no_grad()
def adapter_weights(policy: Policy) -> dict[str, Tensor]:
    """Return unsharded copies of the adapter parameters by name, in host memory; empty without LoRA. Collective."""
    parts = {name: part for name, part in policy.model.named_parameters() if own_name(name) is None}
    with gathered(list(parts.values())):
        return {name: part.detach().cpu().clone() for name, part in parts.items()}


def _unsharded_weights(policy: Policy, world: World) -> dict[str, Tensor]:
    """Return the state dict to save, on rank 0 in host memory, else empty; a tied weight only under its first name."""
    saved = untied_names(policy) if world.is_main else ()
    return {name: weight.cpu().clone() for name, weight in named_weights(policy, BUCKET_BYTES) if name in saved}
