"""Which tests share a process when several run side by side: those that start the same things.

A family stays on one worker, so that what a session starts once (the server of commands, two ranks, vLLM) is started by
one of them. Every other file is a family of its own. Families that take long come first.
"""

import pytest
from xdist.scheduler import LoadScopeScheduling

# By where tests are; the order is that in which they start.
FAMILIES = {
    "runs": ("tests/training/", "tests/cli/", "tests/study/test_study_run.py"),  # `mssr` commands
    "vllm": ("tests/rollout/",),
    "ranks": ("tests/policy/",),  # and models of several architectures
}


def family(nodeid: str) -> str:
    file = nodeid.split("::")[0]
    return next((name for name, places in FAMILIES.items() if file.startswith(places)), file)


class FamilyScheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return family(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # not by the number of tests, which says little of their time
    return FamilyScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list) -> None:
    order = list(FAMILIES)
    items.sort(key=lambda item: order.index(family(item.nodeid)) if family(item.nodeid) in order else len(order))
