"""The shipped 3B and 7B configurations at full size: shapes, ZeRO-3 shards and a packed batch, without memory for the
weights; and one real step of a layer as wide as the 7B's.

The published architecture is written out here by hand; none of it is read from transformers.
"""

import copy
import io
import math
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import forkserver, take_environment
from PIL import Image
from policy_helpers import ALONE, digit_rows, method_loss, plain_distribution, processors, prompts, random_batch
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids

from mssr.config import Config, load_config
from mssr.data.prompts import PromptEncoder
from mssr.errors import BadRow
from mssr.policy.architectures import model_config
from mssr.policy.attention import SDPA, packed
from mssr.policy.model import Policy
from mssr.policy.packing import MicroBatch, pack, plan_micro_batches
from mssr_kernels import PolicyLossConfig

ROOT = Path(__file__).parents[2]
RANKS = 8
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """Sizes of the language model; the vision tower is the same in both, except for its output width."""

    config: str
    parameters: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool


SIZES = [
    Size("qwen2_5_vl_3b.yaml", 3_754_622_976, 2048, 36, 16, 2, 11_008, 151_936, True),
    Size("qwen2_5_vl_7b.yaml", 8_292_166_656, 3584, 28, 28, 4, 18_944, 152_064, False),
]
by_size = pytest.mark.parametrize("size", SIZES, ids=["3B", "7B"])
WIDTH, BLOCKS, MLP = 1280, 32, 3420  # of the vision tower
HEAD_DIM = 128
IMAGE, VIDEO = 151_655, 151_656  # token ids


def published_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by name; a tied head is listed under both of its names."""
    d, kv = size.hidden, size.kv_heads * HEAD_DIM
    linear = {f"{name}.{part}": shape for name, (rows, columns) in {
        "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP),
    }.items() for part, shape in (("weight", (rows, columns)), ("bias", (rows,)))}  # fmt: skip
    block = linear | {"norm1.weight": (WIDTH,), "norm2.weight": (WIDTH,)}
    layer = {
        "self_attn.q_proj.weight": (size.heads * HEAD_DIM, d), "self_attn.q_proj.bias": (size.heads * HEAD_DIM,),
        "self_attn.k_proj.weight": (kv, d), "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, d), "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (d, size.heads * HEAD_DIM),
        "mlp.gate_proj.weight": (size.intermediate, d), "mlp.up_proj.weight": (size.intermediate, d),
        "mlp.down_proj.weight": (d, size.intermediate),
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
    }  # fmt: skip
    shapes = {
        "model.visual.patch_embed.proj.weight": (WIDTH, 3, 2, 14, 14),  # channels, frames, height and width of a patch
        "model.visual.merger.ln_q.weight": (WIDTH,),
        "model.visual.merger.mlp.0.weight": (4 * WIDTH, 4 * WIDTH),  # 2 x 2 patches become a token
        "model.visual.merger.mlp.0.bias": (4 * WIDTH,),
        "model.visual.merger.mlp.2.weight": (d, 4 * WIDTH),
        "model.visual.merger.mlp.2.bias": (d,),
        "model.language_model.embed_tokens.weight": (size.vocabulary, d),
        "model.language_model.norm.weight": (d,),
        "lm_head.weight": (size.vocabulary, d),
    }
    shapes |= {f"model.visual.blocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}
    shapes |= {
        f"model.language_model.layers.{i}.{name}": shape for i in range(size.layers) for name, shape in layer.items()
    }
    return shapes


def load(size: Size) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the configuration's paths are relative to it
        return load_config(ROOT / "configs" / size.config)


@cache
def whole_policy(size: Size) -> Policy:
    """Return the policy of the configuration's model on the meta device."""
    return Policy(meta_model(load(size).model.path))


def meta_model(path: str):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            model_config(path), dtype=torch.bfloat16, attn_implementation=SDPA
        )
    model.tie_weights()
    return model


