"""Grading while a batch is generated, what failures cost, and the rules for truncated responses."""

import os
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mssr.batch import GradedRollouts, Prompt
from mssr.config.reward_keys import RewardConfig
from mssr.distributed import ALONE
from mssr.errors import UserError
from mssr.rewards.grading import Grader, part_means, settle_truncated, start_pools
from mssr.rewards.row import Row
from mssr.rollout.base import Response, collect

TEXTS = ["4", "5", "none", "4"]

REWARDS = """
import asyncio, time

def right(response, row):
    return response == row.answer

def about_the_row(response, row):
    return {
        "accuracy": 1, "tokens": row.tokens, "most": row.max_tokens, "cut": row.truncated, "level": row["level"],
        "images": len(row.image_files), "prompt": len(row.prompt), "problem": len(row.problem),
    }

def short(response, row, *, limit=2):
    return len(response) <= limit

def told(response, row):
    if "fifo" in (row.columns or {}):
        with open(row["fifo"], "w") as file:
            file.write(response)
    return 1.0

def partly(response, row):
    if response == "5":
        raise ValueError("no five")
    return {"none": 3.0}.get(response, float(response == row.answer))

async def waits(response, row):
    await asyncio.sleep(60 if response == "5" else 0)
    return response == row.answer

def hangs(response, row):
    time.sleep(60 if response == "5" else 0)
    return response == row.answer
"""


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def prompt(row, **fields):
    given = {"rendered": "user: 2 + 2?", "columns": {"level": 3}} | fields
    return Prompt(str(row), row, "2 + 2?", "4", None, torch.tensor([1]), None, None, (b"image",), **given)


def response(text, truncated=False):
    return Response(torch.tensor(list(map(ord, text))), torch.zeros(len(text)), truncated, 7)


PROMPTS = [prompt(row + 10) for row in range(4)]
BATCH = collect(PROMPTS, [response(text, truncated=row == 3) for row, text in enumerate(TEXTS)], pad=0)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "rewards_of_test_grading.py"
    file.write_text(REWARDS)
    return file


@contextmanager
def grading_by(file, functions, world=ALONE, **settings):
    """Yield a grader. functions: of the file, as text or by label."""
    if isinstance(functions, str):
        named = f"{file}:{functions}"
    else:
        named = {label: f"{file}:{name}" if isinstance(name, str) else name for label, name in functions.items()}
    config = RewardConfig(**{"function": named, "workers": 1} | settings)
    log = file.parent / "reward.log"
    log.touch()
    with ExitStack() as opened:
        pools = start_pools(config, None, log)
        for pool in pools.values():
            opened.callback(pool.close)
        yield opened.enter_context(closing(Grader(pools, config, Letters(), max_tokens=9, world=world, log=log)))


@pytest.fixture(scope="module")
def grader(file):
    with grading_by(file, "right") as grader:
        yield grader


