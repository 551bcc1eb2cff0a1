"""TRL's trainers with our head against the same trainers with TRL's head, with the same seed and data."""

import importlib
import importlib.metadata
import math

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AyaVisionConfig,
    BertConfig,
    BertForMaskedLM,
    Cohere2Config,
    Cohere2VisionConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Llama4Config,
    ModernBertDecoderConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    xLSTMConfig,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head
from trl_runs import (
    NO_IMAGES,
    gradients,
    image_rows,
    micro_batch,
    text_rows,
    train,
    trainer,
    write_image_model,
    write_text_model,
)

import mssr.integrations.trl
from mssr.errors import UserError
from mssr.integrations.trl import FusedGRPOTrainer, FusedRLOOTrainer
from mssr.integrations.trl.fused_head import fuse_head


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("trl"))


def assert_same_curves(stock, ours, names):
    assert len(stock) == len(ours)
    for step, (theirs, fused) in enumerate(zip(stock, ours)):
        assert set(fused) == set(theirs)
        for name in names:
            assert math.isclose(fused[name], theirs[name], rel_tol=2e-4, abs_tol=2e-5), (step, name)


def test_twenty_steps_on_text(text_model, tmp_path):
    options = dict(max_steps=20, num_generations=4, beta=0.02, num_iterations=2, temperature=0.8)
    stock, ours = (
        train(kind, GRPOConfig, text_model, text_rows(), tmp_path, **options)
        for kind in (GRPOTrainer, FusedGRPOTrainer)
    )
    assert_same_curves(stock, ours, ("loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean"))
    rewards = [step["reward"] for step in ours if "reward" in step]
    assert rewards == [step["reward"] for step in stock if "reward" in step]
    assert len(set(rewards)) > 5  # rewards differ, so there is something to learn


def test_twenty_steps_on_images(tmp_path):
    model, rows = write_image_model(tmp_path), image_rows()
    options = dict(max_steps=20, num_generations=4, steps_per_generation=2, entropy_coef=0.01, **NO_IMAGES)
    stock, ours = (
        train(kind, GRPOConfig, model, rows, tmp_path, **options) for kind in (GRPOTrainer, FusedGRPOTrainer)
    )
    assert_same_curves(stock, ours, ("loss", "grad_norm", "entropy"))
    assert [step.get("reward") for step in ours] == [step.get("reward") for step in stock]


def test_rloo(text_model, tmp_path):
    options = dict(max_steps=4, num_generations=4, beta=0.02, num_iterations=2)
    stock, ours = (
        train(kind, RLOOConfig, text_model, text_rows(), tmp_path, **options)
        for kind in (RLOOTrainer, FusedRLOOTrainer)
    )
    assert_same_curves(stock, ours, ("loss", "grad_norm", "entropy"))


def test_adapters(text_model, tmp_path):
    """With adapters, the reference is the policy without them."""
    options = dict(max_steps=4, num_generations=4, beta=0.05)
    stock, ours = (
        train(
            kind, GRPOConfig, text_model, text_rows(), tmp_path, peft_config=LoraConfig(r=4, init_lora_weights=False),
            **options,
        )
        for kind in (GRPOTrainer, FusedGRPOTrainer)
    )  # fmt: skip
    assert_same_curves(stock, ours, ("loss", "grad_norm", "entropy", "kl"))


def test_gradient_checkpointing(text_model, tmp_path):
    options = dict(max_steps=2, num_generations=4, num_iterations=2, beta=0.02)
    plain, ours = (
        train(kind, GRPOConfig, text_model, text_rows(), tmp_path, gradient_checkpointing=checkpointing, **options)
        for kind, checkpointing in ((GRPOTrainer, False), (FusedGRPOTrainer, True))
    )
    assert_same_curves(plain, ours, ("loss", "grad_norm", "entropy", "kl"))


def test_autocast(text_model, tmp_path):
    """In bfloat16 the two heads round differently: on the same responses they agree within its precision."""
    options = dict(max_steps=2, num_generations=4, num_iterations=2, beta=0.02, bf16=True)
    stock, ours = (
        train(kind, GRPOConfig, text_model, text_rows(), tmp_path, **options)
        for kind in (GRPOTrainer, FusedGRPOTrainer)
    )
    for theirs, fused in zip(stock, ours, strict=True):
        assert fused["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.02)
        assert fused["entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)
    assert ours[1]["kl"] == pytest.approx(stock[1]["kl"], rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type="grpo", delta=1.4),
        dict(loss_type="bnpo", top_entropy_quantile=0.6),
        dict(loss_type="dr_grpo"),
        dict(loss_type="dapo", entropy_coef=0.05),
        dict(loss_type="cispo", epsilon_high=2.0),
        dict(loss_type="sapo"),
        dict(loss_type="luspo", importance_sampling_level="sequence"),
        dict(loss_type="vespo"),
    ],
    ids=lambda options: options["loss_type"],
)
def test_gradients_of_every_loss(options, text_model, tmp_path):
    options = dict(num_generations=4, beta=0.05) | options
    (theirs, stock), (loss, ours) = (
        gradients(trainer(kind, GRPOConfig, text_model, text_rows(), tmp_path, **options), micro_batch())
        for kind in (GRPOTrainer, FusedGRPOTrainer)
    )
    assert loss == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert set(ours) == set(stock)
    for name, gradient in stock.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


