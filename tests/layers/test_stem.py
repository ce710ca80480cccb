import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet

from vireid_timm.layers.stem import DualStem, Stem

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dual_stem(**options) -> DualStem:
    def stem() -> Stem:
        return Stem(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, **options))

    return DualStem(stem(), stem(), options.get('in_chans', 3)).eval()


def test_stem_is_the_beginning_of_a_resnet():
    resnet = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, stem_width=32, stem_type='deep').eval()
    x = torch.randn(2, 3, 48, 33)
    expected = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(x))))
    assert torch.equal(Stem(resnet)(x), expected)


def test_dual_stem_stacks_visible_rows_first():
    stem = dual_stem()
    visible, infrared = torch.randn(3, 3, 32, 16), torch.randn(2, 3, 32, 16)
    both = stem(visible, infrared)
    assert torch.equal(both[:3], stem.visible(visible))
    assert torch.equal(both[3:], stem.infrared(infrared))
    assert torch.equal(stem(visible), both[:3])
    assert torch.equal(stem(infrared=infrared), both[3:])
    assert not torch.equal(stem(infrared=visible), stem(visible))


def test_wrong_images_are_named():
    stem = dual_stem(in_chans=1)
    good = torch.zeros(2, 1, 32, 16)
    with pytest.raises(ValueError, match=r'visible=, infrared=, or both, each \[B, C, H, W\]'):
        stem()
    with pytest.raises(ValueError, match=r'visible images need shape \[B, 1, H, W\], got \[2, 3, 32, 16\]'):
        stem(torch.zeros(2, 3, 32, 16), good)
    with pytest.raises(ValueError, match=r'infrared images need shape \[B, 1, H, W\], got \[1, 32, 16\]'):
        stem(good, good[0])
    sizes = r'same height and width, got \[2, 1, 32, 16\] and \[2, 1, 31, 16\]'  # the stem halves both to the same size
    with pytest.raises(ValueError, match=sizes):
        stem(good, good[:, :, 1:])
