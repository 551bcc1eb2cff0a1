"""Every family: packed sequences equal plain transformers on single ones, and the vision tower runs without images too."""

import json
import shutil

import pytest
import torch
from family_helpers import (
    VISION,
    family_dir,
    family_logp,
    family_plain,
    family_policy,
    family_prompts,
    never_sampled,
)
from policy_helpers import ALONE, DATA, edit_json, make_engine, random_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mssr.data.prompts import PromptEncoder, load_processors
from mssr.errors import BadRow, UserError
from mssr.policy.families import FAMILIES
from mssr.policy.loading import check_model_path, load_policy
from mssr.policy.loss import CrossEntropy
from mssr.policy.packing import pack

LENGTHS = [5, 9, 3, 7, 1, 12]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def policy(family):
    return family_policy(family)


@pytest.fixture(scope="module")
def batch(family):
    return random_batch(family_prompts(family), LENGTHS)


def packed(policy, batch, rows):
    return pack(batch, list(rows), policy.prompt_positions, policy.image_token_id, ALONE.device)


def scored(policy, batch, rows):
    """Return [B, R] log-probs of the rows, packed together in the given order."""
    micro_batch = packed(policy, batch, rows)
    logp = torch.zeros(batch.tokens.shape)
    return logp.index_put((micro_batch.row, micro_batch.column), policy(micro_batch, 1.0).logp)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 2, 4, 0], [2]])
@torch.no_grad()
def test_packed_log_probs_are_plain_transformers(family, policy, batch, rows):
    expected = torch.zeros(batch.tokens.shape)
    expected[rows] = family_logp(family_plain(family_dir(family)), batch)[rows].float()
    torch.testing.assert_close(scored(policy, batch, rows), expected, atol=1e-5, rtol=0)


def test_packed_gradients_are_plain_transformers(family, policy, batch):
    model = family_plain(family_dir(family), attention="sdpa")
    weight = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(1)) * batch.mask
    (family_logp(model, batch) * weight).sum().backward()
    (scored(policy, batch, range(6)) * weight).sum().backward()
    found = dict(policy.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (found[name].grad - parameter.grad).norm() <= 1e-5 * (1 + parameter.grad.norm()), name
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name  # else nothing was compared
    policy.zero_grad(set_to_none=True)


@pytest.mark.parametrize("changed", [1, 2])
@torch.no_grad()
def test_a_sequence_never_sees_its_neighbours(policy, batch, changed):
    other = random_batch(batch.prompts, LENGTHS, seed=1)
    before = scored(policy, batch, range(6))
    swapped = random_batch(batch.prompts, LENGTHS)
    swapped.tokens[changed] = other.tokens[changed]
    after = scored(policy, swapped, range(6))
    others = [row for row in range(6) if row != changed]
    assert torch.equal(after[others], before[others])
    assert (after[changed] - before[changed]).abs()[: LENGTHS[changed]].max() > 1e-2


class LargestSquare(TorchDispatchMode):
    """Records n of the largest [..., n, n] tensor that any operation returned, in `side`."""

    def __init__(self) -> None:
        super().__init__()
        self.side = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-1] == value.shape[-2]:
                self.side = max(self.side, value.shape[-1])
        return out


@torch.no_grad()
def test_no_mask_over_the_packed_row(policy, batch):
    micro_batch = packed(policy, batch, range(6))
    with LargestSquare() as largest:
        policy(micro_batch, 1.0)
    assert largest.side < micro_batch.input_ids.shape[1]