@by_size
def test_every_weight_has_its_published_shape(size):
    named = whole_policy(size).model.named_parameters(remove_duplicate=False)
    assert {name: tuple(weight.shape) for name, weight in named} == published_shapes(size)


@by_size
def test_the_totals_are_the_published_ones(size):
    shapes = published_shapes(size)
    if size.tied:
        del shapes["lm_head.weight"]
    assert sum(map(math.prod, shapes.values())) == size.parameters
    assert sum(weight.numel() for weight in whole_policy(size).parameters()) == size.parameters


@by_size
def test_ids_and_positions_are_the_published_ones(size):
    config = whole_policy(size).model.config
    assert (config.image_token_id, config.video_token_id) == (IMAGE, VIDEO)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (151_652, 151_653)
    text, vision = config.text_config, config.vision_config
    assert text.rope_parameters["mrope_section"] == [16, 24, 24] and text.rope_parameters["rope_theta"] == 1e6
    assert text.eos_token_id == 151_645 and sum(text.rope_parameters["mrope_section"]) * 2 == HEAD_DIM
    assert list(vision.fullatt_block_indexes) == [7, 15, 23, 31] and vision.window_size == 112


def shares_of_eight(path: str) -> tuple[dict[str, tuple[int, int]], float]:
    """Return (name -> (size of the weight, of rank 0's shard), peak memory in GiB), as DeepSpeed partitions the model.

    Run this in a separate process: the other ranks of the group are fake, and what they would send is never read.
    """
    os.environ.update(RANK="0", WORLD_SIZE=str(RANKS), LOCAL_RANK="0", DS_ACCELERATOR="cpu", DS_LOG_LEVEL="error")
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    model = meta_model(path).to_empty(device="cpu")  # unwritten memory is not allocated
    model.tie_weights()
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=torch.bfloat16)
    shares = {name: (weight.ds_numel, weight.ds_tensor.numel()) for name, weight in model.named_parameters()}
    return shares, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def in_a_process(function, *args):
    with ProcessPoolExecutor(1, forkserver(), take_environment, (dict(os.environ),)) as pool:
        return pool.submit(function, *args).result(timeout=150)


@pytest.mark.slow("47 s: DeepSpeed cuts the real 3B and 7B into eight shares")
@by_size
def test_a_rank_of_eight_holds_an_eighth_under_zero_3(size):
    shares, peak = in_a_process(shares_of_eight, load(size).model.path)
    expected = {name: math.prod(shape) for name, shape in published_shapes(size).items()}
    if size.tied:
        del expected["lm_head.weight"]
    assert shares == {name: (numel, math.ceil(numel / RANKS)) for name, numel in expected.items()}
    total = sum(share for _, share in shares.values())
    assert size.parameters <= total * RANKS < size.parameters + RANKS * len(shares)
    # bfloat16 weights; float32 master weights and two moments of them.
    assert 2 * total < peak * GIB < 2 * total + 2 * GIB
    assert (2 + 12) * total / GIB == pytest.approx(
        {3_754_622_976: 6.12, 8_292_166_656: 13.52}[size.parameters], abs=0.01
    )


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, format="PNG")
    return buffer.getvalue()


def encode(config, images: list[bytes]):
    """Return a prompt from the run's encoder, with the real model's image token id; text ids are from a tiny tokenizer."""
    published = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)  # the limits of the real models
    encoder = PromptEncoder(processors()[0], published, config)
    row = digit_rows()[0] | {"images": images, "problem": "How many?" if images else "Two and two?"}
    prompt = encoder.encode(row, 0, "rows")
    ids = prompt.token_ids.masked_fill(prompt.token_ids == encoder.image_token_id, IMAGE)
    return replace(prompt, key=f"{len(images)} {len(ids)}", token_ids=ids)


