"""ZeRO-3 sharding of the policy, and gathering a full copy."""

import warnings

import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig

from mssr.config.schema import ModelConfig
from mssr.distributed import World
from mssr.policy import attention
from mssr.policy.families import family_of
from mssr.policy.loading import apply_options, load_policy
from mssr.policy.model import Policy
from mssr.policy.weights import BUCKET_BYTES, named_weights

# Parameters up to this many elements stay unsharded on every rank. These are the norm weights of models up to 7B, which
# would need a collective each; a bias is gathered with its layer's weight anyway.
PERSISTENT_NUMEL = 4000


def load_partitioned_policy(
    path: str, dtype: torch.dtype, world: World, deepspeed_settings: dict, options: ModelConfig | None = None
) -> Policy:
    """Load the policy as `load_policy`, with this rank's shard of every parameter.

    Only rank 0 reads and checks the files; the others receive one parameter at a time. So only rank 0's host memory holds
    the full model, and a device never holds more than its shard and one parameter. (transformers' own ZeRO-3 loading
    reads everything on every rank, and does not check shapes or missing weights.)

    Raises:
        UserError: as `load_policy`, on every rank.
    """
    options = options or ModelConfig(path=path)
    policy = None
    with world.together():
        if world.is_main:
            policy = load_policy(path, dtype, options, world.device)
    if policy is None:
        policy = _empty_policy(AutoConfig.from_pretrained(path), dtype, torch.device("cpu"))
        apply_options(policy, options, world.device)
    policy.model.generation_config = world.gather(policy.model.generation_config)[0]

    tensors = [*policy.named_parameters(), *policy.named_buffers()]
    layouts = world.gather([(name, tensor.shape, tensor.dtype) for name, tensor in tensors])
    if any(layout != layouts[0] for layout in layouts):
        raise RuntimeError(f"model.path {path}: ranks built different models from it; do they see the same files?")
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(world.device)
        if world.size > 1:
            dist.broadcast(buffer.data, src=0)
    # torch warns about the old names of DeepSpeed's collectives at every call of every layer.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

    # For each parameter in turn: moves it to the device, broadcasts rank 0's values, keeps the shard.
    deepspeed.zero.Init(module=policy, config_dict_or_path=deepspeed_settings, dtype=dtype)
    return policy


class WholeCopy:
    """A full copy of a sharded policy on this rank, without ZeRO's hooks.

    For generation, where ranks make different numbers of module calls: under the hooks each call waits for all ranks. It
    costs the memory of the full model in its dtype.

    policy: the copy.
    """

    def __init__(self, partitioned: Policy, device: torch.device) -> None:
        source = partitioned.model
        dtype = next(source.parameters()).dtype
        self.policy = _empty_policy(source.config, dtype, device).requires_grad_(False).eval()
        self.policy.model.generation_config = source.generation_config
        buffers = dict(source.named_buffers())
        for name, buffer in self.policy.model.named_buffers():
            buffer.copy_(buffers[name])
        self.update(partitioned)

    @torch.no_grad()
    def update(self, partitioned: Policy) -> None:
        """Copy the sharded policy's weights. Collective."""
        own = dict(self.policy.model.named_parameters(remove_duplicate=False))
        for name, weight in named_weights(partitioned, BUCKET_BYTES):
            own[name].copy_(weight)


def _empty_policy(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Policy:
    """Return a policy with uninitialised weights, tied where the model ties them."""
    with torch.device("meta"):
        auto_class = family_of(config).auto_class
        model = auto_class.from_config(config, dtype=dtype, attn_implementation=attention.SDPA)
    policy = Policy(model).to_empty(device=device)
    model.tie_weights()
    return policy
