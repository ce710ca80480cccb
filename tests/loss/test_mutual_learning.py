"""Mutual learning against loops over samples and classes in float64, forward and backward."""

import pytest
import torch
from losses import assert_compiles, random_features, three_branches, value_and_gradient

from vireid_timm.loss.mutual_learning import MUTUAL_CONSTANTS, MUTUAL_LEARNING_MODES, MutualLearningLoss, symmetric_kl


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


@pytest.mark.parametrize('constant', MUTUAL_CONSTANTS)
def test_what_is_held_constant_changes_the_gradients_alone(constant: str) -> None:
    def naive(logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
        p, q = logits_p.softmax(dim=1), logits_q.softmax(dim=1)
        if constant == 'teacher':
            p = p.detach()
        still_p, still_q = (p.detach(), q.detach()) if constant == 'partner' else (p, q)
        return 0.5 * (still_p * (still_p / q).log() + still_q * (still_q / p).log()).sum(dim=1).mean()

    p, q = (2 * random_features(5, 7, seed=seed).requires_grad_() for seed in (1, 2))
    loss = symmetric_kl(p, q, constant)
    torch.testing.assert_close(loss, symmetric_kl(p, q), rtol=0, atol=0)
    learners = (q,) if constant == 'teacher' else (p, q)
    gradients = torch.autograd.grad(symmetric_kl(p, q, constant), learners)
    expected = torch.autograd.grad(naive(p.double(), q.double()), learners)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    (untaught,) = torch.autograd.grad(symmetric_kl(p, q, constant), [p], allow_unused=True)
    assert (untaught is None) == (constant == 'teacher')


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


def test_the_joint_branch_teaches_and_is_not_taught() -> None:
    logits = {branch: values.requires_grad_() for branch, values in three_branches().items()}
    loss = MutualLearningLoss(constant='teacher')(logits)
    gradients = torch.autograd.grad(loss, list(logits.values()), allow_unused=True)
    reached = {branch for branch, gradient in zip(logits, gradients, strict=True) if gradient is not None}
    assert reached == {'global', 'fusion'}
    with pytest.raises(ValueError, match='none, partner, teacher'):
        MutualLearningLoss(constant='student')


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
