"""The helpers of the policy's tests are of use here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "policy"))
