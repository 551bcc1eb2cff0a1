"""kill -9 and Ctrl-C at random times; `python tests/kill_loop.py 20` does more of it."""

import pytest
from kill_loop import COMMANDS, loop


@pytest.mark.slow("20 s each: stopped at random times, not at file operations")
@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_at_random_times(mssr, warm, tmp_path, name):
    assert sum(len(story) for story in loop(mssr, name, warm, tmp_path, kills=4)) >= 4
