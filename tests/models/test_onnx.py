"""Networks exported to ONNX compute the same features."""

import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from networks import images, small
from torch import nn

pytestmark = pytest.mark.usefixtures('one_thread')


class BeforeBN(nn.Module):
    """The features that training sees, which take another way through the pooling."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, visible: torch.Tensor | None = None, infrared: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.forward_branches(visible, infrared).features


def assert_same_after_export(
    model: nn.Module, modality: str, size: tuple[int, int], dynamo: bool, folder: Path
) -> None:
    """Export two images of a size, then compare batches of several sizes."""
    file = str(folder / 'model.onnx')
    if dynamo:
        options = dict(dynamic_shapes={modality: {0: torch.export.Dim('count', min=1, max=64)}}, verbose=False)
    else:
        options = dict(dynamic_axes={modality: {0: 'count'}}, input_names=[modality])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporters' own
        torch.onnx.export(model, (), file, kwargs={modality: images(2, size)}, dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (name,) = (given.name for given in session.get_inputs())
    for count in (2, 1, 5):
        x = images(count, size, seed=count)
        with torch.inference_mode():
            expected = F.normalize(model(**{modality: x}))
        (exported,) = session.run(None, {name: x.numpy()})
        assert exported.shape == expected.shape
        torch.testing.assert_close(F.normalize(torch.from_numpy(exported)), expected, rtol=0, atol=1e-5)


def skip_what_torch_cannot_export(dynamo: bool) -> None:
    if dynamo and torch.__version__ < '2.6':
        pytest.skip('torch 2.5 stops with an error where a free number of images is flattened')


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'tracing'])
@pytest.mark.parametrize('modality', ['visible', 'infrared'])
@pytest.mark.parametrize('size', [(64, 32), (51, 37)])
def test_exported_networks_compute_the_same(size, modality, dynamo, tmp_path):
    assert_same_after_export(small(), modality, size, dynamo, tmp_path)


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'tracing'])
@pytest.mark.parametrize(
    'options',
    [
        dict(spatial_weights='static', img_size=(64, 32), last_stride=2, retrieval='before-bn'),
        dict(plain_fusion=True, num_classes=3),
        dict(fuse_layers=(), non_local_blocks=(0, 1, 1, 0), retrieval='before-bn'),
    ],
    ids=['static', 'plain', 'non-local'],
)
def test_other_exported_networks_compute_the_same(options, dynamo, tmp_path):
    if 'non_local_blocks' in options:
        skip_what_torch_cannot_export(dynamo)
    assert_same_after_export(small(**options), 'infrared', (51, 37), dynamo, tmp_path)


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'tracing'])
@pytest.mark.parametrize('plain', [False, True], ids=['exact', 'plain'])
def test_exported_features_before_bn_are_the_same(plain, dynamo, tmp_path):
    skip_what_torch_cannot_export(dynamo)
    assert_same_after_export(BeforeBN(small(plain_fusion=plain)).eval(), 'infrared', (51, 37), dynamo, tmp_path)


@pytest.mark.parametrize('dynamo', [True, False], ids=['dynamo', 'tracing'])
def test_exported_channels_of_zeros_are_the_same(dynamo, tmp_path):
    """A neck of small variance scales up the root's epsilon, which an optimiser may drop."""
    model = small()
    with torch.no_grad():
        for reduce in model.fusion.reduce:
            reduce.bn.bias.fill_(-1e3)
        model.joint_head.neck.running_mean.zero_()
        model.joint_head.neck.running_var.fill_(1e-8)
    assert_same_after_export(model, 'visible', (64, 32), dynamo, tmp_path)
