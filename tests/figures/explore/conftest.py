import pytest

from tests.figures.explore.runs import write_all


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with a finished run for each explorer; tests do not write into it."""
    return write_all(tmp_path_factory.mktemp("runs"))
