"""docs/ and the READMEs: generated pages are current, links lead somewhere, names and commands in them exist."""

import re
from pathlib import Path

import pytest

from mssr.config.reference import page

ROOT = Path(__file__).parent.parent


def test_the_page_of_keys_is_what_the_schema_says():
    assert (ROOT / "docs/CONFIG.md").read_text() == page(), "run python -m mssr.config.reference > docs/CONFIG.md"
