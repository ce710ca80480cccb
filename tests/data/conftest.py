import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def global_random_state_untouched() -> Iterator[None]:
    """Check that a test neither uses nor changes the global random state."""
    before = torch.get_rng_state(), repr(np.random.get_bit_generator().state), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_bit_generator().state) == before[1]
    assert random.getstate() == before[2]
