"""From a model and a dataset to numbers that can be compared: features once, then every protocol and trial."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn
from tqdm import tqdm

from .augment import normalize
from .files import save_json
from .metrics import RankMetrics, bootstrap_interval, rank_metrics
from .pictures import PictureStore, in_order, picture_store
from .protocols import protocol_of, protocol_trials, protocols_of
from .records import MODALITIES, Dataset, Records

FEATURES = ('after-bn', 'before-bn')
RANKS = (1, 5, 10, 20)
METRICS = (*(f'rank{k}' for k in RANKS), 'mAP', 'mINP')

Pictures = Records | Sequence[str | Path | Image.Image]


@dataclass(frozen=True)
class ProtocolResult:
    """What one protocol measured.

    Attributes:
        direction: Who searched for whom, e.g. `infrared to visible`.
        draw: How the trials' pictures were drawn; None where every picture took part.
        per_identity_cmc: Whether the ranks count distinct identities rather than pictures.
        num_queries: Query pictures of a trial.
        num_valid_queries: Those with a match in the gallery; the metrics are means over them.
        gallery_size: Gallery pictures of a trial.
        mean: Mean over the trials of `rank1`, `rank5`, `rank10`, `rank20`, `mAP` and `mINP`, as fractions.
        std: Standard deviation over the trials (NumPy's, by the number of trials); 0 for a single one.
        mAP_interval: 95 % bootstrap interval of mAP over the queries, each at the mean of its trials.
        trials: The same metrics, trial by trial.
    """

    direction: str
    draw: str | None
    per_identity_cmc: bool
    num_queries: int
    num_valid_queries: int
    gallery_size: int
    mean: dict[str, float]
    std: dict[str, float]
    mAP_interval: tuple[float, float]
    trials: list[dict[str, float]]


@dataclass(frozen=True)
class Report:
    """Results, and everything that changes them. Prints as a table in percent; `report[protocol]` is one result.

    Attributes:
        dataset: The dataset's name.
        options: The dataset's options as resolved (RegDB's trial, SynthVI's seed, ...).
        protocols: Protocol name -> its result.
        model: Architecture; empty where features came from elsewhere, as for the fields below.
        weights: Fingerprint of the weights, see `weights_fingerprint`.
        features: `after-bn` or `before-bn`.
        size: Height and width that pictures were resized to.
        precision: What the network computed in, e.g. `float32`.
        skipped_pictures: Broken test pictures that were left out.
        versions: Version of every package that takes part.
    """

    dataset: str
    options: dict[str, object]
    protocols: dict[str, ProtocolResult]
    model: str = ''
    weights: str = ''
    features: str = ''
    size: tuple[int, int] | None = None
    precision: str = ''
    skipped_pictures: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, protocol: str) -> ProtocolResult:
        return self.protocols[protocol]

    def __str__(self) -> str:
        return '\n'.join([*_heading(self), '', *_table(self), *_notes(self)])

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        save_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> 'Report':
        """Read what `save` wrote.

        Raises:
            ValueError: If the file holds no report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding='utf-8'))
            results = {
                name: ProtocolResult(**{**result, 'mAP_interval': tuple(result['mAP_interval'])})
                for name, result in values['protocols'].items()
            }
            size = values['size'] and tuple(values['size'])
            return cls(**{**values, 'protocols': results, 'size': size})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path} is no report that `vireid eval --report` wrote ({error!r})') from error


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
    features: str = 'after-bn',
    size: tuple[int, int] | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    cache: str = 'disk',
    cache_dir: str | Path | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Evaluate a model on a dataset's test pictures: features once, then every protocol with all its trials.

    The model is left as it was: on its device, every module in the mode that it was in.

    Args:
        model: One of this package's models, with or without classifiers.
        dataset: As `create_dataset` returns it.
        protocol: A name or several of `protocols_of(dataset)`; None for all of them.
        draw: How protocols that draw pictures do so, see `protocol_trials`.
        features: `after-bn` (behind the BN-neck, what the model returns) or `before-bn`.
        size: Height and width that pictures are resized to; None for the model's own.
        batch_size: Pictures per forward pass.
        device: Where to compute; None where the model is.
        amp_dtype: Type that autocast computes in; None for full precision.
        cache: Where decoded pictures are kept, see `picture_store`.
        cache_dir: Folder of the disk cache.
        skip_broken: Leave unreadable pictures out, and count them, rather than stop.
        workers: Pictures decoded at a time; None for one per core.
        progress: Show progress bars, if the output is a terminal.

    Raises:
        ValueError: On an unknown protocol, draw or kind of features, on data that the protocol cannot use, on a picture
            that cannot be read, or on features that are not finite.
    """
    # Everything that can be wrong without looking at a picture is found before the first one is decoded.
    _check_request(model, features, batch_size)
    names = _protocol_names(dataset, protocol)
    rows = _rows_of_trials(dataset, names, draw)
    size = _size_of(model) if size is None else size
    # The store holds the whole table, so that every choice of protocols shares it.
    store = picture_store(
        dataset.test,
        size,
        cache=cache,
        cache_dir=cache_dir,
        skip_broken=skip_broken,
        workers=workers,
        progress=progress,
    )
    intact = store.intact()
    if store.broken:
        dataset = dataclasses.replace(dataset, test=dataset.test[intact])
        rows = _rows_of_trials(dataset, names, draw)
    # A row that no trial needs keeps NaN, which `evaluate_features` would refuse.
    table = torch.full((len(dataset.test), model.num_features), float('nan'))
    table[rows] = _extract(
        model,
        dataset.test[rows],
        store,
        intact[rows],
        features=features,
        batch_size=batch_size,
        device=device,
        amp_dtype=amp_dtype,
        progress=progress,
    )
    report = evaluate_features(table, dataset, names, draw=draw)
    return dataclasses.replace(
        report,
        model=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        weights=weights_fingerprint(model),
        features=features,
        size=(int(size[0]), int(size[1])),
        precision=str(amp_dtype or next(model.parameters()).dtype).removeprefix('torch.'),
        skipped_pictures=len(store.broken),
    )


def evaluate_features(
    features: torch.Tensor | np.ndarray,
    dataset: Dataset,
    protocol: str | Sequence[str] | None = None,
    *,
    draw: str = 'seeded',
) -> Report:
    """The second half of `evaluate`: from features, wherever they come from, to a report.

    Args:
        features: One row per row of `dataset.test`, compared by inner product: for cosine similarity they have to be
            L2-normalised, as those of `embed` are, [N, D]. Rows that no trial of the protocols needs may hold anything.
        dataset: As `create_dataset` returns it.
        protocol: A name or several of `protocols_of(dataset)`; None for all of them.
        draw: How protocols that draw pictures do so, see `protocol_trials`.

    Raises:
        ValueError: On features that do not fit the dataset or are not finite, on an unknown protocol or draw, or on
            data that the protocol cannot use.
    """
    if isinstance(features, np.ndarray):
        features = torch.from_numpy(np.require(features, requirements=['C', 'W']))  # a read-only map is legal too
    features = features.detach().cpu()
    if features.ndim != 2 or len(features) != len(dataset.test) or not features.is_floating_point():
        raise ValueError(
            f'features must be floating point [{len(dataset.test)}, D], one row per test picture of {dataset.name}, '
            f'got {features.dtype} {list(features.shape)}'
        )
    features = features if features.dtype == torch.float64 else features.float()
    names = _protocol_names(dataset, protocol)
    rows = _rows_of_trials(dataset, names, draw)
    _check_features(features[rows], dataset.test.path[rows])
    return Report(
        dataset=dataset.name,
        options=json.loads(json.dumps(dataset.options, default=str)),  # as they will be read back
        protocols={name: _evaluate_protocol(features, dataset, name, draw) for name in names},
        versions=_versions(),
    )


def embed(
    model: nn.Module,
    pictures: Pictures,
    modality: str | None = None,
    *,
    features: str = 'after-bn',
    size: tuple[int, int] | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    cache: str = 'off',
    cache_dir: str | Path | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> tuple[torch.Tensor, list[str] | list[int]]:
    """Features of pictures, ready to be compared by inner product.

    The model is left as it was: on its device, every module in the mode that it was in.

    Args:
        model: One of this package's models, with or without classifiers.
        pictures: A record table, paths, or PIL pictures of mode RGB or L (taken as they are, resized only).
        modality: Of paths and PIL pictures, `visible` or `infrared`; records know their own.
        features: `after-bn` (behind the BN-neck, what the model returns) or `before-bn`.
        size: Height and width that pictures are resized to; None for the model's own.
        batch_size: Pictures per forward pass.
        device: Where to compute; None where the model is.
        amp_dtype: Type that autocast computes in; None for full precision.
        cache: Where decoded pictures are kept, see `picture_store`.
        cache_dir: Folder of the disk cache.
        skip_broken: Leave unreadable pictures out rather than stop.
        workers: Pictures decoded at a time; None for one per core.
        progress: Show progress bars, if the output is a terminal.

    Returns:
        L2-normalised features on the CPU, [N, D] float32, and what each row shows: its path, or for PIL pictures its
        place in `pictures`. Rows come in the order of `pictures`; only pictures that were skipped are missing.

    Raises:
        ValueError: On a missing or unknown modality, an unknown kind of features, a picture that cannot be read, or
            features that are not finite; the message names the picture.
    """
    _check_request(model, features, batch_size)
    records, images = _as_records(pictures, modality)
    size = _size_of(model) if size is None else size
    if images:
        store = PictureStore(records.path, size, _resized(images, size), {})
    else:
        store = picture_store(
            records, size, cache=cache, cache_dir=cache_dir, skip_broken=skip_broken, workers=workers, progress=progress
        )
    rows = store.intact()
    table = _extract(
        model,
        records[rows],
        store,
        rows,
        features=features,
        batch_size=batch_size,
        device=device,
        amp_dtype=amp_dtype,
        progress=progress,
    )
    return table, rows.tolist() if images else records.path[rows].tolist()


def weights_fingerprint(model: nn.Module) -> str:
    """First 12 digits of the SHA-256 over names, shapes, types and values of the state dict, whatever its device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _protocol_names(dataset: Dataset, protocol: str | Sequence[str] | None) -> list[str]:
    names = [protocol] if isinstance(protocol, str) else list(protocols_of(dataset) if protocol is None else protocol)
    if not names:
        raise ValueError(
            f'{dataset.name} has no test pictures that one modality could search for among the other'
            if protocol is None
            else f'no protocol to evaluate; available for {dataset.name}: {", ".join(protocols_of(dataset))}'
        )
    return list(dict.fromkeys(names))


