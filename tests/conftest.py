"""One thread for each process of the tests: several of them run at once, and what they compute is small."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
