"""verl's fused forwards with our log-probs and entropy.

Tested with verl if it is installed, and always with a stand-in that has verl 0.9.1's signatures, defaults and return shapes.
"""

import importlib
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from mssr.errors import UserError
from mssr.integrations import verl as ours

EXAMPLE = Path(__file__).parents[2] / "examples/verl_log_probs.py"
STAND_IN = {
    "verl/__init__.py": "",
    "verl/utils/__init__.py": "",
    "verl/utils/kernel/__init__.py": "",
    "verl/utils/experimental/__init__.py": "",
    "verl/models/__init__.py": "",
    "verl/models/mcore/__init__.py": "",
    "verl/models/transformers/__init__.py": "",
    "verl/models/transformers/monkey_patch.py": """
        from types import MethodType, SimpleNamespace

        def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
            def forward(self, input_ids, temperature=1.0, return_dict=None):
                from verl.utils.experimental.torch_functional import FusedLinearForPPO

                hidden = self.model(input_ids).last_hidden_state
                fused = FusedLinearForPPO(impl_backend=fused_kernels_backend)
                log_probs, entropy = fused(hidden, self.lm_head.weight, input_ids.roll(-1, -1), temperature)
                return SimpleNamespace(log_probs=log_probs, entropy=entropy)

            model.forward = MethodType(forward, model)
    """,
    "verl/models/mcore/model_forward_fused.py": """
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    """,
    "verl/utils/kernel/linear_cross_entropy.py": """
        import torch

        class LinearCrossEntropy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
                raise AssertionError("needs CUDA")

        linear_cross_entropy = LinearCrossEntropy.apply
    """,
    "verl/utils/experimental/torch_functional.py": """
        import torch

        class FusedLinearForPPO(torch.nn.Module):
            def __init__(self, chunk_size=512, impl_backend="torch"):
                super().__init__()
                if impl_backend not in ("torch", "liger"):
                    raise ValueError(impl_backend)

            def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
                log_p = (hidden_states @ vocab_weights.t() / temperature).float().log_softmax(-1)
                entropy = -(log_p.exp() * log_p).sum(-1).to(hidden_states.dtype)
                return log_p.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1), entropy
    """,
    "verl-0.9.1.dist-info/METADATA": """
        Metadata-Version: 2.1
        Name: verl
        Version: 0.9.1
    """,
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return the folder that `import verl` uses in this test, even if the real verl is installed."""
    for name, text in STAND_IN.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "verl"}
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    ours.uninstall()
    for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def verl():
    """Return the real verl, unmodified."""
    yield pytest.importorskip(
        "verl", reason="verl is not installed: its stand-in alone is tested", exc_type=ImportError
    )
    ours.uninstall()


def functions():
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy")


def fused_class():
    return importlib.import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO


def problem(dtype=torch.float32, vocabulary=301):
    """Return hidden [2, 9, 24], weight [V, 24], labels [2, 9], and upstream gradients of log-probs and entropy [2, 2, 9]."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 9, 24), (vocabulary, 24)))
    labels = torch.randint(vocabulary, (2, 9), generator=generator)
    upstream = torch.randn(2, 2, 9, generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels, upstream


def oracle(hidden, weight, labels, upstream, temperature):
    """Return log-probs, entropy, and the gradients by hidden and by weight, all float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    logp, entropy = log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    (logp * upstream[0] + entropy * upstream[1]).sum().backward()
    return [value.detach() for value in (logp, entropy, hidden.grad, weight.grad)]


def measure(function, hidden, weight, labels, upstream):
    """Return the same four results of `function(hidden, weight, labels)`."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = function(hidden, weight, labels)
    torch.autograd.backward([logp, entropy], [u.view(x.shape).to(x.dtype) for u, x in zip(upstream, (logp, entropy))])
    return [value.detach() for value in (logp, entropy, hidden.grad, weight.grad)]


def assert_close(found, expected, tolerance):
    for value, right in zip(found, expected):
        torch.testing.assert_close(value.double(), right.view(value.shape).double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_class_returns_the_labels_shape_and_the_numbers(stand_in, backend):
    ours.install()
    fused = fused_class()(impl_backend=backend)
    *tensors, upstream = problem()

    def call(hidden, weight, labels):
        return fused.forward(hidden_states=hidden, vocab_weights=weight, input_ids=labels, temperature=0.7)

    found = measure(call, *tensors, upstream)
    assert found[0].shape == found[1].shape == (2, 9)
    assert_close(found, oracle(*tensors, upstream, 0.7), 1e-5)


def test_function_returns_flat_rows_and_the_numbers(stand_in):
    ours.install()
    *tensors, upstream = problem()

    def call(hidden, weight, labels):
        return functions().linear_cross_entropy(hidden, weight, labels, 0.7, "none")

    found = measure(call, *tensors, upstream)
    assert found[0].shape == found[1].shape == (18,)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_close(found, oracle(*tensors, upstream, 0.7), 1e-5)


def test_megatron_has_the_sequence_before_the_batch():
    hidden, weight, labels, _ = problem()
    flat = ours.linear_cross_entropy(hidden[:1], weight, labels[:1])
    turned = ours.linear_cross_entropy(hidden[:1].transpose(0, 1), weight, labels[:1])
    assert torch.equal(flat[0], turned[0])
    with pytest.raises(ValueError, match="leading shape"):
        ours.linear_cross_entropy(hidden.transpose(0, 1), weight, labels)


def test_entropy_of_16_bits_is_not_rounded_to_them(stand_in):
    hidden, weight, labels, upstream = problem(torch.bfloat16)
    theirs = fused_class()()(hidden, weight, labels)[1]
    ours.install()
    logp, entropy = fused_class()()(hidden, weight, labels)
    expected = oracle(hidden, weight, labels, upstream, 1.0)
    assert logp.dtype == entropy.dtype == torch.float32
    assert_close([logp, entropy], expected, 1e-4)
    assert (entropy - expected[1]).abs().max() < (theirs - expected[1]).abs().max()


def test_install_reaches_importers_and_uninstall_gives_everything_back(stand_in):
    megatron = importlib.import_module("verl.models.mcore.model_forward_fused")
    original, function = fused_class(), functions().linear_cross_entropy
    assert ours.install() == "0.9.1"
    installed = fused_class()
    assert issubclass(installed, original)
    assert megatron.linear_cross_entropy is functions().linear_cross_entropy is ours.linear_cross_entropy
    ours.install()
    assert fused_class() is installed
    ours.uninstall()
    ours.uninstall()
    assert fused_class() is original
    assert megatron.linear_cross_entropy == functions().linear_cross_entropy == function


def test_external_lib_installs_and_says_so(stand_in, capsys):
    sys.modules.pop("mssr.integrations.verl_external_lib", None)
    importlib.import_module("mssr.integrations.verl_external_lib")
    assert functions().linear_cross_entropy is ours.linear_cross_entropy
    assert capsys.readouterr().out == (
        "verl 0.9.1: with use_fused_kernels=True, log-probs and entropy come from mssr_kernels\n"
    )


def test_another_signature_is_refused_and_nothing_is_changed(stand_in):
    path = stand_in / "verl/utils/experimental/torch_functional.py"
    path.write_text(path.read_text().replace("temperature=1.0)", "temperature=1.0, bias=None)"))
    original = fused_class()
    with pytest.raises(UserError, match=r"verl 0\.9\.1: FusedLinearForPPO\.forward takes .*bias"):
        ours.install()
    assert fused_class() is original


def test_what_verl_itself_lacks_is_named(stand_in):
    (stand_in / "verl/utils/experimental/torch_functional.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match=r"verl 0\.9\.1 cannot be imported: No module named 'no_such_package'"):
        ours.install()


def test_another_version_is_refused(stand_in):
    path = stand_in / "verl-0.9.1.dist-info/METADATA"
    path.write_text(path.read_text().replace("0.9.1", "1.4.0"))
    with pytest.raises(UserError, match=r"needs verl>=0\.9.*, this is 1\.4\.0"):
        ours.install()


def test_what_does_not_fit_is_refused():
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match="only 'none'"):
        ours.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
    with pytest.raises(ValueError, match="leading shape"):
        ours.linear_cross_entropy(hidden, weight, labels[:, 1:])


def split_vocabulary(world):
    """Return this rank's results and gradients, and the error message for a sharded weight."""
    hidden, weight, labels, upstream = problem(vocabulary=300)
    part = weight[world.rank * 150 : (world.rank + 1) * 150]

    def call(hidden, weight, labels):
        return ours.linear_cross_entropy(hidden, weight, labels, 0.7, "none", dist.group.WORLD)

    found = measure(call, hidden, part, labels, upstream)
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)])
    try:
        ours.linear_cross_entropy(hidden, sharded, labels)
        refusal = "none"
    except ValueError as error:
        refusal = str(error)
    return found, refusal


