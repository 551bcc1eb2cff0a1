"""Tiny models of many families, and expected values for patched models, from the logits of the stock model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mssr_kernels import next_token_target

VOCAB, WIDTH = 101, 32
TEXT = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8)
FAMILIES = {
    "qwen2": {"tie_word_embeddings": False},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 0.7},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 7.0},
    "falcon_h1": {
        "lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
    },
    "minicpm3": LATENT | {"num_key_value_heads": 4, "dim_model_base": 12},
    "mixtral": {"num_local_experts": 2},
    "phi": {},  # a head with a bias
}  # fmt: skip


def tiny(family: str = "qwen2", **options):
    """Return a model with weights large enough that its distributions are far from flat."""
    kind, *_ = family.split()
    config = AutoConfig.for_model(kind, **(TEXT | FAMILIES.get(family, {}) | options))
    return with_large_weights(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def with_large_weights(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 if "lm_head" in name or "embed" in name else 0.15)
    return model.eval()


def batch(rows: int = 2, length: int = 9):
    """Return tokens and targets, both [rows, length]; each row's first three targets and its last are ignored."""
    tokens = torch.randint(3, VOCAB, (rows, length))
    return tokens, next_token_target(tokens, torch.arange(length).expand(rows, length) > 3)


def expected(model, target, temperature=1.0, **inputs):
    """Return logp and entropy, both [B, T] float64, from the logits of the stock model."""
    log_p = torch.log_softmax(model(**inputs).logits.double() / temperature, dim=-1)
    kept = target != -100
    logp = log_p.gather(2, target.clamp(min=0)[..., None])[..., 0]
    return logp * kept, -(log_p.exp() * log_p).sum(-1) * kept


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict, want: dict, tolerance=1e-4):
    assert got.keys() == want.keys()
    scale = max(float(gradient.norm()) for gradient in want.values())
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= tolerance * scale, name
