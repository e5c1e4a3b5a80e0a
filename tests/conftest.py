"""What all tests share: one thread for each process, and a user who has nothing yet.

Several processes run the tests at once, and what they compute is small.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what is in the folders of whoever runs the tests out of them, and them out of these folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITGEN_HOME", str(tmp_path_factory.mktemp("home")))
        yield
