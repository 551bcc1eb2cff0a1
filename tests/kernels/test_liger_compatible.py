"""`mssr_kernels.liger` has the signature, loss, metrics and gradients of liger-kernel's own class.

Where both have rounding errors (bfloat16), the oracle is float64: eager log-probs and Liger's own formulas for the loss.
"""

import inspect
import itertools

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Liger
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from torch.utils._python_dispatch import TorchDispatchMode

from mssr_kernels.liger import LigerFusedLinearGRPOLoss as Ours

B, T, D, V = 5, 7, 16, 130
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
KINDS = [(kind, "token") for kind in (*CLIPPED, "cispo", "sapo", "vespo")] + [(kind, "sequence") for kind in CLIPPED]


def batch(b=B, t=T, d=D, v=V, off_policy=0.5, scale=0.3):
    """Return arguments whose tokens reach every branch of the clip; one completion is empty, one has a single token."""
    hidden, weight, bias = torch.randn(b, t, d), scale * torch.randn(v, d), torch.randn(v)
    tokens = torch.randint(v, (b, t))
    tokens[0, 0] = v - 1
    lengths = torch.tensor([t, t // 2, 0, 1, *[t - 1] * (b - 4)])
    logp = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, tokens[..., None])[..., 0]
    return {
        "_input": hidden,
        "lin_weight": weight,
        "bias": bias,
        "selected_token_ids": tokens,
        "attention_mask": (torch.arange(t) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -2.0, *torch.randn(b - 4)]),
        "old_per_token_logps": logp + off_policy * torch.randn(b, t),
        "ref_per_token_logps": logp + 0.3 * torch.randn(b, t),
    }


def scores(loss, arguments, frozen=()):
    """Return [loss, *metrics, *gradients of _input, lin_weight and bias]."""
    leaves = {
        name: arguments[name].clone().requires_grad_(name not in frozen)
        for name in ("_input", "lin_weight", "bias")
        if arguments.get(name) is not None
    }
    value, metrics = loss(**arguments | leaves)
    assert isinstance(metrics, tuple) and not any(metric.requires_grad for metric in metrics)
    (3 * value).backward()  # an upstream gradient that is not 1
    return [value.detach(), *metrics, *(leaf.grad for leaf in leaves.values())]


def agree(ours, theirs, rtol=1e-4, atol=3e-6):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def both(arguments, frozen=(), **options):
    agree(scores(Ours(**options), arguments, frozen), scores(Liger(compiled=False, **options), arguments, frozen))


def test_signatures_are_ligers():
    for method in ("__init__", "forward"):
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(loss, method)).parameters.values()]
            for loss in (Ours, Liger)
        )
        assert ours == theirs
    assert vars(Ours()).keys() == vars(Liger()).keys()


@pytest.mark.parametrize("kind,level", KINDS)
def test_every_option_equals_liger(kind, level):
    deltas = (None, 1.1, 1.5) if kind in CLIPPED else (None,)  # below and above 1 + epsilon_high
    for beta, delta, weighted, on_policy in itertools.product((0.0, 0.1), deltas, (False, True), (False, True)):
        arguments = batch()
        if weighted:
            arguments["vllm_is_ratio"] = 0.3 + 2 * torch.rand(B, T)
        if on_policy:
            del arguments["old_per_token_logps"]
        for corrected in (False, True)[: 1 + (beta > 0)]:
            both(
                arguments,
                beta=beta, delta=delta, loss_type=kind, importance_sampling_level=level, temperature=0.8,
                epsilon_low=0.15, epsilon_high=1.2 if kind == "cispo" else 0.28, max_completion_length=9,
                use_bias_correction_kl=corrected,
            )  # fmt: skip


@pytest.mark.parametrize("kind,level", [("dapo", "token"), ("grpo", "token"), ("grpo", "sequence"), ("vespo", "token")])
def test_forms_of_the_arguments(kind, level):
    options = dict(loss_type=kind, importance_sampling_level=level)
    arguments = batch()
    for ratio in (0.5 + torch.rand(B), 0.5 + torch.rand(B, 1), torch.ones(1).expand(B, T)):
        both(arguments | {"vllm_is_ratio": ratio}, **options)
    both(arguments | {"bias": None}, **options)
    both(arguments | {"attention_mask": arguments["attention_mask"].bool()}, **options)
    both(arguments | {"attention_mask": arguments["attention_mask"].float()}, **options)
    wide = torch.randn(B, T + 1, 2 * D)
    both(arguments | {"_input": wide[:, :-1, ::2], "lin_weight": torch.randn(D, V).T}, **options)  # strided
    both(arguments | {"_input": wide[:1, :1, :D].expand(B, T, D), "advantages": torch.ones(1).expand(B)}, **options)
    both(arguments, frozen=("lin_weight", "bias"), **options)
    both(arguments, frozen=("bias",), **options)
    both(arguments | {"num_items_in_batch": torch.tensor(37)}, **options)
    both(arguments | {"num_items_in_batch": 37}, **options)
    both(arguments | {"num_items_in_batch": 0}, **options)
    both(arguments, chunk_size=3, **options)


