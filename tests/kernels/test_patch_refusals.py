"""Unsupported models are refused by `patch`, and unsupported arguments at the call, with a one-line error."""

import pytest
import torch
from patched_models import TEXT, VOCAB, WIDTH, batch, expected, tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MllamaForCausalLM,
    MllamaTextConfig,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from mssr_kernels import (
    check_patch,
    patch,
    unpatch,
)


class Between(Qwen2ForCausalLM):
    """A model with code of its own before the backbone, or between hidden states and logits."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.RMSNorm(WIDTH)
        self.factor = nn.Parameter(torch.ones(()))

    def before(self, hidden):
        return hidden

    def after(self, logits):
        return logits

    def inputs(self, tokens):
        return {"input_ids": tokens}

    def forward(self, input_ids, extra=None, **kwargs):
        hidden = self.model(**self.inputs(input_ids), **kwargs).last_hidden_state
        return CausalLMOutput(logits=self.after(self.lm_head(self.before(hidden))))


def between(**methods):
    return type("Between", (Between,), methods)(AutoConfig.for_model("qwen2", **TEXT)).eval()


@pytest.mark.parametrize(
    "methods",
    [
        {"after": lambda self, z: 5 * torch.tanh(0.3 * z / 5)},
        {"after": lambda self, z: (20 * torch.tanh(z.float() / 20)) / 3},
        {"after": lambda self, z: z.float().contiguous() * 0.1, "before": lambda self, h: h / 9},
        {"after": lambda self, z: 2 * torch.tanh(z / 2), "before": lambda self, h: h * 3},
    ],
)
def test_any_scale_and_soft_cap_is_followed(methods):
    model, (tokens, target) = between(**methods), batch()
    wanted, _ = expected(model, target, input_ids=tokens)
    patch(model)
    check_patch(model, input_ids=tokens)
    torch.testing.assert_close(model(tokens, target=target).logp.double(), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        ({"before": lambda self, h: self.norm(h.float())}, "hidden states are changed before the head"),
        ({"before": lambda self, h: h.roll(1, dims=1)}, "hidden states are changed before the head"),
        ({"before": lambda self, h: h[:, -1:]}, "the head is called with"),
        ({"after": lambda self, z: z + 1}, "logits are changed after the head"),
        ({"after": lambda self, z: -z}, "logits are changed after the head"),
        ({"after": lambda self, z: z.clamp(-30, 30)}, "not by a scale or a soft cap"),
        ({"after": lambda self, z: torch.log_softmax(z, -1)}, "logits are changed after the head"),
        ({"after": lambda self, z: z[..., :90]}, r"logits are \[1, 8, 90\]"),
        ({"after": lambda self, z: z * self.factor}, "parameters are applied to the logits"),
        ({"before": lambda self, h: (self.lm_head(h), h)[1]}, "the head is called 2 times"),
        ({"after": lambda self, z: z + self.lm_head(self.model(torch.zeros(1, 8))[0])}, "with other tensors"),
        ({"inputs": lambda self, tokens: {"input_ids": tokens + 1}}, "with other tensors than forward"),
        (
            {"inputs": lambda self, tokens: {"input_ids": tokens, "position_ids": torch.zeros_like(tokens)}},
            "with other tensors than forward",
        ),
        (
            {"inputs": lambda self, tokens: {"inputs_embeds": self.get_input_embeddings()(tokens)}},
            "with other tensors than forward",
        ),
        (
            {"after": lambda self, z: z.index_fill(2, torch.tensor([90]), torch.finfo(z.dtype).min)},
            "not by a scale or a soft cap",
        ),
    ],
)
def test_what_is_not_known_is_refused(methods, reason):
    model = between(**methods)
    with pytest.raises(ValueError, match=f"patch cannot follow Between.*{reason}.*not supported"):
        patch(model)
    assert type(model.lm_head) is nn.Linear and not {"forward"} & {
        *vars(model),
        *vars(model.model),
        *vars(model.lm_head),
    }


def test_a_check_notices_a_config_that_changed():
    model, (tokens, _) = patch(tiny("granite", attention_dropout=0.5)), batch()
    model.train()
    assert check_patch(model, input_ids=tokens) < 1e-4
    assert model.training and model.lm_head.training
    model.config.logits_scaling = 6.0
    with pytest.raises(RuntimeError, match="GraniteForCausalLM are .* off those of its logits"):
        check_patch(model, input_ids=tokens)
    patch(model)
    check_patch(model.to(torch.bfloat16), input_ids=tokens)
    with pytest.raises(RuntimeError, match="is not patched"):
        check_patch(unpatch(model), input_ids=tokens)


class FourBit(nn.Linear):
    """Stand-in for quantised heads, which are also subclasses of nn.Linear."""


def test_models_that_cannot_be_patched():
    model = tiny()
    for wrapped in (
        nn.Linear(3, 4),
        nn.Sequential(model),
        nn.parallel.DataParallel(model),
        torch.compile(model).forward,
    ):
        with pytest.raises(TypeError, match="patch needs a transformers model with a backbone.*before DDP"):
            patch(wrapped)
    with pytest.raises(TypeError, match="the forward of OptimizedModule is wrapped already: patch first"):
        patch(torch.compile(model))
    model.lm_head.__class__ = FourBit
    with pytest.raises(
        TypeError, match="nn.Linear as output embeddings of Qwen2ForCausalLM, got FourBit.*quantisation"
    ):
        patch(model)
    model = get_peft_model(tiny(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(
        TypeError, match=r"got peft\.tuners\.lora\.layer\.Linear: .*adapter, leave .*LoRA's target_modules$"
    ):
        patch(model)
    with pytest.raises(
        TypeError, match=r"got Linear: its weight is float8_e4m3fn, leave the head out of quantisation$"
    ):
        patch(tiny().to(torch.float8_e4m3fn))
    model = tiny()
    model.forward = lambda *arguments, **keywords: None
    with pytest.raises(TypeError, match="the forward of Qwen2ForCausalLM is wrapped already"):
        patch(model)


def transformers_models():
    """Return models of transformers by what is said about each. The model itself is what is passed."""
    sizes = dict(TEXT, num_local_experts=2)
    eye = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    out = dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    several = {name: size for name, size in TEXT.items() if name != "head_dim"}
    blip = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    yield (
        Llama4ForConditionalGeneration(Llama4Config(text_config=sizes, vision_config=eye | out)),
        "no backbone 'model'",
    )
    mllama = MllamaForCausalLM(MllamaTextConfig(**several, cross_attention_layers=[1]))
    yield mllama, "no backbone 'language_model'"
    yield BlipForConditionalGeneration(BlipConfig(text_config=blip, vision_config=eye)), "no output embeddings"
    yield tiny().model, "no output embeddings: pass a language model with its head"


def test_a_model_itself_is_not_taken_for_a_wrapper():
    for model, reason in transformers_models():
        with pytest.raises(TypeError, match=f"^patch: {type(model).__name__} has {reason}") as caught:
            patch(model)
        assert "DDP" not in str(caught.value) and "\n" not in str(caught.value)


def test_calls_that_are_refused():
    model, (tokens, target) = patch(tiny()), batch()
    rows = torch.randn(target.shape)

    def refused(reason, error=ValueError, **arguments):
        with pytest.raises(error, match=reason):
            model(tokens, **arguments)

    refused("advantage is given but no target", advantage=rows)
    refused("temperature is given but no target", temperature=0.5)
    refused("old_logp is given but no advantage", target=target, old_logp=rows)
    refused("labels cannot be given with target: .*next_token_target", target=target, labels=tokens)
    refused("logits_to_keep cannot be given with target", target=target, logits_to_keep=torch.tensor([0]))
    refused(
        "num_items_in_batch cannot be given with target: pass it as normalizer", target=target, num_items_in_batch=7
    )
    # transformers would silently ignore these misspelt names: ratio and temperature would be 1.
    refused(
        "old_logps is an argument neither of the head nor of Qwen2.*old_logp", TypeError, target=target, old_logps=rows
    )
    refused("temperatur is an argument neither", TypeError, target=target, temperatur=0.5)
    refused("2 positional|input_ids by name as well", TypeError, target=target, input_ids=tokens)
    refused("output_hidden_states cannot be given", target=target, output_hidden_states=True)
    refused("softcap cannot be given with target: the model's own", target=target, softcap=3.0)
    refused(
        "advantage must be float32, got bfloat16.*cast_forward_inputs",
        TypeError,
        target=target,
        advantage=rows.bfloat16(),
    )
    refused("normalizer must be float32", TypeError, target=target, advantage=rows, normalizer=torch.tensor(7.0).half())
    refused(r"target is \[2, 8\]: target needs hidden's leading shape", target=target[:, 1:])
    model = patch(between())
    refused("extra is used by the forward of Between itself", target=target, extra=rows)


def test_router_losses_are_not_lost():
    model, (tokens, target) = patch(tiny("mixtral")), batch()
    with pytest.raises(ValueError, match="output_router_logits cannot be given with target: the router's loss"):
        model(tokens, target=target, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="config.output_router_logits of MixtralForCausalLM is on"):
        model(tokens, target=target)
    assert model(tokens).aux_loss > 0


def test_lora_on_the_head_of_a_patched_model_is_refused():
    model, (tokens, target) = get_peft_model(patch(tiny()), LoraConfig(target_modules=["lm_head"])), batch()
    with pytest.raises(
        TypeError, match="lm_head of Qwen2ForCausalLM is now peft.*layer.Linear.*leave the head out of LoRA's"
    ):
        model(input_ids=tokens, target=target)
