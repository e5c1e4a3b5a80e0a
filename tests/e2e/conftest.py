"""Lets these tests start processes as the tests of the runs do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "runs"))
