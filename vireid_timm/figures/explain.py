"""Why two images are similar: Grad-CAM of each branch (paper, fig. 5), and the spatial weight maps (eq. 2)."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import nn

from ..constants import FEATURES
from ..data.augment import normalize
from ..data.images import ImageError, load_image
from ..evaluation.features import evaluation_mode, feature_kind, require_dual_stream
from .charts import new_figure, save_figure

if TYPE_CHECKING:
    from captum.attr import LayerGradCam
    from matplotlib.figure import Figure

GREEK = ('α', 'β', 'γ', 'δ')  # the paper's names of the weight maps, first level first


class Explanation(NamedTuple):
    """What a model looks at in one image.

    Attributes:
        image: As the model sees it, [H, W, 3] uint8.
        modality: Its modality.
        similarity: Of its features with those of the other image.
        cams: Grad-CAM of each branch, `global` and `fusion` if there is one, at least 0, [h, w] on layer4's grid.
        weights: Layer -> weight map on layer1's grid, which sum to 1 over the layers, [h, w]; empty without a fusion
            branch.
    """

    image: np.ndarray
    modality: str
    similarity: float
    cams: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def explain(model: nn.Module, images: list[tuple[str, str]], features: str = 'auto') -> list[Explanation]:
    """Explain the similarity of two images, or the features of one.

    Grad-CAM (arXiv:1610.02391) of the joint map, whose GeM is V_joint: each channel counts with the mean of its
    gradient, and what lowers the score is left out. The score is the inner product with the other image's L2-normalised
    features, divided by the norm of the image's own, which is held constant: otherwise two equal images would have no
    gradient. For a single image the other one is itself.

    Args:
        model: A model of this package. It keeps its device and the mode of every module.
        images: Path and modality of one or two images.
        features: `after-bn`, `before-bn` or `auto`: those that the model returns.

    Returns:
        One explanation per image.

    Raises:
        ValueError: Captum is missing, an image cannot be read, the features are unknown, or the model has no pooling.
    """
    require_captum()
    model = require_dual_stream(model)
    if features not in FEATURES:
        raise ValueError(f'unknown features {features!r}; expected one of {", ".join(FEATURES)}')
    features = feature_kind(model, features)
    size = tuple(resolve_model_data_config(model)['input_size'][-2:])
    pixels = [_load(path, size) for path, _ in images]
    modalities = [modality for _, modality in images]
    with evaluation_mode(model):
        inputs = [_as_input(model, image) for image in pixels]
        with torch.no_grad():
            found = [_features(model, *image, features) for image in zip(modalities, inputs, strict=True)]
        return [
            Explanation(
                image,
                modality,
                float((F.normalize(own) * F.normalize(other)).sum()),
                _branch_cams(model, modality, x, features, F.normalize(other) / own.norm()),
                _weight_maps(model, modality, x),
            )
            for image, modality, x, own, other in zip(pixels, modalities, inputs, found, reversed(found), strict=True)
        ]


def require_captum() -> 'type[LayerGradCam]':
    """Return Captum's Grad-CAM.

    Raises:
        ValueError: Captum is not installed.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError:
        raise ValueError('explanations need the extra `explain` (pip install "vireid_timm[explain]")') from None
    return LayerGradCam


def _load(path: str, size: tuple[int, int]) -> np.ndarray:
    try:
        return load_image(path, size)
    except ImageError as error:  # without its advice to skip the image
        raise ValueError(error.args[0]) from error


