"""Makes the helpers of the policy tests importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "policy"))
