"""Extract features: every image passes through the network once, on one rank or split among several."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_model_data_config
from timm.utils import unwrap_model
from torch import distributed, nn
from tqdm import tqdm

from ..constants import CACHES, CROPS, FEATURES, MODALITIES
from ..data.augment import normalize
from ..data.images import ImageError, load_image
from ..data.records import Records
from ..data.store import ImageStore, image_store
from ..data.workers import in_order
from ..device import named_device
from ..distributed import all_ranks, is_rank_zero, rank_and_world_size
from ..layers.power_mean import full_precision
from ..options import MAX_SIDE, MAX_WORKERS, check_range

CROP_BORDER = (10 / 288, 10 / 144)  # training's default padding, as a share of height and width
AMP_DTYPES = (None, torch.bfloat16, torch.float16)

Images = Records | Sequence[str | Path | Image.Image | np.ndarray | torch.Tensor]


@dataclass(frozen=True)
class Extraction:
    """How features are extracted.

    Attributes:
        features: `after-bn` (after the BN-neck), `before-bn`, or `auto`: those that the model returns.
        flip_test: Average over each image and its mirror image.
        crops: 1, or 5 to average over the image and its shifts into the four corners, see `views`.
        centre: Subtract the mean of the modality's features, see `centred`. What an image's features are then depends
            on which other images are extracted with it.
        size: Height and width that images are resized to, or (3, height, width) as timm has it; None for the model's
            own.
        batch_size: Images per forward pass.
        device: Device to compute on; None for the model's own.
        amp_dtype: Autocast type, bfloat16 or float16; None for full precision.
        cache: Where decoded images are kept, see `image_store`. `device` means `disk` here. Ranks share only `disk`.
        cache_dir: Folder of the disk cache.
        skip_broken: Skip images that cannot be read instead of raising.
        workers: Number of workers that decode; None for one per core, at most 8.
        progress: Show progress bars, if the output is a terminal.
    """

    features: str = 'auto'
    flip_test: bool = False
    crops: int = 1
    centre: bool = False
    size: tuple[int, ...] | None = None
    batch_size: int = 128
    device: torch.device | str | None = None
    amp_dtype: torch.dtype | None = None
    cache: str = 'auto'
    cache_dir: str | Path | None = None
    skip_broken: bool = False
    workers: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ('features', FEATURES),
            ('crops', CROPS),
            ('cache', CACHES),
            ('amp_dtype', AMP_DTYPES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f'unknown {name} {value!r}; expected one of {", ".join(map(str, allowed))}')
        check_range('batch_size', self.batch_size, 1)
        if self.workers is not None:
            check_range('workers', self.workers, maximum=MAX_WORKERS)
        if self.size is not None:
            channels, size = self.size[:-2], self.size[-2:]
            if len(channels) == 1 and channels[0] != 3:
                raise ValueError(
                    f'the size must be 3 channels, height and width, in this order, got {" ".join(map(str, self.size))}'
                )
            if len(channels) > 1 or len(size) != 2:
                raise ValueError(f'size must be height and width in pixels, got {self.size}')
            for side in size:
                check_range('size', side, 1, MAX_SIDE)
            object.__setattr__(self, 'size', (int(size[0]), int(size[1])))
        if self.device is not None:
            object.__setattr__(self, 'device', named_device(self.device))


def embed(
    model: nn.Module,
    images: Images,
    modality: str | None = None,
    *,
    cache: str = 'off',
    **options: object,
) -> tuple[torch.Tensor, list[str] | list[int]]:
    """Return the features of images, ready to be compared by inner product.

    The model keeps its device and the mode of every module. If several ranks run, all of them must make this call: they
    share the work, and each gets all features.

    Args:
        model: One of this package's models, with or without classifiers, compiled, or wrapped for parallel training.
        images: A record table, paths, or images in memory, which are only resized: PIL images of mode RGB or L, arrays
            [H, W, 3] (in the order RGB; OpenCV has BGR: pass `crop[:, :, ::-1]`) or [H, W], tensors [3, H, W] or
            [1, H, W]. Arrays and tensors are uint8, or float from 0 to 1 (rounded to 8 bits).
        modality: `visible` or `infrared` for paths and images in memory; None for records, which have their own.
        cache: Where decoded images are kept, see `image_store`.
        **options: The other fields of `Extraction`: `features`, `flip_test`, `crops`, `size`, `batch_size`, ...

    Returns:
        L2-normalised features on the CPU, [N, D] float32, and the path of every row (for images in memory its index
        in `images`). Rows are in the order of `images`, without the skipped ones.

    Raises:
        ValueError: On a missing or unknown modality, an option out of range, an image that cannot be read or is empty,
            or features that are not finite. The message names the image.
    """
    extraction = Extraction(cache=cache, **options)
    model = require_dual_stream(model)
    records, pil_images = _as_records(images, modality)
    if pil_images:
        size = image_size(model, extraction)
        store = ImageStore(records.path, size, _resized(pil_images, size), {})
    else:
        store = open_store(model, records, extraction)
    rows = store.intact()
    (table,) = extract(model, records[rows], store, rows, extraction, [feature_kind(model, extraction.features)]).cpu()
    return table, rows.tolist() if pil_images else records.path[rows].tolist()


def embed_batches(
    model: nn.Module, paths: Sequence[str], modality: str, extraction: Extraction
) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
    """Yield the features of image files batch by batch, for more images than fit into memory. Each is decoded once.

    Args:
        model: One of this package's models. It is left unchanged.
        paths: The files, [N].
        modality: Modality of all of them.
        extraction: How features are extracted. If several ranks run, each computes what it is given.

    Yields:
        Rows of the images in `paths`, [B]; their L2-normalised features on the CPU, [B, D] float32; and row -> why an
        image of the same batch cannot be read, if broken images are skipped.

    Raises:
        ImageError: If an image is broken, unless broken images are skipped.
        ValueError: On features that are not finite.
    """
    size = image_size(model, extraction)
    device = extraction.device or next(model.parameters()).device
    starts = range(0, len(paths), extraction.batch_size)
    batches = [list(range(start, min(start + extraction.batch_size, len(paths)))) for start in starts]
    read = partial(_read_batch, paths, size=size, extraction=extraction)
    with closing(in_order(read, batches, workers=2)) as loaded:  # two threads read ahead
        for rows, images, broken in loaded:
            features = torch.empty(0, model.head_hidden_size)
            if rows:
                with _inference(model, device):
                    kinds = [feature_kind(model, extraction.features)]
                    (features,) = _batch_features(model, modality, images, device, extraction, kinds).cpu()
                check_finite(features, [paths[row] for row in rows])
            yield rows, features, broken


def _read_batch(
    paths: Sequence[str], rows: list[int], size: tuple[int, int], extraction: Extraction
) -> tuple[list[int], torch.Tensor, dict[int, str]]:
    """Decode some files; return the rows of the intact ones, their images [B, 3, H, W] uint8, and the broken rows."""

    def load(row: int) -> np.ndarray | ImageError:
        try:
            return load_image(paths[row], size)
        except ImageError as error:
            if extraction.skip_broken:
                return error
            raise

    images = list(in_order(load, rows, workers=extraction.workers))
    broken = {row: image.args[0] for row, image in zip(rows, images, strict=True) if isinstance(image, ImageError)}
    intact = [image for image in images if not isinstance(image, ImageError)]
    pixels = np.stack(intact).transpose(0, 3, 1, 2) if intact else np.empty((0, 3, *size), np.uint8)
    return [row for row in rows if row not in broken], torch.from_numpy(np.ascontiguousarray(pixels)), broken


def require_dual_stream(model: nn.Module) -> nn.Module:
    """Return the model without what wraps it: `torch.compile`, `DataParallel`, `DistributedDataParallel` or timm's EMA.

    Raises:
        ValueError: If it is not one of this package's models, or returns maps instead of features.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            'a scripted or traced model has lost its configuration (image size, mean, std); give the model that it was '
            'made from'
        )
    model = unwrap_model(model)
    if not hasattr(model, 'forward_branches'):
        raise ValueError(
            f'{type(model).__name__} is not a model of vireid_timm, which takes visible and infrared images; create '
            "one with timm.create_model('vireid_...')"
        )
    if model.global_pool.pool_type == '':
        raise ValueError("the model returns maps, not features (global_pool=''); create it with another global_pool")
    return model