def _rows_of_trials(dataset: Dataset, protocols: Sequence[str], draw: str) -> np.ndarray:
    """Rows of the test table that any trial of the protocols needs, each once, sorted."""
    rows = [np.empty(0, dtype=np.int64)]
    for protocol in protocols:
        for trial in protocol_trials(dataset, protocol, draw):
            rows += [trial.query, trial.gallery]
    return np.unique(np.concatenate(rows))


def _evaluate_protocol(features: torch.Tensor, dataset: Dataset, protocol: str, draw: str) -> ProtocolResult:
    rule = protocol_of(dataset, protocol)
    trials = protocol_trials(dataset, protocol, draw)
    _, identities = np.unique(dataset.test.identity, return_inverse=True)
    results = []
    precision, count = np.zeros(len(dataset.test)), np.zeros(len(dataset.test), dtype=np.int64)
    for trial in trials:
        similarity = features[trial.query] @ features[trial.gallery].T
        result = rank_metrics(
            similarity,
            identities[trial.query],
            identities[trial.gallery],
            ignore=trial.ignore,
            per_identity_cmc=rule.per_identity_cmc,
            max_rank=max(RANKS),
        )
        results.append(result)
        precision[trial.query[result.valid]] += result.ap[result.valid]
        count[trial.query[result.valid]] += 1
    values = [_metric_values(result) for result in results]
    return ProtocolResult(
        direction=rule.direction,
        draw=None if rule.shots is None else draw,
        per_identity_cmc=rule.per_identity_cmc,
        num_queries=len(trials[0].query),
        num_valid_queries=results[0].num_valid_queries,
        gallery_size=len(trials[0].gallery),
        mean={name: float(np.mean([value[name] for value in values])) for name in METRICS},
        std={name: float(np.std([value[name] for value in values])) for name in METRICS},
        mAP_interval=bootstrap_interval(precision[count > 0] / count[count > 0]),
        trials=values,
    )


