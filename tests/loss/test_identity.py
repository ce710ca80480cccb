import pytest
import torch
import torch.nn.functional as F
from losses import assert_compiles, three_branches

from vireid_timm.loss.identity import identity_losses


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_identity_losses_equal_the_loop(label_smoothing: float) -> None:
    logits = three_branches()
    labels = [0, 8, 3, 3, 1, 5]
    losses = identity_losses(logits, torch.tensor(labels), label_smoothing)
    assert list(losses) == ['global', 'fusion', 'joint']
    for name, values in logits.items():
        total = 0.0
        for row, label in zip(values.double(), labels, strict=True):
            log_probability = row - row.exp().sum().log()
            total -= (1 - label_smoothing) * log_probability[label] + label_smoothing * log_probability.mean()
        torch.testing.assert_close(losses[name].double(), total / len(labels), rtol=1e-5, atol=1e-6)


def test_identity_losses_of_chosen_branches_in_half_precision() -> None:
    logits = {name: values.half() for name, values in three_branches().items()}
    losses = identity_losses(logits, torch.arange(6), branches=('joint',))
    assert list(losses) == ['joint']
    assert losses['joint'].dtype == torch.float32
    torch.testing.assert_close(losses['joint'], F.cross_entropy(logits['joint'].float(), torch.arange(6)))
    with pytest.raises(ValueError, match="branch 'local', got only global, fusion, joint"):
        identity_losses(logits, torch.arange(6), branches=('local',))


def test_identity_losses_compile_into_one_graph() -> None:
    assert_compiles(identity_losses, three_branches(), torch.arange(6))