def image_size(model: nn.Module, extraction: Extraction) -> tuple[int, int]:
    """Return the height and width that images are resized to: the extraction's, or else the model's own.

    Raises:
        ValueError: The model does not take the three channels that images are read with.
    """
    if model.in_chans != 3:
        raise ValueError(
            f'the model takes images of {model.in_chans} channels (in_chans), but all images, infrared ones too, are '
            'read with 3; create it with in_chans=3'
        )
    return extraction.size or tuple(resolve_model_data_config(model)['input_size'][-2:])


def feature_kind(model: nn.Module, features: str) -> str:
    """Return `after-bn` or `before-bn`: what was asked for, or what the model returns if that is `auto`."""
    return model.retrieval if features == 'auto' else features


def open_store(model: nn.Module, records: Records, extraction: Extraction) -> ImageStore:
    """Open the image store of a table for an extraction. If several ranks run, all of them must make this call.

    Raises:
        ImageError: If an image is broken, unless broken images are skipped.
        OSError: If the store cannot be written.
    """
    return all_ranks(
        lambda: image_store(
            records,
            image_size(model, extraction),
            # Every image is needed once, so a copy of all of them on the device would save nothing.
            cache='disk' if extraction.cache == 'device' else extraction.cache,
            cache_dir=extraction.cache_dir,
            skip_broken=extraction.skip_broken,
            workers=extraction.workers,
            progress=extraction.progress,
        )
    )