def _metric_values(result: RankMetrics) -> dict[str, float]:
    ranks = {f'rank{k}': float(result.cmc[k - 1]) for k in RANKS}
    return {**ranks, 'mAP': result.mAP, 'mINP': result.mINP}


def _size_of(model: nn.Module) -> tuple[int, int]:
    return tuple(resolve_model_data_config(model)['input_size'][-2:])


def _as_records(pictures: Pictures, modality: str | None) -> tuple[Records, list[Image.Image]]:
    """The pictures as a table, and themselves if they are PIL pictures."""
    if isinstance(pictures, Records):
        if modality is not None:
            raise ValueError(f'records know their modality; embed some of them by their rows, not with {modality!r}')
        return pictures, []
    if isinstance(pictures, (str, Path, Image.Image)):
        raise ValueError(f'embed takes a list of pictures, got the single {pictures!r}')
    if modality not in MODALITIES:
        raise ValueError(f'modality must be one of {", ".join(MODALITIES)} unless records are given, got {modality!r}')
    pictures = list(pictures)
    images = [picture for picture in pictures if isinstance(picture, Image.Image)]
    if images and len(images) < len(pictures):
        raise ValueError(f'paths and PIL pictures cannot be mixed, got {len(images)} PIL pictures of {len(pictures)}')
    names = [f'picture {i}' for i in range(len(images))] or [str(path) for path in pictures]
    return Records.from_rows([(name, '', 0, modality, 'test') for name in names]), images


