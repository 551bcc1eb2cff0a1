"""Fixtures that load a configuration from text and overrides."""

import pytest

from mssr.config import load_config
from mssr.errors import UserError

MINIMAL = "run_dir: run\nmodel: {path: m}\ndata: {train: t}\n"


@pytest.fixture
def load(tmp_path):
    """Load a config file with the given text and overrides."""

    def load(*overrides, text=MINIMAL):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load_config(file, list(overrides))

    return load


@pytest.fixture
def refused(load):
    def refused(*overrides, text=MINIMAL):
        with pytest.raises(UserError) as error:
            load(*overrides, text=text)
        (line,) = str(error.value).splitlines()
        return line

    return refused