@pytest.mark.parametrize("told", [[], [2], [3, 1, 0, 2]])
def test_every_response_is_graded_whether_told_before_or_not(grader, told):
    grading = grader.begin(PROMPTS)
    for row in told:
        grading(row, response(TEXTS[row]))
    graded = grading.finish(BATCH)
    assert graded.reward.tolist() == graded.correct.tolist() == [1, 0, 0, 1]
    assert graded.parts == ({"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 0.0}, {"accuracy": 1.0})
    assert graded.texts == tuple(TEXTS) and not graded.masked.any() and graded.graded.all()


def test_each_response_is_graded_by_its_own_prompts_answer(grader):
    """Two responses are passed out of order, the other two only at the end."""
    prompts = [replace(prompt(row), answer=answer) for row, answer in enumerate(["4", "5", "6", "9"])]
    grading = grader.begin(prompts)
    for row in (3, 1):
        grading(row, response(TEXTS[row]))
    assert grading.finish(BATCH).correct.tolist() == [1, 1, 0, 0]


def test_an_empty_batch(grader):
    graded = grader.begin([]).finish(collect([], [], pad=0))
    assert graded.reward.shape == graded.graded.shape == (0,) and graded.texts == graded.parts == ()


def test_a_function_sees_the_row(file):
    with grading_by(file, "about_the_row", weights={"tokens": 0.5, "level": -1.0}) as grader:
        graded = grader.begin(PROMPTS).finish(BATCH)
    first = {"accuracy": 1, "tokens": 1, "most": 9, "cut": 0, "level": 3, "images": 1, "prompt": 12, "problem": 6}
    assert graded.parts[0] == first and graded.parts[2]["tokens"] == 4 and graded.parts[3] == first | {"cut": 1}
    rest = 1 + 9 - 3 + 1 + 12 + 6
    assert graded.reward.tolist() == [rest + 0.5, rest + 0.5, rest + 2, rest + 0.5 + 1]
    assert graded.correct.tolist() == [1, 1, 1, 1]


def test_the_first_example_of_the_docs(tmp_path):
    """Only the last response says the right number as asked; it takes 9 of 9 tokens."""
    page = (Path(__file__).parents[2] / "docs" / "REWARDS.md").read_text()
    (tmp_path / "my_reward.py").write_text(page.split("```python\n")[1].split("```")[0])
    texts = ["Answer: 5", "Answer:4", "Answer: 4"]
    batch = collect(PROMPTS[:3], [response(text) for text in texts], pad=0)
    with grading_by(tmp_path / "my_reward.py", "score", weights={"brevity": 0.9}) as grader:
        graded = grader.begin(PROMPTS[:3]).finish(batch)
    assert graded.correct.tolist() == [0, 0, 1] and graded.reward.tolist() == [0, 0, 1]


def test_a_response_is_graded_while_others_are_generated(file, tmp_path):
    """The function has been called before there is a second response, and before anybody waits for it."""
    os.mkfifo(tmp_path / "fifo")
    with grading_by(file, "told") as grader:
        grading = grader.begin([prompt(0, columns={"fifo": str(tmp_path / "fifo")}), *PROMPTS[1:]])
        grading(0, response("first"))
        assert (tmp_path / "fifo").read_text() == "first"  # waits until the function writes
        assert grading.finish(BATCH).texts == ("first", *TEXTS[1:])


def test_the_budget_is_of_the_wait_after_the_generation(file, tmp_path):
    """Grading beside a long generation delays nothing, however long it takes."""
    os.mkfifo(tmp_path / "fifo")
    with grading_by(file, "told", step_timeout_s=0.001) as grader:
        grading = grader.begin([*PROMPTS[:3], prompt(3, columns={"fifo": str(tmp_path / "fifo")})])
        for row, text in enumerate(TEXTS):
            grading(row, response(text))
        assert (tmp_path / "fifo").read_text() == TEXTS[3]  # the last one has begun
        (pool,) = grader.pools.values()
        pool.submit("", Row("", "")).result(60)  # and ended
        assert grading.finish(BATCH).correct.tolist() == [1, 1, 1, 1] and grading.cost.timeouts == 0


def test_several_functions_and_their_options(file):
    functions = {"accuracy": "right", "short": {"function": f"{file}:short", "limit": 3}}
    with grading_by(file, functions, weights={"short": 0.25}) as grader:
        grading = grader.begin(PROMPTS)
        graded = grading.finish(BATCH)
    assert graded.reward.tolist() == [1.25, 0.25, 0, 1.25] and graded.correct.tolist() == [1, 0, 0, 1]
    assert set(grading.cost.in_function) == {"accuracy", "short"} and grading.cost.seconds > 0
    assert part_means(graded.parts, ALONE) == {"accuracy": 0.5, "short": 0.75}


@pytest.mark.parametrize(("on_error", "graded"), [("zero", [1, 1, 1, 1]), ("skip", [1, 0, 0, 1])])
def test_failures_cost_the_response_and_are_said_once_of_each_kind(file, capsys, on_error, graded):
    with grading_by(file, "partly", on_error=on_error) as grader:
        for _ in range(2):
            grading = grader.begin(PROMPTS)
            found = grading.finish(BATCH)
            assert found.reward.tolist() == found.correct.tolist() == [1, 0, 0, 1]
            assert found.graded.tolist() == [bool(one) for one in graded]
            assert found.loss_mask.any(1).tolist() == found.graded.tolist()
            assert (grading.cost.timeouts, grading.cost.errors) == (0, 2)
        assert grader.cost.errors == 4
    raised, outside = capsys.readouterr().err.splitlines()
    then = {"zero": "get reward 0", "skip": "are left out of loss and tracker"}[on_error]
    assert raised.startswith("mssr: reward function accuracy, row 11: ValueError: no five (")
    assert raised.endswith(
        f": such responses {then} (said once; counted in reward/errors; more in {file.parent}/reward.log)"
    )
    assert outside.startswith(
        "mssr: reward function accuracy, row 12: accuracy is 3, and the part reward.success must be"
    )
    assert "raise ValueError" in (file.parent / "reward.log").read_text()


def test_a_failure_ends_the_run_if_it_shall(file):
    with grading_by(file, "partly", on_error="fail") as grader:
        with pytest.raises(
            UserError, match=r"^reward function accuracy, row 11: ValueError: no five .*; fix it, or set reward\."
        ):
            grader.begin(PROMPTS).finish(BATCH)
        assert grader.begin(PROMPTS[:1]).finish(BATCH.rows(0, 1)).correct.tolist() == [1]


def failing_on_one_rank(world, file):
    """Rank 1 has the responses that fail."""
    rows = slice(0, 1) if world.rank == 0 else slice(1, 4)
    with grading_by(file, "partly", world, on_error="fail") as grader:
        try:
            grader.begin(PROMPTS[rows]).finish(BATCH.rows(rows.start, rows.stop))
        except UserError as error:
            return str(error)


def test_a_failure_on_one_rank_ends_all(ranks, file):
    first, second = ranks(failing_on_one_rank, file)
    assert first == second and first.startswith("reward function accuracy, row 11: ValueError: no five")


def parts_of_one_rank(world, file):
    """Rank 0 has no responses."""
    rows = slice(0, 0) if world.rank == 0 else slice(0, 4)
    with grading_by(file, "right", world, weights={"sort": 1.0}) as grader:
        try:
            grader.begin(PROMPTS[rows]).finish(BATCH.rows(rows.start, rows.stop))
        except UserError as error:
            return str(error)


def test_all_ranks_refuse_a_weight_without_a_part(ranks, file):
    line = "reward.weights.sort: no reward function returns this part; they return accuracy"
    assert ranks(parts_of_one_rank, file) == [line, line]


@pytest.mark.parametrize("function", ["waits", "hangs"])
def test_a_late_call_is_a_timeout(file, capsys, function):
    with grading_by(file, function, timeout_s=1.0) as grader:
        grading = grader.begin(PROMPTS)
        assert grading.finish(BATCH).correct.tolist() == [1, 0, 0, 1]
    assert (grading.cost.timeouts, grading.cost.errors) == (1, 0) and grading.cost.seconds >= 1.0
    (line,) = capsys.readouterr().err.splitlines()
    assert "row 11: took more than 1 s: such responses get reward 0 (said once; counted in reward/timeouts" in line


def test_grading_a_step_takes_no_longer_than_its_budget(file, capsys):
    """The worker hangs in the first call, which ends at its own limit; the later ones are not made: they would take 7 s."""
    with grading_by(file, "hangs", timeout_s=1.0, step_timeout_s=0.2) as grader:
        grading = grader.begin([*PROMPTS, *PROMPTS])
        batch = collect([*PROMPTS, *PROMPTS], [response(text) for text in ["5"] * 8], pad=0)
        assert grading.finish(batch).correct.tolist() == [0] * 8
        assert grading.cost.timeouts == 8 and grading.cost.seconds < 6.0
        (pool,) = grader.pools.values()
        assert pool.submit(TEXTS[0], Row("", PROMPTS[0].answer)).result(60).parts  # the new worker has started
        later = grader.begin(PROMPTS[:1])
        assert later.finish(BATCH.rows(0, 1)).correct.tolist() == [1]


def settled(rule) -> GradedRollouts:
    """The last response is truncated; neither it nor the first one has a grade."""
    reward, correct = torch.tensor([0.0, 0, 1.5, 0]), torch.tensor([0.0, 0, 1, 0])
    graded = torch.tensor([False, True, True, False])
    masked, parts = torch.zeros(4, dtype=torch.bool), ({}, {}, {}, {})
    rollouts = {"reward": reward, "correct": correct, "graded": graded, "masked": masked, "parts": parts}
    return settle_truncated(GradedRollouts(**vars(BATCH), **rollouts, texts=tuple(TEXTS)), rule)


def test_truncated_responses_are_graded_like_others():
    batch = settled("graded")
    assert batch.graded.tolist() == [False, True, True, False] and not batch.masked.any()
    assert torch.equal(batch.loss_mask[1:3], batch.mask[1:3]) and not batch.loss_mask[[0, 3]].any()


def test_truncated_responses_left_out_of_the_loss(grader):
    batch = settle_truncated(grader.begin(PROMPTS).finish(BATCH), "masked")
    assert batch.reward.tolist() == batch.correct.tolist() == [1, 0, 0, 1]  # the tracker still counts the last one
    assert batch.masked.tolist() == [False, False, False, True] and batch.graded.all()
    assert torch.equal(batch.loss_mask[:3], batch.mask[:3]) and not batch.loss_mask[3].any()


def test_truncated_responses_fail(grader):
    batch = settle_truncated(grader.begin(PROMPTS).finish(BATCH), "failed")
    assert batch.reward.tolist() == batch.correct.tolist() == [1, 0, 0, 0] and not batch.masked.any()
    assert batch.parts[3] == {"accuracy": 1.0}  # what the function said
    assert settled("failed").graded.tolist() == [False, True, True, True]  # they need no grade