def test_split_vocabulary_leaves_the_sum_of_the_hidden_gradient_to_the_caller(ranks):
    """As in verl 0.9.1's kernel: Megatron's sequence parallelism sums the ranks' gradients afterwards."""
    found, refusals = zip(*ranks(split_vocabulary))
    logp, entropy, by_hidden, by_weight = zip(*found)
    expected = oracle(*problem(vocabulary=300), 0.7)
    for rank in range(2):
        assert_close([logp[rank], entropy[rank]], expected[:2], 1e-5)
        assert "DTensor" in refusals[rank]
    assert_close([by_hidden[0] + by_hidden[1], torch.cat(by_weight)], expected[2:], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_against_the_real_one(verl, dtype):
    *tensors, upstream = problem(dtype)

    def call(hidden, weight, labels):
        return fused_class()().forward(hidden, weight, labels, 0.7)

    theirs = measure(call, *tensors, upstream)
    ours.install()
    found = measure(call, *tensors, upstream)
    if dtype == torch.float32:
        assert_close(found, theirs, 1e-5)
    expected = oracle(*tensors, upstream, 0.7)
    for value, other, right in zip(found, theirs, expected):
        assert (value - right).abs().max() <= (other - right).abs().max() + 1e-5


def text_model():
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(320, (2, 12))
    mask = torch.ones_like(ids)
    return Qwen2ForCausalLM(config), dict(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(-1) - 1)


def picture_model():
    text = dict(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6]},
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64, fullatt_block_indexes=[0]
    )
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=300, video_token_id=301, vision_start_token_id=302,
        vision_end_token_id=303, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(290, (2, 12))
    ids[:, 2:6] = 300  # a picture of 4 x 4 patches is 4 tokens
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(12).expand(4, 2, 12),
        pixel_values=torch.randn(32, 3 * 2 * 14 * 14),
        image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
    )
    return Qwen2_5_VLForConditionalGeneration(config), inputs


