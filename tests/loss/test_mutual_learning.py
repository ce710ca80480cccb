"""Mutual learning against loops over samples and classes in float64, forward and backward."""

import pytest
import torch
from losses import assert_compiles, random_features, three_branches, value_and_gradient

from vireid_timm.loss.mutual_learning import MUTUAL_LEARNING_MODES, MutualLearningLoss, symmetric_kl


def naive_symmetric_kl(logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
    """Eq. 5 sample by sample and class by class, mean over the samples."""
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(logits_p.double(), logits_q.double(), strict=True):
        p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
        for a, b in zip(p, q, strict=True):
            total = total + 0.5 * (a * (a.log() - b.log()) + b * (b.log() - a.log()))
    return total / len(logits_p)


@pytest.mark.parametrize('shape', [(1, 2), (5, 7), (3, 40)])
def test_symmetric_kl_equals_the_loop_with_gradients_into_both(shape: tuple[int, int]) -> None:
    p, q = 3 * random_features(*shape, seed=1), 3 * random_features(*shape, seed=2)
    loss, *gradients = value_and_gradient(symmetric_kl, p, q)
    expected, *expected_gradients = value_and_gradient(naive_symmetric_kl, p.double(), q.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(symmetric_kl(q, p), loss)
    assert symmetric_kl(p, p) == 0
    assert torch.autograd.gradcheck(symmetric_kl, (p.double().requires_grad_(), q.double().requires_grad_()))


def test_symmetric_kl_is_finite_for_confident_predictions_in_half_precision() -> None:
    p = torch.tensor([[6e4, -6e4, 0.0]], dtype=torch.float16)
    q = torch.tensor([[-6e4, 6e4, 0.0]], dtype=torch.float16)
    loss, *gradients = value_and_gradient(symmetric_kl, p, q)
    torch.testing.assert_close(loss, torch.tensor(1.2e5), rtol=1e-3, atol=0.0)
    assert loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_symmetric_kl_names_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r'\[2, 3\] and \[2, 4\]'):
        symmetric_kl(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ('mode', 'global_part', 'fusion_part', 'between'),
    [
        ('none', 0.0, 0.0, 0.0),
        ('global-to-fusion', 0.0, 0.0, 1.8),
        ('joint-to-global', 0.6, 0.0, 0.0),
        ('joint-to-fusion', 0.0, 1.8, 0.0),
        ('joint-to-both', 0.6, 1.8, 0.0),
    ],
)
def test_mutual_learning_modes_are_the_rows_of_table_4(
    mode: str, global_part: float, fusion_part: float, between: float
) -> None:
    logits = three_branches()
    expected = (
        global_part * naive_symmetric_kl(logits['joint'], logits['global'])
        + fusion_part * naive_symmetric_kl(logits['joint'], logits['fusion'])
        + between * naive_symmetric_kl(logits['global'], logits['fusion'])
    )
    torch.testing.assert_close(MutualLearningLoss(mode)(logits).double(), expected, rtol=1e-5, atol=1e-6)


def test_mutual_learning_weights_and_default() -> None:
    logits = three_branches()
    expected = naive_symmetric_kl(logits['joint'], logits['global'])
    expected = expected + naive_symmetric_kl(logits['joint'], logits['fusion'])
    loss = MutualLearningLoss(global_weight=1.0, fusion_weight=1.0)(logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(MutualLearningLoss()(logits), MutualLearningLoss('joint-to-both', 0.6, 1.8)(logits))
    assert MutualLearningLoss('none')({'global': logits['global']}) == 0
    assert MutualLearningLoss('none')({}) == 0


def test_mutual_learning_errors_name_what_is_allowed_and_given() -> None:
    with pytest.raises(ValueError, match=f"'both'.*{', '.join(MUTUAL_LEARNING_MODES)}"):
        MutualLearningLoss('both')
    with pytest.raises(ValueError, match="branch 'joint', got only global, fusion"):
        MutualLearningLoss()({name: torch.zeros(2, 3) for name in ('global', 'fusion')})


def test_mutual_learning_compiles_into_one_graph() -> None:
    assert_compiles(MutualLearningLoss(), three_branches())
