"""Non-local blocks, on their own and in a network."""

import copy

import pytest
import torch
from networks import forward_calls, gradients, images, on_meta, randomised, small, training_value
from timm.models import create_feature_extractor, get_graph_node_names
from torch import nn

from vireid_timm.layers.non_local import NonLocalBlock
from vireid_timm.models.dual_stream import DualStreamResNet

pytestmark = pytest.mark.usefixtures('one_thread')


def naive_non_local(block: NonLocalBlock, x: torch.Tensor) -> torch.Tensor:
    """Build the affinity of every pair of positions."""
    positions = x.shape[2] * x.shape[3]
    theta, phi, g = (part(x).flatten(2) for part in (block.theta, block.phi, block.g))
    affinity = theta.transpose(1, 2) @ phi / positions  # [B, to, from]
    sums = (affinity @ g.transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
    return x + block.norm(block.out(sums))


@pytest.mark.parametrize('width', [1, 5])
def test_non_local_blocks_against_the_affinity_of_all_pairs(width):
    block = NonLocalBlock(6, width, dtype=torch.float64)
    for count, size in ((2, (3, 5)), (1, (1, 1)), (0, (4, 2))):
        x = torch.randn(count, 6, *size, dtype=torch.float64)
        assert torch.equal(block.eval()(x), x)  # adds nothing at first
        with torch.no_grad():
            expected = naive_non_local(randomised(block), x)
            torch.testing.assert_close(block(x), expected)
            assert not count or not torch.allclose(expected, x, rtol=1e-3)
        nn.init.zeros_(block.norm.weight)
        nn.init.zeros_(block.norm.bias)


@pytest.mark.parametrize('width', [1, 'half'])
def test_agw_has_five_non_local_blocks(width):
    model = on_meta('vireid_agw_r50', non_local_width=width)
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, NonLocalBlock)}
    assert list(blocks) == [f'layer2.{i}_non_local' for i in (2, 3)] + [f'layer3.{i}_non_local' for i in (3, 4, 5)]
    assert [name for name, _ in model.layer2.named_children()] == ['0', '1', '2', '2_non_local', '3', '3_non_local']
    for name, block in blocks.items():
        channels = 512 if name.startswith('layer2') else 1024
        assert block.theta.weight.shape == (channels // 2 if width == 'half' else 1, channels, 1, 1)
    added = sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())
    assert width == 'half' or added == 28_687
    base = on_meta('vireid_base_r50')
    assert added == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    assert set(base.state_dict()) == {key for key in model.state_dict() if '_non_local.' not in key}


def non_local(**kwargs) -> DualStreamResNet:
    return small(fuse_layers=(), non_local_blocks=(0, 1, 1, 0), non_local_width='half', **kwargs)


def test_non_local_blocks_add_nothing_at_first():
    model, plain = non_local(num_classes=3), small(num_classes=3, fuse_layers=())
    x = images(), images(seed=1)
    with torch.inference_mode():
        model.load_state_dict(plain.state_dict(), strict=False)
        assert not torch.allclose(model(*x), plain(*x), rtol=0.1)
        for block in (model.layer2[1], model.layer3[1]):
            nn.init.zeros_(block.norm.weight)
            nn.init.zeros_(block.norm.bias)
        assert torch.equal(model(*x), plain(*x))


def test_non_local_blocks_are_part_of_their_layers():
    model = non_local()
    features = non_local(features_only=True)
    features.model.load_state_dict(model.state_dict(), strict=False)
    with torch.inference_mode():
        levels = model.forward_intermediates(images(), intermediates_only=True)
        for i, layer in ((1, model.layer2), (2, model.layer3)):
            expected = naive_non_local(layer[1], layer[0](levels[i - 1]))
            torch.testing.assert_close(levels[i], expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(features(images()), levels, strict=True))


def test_non_local_blocks_train_with_and_without_checkpointing():
    model = non_local(num_classes=3).train()
    x = images(), images(seed=1)
    expected = gradients(model, training_value(model.forward_branches(*x)))
    calls = forward_calls(model.layer3[1])
    model.set_grad_checkpointing()
    actual = gradients(model, training_value(model.forward_branches(*x)))
    assert len(calls) == 2
    for name, gradient in actual.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, expected[name])


def test_non_local_blocks_are_traced_compiled_and_exported(compiled):
    model = non_local(num_classes=3)
    _, nodes = get_graph_node_names(model)
    traced = create_feature_extractor(model, nodes[-1:])
    count = torch.export.Dim('count', min=1, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes={'visible': {0: count}}).module()
    with torch.inference_mode():
        for x in (images(), images(3, seed=1)):
            expected = model(x)
            assert torch.equal(next(iter(traced(x).values())), expected)
            for other in (exported(x), compiled(model)(x)):
                torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)


def test_non_local_blocks_in_half_precision():
    model = non_local()
    x = images(), images(seed=1)
    with torch.no_grad():
        expected = model(*x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert torch.cosine_similarity(model(*x), expected).min() > 0.999
        for dtype in (torch.float16, torch.bfloat16):
            actual = copy.deepcopy(model).to(dtype)(*(batch.to(dtype) for batch in x))
            assert torch.cosine_similarity(actual.float(), expected).min() > 0.99