def _resized(images: list[Image.Image], size: tuple[int, int]) -> np.ndarray:
    """PIL pictures as bytes [N, H, W, 3], resized as `picture_store` does."""
    for i, image in enumerate(images):
        if image.mode not in ('RGB', 'L'):
            raise ValueError(
                f'picture {i} has mode {image.mode}; PIL pictures must be RGB or L (8 bits): convert it, or give its '
                'path instead, which is read with all that its format needs'
            )
    squashed = [image.convert('RGB').resize((size[1], size[0]), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in squashed])


def _check_request(model: nn.Module, features: str, batch_size: int) -> None:
    if not hasattr(model, 'forward_branches'):
        raise ValueError(
            f'{type(model).__name__} is none of the models of vireid_timm, which take visible and infrared pictures; '
            "create one with timm.create_model('vireid_...')"
        )
    if features not in FEATURES:
        raise ValueError(f'unknown features {features!r}; expected one of {", ".join(FEATURES)}')
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')


def _extract(
    model: nn.Module,
    records: Records,
    store: PictureStore,
    store_rows: np.ndarray,
    *,
    features: str,
    batch_size: int,
    device: torch.device | str | None,
    amp_dtype: torch.dtype | None,
    progress: bool,
) -> torch.Tensor:
    """L2-normalised features of the records, [N, D]; record i is row `store_rows[i]` of the store."""
    table = torch.empty(len(records), model.num_features)
    config = resolve_model_data_config(model)
    bar = tqdm(total=len(records), desc='features', unit='pic', disable=None if progress else True)
    with bar, _inference(model, device) as like:
        for modality in MODALITIES:
            rows = np.flatnonzero(records.modality == modality)
            batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            # Two threads read ahead while the network computes.
            loaded = in_order(store.__getitem__, [store_rows[batch] for batch in batches], workers=2)
            with closing(loaded):
                for batch, pixels in zip(batches, loaded):
                    pictures = torch.from_numpy(pixels).to(like.device).permute(0, 3, 1, 2).float() / 255
                    pictures = normalize(pictures, config['mean'], config['std']).to(like.dtype)
                    with torch.autocast(like.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                        output = _forward(model, modality, pictures, features)
                    output = output.float().cpu()
                    _check_features(output, records.path[batch])
                    table[batch] = F.normalize(output)
                    bar.update(len(batch))
    return table


def _forward(model: nn.Module, modality: str, pictures: torch.Tensor, features: str) -> torch.Tensor:
    if features == 'before-bn':
        return model.forward_branches(**{modality: pictures}).features
    if model.num_classes == 0:
        return model(**{modality: pictures})
    return model.forward_head(model.forward_features(**{modality: pictures}), pre_logits=True)


@contextmanager
def _inference(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.Tensor]:
    """No gradients, evaluation mode, on a device; afterwards everything as it was. Gives a parameter to follow."""
    modes = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    try:
        model.eval().to(device or home)
        with torch.inference_mode():
            yield next(model.parameters())
    finally:
        model.to(home)
        # Module by module: `model.train()` would also wake those that the caller keeps in evaluation mode.
        for module, training in modes.items():
            module.training = training


def _check_features(features: torch.Tensor, paths: Sequence[str]) -> None:
    finite = features.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first = paths[int((~finite).int().argmax())]
        raise ValueError(
            f'{first}: the features of this picture are not finite ({int((~finite).sum())} such pictures among '
            f'{len(paths)}); the weights may have diverged, or half precision may be too narrow for them'
        )


def _versions() -> dict[str, str]:
    from . import __version__  # defined by the package that imports this module

    return {
        'vireid_timm': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'numpy': np.__version__,
    }


def _heading(report: Report) -> list[str]:
    options = ', '.join(f'{name}={value}' for name, value in report.options.items())
    lines = [f'{report.dataset} ({options})' if options else report.dataset]
    if report.model:
        height, width = report.size
        lines.append(
            f'{report.model}, weights {report.weights}, features {report.features}, pictures {height}x{width}, '
            f'{report.precision}'
        )
    if report.skipped_pictures:
        lines.append(f'{report.skipped_pictures} broken pictures left out')
    lines.append(', '.join(f'{name} {version}' for name, version in report.versions.items()))
    return lines


def _table(report: Report) -> list[str]:
    """Aligned columns; the deviation over several trials stands below the mean."""
    rows = [['protocol', 'trials', 'queries', 'gallery', *(f'R{k}' for k in RANKS), 'mAP', 'mINP', 'mAP 95 %']]
    for name, result in report.protocols.items():
        queries = str(result.num_queries)
        if result.num_valid_queries < result.num_queries:
            queries = f'{result.num_valid_queries} of {result.num_queries}'
        trials = f'{len(result.trials)} {result.draw or ""}'.strip()
        low, high = result.mAP_interval
        means = [f'{100 * result.mean[metric]:.2f}' for metric in METRICS]
        rows.append([name, trials, queries, str(result.gallery_size), *means, f'{100 * low:.2f} to {100 * high:.2f}'])
        if len(result.trials) > 1:
            rows.append(['', '', '', 'std', *(f'{100 * result.std[metric]:.2f}' for metric in METRICS), ''])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        '  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def _notes(report: Report) -> list[str]:
    per_identity = [name for name, result in report.protocols.items() if result.per_identity_cmc]
    return [f'R1 to R20 count distinct identities: {", ".join(per_identity)}'] if per_identity else []