@pytest.mark.parametrize("make", [text_model, picture_model])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_verls_forward(verl, monkeypatch, make, dtype):
    """Compare verl's function with ours: log-probs, entropy and every gradient of a policy loss with entropy bonus."""
    from verl.models.transformers import monkey_patch

    model, inputs = make()
    monkeypatch.setattr(
        monkey_patch, "is_trl_available", lambda: False
    )  # verl 0.9.1 imports a class that trl 1.x dropped
    for owner in (type(model), type(model.model)):  # verl patches classes: undone after the test
        monkeypatch.setattr(owner, "forward", owner.forward)

    def scores(backend):
        monkey_patch.apply_monkey_patch(
            model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
        )
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(**inputs, temperature=0.8, return_dict=True, use_cache=False)
        weights = torch.linspace(-1, 1, out.log_probs.numel()).view(out.log_probs.shape)
        (out.log_probs * weights - 0.1 * out.entropy.float()).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        return out.log_probs.detach().flatten(), out.entropy.detach().flatten().float(), gradients

    theirs = scores("torch")
    ours.install()
    for backend in ("torch", "triton"):
        found = scores(backend)
        tolerance = 2e-5 if dtype == torch.float32 else 0.06
        torch.testing.assert_close(found[:2], theirs[:2], rtol=tolerance, atol=tolerance)
        for value, other in zip(found[2], theirs[2]):
            assert (value - other).norm() <= tolerance * other.norm() + 1e-6


def test_the_example(verl, monkeypatch, capsys):
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)
    runpy.run_path(str(EXAMPLE))["main"]()
    differences = [float(line.split()[-6]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert max(differences) < 1e-5


def test_the_example_on_the_stand_in(stand_in, capsys):
    runpy.run_path(str(EXAMPLE))["main"]()
    differences = [float(line.split()[-6]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert max(differences) < 1e-5
