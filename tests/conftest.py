import os
import sys
from pathlib import Path

# Before torch is imported, also in subprocesses: tiny models are faster on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: --slow"))


@pytest.fixture(scope="session")
def boards(tmp_path_factory):
    """The folder of a small dataset of 4x4 Sudokus to train on."""
    from runs import write_boards  # here, because not every test file needs torch

    return write_boards(tmp_path_factory.mktemp("data") / "boards")
