import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "policy"))

from policy_fixtures import *  # noqa: F403
