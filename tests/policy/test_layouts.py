"""One run under every layout: all ZeRO stages and rank counts give the same weights and load each other's checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from policy_helpers import assert_same_weights, load_engine, make_engine, model_dir, near_batch, save_engine
from test_engine_ranks import CONFIG

from mssr.errors import UserError
from mssr.policy.loss import PolicyGradient
from mssr.policy.pieces import VALUES, SavedPieces
from mssr.training.checkpoint import read_weights

OFFLOADED = str(Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3_offload.json")
LAYOUTS = [(1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (2, OFFLOADED)]  # (ranks, ZeRO stage or JSON)
UPDATES = 9  # three of each kind of batch


def name(layout):
    return f"{layout[0]}x{layout[1] if isinstance(layout[1], int) else Path(layout[1]).stem}"


@pytest.fixture(scope="module")
def mixed_batches(prompts, plain):
    """Rows with one, two or no images, so that some micro-batches, and one rank's whole share, have no image."""
    text = prompts[2]
    rows = [[prompts[0], text, prompts[4], prompts[1]], [text, text, prompts[3], prompts[5]], [text] * 4]
    return [near_batch(rows[step % 3], [5 + step % 4, 9, 3, 7], plain, seed=step) for step in range(UPDATES)]


def own_rows(world, batch):
    share = len(batch) // world.size
    return batch.rows(world.rank * share, (world.rank + 1) * share)


def go_on(world, batches, stage, folder, start=None, **settings):
    """Train from the checkpoint in `start` (None: from the model's file) and save in `folder`. Return gradient norms."""
    layout = {"zero_stage": stage} if isinstance(stage, int) else {"deepspeed": stage}
    engine = make_engine(world=world, budget=100, lr=1e-3, **layout, **settings)
    if start is not None:
        load_engine(engine, start)
    norms = [engine.update(own_rows(world, batch), PolicyGradient(CONFIG)).grad_norm for batch in batches]
    save_engine(engine, folder)
    return norms


@pytest.fixture
def under(ranks, world):
    """`under((ranks, stage), ...)` runs `go_on` on that many ranks and returns rank 0's result."""

    def run(layout, batches, *args, **settings):
        size, stage = layout
        if size == 1:
            return go_on(world, batches, stage, *args, **settings)
        return ranks(go_on, batches, stage, *args, **settings)[0]

    return run


def final_weights(folder):
    return dict(read_weights(folder / "checkpoints" / "step_000001"))


@pytest.fixture(scope="module")
def uninterrupted(world, mixed_batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    norms = go_on(world, mixed_batches, 0, folder)
    return final_weights(folder), norms


OTHERS = pytest.mark.slow("1 to 3 s each; the unmarked layouts cover every kind of sharding")
QUICK = [(1, 3), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    "layout", [*QUICK, *(pytest.param(one, marks=OTHERS) for one in LAYOUTS[1:] if one not in QUICK)], ids=name
)
def test_every_update_is_the_same(under, layout, mixed_batches, uninterrupted, tmp_path):
    norms = under(layout, mixed_batches, tmp_path)
    expected, expected_norms = uninterrupted
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    assert_same_weights(final_weights(tmp_path), expected)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((1, 0), (2, 3)),
        ((2, 2), (1, 3)),
        *(pytest.param(*pair, marks=OTHERS) for pair in [((2, 3), (2, 2)), ((2, 1), (1, 0)), ((1, 3), (2, 0))]),
    ],
    ids=str,
)
def test_what_one_layout_saved_another_goes_on_with(under, saved, loaded, mixed_batches, uninterrupted, tmp_path):
    first = under(saved, mixed_batches[:5], tmp_path / "first")
    second = under(loaded, mixed_batches[5:], tmp_path / "second", tmp_path / "first")
    expected, norms = uninterrupted
    assert first + second == pytest.approx(norms, rel=1e-3)
    assert_same_weights(final_weights(tmp_path / "second"), expected)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=OTHERS), "bfloat16"])
def test_every_bit_survives_every_layout(under, dtype, mixed_batches, tmp_path):
    """Each layout loads and saves the checkpoint of the one before. Master weights and moments stay those of the first."""
    layouts = [layout for layout in LAYOUTS if dtype == "float32" or layout[1]]
    under(layouts[-1], mixed_batches[:2], tmp_path / "0", dtype=dtype)
    before = everything(tmp_path / "0")
    for number, layout in enumerate(layouts):
        under(layout, [], tmp_path / str(number + 1), tmp_path / str(number), dtype=dtype)
        after = everything(tmp_path / str(number + 1))
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value), (layout, key)


def everything(folder):
    """Return (name, kind) -> unsharded value, flat, from all ranks' files."""
    step = folder / "checkpoints" / "step_000001"
    shapes = torch.load(step / "state.pt", weights_only=True)["engine"]["shapes"]
    saved, found = SavedPieces([torch.load(file)["pieces"] for file in sorted(step.glob("rank_*.pt"))]), {}
    for name, shape in shapes.items():
        for value in VALUES:
            found[name, value] = torch.empty(torch.Size(shape).numel())
            saved.fill(name, value, 0, found[name, value])
    return found


def scores_after_loading(world, batch, folder, stage):
    engine = make_engine(world=world, zero_stage=stage, dtype="bfloat16")
    load_engine(engine, folder)
    return engine.score(batch)


def test_the_weights_in_use_are_the_loaded_ones(ranks, world, mixed_batches, tmp_path):
    """Loading also sets the weights in use, not only master weights and moments: scores match before any update."""
    batch = mixed_batches[0]
    ranks(go_on, mixed_batches[1:3], 2, tmp_path, dtype="bfloat16")
    expected = scores_after_loading(world, batch, tmp_path, 1)
    assert not torch.equal(expected, make_engine(dtype="bfloat16", zero_stage=1).score(batch))
    for stage in (1, 2, 3):
        for found in ranks(scores_after_loading, batch, tmp_path, stage):
            torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_what_torch_draws_next_is_what_it_would_have_drawn(world, tmp_path):
    torch.manual_seed(5)
    save_engine(make_engine(world=world), tmp_path)
    expected = torch.rand(3)
    torch.manual_seed(6)
    load_engine(make_engine(world=world), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_another_models_checkpoint_is_refused(world, mixed_batches, tmp_path):
    go_on(world, mixed_batches[:1], 0, tmp_path)
    with pytest.raises(UserError, match=r"lm_head.weight \[\d+, \d+\], this one does not; resume with its model.path"):
        load_engine(make_engine(path=model_dir(True)), tmp_path)


def test_a_missing_rank_file_is_named(ranks, world, mixed_batches, tmp_path):
    ranks(go_on, mixed_batches[:1], 2, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "broken", ignore=shutil.ignore_patterns("rank_1.pt", "broken"))
    with pytest.raises(UserError, match="rank_1.pt: missing; no other checkpoint is whole"):
        load_engine(make_engine(), tmp_path / "broken")


def test_the_rate_is_the_configured_one_where_the_schedule_was(world, mixed_batches, tmp_path):
    go_on(world, mixed_batches[:3], 0, tmp_path, schedule="cosine")
    engine = make_engine(lr=5e-4, schedule="cosine", zero_stage=2, budget=100)
    load_engine(engine, tmp_path)
    uninterrupted = make_engine(lr=5e-4, schedule="cosine", budget=100)
    for batch in mixed_batches[:3]:
        uninterrupted.update(batch, PolicyGradient(CONFIG))
    for batch in mixed_batches[3:5]:
        assert engine.update(batch, PolicyGradient(CONFIG)).lr == uninterrupted.update(batch, PolicyGradient(CONFIG)).lr
