import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    yield lambda function: torch.compile(function, backend='aot_eager', fullgraph=True)
    torch._dynamo.reset()