@by_size
def test_the_largest_picture_is_a_row_that_is_left_out(size):
    data = load(size).data
    assert data.on_bad_row == "skip"
    with pytest.raises(BadRow, match=r"\b53\d\d\b.*2048"):
        encode(data, [picture(2048, 2048)])


def rows_of_a_rank(size: Size) -> tuple:
    """Return (prompts, response lengths) of one update on one of eight ranks: the longest possible, and short ones."""
    data = load(size).data
    wide = data.model_copy(update={"max_prompt_tokens": 8192})
    largest, usual, text = encode(wide, [picture(2048, 2048)]), encode(data, [picture(1232, 1232)]), encode(data, [])
    # An image token is 28 x 28 pixels: 2048 pixels are 73 of them, 1232 are 44.
    for prompt, side in ((largest, 73), (usual, 44)):
        assert int((prompt.token_ids == IMAGE).sum()) == side * side
        assert prompt.image_grid_thw.tolist() == [[1, 2 * side, 2 * side]]
        assert prompt.pixel_values.shape == (4 * side * side, 3 * 2 * 14 * 14)
    return [largest, usual, *[text] * 6], [4096, 1000, 4096, 4096, 1, 3000, 4096, 50]


def hidden_states(policy: Policy, micro_batch: MicroBatch) -> torch.Tensor:
    """Return the input of the head on the meta device: vision tower, image tokens, layers, predicting positions."""
    model, grids = policy.model, micro_batch.image_grid_thw
    embeddings = model.get_input_embeddings()(micro_batch.input_ids.to("meta"))
    if grids is not None:
        positions = get_vision_position_ids(grids, policy.merge_size).to("meta")
        pixels = micro_batch.pixel_values.to("meta", model.dtype)
        # One window instead of hundreds, which would take as many attention calls; shapes are the same.
        windows = {
            "window_index": torch.arange(len(pixels) // policy.merge_size**2),
            "cu_window_seqlens": torch.tensor([0, len(pixels)], dtype=torch.int32),
        }
        features = policy.vision_tower(pixels, grid_thw=grids, position_ids=positions, **windows).pooler_output
        is_image = micro_batch.mm_token_type_ids == 1
        assert features.shape == (int(is_image.sum()), embeddings.shape[-1])
        embeddings = embeddings.masked_scatter(is_image.to("meta")[..., None], features)
    out = policy.language_model(
        inputs_embeds=embeddings,
        position_ids=micro_batch.position_ids.to("meta"),
        use_cache=False,
        **packed(meta_layout(micro_batch.layout)),
    )
    return out.last_hidden_state[0].index_select(0, micro_batch.predicts.to("meta"))


def meta_layout(layout):
    moved = {name: part.to("meta") for name, part in vars(layout).items() if isinstance(part, torch.Tensor)}
    return replace(layout, **moved)


@by_size
@torch.no_grad()
def test_an_update_at_full_size_fits_its_budget_and_reaches_the_head(size):
    policy, budget = whole_policy(size), load(size).train.micro_batch_tokens
    asked, responses = rows_of_a_rank(size)
    batch = random_batch(asked, responses)
    lengths = [len(prompt.token_ids) + length for prompt, length in zip(asked, responses)]
    groups = plan_micro_batches(lengths, budget)
    assert len(groups) == math.ceil(sum(lengths) / budget)
    for rows in groups:
        micro_batch = pack(batch, rows, policy.prompt_positions, IMAGE, torch.device("cpu"))
        count = sum(lengths[row] for row in rows)
        assert count <= budget and micro_batch.input_ids.shape == (1, count)
        assert micro_batch.position_ids.shape == (4, 1, count)
        sides = {row: side for row, side in ((0, 73), (1, 44)) if row in rows}
        assert int(micro_batch.mm_token_type_ids.sum()) == sum(side**2 for side in sides.values())
        # An image of side s advances the positions of the text behind it by s, not by its s * s tokens.
        starts = torch.tensor([0, *(lengths[row] for row in rows)]).cumsum(0)
        for row, start, end in zip(rows, starts, starts[1:]):
            own = micro_batch.position_ids[:, 0, start:end]
            assert own[0].tolist() == list(range(lengths[row]))
            skipped = sides.get(row, 0) ** 2 - sides.get(row, 0)
            assert (own[1:, -1] == lengths[row] - 1 - skipped).all()
        wanted = micro_batch.input_ids[0, micro_batch.predicts + 1]
        assert torch.equal(wanted, micro_batch.target) and len(wanted) == sum(responses[row] for row in rows)
        hidden = hidden_states(policy, micro_batch)
        assert hidden.shape == (len(wanted), size.hidden) and hidden.dtype == torch.bfloat16 and hidden.is_meta


def wide_model():
    """Return a random float32 model: one layer and one vision block as wide as the 7B's, the tiny tokenizer's ids."""
    config, tokenizer = copy.deepcopy(model_config("Qwen/Qwen2.5-VL-7B-Instruct")), processors()[0]
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.layer_types, text.vocab_size = 1, ["full_attention"], len(tokenizer)
    vision.depth, vision.fullatt_block_indexes = 1, [0]
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        key = f"{name.removesuffix('_pad')}_token_id"
        setattr(config, key, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def wide_step() -> dict:
    """Make a step at the 7B's width: compare the packed batch's gradients with those of single sequences, then AdamW."""
    torch.set_num_threads(1)
    loss_config = PolicyLossConfig(kl_coef=0.05, entropy_coef=0.01, tis_cap=2.0)
    asked, model = list(prompts()[:3]), wide_model()
    batch = random_batch(asked, [5, 9, 3])
    tokens = int(batch.mask.sum())
    for row, prompt in enumerate(asked):
        response = batch.response(row)
        given = [values[row, : len(response)].double() for values in (batch.old_logp, batch.ref_logp, batch.logp)]
        distribution = plain_distribution(model, prompt, response)
        plain = method_loss(distribution, response, batch.advantage[row].double(), *given, loss_config)
        (plain.sum() / tokens).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    model.set_attn_implementation(SDPA)
    policy = Policy(model).train()
    micro_batch = pack(batch, [0, 1, 2], policy.prompt_positions, policy.image_token_id, ALONE.device)

    def loss():
        row, column = micro_batch.row, micro_batch.column
        values = {name: getattr(batch, name)[row, column] for name in ("old_logp", "ref_logp")}
        return policy(
            micro_batch, 1.0, config=loss_config, advantage=batch.advantage[row], normalizer=tokens,
            rollout_logp=batch.logp[row, column], **values,
        ).loss  # fmt: skip

    before = loss()
    before.backward()
    found = dict(model.named_parameters())
    error = {name: float((found[name].grad - want).norm() / want.norm()) for name, want in expected.items()}
    untouched = [name for name, want in expected.items() if not want.norm() > 0]
    expected.clear()
    probe = {name: weight.detach().flatten()[:64].clone() for name, weight in found.items()}
    torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True).step()
    still = [name for name, weight in found.items() if torch.equal(weight.detach().flatten()[:64], probe[name])]
    with torch.no_grad():
        after = float(loss())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    width = tuple(found["model.language_model.layers.0.mlp.down_proj.weight"].shape)
    return {
        "error": error, "untouched": untouched, "still": still, "losses": (float(before.detach()), after),
        "peak": peak, "width": width,
    }  # fmt: skip


@pytest.mark.slow("30 s: a real layer and a real vision block")
def test_a_step_at_the_width_of_7b():
    step = in_a_process(wide_step)
    assert step["width"] == (3584, 18_944)
    assert max(step["error"].values()) < 1e-4
    assert not step["untouched"] and len(step["error"]) == 33
    assert [name for name in step["still"] if "embed_tokens" not in name] == []
    assert step["losses"][1] < step["losses"][0]
    assert step["peak"] < 6