@pytest.mark.parametrize("family", VISION)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_images_the_tower_runs_as_with_them(family, checkpointing):
    """Forward runs the same modules and backward produces the same gradients, in the same order: ranks under ZeRO-2 and
    ZeRO-3 wait for each other in this order. The update does not change: the tower's gradients are exactly 0."""
    policy = family_policy(family).train()
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = random_batch(family_prompts(family), LENGTHS)
    calls, gradients = [], []
    for name, module in policy.model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    for name, parameter in policy.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: gradients.append(name))

    def orders(rows):
        policy.zero_grad(set_to_none=True)
        calls.clear(), gradients.clear()
        out = policy(packed(policy, batch, rows), 1.0)
        out.logp.sum().backward()
        return out.logp.detach(), list(calls), list(gradients)

    _, with_calls, with_gradients = orders([0])
    logp, calls_without, gradients_without = orders([2])
    assert calls_without == with_calls and gradients_without == with_gradients
    assert sorted(gradients_without) == sorted(name for name, _ in policy.model.named_parameters())
    assert all(not parameter.grad.any() for parameter in policy.vision_tower.parameters())
    expected = family_logp(family_plain(family_dir(family)), batch)[2, : LENGTHS[2]]
    torch.testing.assert_close(logp, expected.float(), atol=1e-5, rtol=0)


def test_what_is_never_sampled(family, policy, batch):
    """Image and video pads have probability 0; a text-only model can sample its whole vocabulary."""
    assert policy.forbidden_token_ids == never_sampled(policy.model)
    assert len(policy.forbidden_token_ids) == (2 if family in VISION else 0)
    assert (policy.image_token_id is None) == (policy.vision_tower is None) == (family not in VISION)
    with torch.no_grad():
        logits = policy.model(input_ids=batch.prompts[2].token_ids[None]).logits[0, -1]
    assert (~logits.isfinite()).nonzero().flatten().tolist() == policy.forbidden_token_ids


def test_image_tokens_are_what_the_tower_makes(family):
    """The image processor's patches have sides of 14 or 16 pixels; 2 x 2 of them become one image token."""
    for prompt in family_prompts(family):
        if prompt.pixel_values is None:
            continue
        config = load_policy(family_dir(family), torch.float32).model.config
        pads = int((prompt.token_ids == config.image_token_id).sum())
        assert pads * 4 == len(prompt.pixel_values) == int(prompt.image_grid_thw.prod(1).sum())
        assert prompt.pixel_values.shape[1] == 3 * 2 * config.vision_config.patch_size**2


def test_the_engine_trains_it(world, family, batch):
    engine = make_engine(path=family_dir(family), zero_stage=2, lr=1e-3)
    before = engine.score(batch)
    torch.testing.assert_close(before, family_logp(family_plain(family_dir(family)), batch).float(), atol=1e-5, rtol=0)
    for _ in range(2):
        engine.update(batch, CrossEntropy())
    assert engine.score(batch).sum() > before.sum() + 1


@pytest.mark.parametrize("text", [name for name in FAMILIES if name not in VISION])
def test_a_text_only_model_refuses_rows_with_images(text):
    encoder = PromptEncoder(*load_processors(family_dir(text)), DATA)
    picture = family_prompts(VISION[0])[0].images[0]
    with pytest.raises(BadRow, match=r"^rows, row 3: has images, but model.path is a text-only model"):
        encoder.encode({"problem": "3 + 4?", "answer": "7", "images": [picture]}, 3, "rows")


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_vl_moe", "no_such_type", None])
def test_other_types_are_refused_by_name(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for load in (check_model_path, lambda path: load_policy(path, torch.float32)):
        with pytest.raises(UserError) as caught:
            load(str(tmp_path))
        assert str(caught.value) == (
            f"model.path {tmp_path}: model_type {model_type} is not supported; "
            "these are: llama, qwen2, qwen2_5_vl, qwen2_vl, qwen3, qwen3_vl. For most others use the loss: "
            "mssr_kernels.patch(model) in a trainer of your own, or the trainers of mssr.integrations.trl"
        )


def test_sliding_windows_are_refused(tmp_path):
    shutil.copy(f"{family_dir('qwen3')}/config.json", tmp_path)
    check_model_path(str(tmp_path))
    edit_json(
        tmp_path / "config.json", use_sliding_window=True, sliding_window=16, max_window_layers=1, layer_types=None
    )
    with pytest.raises(UserError, match="layers with sliding_attention"):
        check_model_path(str(tmp_path))