SIZES = dict(
    vocab_size=70, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, final_logit_softcapping=3.0),
        CohereConfig(**SIZES, logit_scale=0.25),
        GraniteConfig(**SIZES, logits_scaling=4.0),
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_soft_cap_scale_and_experts(config):
    config.initializer_range = 0.5  # logits far beyond the cap
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(3, 70, (2, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    plain = model(ids).logits
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    found = []
    for fused in (False, True):
        if fused:
            fuse_head(model, temperature=0.7)
        model.zero_grad()
        moe = {"output_router_logits": True} if config.model_type == "qwen3_moe" else {}
        out = model(ids, labels=labels, fused_lm_head=True, **moe)
        (out.log_probs.sum() + 0.3 * out.entropy.sum() + (out.aux_loss if moe else 0)).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((out.log_probs.detach(), out.entropy.detach(), gradient, out.aux_loss))
    for theirs, ours in zip(found[0][:3], found[1][:3]):
        assert theirs.shape == ours.shape
        assert (theirs - ours).norm() <= 2e-5 * theirs.norm()
    assert (found[0][3] is None) == (found[1][3] is None) == (not moe)
    assert torch.equal(model(ids).logits, plain)


EYE = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)  # fmt: skip
SEES = dict(vision_config=SiglipVisionConfig(**EYE), text_config=Cohere2Config(**SIZES, logit_scale=0.25))
NATIVE = dict(
    chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native"
)
OF_ANOTHER_FAMILY = {
    "aya vision": lambda: AutoModelForImageTextToText.from_config(AyaVisionConfig(**SEES, image_token_index=5)),
    "cohere2 vision": lambda: AutoModelForImageTextToText.from_config(Cohere2VisionConfig(**SEES, image_token_id=5)),
    "xlstm": lambda: AutoModelForCausalLM.from_config(
        xLSTMConfig(
            vocab_size=70,
            hidden_size=32,
            num_heads=2,
            num_blocks=1,
            qk_dim_factor=1.0,
            output_logit_soft_cap=2.0,
            **NATIVE,
        )
    ),
}


@pytest.mark.parametrize("family", OF_ANOTHER_FAMILY)
def test_scores_are_those_of_the_model_s_own_logits(family):
    """Their configs name soft cap and scale as no other model's does."""
    model = OF_ANOTHER_FAMILY[family]().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=2)
        ids = torch.randint(6, 70, (2, 9))
        logp = torch.log_softmax(model(ids, use_cache=False).logits / 0.7, dim=-1)[:, :-1]
        fuse_head(model, temperature=0.7)
        out = model(ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs, logp.gather(2, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-4)


PLAIN = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
NOT_FOLLOWED = {
    "ModernBertDecoderForCausalLM": lambda: AutoModelForCausalLM.from_config(ModernBertDecoderConfig(**PLAIN)),
    "BertForMaskedLM": lambda: BertForMaskedLM(BertConfig(**PLAIN)),
    "Llama4ForConditionalGeneration": lambda: AutoModelForImageTextToText.from_config(
        Llama4Config(
            text_config=dict(**SIZES, num_local_experts=2),
            vision_config=dict(**EYE, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
        )
    ),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_a_model_with_more_between_backbone_and_logits_is_refused(name):
    model = NOT_FOLLOWED[name]()
    with pytest.raises(UserError, match=f"{name}.*use a trainer that scores from the model's logits$") as caught:
        fuse_head(model, temperature=1.0)
    assert "\n" not in str(caught.value)
    assert type(model.get_output_embeddings()) is nn.Linear and "forward" not in vars(model)


def test_a_micro_batch_without_a_scored_token_has_a_gradient_of_zero(text_model):
    model = AutoModelForCausalLM.from_pretrained(text_model)
    add_fused_lm_head(model)
    fuse_head(model, temperature=1.0)
    ids = torch.randint(3, 200, (2, 5))
    out = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_the_model_is_saved_as_it_was(text_model, tmp_path):
    run = trainer(FusedGRPOTrainer, GRPOConfig, text_model, text_rows(), tmp_path, num_generations=4)
    run.save_model(str(tmp_path / "saved"))
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (text_model, tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_the_head_cannot_do_is_refused(text_model, tmp_path):
    with pytest.raises(UserError, match=r"^cast_lm_head_to_fp32: .* set it to False.*$"):
        trainer(
            FusedGRPOTrainer,
            GRPOConfig,
            text_model,
            text_rows(),
            tmp_path,
            num_generations=4,
            cast_lm_head_to_fp32=True,
        )
    model = AutoModelForCausalLM.from_config(CohereConfig(**SIZES, logit_scale=0.0))
    with pytest.raises(UserError, match=r"^the fused head cannot follow CohereForCausalLM .*logits are changed.*$"):
        fuse_head(model, temperature=1.0)
    model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Identity())
    with pytest.raises(UserError, match=r"^CohereForCausalLM: the head is Identity, .*$"):
        fuse_head(model, temperature=1.0)


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0"])
def test_an_unsupported_version_is_one_line_with_the_range(version, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "trl" else real(name))
    with pytest.raises(UserError, match=rf"^mssr.integrations.trl needs trl>=1.15,<1.17, this is {version}; .*$"):
        importlib.reload(mssr.integrations.trl)