@pytest.mark.parametrize("kind", ["dapo", "grpo"])
def test_unusual_bounds_of_the_clip(kind):
    for low, high, delta in (
        (1.5, 0.1, None),
        (0.2, 0.0, 1.0),
        (0.0, 0.0, None),
        (0.2, 0.2, float("inf")),
        (0.2, 0.2, 0.9),
    ):
        both(batch(), loss_type=kind, epsilon_low=low, epsilon_high=high, delta=delta)
    both(batch(), loss_type=kind, beta=-0.1)


@pytest.mark.parametrize("kind", ["bnpo", "grpo", "luspo"])
def test_reference_model_by_its_hidden_states(kind):
    arguments = batch()
    del arguments["ref_per_token_logps"]
    arguments |= {"ref_input": torch.randn(B, T, D), "ref_weight": torch.randn(V, D)}
    both(arguments, loss_type=kind)
    arguments["ref_bias"] = torch.randn(V)
    both(arguments, loss_type=kind)
    both(arguments, loss_type=kind, use_ref_model=False)  # then it is not used, and the reported divergence is 0
    with pytest.warns(UserWarning, match="ref_input is not used"):
        with_both = scores(Ours(loss_type=kind), arguments | {"ref_per_token_logps": batch()["ref_per_token_logps"]})
    assert not torch.equal(with_both[1], scores(Ours(loss_type=kind), arguments)[1])


@pytest.mark.parametrize("kind,level", [pair for pair in KINDS if pair[0] != "luspo"])  # luspo has a loss on padding
def test_what_the_mask_leaves_out_has_no_influence(kind, level):
    arguments = batch() | {"vllm_is_ratio": 0.5 + torch.rand(B, T)}
    options = dict(loss_type=kind, importance_sampling_level=level, max_completion_length=9)
    out = arguments["attention_mask"] == 0
    poisoned = {
        name: value.masked_fill(out[..., None] if value.ndim == 3 else out, torch.nan)
        for name, value in arguments.items()
        if name in ("_input", "old_per_token_logps", "ref_per_token_logps")
        or (name == "vllm_is_ratio" and kind != "vespo")  # vespo sums it over the padding
    }
    poisoned["selected_token_ids"] = arguments["selected_token_ids"].masked_fill(out, -100)
    poisoned["advantages"] = arguments["advantages"].masked_fill(out.all(1), torch.nan)
    clean, dirty = scores(Ours(**options), arguments), scores(Ours(**options), arguments | poisoned)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b)
    assert (dirty[3][out] == 0).all()  # the gradient of _input


@pytest.mark.parametrize("kind,level", KINDS)
def test_nothing_to_learn_from(kind, level):
    arguments = batch() | {"attention_mask": torch.zeros(B, T, dtype=torch.int64)}
    options = dict(loss_type=kind, importance_sampling_level=level, max_completion_length=9)
    both(arguments, **options)
    assert all((value == 0).all() for value in scores(Ours(**options), arguments))