def extract(
    model: nn.Module,
    records: Records,
    store: ImageStore,
    store_rows: np.ndarray,
    extraction: Extraction,
    kinds: Sequence[str],
) -> torch.Tensor:
    """Return the features of a table's images, of one or several kinds from a single pass.

    If several ranks run, all of them must make this call. The batches are those of a single process; of n ranks, each
    computes every n-th batch, and all of them get the features of all images.

    Args:
        model: One of this package's models, with or without classifiers. It is left unchanged.
        records: The images, [N].
        store: The store that holds them.
        store_rows: Row of the store for each image, [N].
        extraction: How features are extracted; `kinds` take the place of its `features`.
        kinds: `after-bn`, `before-bn` or both, [K].

    Returns:
        L2-normalised features in the order of `records`, [K, N, D] float32, on the device that computed them. Only
        those of the first kind are sure to be finite.

    Raises:
        ValueError: On an image that cannot be read, features of the first kind that are not finite, ranks with
            different arguments, or a failure of another rank.
    """
    number, count = rank_and_world_size()
    if count > 1:
        _check_agreement(model, records, extraction, kinds)
    batches = _batches(records, extraction.batch_size)[number::count]
    device = extraction.device or next(model.parameters()).device
    tables = torch.zeros(len(kinds), len(records), model.head_hidden_size, device=device)
    all_ranks(lambda: _fill(tables, model, batches, store, store_rows, extraction, kinds))
    if count > 1:
        _gather(tables, [row for _, rows in batches for row in rows.tolist()])

    def finish() -> torch.Tensor:
        # Once at the end: a check after every batch would make the CPU wait for the GPU.
        check_finite(tables[0], records.path)
        if not extraction.centre:
            return tables
        return torch.stack([centred(table, records.modality) for table in tables])

    return all_ranks(finish)


def centred(features: torch.Tensor, modality: np.ndarray) -> torch.Tensor:
    """Subtract each modality's mean feature and normalise again.

    What all images of a modality have in common says nothing about who they show, and keeps the modalities apart.

    Args:
        features: L2-normalised features, [N, D].
        modality: `visible` or `infrared` for each, [N].

    Returns:
        L2-normalised features, [N, D]; 0 where a modality's images all have the same.

    Raises:
        ValueError: A modality has a single image, which would be its own mean.
    """
    result = features.clone()
    for name in np.unique(modality).tolist():
        rows = torch.from_numpy(np.flatnonzero(modality == name)).to(features.device)
        if len(rows) == 1:
            raise ValueError(f'there is one {name} image, which cannot be centred; give more images, or do not centre')
        own = features[rows]
        result[rows] = F.normalize(own - own.double().mean(dim=0).to(own.dtype))
    return result


