"""Small networks, inputs for them, and values to compare."""

import timm
import torch
from torch import nn

from vireid_timm.models.branches import BranchOutput
from vireid_timm.models.dual_stream import DualStreamResNet

RESNETS = timm.list_models('vireid_*', module='dual_stream')
IMAGENET_TAGS = [tag for tag in timm.list_pretrained('vireid_*in1k') if tag.partition('.')[0] in RESNETS]
TRUNK = ('layer1.', 'layer2.', 'layer3.', 'layer4.')
# ResNet-10-T with an eighth of its channels.
THIN = dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 32, 64))


def images(count: int = 2, size: tuple[int, int] = (32, 16), seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """Randomise the normalisations: fresh ones turn residual blocks off, and both stems start with equal values."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_(0.0, 0.2, generator=generator)
    return model


def small(name: str = 'vireid_dml_r10t', **kwargs) -> DualStreamResNet:
    return randomised(timm.create_model(name, resnet_args=THIN, **kwargs)).eval()


def on_meta(name: str, **kwargs) -> DualStreamResNet:
    """A network with shapes but no values."""
    return timm.create_model(name, device='meta', **kwargs).eval()


def meta_images(model: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.zeros(count, *model.pretrained_cfg['input_size'], device='meta')


def gradients(model: nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def training_value(output: BranchOutput) -> torch.Tensor:
    """A scalar that depends on every branch."""
    parts = [output.features, *output.logits.values()]
    return sum((part * torch.linspace(-1, 1, part.shape[1])).square().mean() for part in parts)


def forward_calls(module: nn.Module) -> list[nn.Module]:
    """Return a list that grows with every forward pass of the module."""
    calls: list[nn.Module] = []
    module.register_forward_pre_hook(lambda called, inputs: calls.append(called))
    return calls
