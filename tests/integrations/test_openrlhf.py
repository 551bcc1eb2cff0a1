"""OpenRLHF's Actor with our head: log-probs, entropy and gradients, compared with its own.

Tested with OpenRLHF if it is installed, and always with a stand-in that has OpenRLHF 0.11.2's signatures and order of calls.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import runpy
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
import transformers.modeling_flash_attention_utils as padding
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mssr.errors import UserError
from mssr.integrations import openrlhf as ours

ACTOR = """
    import torch
    from torch import nn


    def unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group):
        kept = attention_mask.flatten().nonzero()[:, 0]
        positions = attention_mask.cumsum(-1) - 1
        rows = (sequences, positions, sequences.roll(-1, 1))
        tokens, positions, shifted = (row.flatten()[kept][None] for row in rows)
        return tokens, positions, shifted, 0, kept


    def compute_entropy(logits):
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)


    def log_probs_from_logits(logits, labels, temperature=1.0):
        if temperature != 1.0:
            logits.div_(temperature)
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


    class Actor(nn.Module):
        def __init__(self, model, temperature=1.0, packing_samples=False):
            super().__init__()
            self.model, self.temperature, self.packing_samples = model, temperature, packing_samples

        def forward(
            self, sequences, action_mask=None, attention_mask=None, return_output=False, allgather_logits=False,
            return_logprobs=False, ring_attn_group=None, packed_seq_lens=None, return_entropy=False, **mm_inputs,
        ):
            if self.packing_samples:
                tokens, positions, shifted, _, kept = unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group)
                output = self.model(tokens, attention_mask=None, position_ids=positions, **mm_inputs)
            else:
                shifted, kept = sequences.roll(-1, 1), torch.arange(sequences.numel())
                output = self.model(sequences, attention_mask=attention_mask, **mm_inputs)

            def padded(values):
                return values.new_zeros(sequences.numel()).index_put((kept,), values.flatten()).view(sequences.shape)

            output["logits"] = output["logits"].to(torch.float32)
            if self.temperature != 1.0:
                output["logits"].div_(self.temperature)
            if return_entropy:
                output.entropy = padded(compute_entropy(output["logits"]))[:, :-1]
            if action_mask is None and not return_logprobs:
                return output
            log_probs = padded(log_probs_from_logits(output["logits"], shifted))[:, :-1]
            if action_mask is not None:
                log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
            return (log_probs, output) if return_output else log_probs
"""
STAND_IN = {
    "openrlhf/__init__.py": "",
    "openrlhf/models/__init__.py": "from openrlhf.models.actor import Actor",
    "openrlhf/models/actor.py": ACTOR,
    "openrlhf-0.11.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: openrlhf\nVersion: 0.11.2\n",
}


def loaded(package):
    return [name for name in sys.modules if name.split(".")[0] == package]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return the folder that `import openrlhf` uses in this test, even if the real OpenRLHF is installed."""
    for name, text in STAND_IN.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    kept = {name: sys.modules.pop(name) for name in loaded("openrlhf")}
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in loaded("openrlhf"):
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def openrlhf(monkeypatch):
    """Return the real `openrlhf.models.actor`. Without flash-attn, transformers' plain torch padding replaces its own."""
    reason = "OpenRLHF is not installed: its stand-in alone is tested"
    pytest.importorskip("openrlhf", reason=reason)
    if importlib.util.find_spec("flash_attn") is None:
        for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
            module = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
            monkeypatch.setitem(sys.modules, name, module)
        module = sys.modules["flash_attn.bert_padding"]
        module.rearrange = pytest.importorskip("einops").rearrange
        module.index_first_axis = torch.Tensor.__getitem__
        module.pad_input, module.unpad_input = padding._pad_input, padding._unpad_input
        sys.modules["flash_attn.utils.distributed"].all_gather = None
    module = pytest.importorskip("openrlhf.models.actor", reason=reason, exc_type=ImportError)
    # The original is compiled, which takes half a minute on a CPU.
    monkeypatch.setattr(module, "compute_entropy", inspect.unwrap(module.compute_entropy))
    yield module
    ours.uninstall()


def stand_in_actor():
    return importlib.import_module("openrlhf.models.actor")


EXAMPLE = Path(__file__).parents[2] / "examples/openrlhf_log_probs.py"
SMALL = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.2,
)  # fmt: skip


def text_model(**changes):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True, **changes))