def views(images: torch.Tensor, flip_test: bool = False, crops: int = 1) -> Iterator[torch.Tensor]:
    """Yield the variants of each image whose normalised features are averaged.

    Five crops are the image and its shifts into the four corners of a black border, as wide as in training: 10 of 288
    pixels in height, 10 of 144 in width. With `flip_test`, the mirror image follows each variant.

    Args:
        images: [B, 3, H, W] float, before normalisation (black is 0).
        flip_test: Whether to add mirror images.
        crops: 1 or 5.

    Yields:
        [B, 3, H, W]; the first is `images` itself.
    """
    high, wide = (max(1, round(side * share)) for side, share in zip(images.shape[2:], CROP_BORDER, strict=True))
    shifts = [(0, 0), (-high, -wide), (-high, wide), (high, -wide), (high, wide)]
    for down, right in shifts[:crops]:
        # Negative padding crops: the image grows at one edge and shrinks by as much at the opposite one.
        view = F.pad(images, (right, -right, down, -down)) if down else images
        yield view
        if flip_test:
            yield view.flip(3)


def check_finite(features: torch.Tensor, paths: Sequence[str]) -> None:
    """Check that all features [N, D] are finite.

    Raises:
        ValueError: If they are not; the message names the first image with such features.
    """
    if not features.numel() or torch.stack(features.aminmax()).isfinite().all():  # one pass over the memory
        return
    broken = (~features.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    raise ValueError(
        f'{paths[broken[0]]}: the features of this image are not finite ({len(broken)} such images among '
        f'{len(paths)}); the weights may have diverged, or overflow in half precision'
    )


def as_tensor(features: torch.Tensor | np.ndarray, name: str) -> torch.Tensor:
    """Return features as a tensor, float32 or better, without their graph; an array shares its memory if it can.

    Raises:
        ValueError: They are not floating point.
    """
    if not isinstance(features, torch.Tensor):
        features = np.require(features, requirements=['C', 'W'])  # it may be a read-only memory map
        features = torch.from_numpy(features) if features.dtype.kind == 'f' else features
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        raise ValueError(f'{name} must have a floating-point dtype, got {features.dtype}')
    return full_precision(features.detach())


def tracklet_features(features: torch.Tensor, first_rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Average the features of each tracklet's images and normalise the mean.

    Args:
        features: Features of the images, [N, D].
        first_rows: Row of the first image of each image's tracklet, see `Records.first_rows`, [N].

    Returns:
        L2-normalised features of the tracklets, [T, D], and the row of each one's first image, ascending, [T] int64.
    """
    rows, lengths = np.unique(first_rows, return_counts=True)
    order, lengths = (
        torch.from_numpy(values).to(features.device) for values in (np.argsort(first_rows, kind='stable'), lengths)
    )
    # Adds up in the order of the rows, also on a GPU, where index_add would give other bits each time.
    return F.normalize(torch.segment_reduce(features[order], 'mean', lengths=lengths)), rows


def feature_settings(model: nn.Module, extraction: Extraction, tracklets: bool = False) -> dict[str, object]:
    """Return what decides the features of an image, as plain values: a calibration holds for the same ones only.

    The precision is left out: it moves similarities by less than other images of the same kind do.
    """
    return {
        'weights': weights_fingerprint(model, classifiers=False),
        'features': feature_kind(model, extraction.features),
        'flip_test': extraction.flip_test,
        'crops': extraction.crops,
        'centre': extraction.centre,
        'size': list(image_size(model, extraction)),
        'tracklets': tracklets,
    }


def weights_fingerprint(model: nn.Module, classifiers: bool = True) -> str:
    """Return 12 digits of the SHA-256 of the state dict's names, shapes, types and values, on any device.

    Args:
        model: The model.
        classifiers: Whether they count; without them it is the fingerprint of the model with `num_classes=0`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not classifiers and name.endswith('_head.fc.weight'):
            continue
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _as_records(images: Images, modality: str | None) -> tuple[Records, list[Image.Image]]:
    """Return the images as a table, and the images themselves if they are in memory."""
    if isinstance(images, Records):
        if modality is not None:
            raise ValueError(
                f'records have their own modality, but modality={modality!r} was given; to embed some of them, pass '
                'those rows'
            )
        return images, []
    if isinstance(images, (str, Path, Image.Image)):
        raise ValueError(f'embed takes a list of images, got a single one: {images!r}')
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim in (2, 3):
        raise ValueError(f'embed takes a list of images, got a single one of shape {list(images.shape)}')
    if modality not in MODALITIES:
        raise ValueError(f'modality must be one of {", ".join(MODALITIES)} unless records are given, got {modality!r}')
    images = list(images)
    paths = [str(image) for image in images if isinstance(image, (str, Path))]
    if paths and len(paths) < len(images):
        raise ValueError(f'paths and images in memory cannot be mixed, got {len(paths)} paths of {len(images)}')
    pil_images = [] if paths else [_as_pil(image, i) for i, image in enumerate(images)]
    names = paths or [f'image {i}' for i in range(len(images))]
    return Records.from_rows([(name, '', 0, modality, 'test') for name in names]), pil_images


def _as_pil(image: Image.Image | np.ndarray | torch.Tensor, number: int) -> Image.Image:
    """Return an image in memory as a PIL image of mode RGB or L."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = Image.fromarray(_as_array(image, number))
    elif not isinstance(image, Image.Image):
        raise ValueError(f'image {number} is a {type(image).__name__}; pass a path, a PIL image, an array or a tensor')
    if image.mode not in ('RGB', 'L'):
        raise ValueError(
            f'image {number} has mode {image.mode}; PIL images must be RGB or L (8 bits): convert it, or pass its '
            'path, which handles every format'
        )
    if 0 in image.size:
        raise ValueError(_empty(number, image.size[::-1]))
    return image


def _as_array(image: np.ndarray | torch.Tensor, number: int) -> np.ndarray:
    """Return an array or a tensor as [H, W, 3] or [H, W] uint8."""
    shape = list(image.shape)
    if 0 in shape:
        raise ValueError(_empty(number, shape))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # NumPy lacks bfloat16
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3):
        raise ValueError(
            f'image {number} has shape {shape}; arrays must be [H, W, 3] or [H, W], tensors [3, H, W] or [1, H, W]'
        )
    if image.dtype.kind == 'f':
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f'image {number} has values from {image.min():.4g} to {image.max():.4g}; in floating point they must '
                'be from 0 to 1 and not normalised, otherwise uint8'
            )
        image = (255 * image).round().astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(
            f'image {number} has type {image.dtype}; pass uint8, floating point from 0 to 1, or the path of its file'
        )
    return np.ascontiguousarray(image)


def _empty(number: int, shape: Sequence[int]) -> str:
    return f'image {number} is empty ({"x".join(map(str, shape))}); leave it out, or check the box that it was cut by'


def _resized(images: list[Image.Image], size: tuple[int, int]) -> np.ndarray:
    """Return PIL images as an array [N, 3, H, W] uint8, resized as `image_store` does."""
    squashed = [image.convert('RGB').resize((size[1], size[0]), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in squashed])


def _batches(records: Records, batch_size: int) -> list[tuple[str, np.ndarray]]:
    """Return the modality and the rows of every batch. A batch has images of one modality."""
    batches = []
    for modality in MODALITIES:
        rows = np.flatnonzero(records.modality == modality)
        batches += [(modality, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return batches


def _fill(
    tables: torch.Tensor,
    model: nn.Module,
    batches: list[tuple[str, np.ndarray]],
    store: ImageStore,
    store_rows: np.ndarray,
    extraction: Extraction,
    kinds: Sequence[str],
) -> None:
    """Extract the features of the batches into their rows of the tables [K, N, D]."""
    total = sum(len(rows) for _, rows in batches)
    hidden = None if extraction.progress and is_rank_zero() else True  # None shows the bar on a terminal only
    bar = tqdm(total=total, desc='features', unit='img', disable=hidden)
    # Two threads read ahead while the network computes.
    loaded = in_order(store.__getitem__, [store_rows[rows] for _, rows in batches], workers=2)
    with bar, closing(loaded), _inference(model, tables.device):
        for (modality, rows), images in zip(batches, loaded, strict=True):
            try:
                features = _batch_features(model, modality, images, tables.device, extraction, kinds)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f'{len(rows)} images at a time do not fit into the memory of {tables.device}; try a smaller '
                    'batch_size (--batch-size)'
                ) from error
            tables[:, torch.from_numpy(rows).to(tables.device, non_blocking=True)] = features
            bar.update(len(rows))


def _batch_features(
    model: nn.Module,
    modality: str,
    images: torch.Tensor,
    device: torch.device,
    extraction: Extraction,
    kinds: Sequence[str],
) -> torch.Tensor:
    """Return the L2-normalised features [K, B, D] float32 of stored images [B, 3, H, W] uint8."""
    if device.type == 'cuda':  # the copy from pinned memory does not wait for the previous batch
        images = images.pin_memory()
    images = images.to(device, non_blocking=True).float() / 255
    config = resolve_model_data_config(model)
    amp, dtype = extraction.amp_dtype, next(model.parameters()).dtype
    outputs = {'after-bn': model.forward_neck, 'before-bn': model.forward_pool}
    total = 0
    for view in views(images, extraction.flip_test, extraction.crops):
        view = normalize(view, config['mean'], config['std']).to(dtype)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            joint_map = model.forward_features(**{modality: view})
            features = torch.stack([outputs[kind](joint_map).float() for kind in kinds])
        total = total + F.normalize(features, dim=2)
    return F.normalize(total, dim=2)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        # Module by module: `model.train()` would also switch those that the caller keeps in evaluation mode.
        for module, training in modes.items():
            module.training = training


@contextmanager
def _inference(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run without gradients, in evaluation mode, on a device; restore the model afterwards."""
    home = next(model.parameters()).device
    with evaluation_mode(model):
        try:
            model.to(device)
            with torch.inference_mode():
                yield
        finally:
            model.to(home)


def _check_agreement(model: nn.Module, records: Records, extraction: Extraction, kinds: Sequence[str]) -> None:
    """Check that all ranks were given the same arguments, or their features would not belong together."""
    images = '\n'.join([*records.path.tolist(), *records.modality.tolist()])
    number, count = rank_and_world_size()
    own = {
        'weights': weights_fingerprint(model),
        'images': hashlib.sha256(images.encode('utf-8', 'surrogatepass')).hexdigest(),
        'features': list(kinds),
        'flip_test': extraction.flip_test,
        'crops': extraction.crops,
        'centre': extraction.centre,
        'size': image_size(model, extraction),
        'batch_size': extraction.batch_size,
        'amp_dtype': str(extraction.amp_dtype),
    }
    everyone = [own] * count
    distributed.all_gather_object(everyone, own)
    differing = [name for name, value in own.items() if any(other[name] != value for other in everyone)]
    if differing:
        raise ValueError(
            f'the {count} ranks were given different {", ".join(differing)} to extract features with; give all of them '
            'the same arguments, and the same seed if weights are random'
        )


def _gather(tables: torch.Tensor, rows: list[int]) -> None:
    """Complete tables [K, N, D] on every rank. This rank has filled the given rows and left zeros in the others.

    Adding zeros changes no value, and a sum needs no memory for a second copy.
    """
    filled = torch.bincount(torch.tensor(rows, dtype=torch.int64), minlength=tables.shape[1]).to(tables.device)
    distributed.all_reduce(filled)
    distributed.all_reduce(tables)
    wrong = (filled != 1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f'the ranks extracted row {wrong[0]} {int(filled[wrong[0]])} times ({len(wrong)} such rows of '
            f'{tables.shape[1]}); every row must be extracted exactly once'
        )
