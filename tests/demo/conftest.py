"""Lets the tests of the benchmarks' parts import them.

The clone comes last on the path: what is tested stays the installed package wherever there is one.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
