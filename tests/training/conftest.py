"""What tests of training share."""

import pytest

from metajax import training


@pytest.fixture
def checkpoints(tmp_path):
    """Checkpoints in an empty folder."""
    made = training.Checkpoints(tmp_path)
    yield made
    made.close()
