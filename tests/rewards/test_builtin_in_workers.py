"""Built-in rewards where they run: in the workers, which end what hangs."""

import inspect
import re
import subprocess
import sys
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
from judge_server import judge_server  # noqa: F401

from mssr.config import yaml_1_2
from mssr.config.reward_keys import RewardConfig
from mssr.errors import UserError
from mssr.rewards import function as functions
from mssr.rewards.builtin.judge import Options
from mssr.rewards.pool import RewardPool
from mssr.rewards.row import Row

ROOT = Path(functions.__file__).parents[2]
OPTIONS = {"overlong": {"buffer": 10}, "judge": {"url": "http://localhost/v1", "model": "wise"}}


@contextmanager
def pool_of(name, timeout_s=20.0, **options):
    settings = {"workers": 1, "timeout_s": timeout_s, "memory_gib": 4, "batch_size": 1, "log": None}
    with closing(RewardPool(functions.named(name, options=options), **settings)) as pool:
        yield pool


def test_every_file_is_a_built_in_of_its_name():
    names = ["choice", "count", "exact", "format", "iou", "judge", "math", "number", "overlong"]
    assert functions.builtins() == names
    for name in names:
        loaded = functions.load(functions.named(name, options=OPTIONS.get(name, {})))
        assert loaded.call.__name__ == name and loaded.images == (name == "judge")


def test_a_worker_of_a_built_in_imports_no_large_library():
    others = [name for name in functions.builtins() if name != "judge"]  # its client needs pydantic
    code = f"""
import sys
from mssr.rewards.function import load, named
for name in {others}:
    load(named(name, options={OPTIONS}.get(name, {{}})))
assert not {{"torch", "transformers", "pydantic", "sympy", "scipy", "openai", "jinja2"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_mathematics_that_hangs_is_ended_and_the_next_pair_is_compared():
    with pool_of("math", timeout_s=2.0) as pool:
        calls = [
            pool.submit(rf"\boxed{{{said}}}", Row("?", right))
            for said, right in [
                (r"\sqrt{8}", r"2\sqrt{2}"),
                ("9^{9^{9^{9}}}", "5"),
                (r"\frac{1}{2}", "0.5"),
                ("1", "2"),
            ]
        ]
        first, late, *others = [call.result() for call in calls]
        assert late.failure.kind == "timeout" and late.parts is None
        assert [each.parts for each in (first, *others)] == [{"accuracy": 1}, {"accuracy": 1}, {"accuracy": 0}]


def test_a_wrong_option_ends_the_start():
    with pytest.raises(UserError, match=r"^reward.function number: tolerance: must be a number of at least 0, got -1$"):
        pool_of("number", tolerance=-1).__enter__()
    with pytest.raises(UserError, match=r"^reward.function format: .*unexpected keyword argument 'patern'"):
        pool_of("format", patern="x").__enter__()


def test_a_judge_in_its_worker(judge_server):  # noqa: F811
    """Its calls wait for each other, longer than other functions may take, and a failure says what to do."""
    judge_server.replies = ["Score: 0.5"] * 29 + ["no idea"]
    with pool_of("judge", timeout_s=0.001, url=judge_server.url, model="wise", retries=0, concurrency=2) as pool:
        assert pool.kind == "async"
        found = [call.result() for call in [pool.submit(str(number), Row("?", "4")) for number in range(30)]]
    assert [one.parts for one in found].count({"accuracy": 0.5}) == 29 and judge_server.most <= 2
    (failure,) = [one.failure for one in found if one.failure]
    assert failure.kind == "error" and "no score in the judge's reply 'no idea'; change template" in failure.message


def test_the_page_names_every_built_in_and_option_and_its_examples_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a judge's cache
    section = re.split(r"^## ", (ROOT / "docs/REWARDS.md").read_text(), flags=re.MULTILINE)
    (section,) = [part for part in section if part.startswith("Built in\n")]
    named = set(re.findall(r"`(\w+)`", section))
    for name in functions.builtins():
        loaded = functions.load(functions.named(name, options=OPTIONS.get(name, {})))
        parameters = set(inspect.signature(loaded.call).parameters) - {"response", "row", "options"}
        assert {name} | parameters <= named, name
    assert {field.name for field in fields(Options)} <= named
    for example in re.findall(r"^```yaml\n(.*?)^```", section, re.DOTALL | re.MULTILINE):
        for function in RewardConfig(**yaml_1_2.load(example)["reward"]).functions.values():
            functions.load(functions.named(function.reference, options=function.options))
