"""Every fault still fits the code. Whether tests notice it, `python -m tests.mutants` checks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.mutants.faults import ROOT, all_faults

FAULTS = all_faults()


@pytest.mark.parametrize("group", sorted({fault.group for fault in FAULTS.values()}))
def test_every_fault_can_be_made(group):
    for fault in FAULTS.values():
        if fault.group == group:
            compile(fault.applied(ROOT), fault.file, "exec")
            assert [test for test in fault.tests if not (ROOT / test).is_file()] == [], fault.name


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 80