def _as_input(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    """Return an image as the network's input [1, 3, H, W]."""
    config, parameter = resolve_model_data_config(model), next(model.parameters())
    x = torch.tensor(image, device=parameter.device).permute(2, 0, 1)[None].float() / 255
    return normalize(x, config['mean'], config['std']).to(parameter.dtype)


def _features(model: nn.Module, modality: str, x: torch.Tensor, features: str) -> torch.Tensor:
    """Return features [1, D] float32 in a way that pools the joint map by `model.global_pool`, as Grad-CAM needs."""
    joint_map = model.forward_features(**{modality: x})
    if features == 'before-bn':
        return model.forward_pool(joint_map).float()
    return model.forward_neck(joint_map).float()


def _branch_cams(
    model: nn.Module, modality: str, x: torch.Tensor, features: str, direction: torch.Tensor
) -> dict[str, np.ndarray]:
    """Return Grad-CAM of each branch for the inner product of the features with a direction [1, D]."""

    def score(x: torch.Tensor) -> torch.Tensor:
        return (_features(model, modality, x, features) * direction).sum(dim=1)

    # What is pooled is the joint map: its channels are those of the global branch, then those of the fusion branch.
    grad_cam = require_captum()(score, model.global_pool)
    channels = grad_cam.attribute(x, attribute_to_layer_input=True, attr_dim_summation=False)[0].detach()
    fused = 0 if model.fusion is None else model.fusion.num_features
    parts = zip(('global', 'fusion'), channels.split([len(channels) - fused, fused]), strict=True)
    return {name: part.sum(dim=0).relu().cpu().numpy() for name, part in parts if len(part)}


def _weight_maps(model: nn.Module, modality: str, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the weight map of each fused layer."""
    if model.fusion is None:
        return {}
    maps = []
    hook = model.fusion.weights.register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        with torch.no_grad():
            model.forward_features(**{modality: x})
    finally:
        hook.remove()
    return {f'layer{level}': array for level, array in zip(model.fuse_layers, maps[0][0].cpu().numpy(), strict=True)}


def save_explanations(explanations: list[Explanation], path: str | Path) -> None:
    """Draw explanations as a PNG: a row per image with its Grad-CAMs and weight maps.

    Every Grad-CAM is scaled to its own maximum. The weight maps share one scale.

    Raises:
        OSError: The file cannot be written.
    """
    height, width = explanations[0].image.shape[:2]
    num_cams, layers = len(explanations[0].cams), list(explanations[0].weights)
    columns = 1 + num_cams + len(layers)
    figure = new_figure(1.35 * columns + 0.9, 1.3 * len(explanations) * height / width + 1.4)
    figure.set_layout_engine('compressed')  # for cells of a fixed shape
    if len(explanations) > 1:
        figure.suptitle(f'similarity {explanations[0].similarity:.3f}', fontsize=11)
    grid = figure.subplots(len(explanations), columns, squeeze=False)
    for cell in grid.flat:
        cell.set(xticks=[], yticks=[])
    titles = ['image', *explanations[0].cams, *(f'{name} ({layer})' for name, layer in zip(GREEK, layers))]
    for cell, title in zip(grid[0], titles, strict=True):
        cell.set_title(title, fontsize=10)
    for cells, each in zip(grid, explanations, strict=True):
        cells[0].imshow(each.image)
        cells[0].set_ylabel(each.modality)
    _draw_cams(figure, grid[:, 1 : 1 + num_cams], explanations)
    if layers:
        _draw_weights(figure, grid[:, 1 + num_cams :], explanations)
    save_figure(figure, path)


def save_cams(explanations: list[Explanation], path: str | Path) -> None:
    """Draw the Grad-CAMs of any number of images as a PNG, as the paper's fig. 5: images, then a row per branch.

    Raises:
        OSError: The file cannot be written.
    """
    height, width = explanations[0].image.shape[:2]
    rows = ['image', *explanations[0].cams]
    figure = new_figure(1.35 * len(explanations) + 0.6, 1.3 * len(rows) * height / width + 1)
    figure.set_layout_engine('compressed')  # for cells of a fixed shape
    grid = figure.subplots(len(rows), len(explanations), squeeze=False)
    for cell in grid.flat:
        cell.set(xticks=[], yticks=[])
    for cell, name in zip(grid[:, 0], rows, strict=True):
        cell.set_ylabel(name)
    for cell, each in zip(grid[0], explanations, strict=True):
        cell.imshow(each.image)
        cell.set_title(each.modality, fontsize=10)
    _draw_cams(figure, grid[1:].T, explanations)
    save_figure(figure, path)


def _draw_cams(figure: 'Figure', grid: np.ndarray, explanations: list[Explanation]) -> None:
    """Draw the Grad-CAMs over grey images, in the cells [images, branches]."""
    for cells, each in zip(grid, explanations, strict=True):
        height, width = each.image.shape[:2]
        for cell, cam in zip(cells, each.cams.values(), strict=True):
            cell.imshow(each.image.mean(axis=2), cmap='gray', vmin=0, vmax=255)
            heat = cell.imshow(
                cam / max(cam.max(), 1e-12),
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation='bilinear',
                cmap='inferno',
                vmin=0,
                vmax=1,
                alpha=0.6,
            )
    scale = figure.colorbar(heat, ax=grid, location='bottom', shrink=0.8, ticks=[0, 1], label='Grad-CAM')
    scale.ax.set_xticklabels(['0', 'max'])


def _draw_weights(figure: 'Figure', grid: np.ndarray, explanations: list[Explanation]) -> None:
    """Draw the weight maps on one scale, in the cells [images, layers]."""
    values = np.concatenate([weights.ravel() for each in explanations for weights in each.weights.values()])
    low, high = values.min(), values.max()
    if high - low < 1e-3:  # as before training
        low, high = 0, 1
    for cells, each in zip(grid, explanations, strict=True):
        for cell, weights in zip(cells, each.weights.values(), strict=True):
            shades = cell.imshow(weights, cmap='viridis', vmin=low, vmax=high)
    figure.colorbar(shades, ax=grid, location='bottom', shrink=0.8, label='weight')
