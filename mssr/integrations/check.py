"""`mssr doctor --integration NAME`: compares our scores with the installed framework's on the same tokens of a tiny model.

An integration depends on a framework's internals, for which its version is no proof.
"""

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from mssr.errors import UserError
from mssr.integrations.versions import require_version
from mssr.versions import requirement
from mssr_kernels import check_patch, patch

ALLOWED = 1e-4  # float32 on both sides
TEMPERATURE = 0.8


# By quantity: its values; its largest difference, in nats, of gradients relative to their largest entry.
Results = dict[str, Tensor]
Differences = dict[str, float]


class Agreement(NamedTuple):
    framework: str
    differences: Differences

    def __str__(self) -> str:
        found = ", ".join(f"{what} {difference:.1e}" for what, difference in self.differences.items())
        return f"✓ {self.framework}: largest differences from its own results on a tiny model: {found}"


def check_integration(name: str) -> Agreement:
    """Run one of CHECKS.

    Raises:
        UserError: unknown integration, framework missing or of another version, or results differ.
    """
    if name not in CHECKS:
        raise UserError(f"--integration {name}: unknown; choose from {', '.join(CHECKS)}")
    differences = CHECKS[name]()
    package = {"liger": "liger-kernel"}.get(name, name)
    found = Agreement(f"{package} {importlib.metadata.version(package)}", differences)
    for what, difference in differences.items():
        if not difference <= ALLOWED:
            raise UserError(
                f"{found.framework}: {what} differs by {difference:.1e} from the framework's own (allowed: {ALLOWED:.0e}); "
                "do not use this integration with this version"
            )
    return found


def _transformers() -> Differences:
    try:
        return {"log-prob": check_patch(patch(_model()), input_ids=_tokens())}
    except RuntimeError as error:
        raise UserError(f"transformers {importlib.metadata.version('transformers')}: {error}") from None


def _trl() -> Differences:
    require_version("trl")
    from trl.trainer.utils import add_fused_lm_head

    from mssr.integrations.trl.fused_head import fuse_head

    def scores(fused: bool) -> Results:
        model = _model()
        add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        if fused:
            fuse_head(model, TEMPERATURE)
        out = model(input_ids=_tokens(), labels=_tokens(), fused_lm_head=True)
        return _scores(model, out.log_probs, out.entropy)

    return _differences(scores(fused=False), scores(fused=True))


def _verl() -> Differences:
    from mssr.integrations import verl

    verl.install()
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    def scores() -> Results:
        model = _model()
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
        out = model(input_ids=_tokens(), temperature=TEMPERATURE, return_dict=True)
        return _scores(model, out.log_probs[:, :-1], out.entropy[:, :-1])

    return _with_and_without(scores, verl.uninstall)


def _openrlhf() -> Differences:
    from mssr.integrations import openrlhf

    openrlhf.install()
    from openrlhf.models import Actor

    def scores() -> Results:
        actor = Actor(_model(), temperature=TEMPERATURE)
        actor.packing_samples = False
        ones = torch.ones_like(_tokens())
        logp, out = actor(_tokens(), ones[:, 1:].bool(), attention_mask=ones, return_output=True, return_entropy=True)
        return _scores(actor.model, logp, out.entropy[:, -logp.shape[1] :])

    return _with_and_without(scores, openrlhf.uninstall)


def _liger() -> Differences:
    from mssr_kernels import liger as ours

    try:
        from liger_kernel import chunked_loss as theirs
    except ImportError:
        raise UserError(
            "liger-kernel is not installed, so there is nothing to compare with (mssr_kernels.liger works without it); "
            f"pip install '{requirement('liger-kernel')}'"
        ) from None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 32, generator=generator)
    hidden = torch.randn(4, 16, 32, generator=generator)
    advantage, mask = torch.randn(4, generator=generator), torch.ones(4, 16)
    tokens = torch.randint(512, (4, 16), generator=generator)

    def results(module) -> Results:
        head = weight.clone().requires_grad_()
        settings = dict(beta=0.0, use_ref_model=False, compiled=False, temperature=TEMPERATURE)
        value, _ = module.LigerFusedLinearGRPOLoss(**settings)(hidden, head, tokens, mask, advantage)
        value.backward()
        return {"loss": value.detach(), "gradient": head.grad}

    return _differences(results(theirs), results(ours))


CHECKS: dict[str, Callable[[], Differences]] = {
    "transformers": _transformers,
    "trl": _trl,
    "verl": _verl,
    "openrlhf": _openrlhf,
    "liger": _liger,
}


def _model() -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()


def _tokens() -> Tensor:
    return torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))


def _scores(model: PreTrainedModel, logp: Tensor, entropy: Tensor) -> Results:
    """Return both, [B, T - 1], and the gradient of a loss of both."""
    (logp.mean() - 0.1 * entropy.mean()).backward()
    gradient = model.get_output_embeddings().weight.grad
    return {"log-prob": logp.detach().float(), "entropy": entropy.detach().float(), "gradient": gradient}


def _with_and_without(scores: Callable[[], Results], uninstall: Callable[[], None]) -> Differences:
    try:
        ours = scores()
    finally:
        uninstall()
    return _differences(scores(), ours)


def _differences(theirs: Results, ours: Results) -> Differences:
    largest = {what: float((ours[what] - theirs[what]).abs().max()) for what in theirs}
    return largest | {"gradient": largest["gradient"] / float(theirs["gradient"].abs().max())}
