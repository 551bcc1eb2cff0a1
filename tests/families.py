"""Distribute tests over pytest's workers: tests that share an expensive process run on the same worker.

A family runs on one worker, which starts the shared process once (the server that forks commands, two ranks, vLLM). Every
other file is a family of its own. The longest families start first.
"""

import pytest
from xdist.scheduler import LoadScopeScheduling

# Name -> prefixes of the tests' paths. Families start in this order.
FAMILIES = {
    "runs": ("tests/training/", "tests/cli/", "tests/study/test_study_run.py"),  # they run `mssr` commands
    "vllm": ("tests/rollout/",),
    "ranks": ("tests/policy/",),  # two gloo ranks
}


def family(nodeid: str) -> str:
    file = nodeid.split("::")[0]
    return next((name for name, places in FAMILIES.items() if file.startswith(places)), file)


class FamilyScheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return family(nodeid)

    def remove_node(self, node):
        """Mark a test that crashed its worker as done, so that it does not run again and crash the next worker."""
        crashed = super().remove_node(node)
        if crashed is not None:
            for units in (self.workqueue, *self.assigned_work.values()):
                if crashed in units.get(family(crashed), {}):
                    units[family(crashed)][crashed] = True  # done
        return crashed


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # else families with the most tests start first
    return FamilyScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list) -> None:
    order = list(FAMILIES)
    items.sort(key=lambda item: order.index(family(item.nodeid)) if family(item.nodeid) in order else len(order))
