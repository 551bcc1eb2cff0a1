"""Every fault applies to the current code and is in the table; `python -m tests.mutants` checks that tests notice it."""

import re

import pytest
from faults import ROOT, all_faults, escaped, table

FAULTS = all_faults()


@pytest.mark.parametrize("group", sorted({fault.group for fault in FAULTS.values()}))
def test_every_fault_can_be_made(group):
    for fault in FAULTS.values():
        if fault.group == group:
            compile(fault.applied(ROOT), fault.file, "exec")
            assert [test for test in fault.tests if not (ROOT / test).is_file()] == [], fault.name


def test_the_table_says_which_of_its_tests_notices_each():
    rows = table()
    assert list(rows) == list(FAULTS), "run `python -m tests.mutants` for the faults that are new"
    for name, fault in FAULTS.items():
        assert f"| {escaped(fault.fault)} |" in rows[name], name
        noticed = re.search(r"`(tests/[^:`]+)::(\w+)", rows[name])
        assert noticed is not None and noticed[1] in fault.tests, rows[name]
        assert f"def {noticed[2]}(" in (ROOT / noticed[1]).read_text(), rows[name]
