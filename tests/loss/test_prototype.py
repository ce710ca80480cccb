"""Prototype contrast against a loop over images and identities in float64, forward, backward and updated."""

import pytest
import torch
from losses import assert_compiles, random_features, value_and_gradient

from vireid_timm.loss.prototype import PrototypeContrast

LABELS = {'paper': [0, 0, 1, 1, 2, 2, 0, 1], 'one image each': [4, 2, 0], 'one identity': [3, 3], 'one image': [1]}
CLASSES = 6


def naive_loss(features: torch.Tensor, labels: list[int], prototypes: torch.Tensor) -> torch.Tensor:
    known = [number for number in range(CLASSES) if prototypes[number].any()]
    terms = []
    for feature, label in zip(features, labels, strict=True):
        if label in known:
            cosines = [(feature / feature.norm() * prototypes[number]).sum() / 0.03 for number in known]
            terms.append(torch.stack(cosines).logsumexp(0) - cosines[known.index(label)])
    return (features * 0).sum() + (torch.stack(terms).mean() if terms else 0)


def naive_update(features: torch.Tensor, labels: list[int], prototypes: torch.Tensor) -> torch.Tensor:
    moved = prototypes.clone()
    for number in set(labels):
        own = [f / f.norm() for f, label in zip(features, labels, strict=True) if label == number]
        mean = torch.stack(own).mean(0)
        moved[number] = 0.5 * prototypes[number] + 0.5 * mean if prototypes[number].any() else mean
        moved[number] /= moved[number].norm()
    return moved


def loss_with(labels: list[int], width: int = 24) -> PrototypeContrast:
    """A loss that has seen a batch of these people."""
    loss = PrototypeContrast(CLASSES, width).double()
    loss.update(random_features(len(labels), width, seed=7, dtype=torch.float64), torch.tensor(labels))
    return loss


@pytest.mark.parametrize('seen', [[], [0, 1, 2, 3, 4, 5], [2, 0, 0]])
@pytest.mark.parametrize('group', LABELS)
def test_the_loss_is_that_of_the_loop_forward_and_backward(group: str, seen: list[int]) -> None:
    labels = LABELS[group]
    loss = loss_with(seen) if seen else PrototypeContrast(CLASSES, 24).double()
    features = random_features(len(labels), dtype=torch.float64)
    value, gradient = value_and_gradient(lambda values: loss(values, torch.tensor(labels)), features)
    expected = value_and_gradient(lambda values: naive_loss(values, labels, loss.prototypes), features)
    torch.testing.assert_close((value, gradient), expected)
    single, single_gradient = value_and_gradient(lambda v: loss.float()(v, torch.tensor(labels)), features.float())
    torch.testing.assert_close(single.double(), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single_gradient.double(), gradient, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize('group', LABELS)
def test_updates_are_those_of_the_loop(group: str) -> None:
    labels = LABELS[group]
    loss = loss_with([0, 3])
    for seed in range(3):
        features = random_features(len(labels), seed=seed, dtype=torch.float64)
        expected = naive_update(features, labels, loss.prototypes)
        loss.update(features.requires_grad_(), torch.tensor(labels))
        torch.testing.assert_close(loss.prototypes, expected)
        assert not loss.prototypes.requires_grad


def test_an_update_between_forward_and_backward_is_not_noticed() -> None:
    loss, labels = loss_with([0, 1, 2]), torch.tensor(LABELS['paper'])
    features = random_features(len(labels), dtype=torch.float64)
    _, expected = value_and_gradient(lambda values: loss(values, labels), features)
    leaf = features.clone().requires_grad_()
    value = loss(leaf, labels)
    loss.update(leaf.detach(), labels)
    value.backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)


def test_zero_features_leave_no_prototype() -> None:
    loss = PrototypeContrast(CLASSES, 4)
    loss.update(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert not loss.prototypes.any()
    value, gradient = value_and_gradient(lambda values: loss(values, torch.tensor([0, 1])), torch.zeros(2, 4))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_in_float32(dtype: torch.dtype) -> None:
    loss, labels = loss_with([0, 1, 2]).float(), torch.tensor(LABELS['paper'])
    features = random_features(len(labels)).to(dtype)
    value, gradient = value_and_gradient(lambda values: loss(values, labels), features)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    expected = naive_loss(features.double(), labels.tolist(), loss.prototypes.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    other = loss_with([0, 1, 2]).float()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(loss(features, labels), value)
        loss.update(features, labels)
    other.update(features, labels)
    assert torch.equal(loss.prototypes, other.prototypes)


def test_one_graph_that_waits_for_nothing() -> None:
    loss, labels = loss_with([0, 1, 2]), torch.tensor(LABELS['paper'])
    assert_compiles(loss, random_features(len(labels), dtype=torch.float64), labels)
    torch.compile(loss.update, fullgraph=True, backend='eager')(random_features(len(labels)), labels)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r'features \[N, D\] and identities \[N\]'):
        PrototypeContrast(3, 2)(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long))
