"""The losses against slow, obvious versions: Python loops in float64, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

from vireid_timm.loss.identity import identity_losses
from vireid_timm.loss.mutual_learning import MUTUAL_LEARNING_MODES, MutualLearningLoss, symmetric_kl
from vireid_timm.loss.triplet import WeightedRegularizedTriplet

GROUPS = {
    'paper': [name for _ in range(2) for name in range(8) for _ in range(4)],
    'uneven': [3, 3, 3, 3, 3, 7, 7, 1],
    'every image alone': [0, 1, 2, 3, 4],
    'one against many': [5, 5, 5, 5, 5, 5, 9],
    'negative and large labels': [-1, 2**40, -1, 2**40],
    'several blocks of rows': [name % 12 for name in range(70)],
}


def random_features(count: int, width: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)


def naive_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    squared = ((a - b) ** 2).sum()
    return squared.sqrt() if squared > 0 else squared * 0


def naive_triplet(features: torch.Tensor, identities: list[int]) -> torch.Tensor:
    """The definition, anchor by anchor, in float64."""
    terms = []
    for anchor, name in zip(features, identities, strict=True):
        positive = [naive_distance(anchor, f) for f, other in zip(features, identities, strict=True) if other == name]
        negative = [naive_distance(anchor, f) for f, other in zip(features, identities, strict=True) if other != name]
        if not negative:
            terms.append((features * 0).sum())
            continue
        positive, negative = torch.stack(positive), torch.stack(negative)
        positive_weight = torch.exp(positive - positive.max().detach())
        negative_weight = torch.exp(-negative + negative.min().detach())
        difference = (positive_weight / positive_weight.sum() * positive).sum()
        difference = difference - (negative_weight / negative_weight.sum() * negative).sum()
        terms.append(torch.logaddexp(difference, torch.zeros_like(difference)))
    return torch.stack(terms).mean()


def value_and_gradient(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = [values.detach().clone().requires_grad_() for values in inputs]
    loss = function(*inputs)
    loss.backward()
    return (loss.detach(), *(values.grad for values in inputs))


@pytest.mark.parametrize('scale', [1e-3, 1.0, 5.0, 1e3])
@pytest.mark.parametrize('group', GROUPS)
def test_triplet_equals_the_loop_forward_and_backward(group: str, scale: float) -> None:
    identities = GROUPS[group]
    features = random_features(len(identities), dtype=torch.float64) * scale
    loss, gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.tensor(identities)), features
    )
    expected, expected_gradient = value_and_gradient(lambda values: naive_triplet(values, identities), features)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=3e-9)  # softplus is linear beyond 20: 2e-9
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)
    single, single_gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.tensor(identities)), features.float()
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single_gradient.double(), expected_gradient, rtol=1e-2, atol=2e-4 * gradient.abs().max())


@pytest.mark.parametrize('distance', [10.0, 20.0, 100.0, 1e4])
def test_triplet_weights_stay_exact_at_large_distances(distance: float) -> None:
    """Three pairs, every image of one pair equally far from every image of the others."""
    features = torch.zeros(6, 5)
    features[:2, 0] = distance / math.sqrt(2)
    features[2:4, 1] = distance / math.sqrt(2)
    features[4:, 2] = distance / math.sqrt(2)
    identities = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = WeightedRegularizedTriplet()(features, identities)  # positives at 0, negatives at the distance
    torch.testing.assert_close(loss, F.softplus(torch.tensor(-distance)), rtol=1e-3, atol=0.0)
    # Furthest positives at the distance, nearest negative at 0; what the softmax leaves to the others is e^-distance.
    swapped = WeightedRegularizedTriplet()(features, torch.tensor([0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(swapped, torch.tensor(distance), rtol=2e-4, atol=0.0)


def test_triplet_distances_survive_a_large_common_offset() -> None:
    """Features after ReLU and pooling share a large mean; |a|² + |b|² − 2ab would lose the differences in it."""
    identities = GROUPS['uneven']
    features = (random_features(len(identities)) * 0.01 + 64).float()
    loss, gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.tensor(identities)), features
    )
    expected, expected_gradient = value_and_gradient(lambda v: naive_triplet(v, identities), features.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_identical_features_give_a_finite_loss_and_gradient() -> None:
    identities = GROUPS['paper']
    features = torch.ones(len(identities), 16)
    loss, gradient = value_and_gradient(lambda v: WeightedRegularizedTriplet()(v, torch.tensor(identities)), features)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_some_identical_features_among_others() -> None:
    """The same image twice in a batch (a small identity), and two people with the same features."""
    features = random_features(8, dtype=torch.float64)
    features[1] = features[0]
    features[7] = features[0]
    identities = GROUPS['uneven']
    loss, gradient = value_and_gradient(lambda v: WeightedRegularizedTriplet()(v, torch.tensor(identities)), features)
    expected, expected_gradient = value_and_gradient(lambda v: naive_triplet(v, identities), features)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize('count', [1, 2, 6])
def test_a_single_identity_gives_zero_loss_and_zero_gradient(count: int) -> None:
    loss, gradient = value_and_gradient(
        lambda values: WeightedRegularizedTriplet()(values, torch.zeros(count, dtype=torch.long)),
        random_features(count),
    )
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [1.0, 1e3])
def test_half_precision_features_are_computed_in_float32(dtype: torch.dtype, scale: float) -> None:
    identities = GROUPS['paper']
    features = (random_features(len(identities)) * scale).to(dtype)
    loss, gradient = value_and_gradient(lambda v: WeightedRegularizedTriplet()(v, torch.tensor(identities)), features)
    expected = naive_triplet(features.double(), identities)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(WeightedRegularizedTriplet()(features, torch.tensor(identities)), loss)


def test_losses_compile_into_one_graph() -> None:
    """No Python branch on a value, and so no waiting for the device."""
    features, identities, logits = random_features(64), torch.tensor(GROUPS['paper']), three_branches()
    for loss, inputs in (
        (WeightedRegularizedTriplet(), (features, identities)),
        (MutualLearningLoss(), (logits,)),
        (lambda *given: sum(identity_losses(*given).values()), (logits, torch.arange(6))),
    ):
        compiled = torch.compile(loss, fullgraph=True, backend='eager')
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))


def test_triplet_does_not_depend_on_the_order_of_the_batch() -> None:
    identities = torch.tensor(GROUPS['paper'])
    features = random_features(len(identities), dtype=torch.float64)
    order = torch.randperm(len(identities), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        WeightedRegularizedTriplet()(features[order], identities[order]),
        WeightedRegularizedTriplet()(features, identities),
    )


@pytest.mark.parametrize(('features', 'identities'), [((4, 3), (5,)), ((4,), (4,)), ((0, 3), (0,)), ((4, 3), (4, 1))])
def test_triplet_names_shapes_that_do_not_fit(features: tuple[int, ...], identities: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'features \[N, D\] and identities \[N\]'):
        WeightedRegularizedTriplet()(torch.zeros(features), torch.zeros(identities, dtype=torch.long))


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


def three_branches() -> dict[str, torch.Tensor]:
    return {name: 2 * random_features(6, 9, seed) for seed, name in enumerate(('global', 'fusion', 'joint'))}


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
    with pytest.raises(ValueError, match="branch 'joint', but got only global, fusion"):
        MutualLearningLoss()({name: torch.zeros(2, 3) for name in ('global', 'fusion')})


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
    with pytest.raises(ValueError, match="branch 'local', but got only global, fusion, joint"):
        identity_losses(logits, torch.arange(6), branches=('local',))
