"""Lets the tests of the runs use the small data sets that the readers are tested with."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "engine"))