def exact(arguments, **options):
    """Return [loss, *gradients] in float64, from Liger's formulas on eager log-probs; 3.0 is exact in every dtype."""
    leaves = [arguments[name].double().requires_grad_() for name in ("_input", "lin_weight", "bias")]
    hidden, weight, bias = leaves
    logp = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, arguments["selected_token_ids"][..., None])[
        ..., 0
    ]
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logp,
        arguments["attention_mask"],
        arguments["advantages"].double(),
        full_attention_mask=arguments["attention_mask"],
        old_per_token_logps=arguments["old_per_token_logps"].double(),
        ref_per_token_logps=arguments["ref_per_token_logps"].double(),
        **options,
    )
    (3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


EXACT = [
    ("dapo", "token", 0.1),
    ("grpo", "token", 0.0),
    ("grpo", "token", 0.1),
    ("bnpo", "sequence", 0.1),
    ("sapo", "token", 0.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind,level,beta", EXACT)
def test_no_less_exact_than_liger(kind, level, beta, dtype):
    # Ratios near 1, away from the bounds, so that rounding does not decide whether a token is clipped.
    arguments = batch(b=8, t=40, d=64, v=5000, off_policy=0.0, scale=0.1)
    arguments |= {name: arguments[name].to(dtype) for name in ("_input", "lin_weight", "bias")}
    options = dict(loss_type=kind, importance_sampling_level=level, beta=beta, epsilon_low=0.5, epsilon_high=0.5)
    wanted = exact(arguments, **options)
    errors = []
    for loss in (Ours(**options), Liger(compiled=False, **options)):
        found = scores(loss, arguments)
        assert all(value.dtype == dtype for value in found[-3:])
        errors.append([(a.double() - b).norm().item() for a, b in zip([found[0], *found[-3:]], wanted)])
    for ours, theirs, value in zip(*errors, wanted):
        # In float32 both have only rounding errors, which depend on the order of the sums.
        bound = theirs + 1e-6 if dtype == torch.bfloat16 else 2e-6 * value.norm().item() + 1e-7
        assert ours <= bound


def test_autocast_and_a_head_of_another_dtype():
    arguments = batch()
    rounded = arguments | {name: arguments[name].bfloat16() for name in ("_input", "lin_weight", "bias")}
    wanted = scores(Ours(), rounded)
    with torch.autocast("cpu", torch.bfloat16):
        agree(scores(Ours(), arguments)[:3], wanted[:3], rtol=0, atol=0)
    mixed = scores(Ours(), arguments | {"_input": rounded["_input"]})  # the head stays float32, as do its gradients
    agree(mixed[:3], wanted[:3], rtol=0, atol=0)
    assert mixed[-2].dtype == mixed[-1].dtype == torch.float32


class MatmulWork(TorchDispatchMode):
    """Counts products of one row with the head, by the matmuls that run."""

    def __init__(self):
        super().__init__()
        self.rows = 0.0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        from mssr_kernels.modes import ops

        if function.namespace == "mssr_kernels":
            with self:
                return getattr(ops, function.overloadpacket.__name__)(*arguments, **keywords or {})
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = [value for value in arguments if isinstance(value, torch.Tensor)][-2:]
            self.rows += a.shape[0] * a.shape[1] * b.shape[1] / (D * V)
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize(
    "products,options",
    [
        (3, dict(loss_type="dapo")),
        (3, dict(loss_type="dr_grpo", max_completion_length=9, delta=1.5)),
        (3, dict(loss_type="grpo", beta=0.0)),
        (4, dict(loss_type="grpo")),
        (4, dict(loss_type="bnpo", importance_sampling_level="sequence")),
    ],
)
def test_a_row_local_loss_has_its_gradients_from_one_pass(products, options):
    arguments = batch(off_policy=0.0) | {"attention_mask": torch.ones(B, T, dtype=torch.int64)}
    with MatmulWork() as work:
        scores(Ours(**options), arguments)
    assert work.rows == pytest.approx(products * B * T)


def losses_of_rank(world):
    """Return [our loss, Liger's] of several cases. Ranks have unequal micro-batches; the mean is over the tokens of both."""
    torch.manual_seed(world.rank)
    arguments = batch()
    arguments["attention_mask"][4, 3 + 2 * world.rank :] = 0
    found = []
    for extra in ({}, {"num_items_in_batch": torch.tensor(50)}):
        for kind in ("dapo", "cispo", "bnpo"):
            losses = Ours(loss_type=kind), Liger(loss_type=kind, compiled=False)
            found.append([loss(**arguments | extra)[0] for loss in losses])
    return torch.tensor(found)


def test_two_ranks_share_a_normalizer(ranks):
    for found in ranks(losses_of_rank):
        torch.testing.assert_close(found[:, 0], found[:, 1])


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(loss_type="ppo"), "loss_type must be one of grpo, .*vespo, got 'ppo'"),
        (dict(importance_sampling_level="word"), "importance_sampling_level is 'word': 'token' or 'sequence'"),
        (dict(loss_type="sapo", importance_sampling_level="sequence"), "must be 'token' for loss_type 'sapo'"),
        (dict(loss_type="dr_grpo"), "'dr_grpo' needs max_completion_length > 0, got None"),
        (dict(sapo_temperature_neg=0.0), r"sapo_temperature_\* must be > 0, got 1.0 and 0.0"),
        (dict(delta=-1.0), "delta must be > 0 or None, got -1.0"),
    ],
)
def test_options_that_do_not_go(options, message):
    with pytest.raises(ValueError, match=message):
        Ours(**options)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"_input": torch.ones(B * T, D)}, ValueError, r"_input must be \[B, T, D\]"),
        ({"attention_mask": torch.ones(B, T - 1)}, ValueError, r"attention_mask is \[5, 6\] but _input is"),
        ({"attention_mask": torch.full((B, T), 0.5)}, ValueError, "attention_mask must be of 0 and 1"),
        ({"old_per_token_logps": torch.ones(B)}, ValueError, r"old_per_token_logps is \[5\] but _input"),
        ({"advantages": torch.ones(B, T)}, ValueError, r"advantages is \[5, 7\]: it must be \[B\] = \[5\]"),
        ({"vllm_is_ratio": torch.ones(T)}, ValueError, r"vllm_is_ratio is \[7\]: it must be \[B\], \[B, 1\] or"),
        ({"vllm_is_ratio": -torch.ones(B)}, ValueError, "vllm_is_ratio must be >= 0"),
        ({"ref_per_token_logps": None}, ValueError, "use_ref_model needs ref_per_token_logps or ref_input"),
        (
            {"ref_per_token_logps": None, "ref_input": torch.ones(B, T, D)}, ValueError, "ref_input needs ref_weight",
        ),
        (
            {"ref_per_token_logps": None, "ref_input": torch.ones(B, 3, D), "ref_weight": torch.ones(V, D)},
            ValueError, r"ref_input is \[5, 3, 16\]: it must be \[5, 7\] and D",
        ),
        ({"selected_token_ids": torch.full((B, T), -100)}, IndexError, r"is -100: outside \[0, 130\)"),
    ],
)  # fmt: skip
def test_one_line_that_names_the_mistake(changes, error, message):
    with pytest.raises(error, match=message) as raised:
        Ours()(**batch() | changes)
    assert "\n" not in str(raised.value)
