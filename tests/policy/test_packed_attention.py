"""Packed attention through flash-attn's interface equals packed SDPA, and which of the two a run gets.

flash-attn itself needs a GPU. A function with its signature, which computes attention in float64, stands in for it.
"""

import sys
import types

import pytest
import torch
from family_helpers import family_dir, family_logp, family_plain, family_policy, family_prompts
from policy_helpers import ALONE, random_batch

from mssr.config.schema import ModelConfig
from mssr.errors import UserError
from mssr.policy.attention import FLASH, SDPA, PackedLayout, attention_name
from mssr.policy.loading import load_policy
from mssr.policy.packing import pack

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = [5, 9, 3, 7, 1, 12]


class EagerVarlen:
    """Replaces flash_attn 2.8's `flash_attn_varlen_func`: q and result [total, heads, d], k and v [total, kv heads, d]."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        self.calls += 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and isinstance(max_seqlen_q, int)
        assert q.ndim == k.ndim == v.ndim == 3 and q.shape[0] == k.shape[0] == int(cu_seqlens_q[-1])
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max()) and q.shape[1] % k.shape[1] == 0
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and dropout_p == 0.0 and causal
        repeats = q.shape[1] // k.shape[1]
        out = []
        for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
            query = q[start:end].double()
            key, value = (part[start:end].double().repeat_interleave(repeats, dim=1) for part in (k, v))
            scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or q.shape[2] ** -0.5)
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, value))
        return torch.cat(out).to(q.dtype)


@pytest.fixture
def flash_attn(monkeypatch):
    """Add a fake module flash_attn, as if it were installed. Return its function."""
    function = EagerVarlen()
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return function


def logp_and_gradients(policy, batch):
    micro_batch = pack(batch, [0, 1, 2, 3, 4, 5], policy.prompt_positions, policy.image_token_id, ALONE.device)
    weight = torch.randn(len(micro_batch.target), generator=torch.Generator().manual_seed(2))
    logp = policy(micro_batch, 1.0).logp
    (logp * weight).sum().backward()
    return logp.detach(), {name: parameter.grad for name, parameter in policy.model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llama"])
def test_flash_attention_is_sdpa(family, flash_attn):
    batch = random_batch(family_prompts(family), LENGTHS)
    logp, gradients = logp_and_gradients(family_policy(family), batch)
    policy = family_policy(family)
    policy.model.set_attn_implementation(FLASH)
    found, found_gradients = logp_and_gradients(policy, batch)
    assert flash_attn.calls == 2  # the language model's layers, and nothing else
    torch.testing.assert_close(found, logp, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        assert (found_gradients[name] - gradient).norm() <= 1e-5 * (1 + gradient.norm()), name


def test_flash_attention_generates_as_sdpa_does(flash_attn):
    """Without packing, transformers' own attention runs, and padding is masked."""
    policy = family_policy("qwen3")
    policy.model.set_attn_implementation(FLASH)
    prompt, other = family_prompts("qwen3")[1:3]
    longest = max(len(prompt.token_ids), len(other.token_ids)) + 3
    ids, seen = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest, dtype=torch.int64)
    for row, one in enumerate((prompt, other)):
        ids[row, longest - len(one.token_ids) :], seen[row, longest - len(one.token_ids) :] = one.token_ids, 1
    found = policy.model.generate(input_ids=ids, attention_mask=seen, do_sample=False, max_new_tokens=6)
    plain = family_plain(family_dir("qwen3"))
    for row, one in enumerate((prompt, other)):
        alone = plain.generate(
            input_ids=one.token_ids[None], attention_mask=torch.ones_like(one.token_ids)[None], do_sample=False,
            max_new_tokens=6,
        )  # fmt: skip
        count = alone.shape[1] - len(one.token_ids)
        assert found[row, longest : longest + count].tolist() == alone[0, len(one.token_ids) :].tolist()
    assert flash_attn.calls == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_is_taken_where_it_can_run(flash_attn, dtype):
    assert attention_name("auto", dtype, GPU) == attention_name("flash", dtype, GPU) == FLASH
    assert attention_name("sdpa", dtype, GPU) == SDPA


@pytest.mark.parametrize(
    "dtype, device, installed, why",
    [
        (torch.bfloat16, CPU, True, "flash-attn runs on a GPU, and the device is cpu"),
        (torch.float32, GPU, True, "flash-attn computes in 16 bits, and model.dtype is float32"),
        (torch.bfloat16, GPU, False, "flash-attn cannot be imported"),
    ],
)
def test_where_it_cannot_run(flash_attn, monkeypatch, dtype, device, installed, why):
    if not installed:
        monkeypatch.setitem(sys.modules, "flash_attn", None)  # makes the import fail
    assert attention_name("auto", dtype, device) == attention_name("sdpa", dtype, device) == SDPA
    with pytest.raises(UserError) as caught:
        attention_name("flash", dtype, device)
    line = str(caught.value)
    assert line.startswith(f"model.attention flash: {why}") and line.endswith("; set model.attention=auto")
    assert "\n" not in line


def test_a_policy_is_loaded_with_the_attention_asked_for():
    path = family_dir("qwen3_vl")
    with pytest.raises(UserError, match="^model.attention flash: flash-attn runs on a GPU"):
        load_policy(path, torch.float32, ModelConfig(path=path, attention="flash"))
    model = load_policy(path, torch.float32, ModelConfig(path=path, attention="auto")).model
    assert model.model.language_model.config._attn_implementation == SDPA


def test_a_layout_counts_what_is_computed():
    layout = PackedLayout.of([3, 1, 4])
    assert layout.slots == 3 * 4 and layout.longest == 4
    assert layout.ends.tolist() == [0, 3, 4, 8] and layout.ends.dtype == torch.int32
    assert layout.gather.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 6, 7]
    assert layout.scatter.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert PackedLayout.of([5]).slots == 5


@torch.no_grad()
def test_a_layer_that_lost_the_layout_fails():
    """It must not attend over the whole packed row instead."""
    policy = family_policy("llama")
    batch = random_batch(family_prompts("llama"), LENGTHS)
    micro_batch = pack(batch, [0, 1], policy.prompt_positions, None, ALONE.device)
    layer = policy.model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, packed_layout, **kwargs: forward(*args, **kwargs)
    with pytest.raises(RuntimeError):
        policy(micro_batch, 1.0)
    layer.forward = forward
    expected = family_logp(family_plain(family_dir("llama")), batch)[:2]
    found = policy(micro_batch, 1.0).logp
    torch.testing.assert_close(found, torch.cat([expected[0, :5], expected[1, :9]]).float(), atol=1e-5, rtol=0)
