"""A patched model on two ranks, each with half of the batch, matches the stock model on one rank with all of it."""

import copy
import warnings

import pytest
import torch
from patched_models import assert_same_gradients, batch, gradients, tiny
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mssr_kernels import PolicyLossConfig, check_patch, patch

CLIPPED = PolicyLossConfig(clip_low=0.2, clip_high=0.3, dual_clip=None, entropy_alpha=0.0)


def problem(tied: bool):
    """Return the stock model, tokens, target, advantage and old_logp: the same on every rank."""
    torch.manual_seed(7)
    model = tiny("qwen2 tied" if tied else "qwen2")
    tokens, target = batch(4)
    return model, tokens, target, torch.randn(target.shape), -4 + torch.randn(target.shape)


def of_logits(model, tokens, target, advantage, old_logp):
    """Return the summed policy loss, computed eagerly from the logits."""
    log_p = torch.log_softmax(model(tokens).logits.double(), dim=-1)
    logp = log_p.gather(2, target.clamp(min=0)[..., None])[..., 0]
    ratio = torch.exp(logp - old_logp)
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
    return -objective[target != -100].sum()


def one_process(tied: bool):
    """Return the loss, its gradients, and the loss after a step of plain gradient descent."""
    model, *rows = problem(tied)
    loss = of_logits(model, *rows)
    found = gradients(model, loss / 20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.1 * found[name]
    return loss.item(), found, of_logits(model, *rows).item()


def own(world, *tensors):
    return [tensor[2 * world.rank : 2 * world.rank + 2] for tensor in tensors]


def fused(model, tokens, target, advantage, old_logp, normalizer):
    arguments = dict(target=target, advantage=advantage, old_logp=old_logp, normalizer=normalizer, config=CLIPPED)
    return model(input_ids=tokens, **arguments).loss


def wrap_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def wrap_fsdp(model, head_too: bool):
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=whole)
    if head_too:
        fully_shard(model.lm_head, mp_policy=whole, reshard_after_forward=True)
    return fully_shard(model, mp_policy=whole, reshard_after_forward=True)


WRAPPERS = {
    "ddp": wrap_ddp,
    "fsdp2": lambda model: wrap_fsdp(model, head_too=False),
    "fsdp2, the head on its own": lambda model: wrap_fsdp(model, head_too=True),
}


def train_wrapped(world, wrapper: str, tied: bool):
    """Make every call twice, so that a backward that leaves state behind is noticed."""
    stock, *rows = problem(tied)
    model = WRAPPERS[wrapper](patch(stock))
    tokens, target, advantage, old_logp = own(world, *rows)
    check_patch(model, input_ids=tokens)
    logps = [model(input_ids=tokens, target=target).logp.detach() for _ in range(2)]
    for _ in range(2):
        model.zero_grad()
        loss = fused(model, tokens, target, advantage, old_logp, 20 / world.size)
        loss.backward()

    def whole(tensor):
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    names = {name: parameter for name, parameter in model.named_parameters()}
    found = {name.removeprefix("module."): whole(parameter.grad) for name, parameter in names.items()}
    model.zero_grad()
    out = model(input_ids=tokens, target=target)
    (out.logp * advantage).sum().backward()
    through_logp = {name.removeprefix("module."): whole(parameter.grad) for name, parameter in names.items()}
    return world.sum(loss.detach()).item() * 20 / world.size, found, logps, through_logp


@pytest.mark.parametrize(
    ("wrapper", "tied"),
    [("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True), ("fsdp2, the head on its own", False)],
)
def test_ddp_and_fsdp2(ranks, wrapper, tied):
    loss, wanted, _ = one_process(tied)
    model, tokens, target, advantage, _ = problem(tied)
    log_p = torch.log_softmax(model(tokens).logits.double(), dim=-1)
    logp = log_p.gather(2, target.clamp(min=0)[..., None])[..., 0] * (target != -100)
    through_logp = gradients(model, (logp * advantage).sum() / 2)
    for rank, (found, gradient, logps, of_logp) in enumerate(ranks(train_wrapped, wrapper, tied)):
        assert found == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(gradient, wanted)
        assert torch.equal(*logps)
        torch.testing.assert_close(logps[0].double(), logp[2 * rank : 2 * rank + 2], rtol=1e-5, atol=2e-5)
        assert_same_gradients(of_logp, through_logp)


def train_deepspeed(world, stage: int, tied: bool):
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    import deepspeed

    model, *rows = problem(tied)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1e9,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage == 3:  # as from_pretrained does under ZeRO-3: sharded parameters are patched
        deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    empty = stage == 3 and model.lm_head.weight.numel() == 0
    tokens, target, advantage, old_logp = own(world, *rows)
    check_patch(engine, input_ids=tokens)
    losses, norms = [], []
    for _ in range(2):
        loss = fused(engine, tokens, target, advantage, old_logp, 20 / world.size)
        losses.append(world.sum(loss.detach()).item() * 20 / world.size)
        engine.backward(loss)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    engine.destroy()
    return losses, norms, empty


@pytest.mark.parametrize(("stage", "tied"), [(2, False), (3, False), (3, True)])
def test_zero(ranks, stage, tied):
    loss, wanted, after = one_process(tied)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    for losses, norms, empty in ranks(train_deepspeed, stage, tied):
        assert losses == pytest.approx([loss, after], rel=1e-4)
        assert norms[0] == pytest.approx(norm, rel=1e-4)
        assert empty is (stage == 3)


def cast_by_fsdp(world):
    stock, *rows = problem(False)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_shard(patch(copy.deepcopy(stock)), mp_policy=low)
    tokens, target, advantage, old_logp = own(world, *rows)
    try:
        fused(model, tokens, target, advantage, old_logp, 10.0)
    except TypeError as error:
        refused = str(error)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model = fully_shard(patch(stock), mp_policy=low)
    fused(model, tokens, target, advantage, old_logp, 10.0).backward()
    norm = torch.stack([p.grad.full_tensor().norm() for p in model.parameters()]).norm().item()
    return refused, norm


def test_mixed_precision_of_fsdp2(ranks):
    """It would cast advantages and log-probs to bfloat16; the error names the setting that keeps them in float32."""
    _, wanted, _ = one_process(False)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()
    for refused, found in ranks(cast_by_fsdp):
        assert "must be float32, got bfloat16" in refused and "cast_forward_inputs=False" in refused
        assert found == pytest.approx(norm, rel=0.05)
