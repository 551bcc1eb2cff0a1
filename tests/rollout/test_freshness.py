"""The log-prob gap detects weights that are not the trainer's: each part of the sync is broken on purpose, in real vLLM."""

import pytest
import torch
from policy_helpers import ALONE, make_engine, model_dir, random_batch
from rollout_engines import vllm

import mssr.policy.weights as weights
import mssr.rollout.weight_sync as weight_sync
from mssr.errors import UserError
from mssr.policy.loss import CrossEntropy
from mssr.rollout.gap import measure_gap
from mssr.training.skipping import SkippedSteps

LIMIT = 1e-3  # nats; an exact sync is within 1e-5


class Step:
    """The policy and its sampler. The sampler has synced and sampled once; the policy has made an update since then."""

    def __init__(self, prompts, *, tied=False, zero_stage=0, **settings):
        self.prompts = list(prompts)
        self.trainer = make_engine(path=model_dir(tied), lr=2e-2, zero_stage=zero_stage)
        self.sampler = vllm(model_dir(tied), **settings)
        self.sampler.update_weights(self.trainer.policy, 0)
        self.sampler.generate(self.prompts, list(range(6)), 1.0)  # vLLM has seen the images now
        self.trainer.update(random_batch(self.prompts, [5, 9, 3, 7, 1, 12]), CrossEntropy())

    def check_gap(self, step=2):
        batch = self.sampler.generate(self.prompts, list(range(6)), 1.0)
        accumulated, skipped = self.trainer.accumulate(batch, CrossEntropy()), SkippedSteps(0, LIMIT)
        gap = measure_gap(accumulated.logp, batch.logp, batch.mask, ALONE)
        stats = (self.trainer.step if gap.within(LIMIT) else self.trainer.discard)(accumulated)
        if reason := skipped.observe(gap, [stats]):
            skipped.refuse_to_go_on(step, gap, reason)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def step(request, world, prompts):
    return Step(prompts, tied=request.param)


def test_a_whole_sync_leaves_no_gap(step):
    step.sampler.update_weights(step.trainer.policy, 1)
    step.check_gap()


def test_a_sync_of_zero_3_in_many_buckets(world, prompts, monkeypatch):
    """Parameters are unsharded only while their bucket is gathered; vLLM merges q, k and v from different buckets."""
    step = Step(prompts, zero_stage=3, sync_gib=4e-5)
    limit, buckets, gathered = 4e-5 * 2**29, [], weights.gathered

    def noting(parameters):
        buckets.append([parameter.ds_numel * parameter.element_size() for parameter in parameters])
        return gathered(parameters)

    monkeypatch.setattr(weights, "gathered", noting)
    step.sampler.update_weights(step.trainer.policy, 1)
    assert len(buckets) > 10 and all(sum(bucket) <= limit or len(bucket) == 1 for bucket in buckets)
    step.check_gap()


def test_a_sync_that_comes_a_step_late(step):
    with pytest.raises(
        UserError, match=r"^step 2: skipped: rollout and trainer disagree by .* check that weights and caches"
    ):
        step.check_gap()


def test_images_seen_before_with_the_old_vision_tower(step, monkeypatch):
    """The encoder cache is not reset, neither by us nor by vLLM's reload."""
    runner = step.sampler._llm.collective_rpc(lambda worker: worker.model_runner)[0]
    monkeypatch.setattr(type(runner), "reset_encoder_cache", lambda self: None)
    monkeypatch.setattr(weight_sync, "reset_caches", lambda llm: llm.reset_mm_cache())
    step.sampler.update_weights(step.trainer.policy, 1)
    with pytest.raises(UserError, match="disagree"):
        step.check_gap()


def without(monkeypatch, skipped):
    """Make later syncs leave out the weights whose names end with one of `skipped`."""
    whole = weight_sync.named_weights

    def partial(policy, bucket_bytes):
        return ((name, weight) for name, weight in whole(policy, bucket_bytes) if not name.endswith(skipped))

    monkeypatch.setattr(weight_sync, "named_weights", partial)


HEAD = ("lm_head.weight", "embed_tokens.weight")  # of a tied model both names are the head's
SKIPPED = [
    HEAD,
    ("layers.1.self_attn.k_proj.weight",),
    ("layers.0.mlp.up_proj.weight",),
    ("visual.merger.mlp.2.weight",),
    ("language_model.norm.weight",),
]


@pytest.mark.parametrize("skipped", SKIPPED, ids=lambda names: names[0])
def test_a_weight_that_is_not_sent(step, monkeypatch, skipped):
    """The sync refuses and names the weight. Without that check, the gap is too large."""
    without(monkeypatch, skipped)
    with pytest.raises(
        UserError, match=f"weight sync: . weights were not sent to vLLM, the first .*({'|'.join(skipped)})"
    ):
        step.sampler.update_weights(step.trainer.policy, 1)
    monkeypatch.setattr(weight_sync, "refuse_partial_sync", lambda unsent, untouched: None)
    step.sampler.update_weights(step.trainer.policy, 1)
    with pytest.raises(UserError, match="disagree"):
        step.check_gap()


def test_a_weight_of_vllms_that_nothing_is_loaded_into(step):
    """This happens when a name changes between versions and vLLM drops weights that it does not know."""
    load = weight_sync.load_weights

    def losing(worker, weights):
        return load(worker, (item for item in weights if "merger" not in item[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_sync, "load_weights", losing)
        with pytest.raises(UserError, match=r"weight sync: \d+ weights of vLLM's were not written, the first .*merger"):
            step.sampler.update_weights(step.trainer.policy, 1)


def test_every_weight_is_vllms_afterwards(step):
    """Bitwise, by vLLM's names, for tensors that it keeps as they came (norms and embeddings)."""
    step.sampler.update_weights(step.trainer.policy, 1)
    (model,) = step.sampler._llm.collective_rpc(lambda worker: worker.model_runner.get_model())
    theirs = dict(model.named_parameters())
    ours = dict(step.trainer.policy.model.named_parameters())
    same = {
        "language_model.model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "visual.merger.ln_q.weight": "model.visual.merger.ln_q.weight",
    }
    for name, own in same.items():
        assert torch.equal(theirs[name][: len(ours[own])], ours[own]), name  # vLLM pads the vocabulary