def picture_model():
    vision = dict(
        depth=1, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=[0]
    )
    config = Qwen2_5_VLConfig(
        text_config=SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        vision_config=vision, image_token_id=300, video_token_id=301, vision_start_token_id=302,
        vision_end_token_id=303, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def batch():
    """Return tokens [3, 12], two rows padded on the right; their mask; and the action mask of the last 5 columns [3, 5]."""
    torch.manual_seed(1)
    sequences = torch.randint(290, (3, 12))
    attention = torch.ones_like(sequences)
    attention[1, 10:] = 0
    attention[2, 9:] = 0
    return sequences, attention, attention[:, -5:].bool()


def pictures(sequences):
    """Put an image of 4 x 4 patches, 4 tokens, into every row, and return the images' inputs."""
    sequences[:, 2:6] = 300
    return dict(pixel_values=torch.randn(48, 3 * 2 * 14 * 14), image_grid_thw=torch.tensor([[1, 4, 4]] * 3))


def step(actor, dtype=torch.float32, **images):
    """Return log-probs and entropy of the actions, and the gradients of a policy loss with entropy bonus."""
    sequences, attention, actions = batch()
    if images:
        images = pictures(sequences)
    actor.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        log_probs, output = actor(
            sequences, actions, attention_mask=attention, return_output=True, return_entropy=True, **images
        )
    entropy = output.entropy[:, -actions.shape[1] :] * actions
    weights = torch.linspace(-1, 1, log_probs.numel()).view(log_probs.shape)
    (log_probs * weights - 0.1 * entropy).sum().backward()
    gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    return log_probs.detach(), entropy.detach(), gradients


def assert_same(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found[:2], expected[:2], rtol=tolerance, atol=tolerance)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert (found[2][name] - value).norm() <= tolerance * value.norm() + 1e-6, name


def no_logits(head, inputs, output):
    assert not isinstance(output, torch.Tensor), "the head made logits"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stand_in_gives_the_same_without_logits(stand_in, packing, temperature):
    actor = stand_in_actor().Actor(text_model(), temperature, packing)
    theirs = step(actor)
    assert ours.install() == "0.11.2"
    actor.model.lm_head.register_forward_hook(no_logits)
    assert_same(step(actor), theirs)


def test_who_asks_for_logits_gets_logits(stand_in):
    actor = stand_in_actor().Actor(text_model(), 0.7)
    sequences, attention, _ = batch()
    theirs = actor(sequences, attention_mask=attention, return_output=True, return_entropy=True)
    ours.install()
    actor(sequences, attention_mask=attention, return_logprobs=True)  # so that the head has scored once
    found = actor(sequences, attention_mask=attention, return_output=True, return_entropy=True)
    torch.testing.assert_close(found.logits, theirs.logits)
    torch.testing.assert_close(found.entropy, theirs.entropy)
    assert actor.model(sequences).logits.shape == (3, 12, 320)


def test_uninstall_gives_everything_back(stand_in):
    module = stand_in_actor()
    before = module.Actor.forward, module.compute_entropy, module.log_probs_from_logits
    ours.install()
    ours.install()
    assert module.Actor.forward is not before[0]
    ours.uninstall()
    ours.uninstall()
    assert (module.Actor.forward, module.compute_entropy, module.log_probs_from_logits) == before


def test_another_signature_is_refused_and_nothing_is_changed(stand_in):
    path = stand_in / "openrlhf/models/actor.py"
    path.write_text(path.read_text().replace("return_entropy=False, **", "return_entropy=False, top_k=0, **"))
    before = stand_in_actor().Actor.forward
    with pytest.raises(UserError, match=r"openrlhf 0\.11\.2: Actor\.forward takes .*top_k"):
        ours.install()
    assert stand_in_actor().Actor.forward is before


def test_another_version_is_refused(stand_in):
    path = stand_in / "openrlhf-0.11.2.dist-info/METADATA"
    path.write_text(path.read_text().replace("0.11.2", "0.8.0"))
    with pytest.raises(UserError, match=r"needs openrlhf>=0\.11.*, this is 0\.8\.0"):
        ours.install()


def test_what_openrlhf_itself_lacks_is_named(stand_in):
    path = stand_in / "openrlhf/models/actor.py"
    path.write_text("import no_such_attention\n")
    with pytest.raises(UserError, match=r"openrlhf 0\.11\.2 cannot be imported: No module named 'no_such_attention'"):
        ours.install()


def test_a_softcap_after_the_head_is_refused(stand_in):
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=32, final_logit_softcapping=30.0))
    actor = stand_in_actor().Actor(model)
    ours.install()
    with pytest.raises(UserError, match="softcap"):
        step(actor)


def test_a_head_that_is_no_plain_linear_is_refused(stand_in):
    class Quantised(nn.Linear):
        pass

    model = text_model()
    model.lm_head.__class__ = Quantised
    ours.install()
    with pytest.raises(UserError, match="head of Qwen2ForCausalLM is a Quantised"):
        step(stand_in_actor().Actor(model))


def test_an_error_in_the_model_leaves_the_head_as_it_was(stand_in):
    model = text_model()
    actor = stand_in_actor().Actor(model)
    ours.install()

    def fail(*_):
        raise FloatingPointError

    hook = model.model.register_forward_hook(fail)
    with pytest.raises(FloatingPointError):
        step(actor)
    hook.remove()
    assert model(batch()[0]).logits.shape == (3, 12, 320)


@pytest.mark.parametrize("make", [text_model, picture_model])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_actor(openrlhf, tmp_path, make, packing, dtype):
    if packing and make is picture_model:
        pytest.skip("OpenRLHF does not pack image inputs")
    make().save_pretrained(tmp_path)
    actor = openrlhf.Actor(str(tmp_path), "sdpa", packing_samples=packing, temperature=0.7).float()
    images = {"images": True} if make is picture_model else {}
    theirs = step(actor, dtype, **images)
    ours.install()
    actor.model.lm_head.register_forward_hook(no_logits)
    assert_same(step(actor, dtype, **images), theirs, 2e-5 if dtype == torch.float32 else 0.06)


def test_the_real_actor_with_lora(openrlhf, tmp_path):
    text_model().save_pretrained(tmp_path)
    actor = openrlhf.Actor(str(tmp_path), "sdpa", lora_rank=4, target_modules=["q_proj", "v_proj"]).float()
    theirs = step(actor)
    ours.install()
    assert_same(step(actor), theirs)


def test_the_example(openrlhf, capsys):
    runpy.run_path(str(EXAMPLE))["main"]()
    differences = [float(line.split()[-6]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert max(differences) < 1e-5


def test_the_example_on_the_stand_in(stand_in, capsys):
    runpy.run_path(str(EXAMPLE))["main"]()
    differences = [float(line.split()[-6]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert max(differences) < 1e-5
