import pytest
import torch

from vireid_timm.layers.head import BatchNormNeck, BranchHead


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_neck_is_batch_norm_without_a_bias():
    neck = BatchNormNeck(5)
    assert list(neck.state_dict()) == ['weight', 'running_mean', 'running_var', 'num_batches_tracked']
    assert [name for name, _ in neck.named_parameters()] == ['weight']
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 3 + 2
    expected = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt() * neck.weight
    torch.testing.assert_close(neck(x), expected)
    neck.eval()
    expected = (x - neck.running_mean) / (neck.running_var + 1e-5).sqrt() * neck.weight
    torch.testing.assert_close(neck(x), expected)


def test_head_is_neck_then_classifier_without_a_bias():
    head = BranchHead(5, 3).eval()
    assert [name for name, _ in head.named_parameters()] == ['neck.weight', 'fc.weight']
    x = torch.randn(4, 5)
    torch.testing.assert_close(head(x), head.neck(x) @ head.fc.weight.T)
    assert torch.equal(head(x, pre_logits=True), head.neck(x))


def test_head_without_classes_returns_the_features_after_the_neck():
    head = BranchHead(5, 0).eval()
    x = torch.randn(4, 5)
    assert torch.equal(head(x), head.neck(x))


def test_head_drops_features_only_in_training():
    head = BranchHead(64, 3, drop_rate=0.5)
    x = torch.randn(8, 64)
    dropped = head.drop(head.neck(x)) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert (head(x, pre_logits=True) != 0).all()
    head.eval()
    assert torch.equal(head(x), head(x))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_new_classifiers_match_the_neck(dtype):
    head = BranchHead(5, 3, dtype=dtype).eval()
    neck = head.neck.weight.clone()
    for count in (4, 0, 2):
        head.reset(count)
        assert not any(module.training for module in head.modules())
        assert head(torch.randn(6, 5)).shape == (6, count or 5)
        assert {parameter.dtype for parameter in head.parameters()} == {dtype}
    assert torch.equal(head.neck.weight, neck)
