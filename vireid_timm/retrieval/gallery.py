"""A gallery: a model and the index of the images that it searches."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from ..constants import MODALITIES
from ..data.findings import Findings
from ..data.listing import ListedImage, listed_image, normalized_time
from ..device import resolve_device
from ..evaluation.calibration import Calibration
from ..evaluation.features import (
    Extraction,
    as_tensor,
    centred,
    check_finite,
    embed,
    embed_batches,
    feature_kind,
    image_size,
    require_dual_stream,
    weights_fingerprint,
)
from ..hub.folder import load_model, model_calibration
from ..options import check_range
from .index import About, Changed, Index, View
from .search import exact_search, mean_features

_logger = logging.getLogger(__name__)

FEWEST_TO_CENTRE = 16  # queries; the mean of fewer says more about these people than about their modality
_PER_IDENTITY = 8  # images looked at for each identity that is asked for, before another pass over the gallery

Query = str | Path | Image.Image | np.ndarray | torch.Tensor
Hit = tuple[tuple, float]  # path, camera, time and identity of an image; its similarity


class Match(NamedTuple):
    """A gallery image that was found.

    Attributes:
        path: Its file.
        camera: Number or name of its camera, None if unknown.
        time: When it was taken, in ISO 8601, None if unknown.
        identity: Name of the person, None if unknown.
        similarity: Inner product of its features with the query's.
        probability: That it shows the query's person; None if the model is not calibrated.
    """

    path: str
    camera: int | str | None
    time: str | None
    identity: str | None
    similarity: float
    probability: float | None


class Answer(NamedTuple):
    """What was found for a query.

    Attributes:
        query: Its path; `query 3` for an image in memory or features.
        nobody: Probability that the query's person is not in the gallery; None if the model is not calibrated.
        results: The most similar images, best first.
    """

    query: str
    nobody: float | None
    results: list[Match]


class Gallery:
    """Images of one modality that can be searched, in an index on disk.

    Threads may share a gallery: one may add images while others search. What was added or removed is found by this
    object at once, and by other processes after `save`. Until then, others cannot write the index.

    ```python
    gallery = vireid_timm.Gallery.create('index', 'vireid_dml_r10t.synthvi', 'visible')
    gallery.add(['a.jpg', 'b.jpg'], cameras=[1, 2])
    gallery.save()
    for match in gallery.search(['night.jpg'], 'infrared', top=5)[0].results:
        print(match.path, match.similarity)
    ```
    """

    def __init__(self, index: Index, model: nn.Module | None, device: torch.device, batch_size: int) -> None:
        """Use `open` or `create`."""
        self.index = index
        self._model = model  # loaded when it is first needed
        self._device = device
        self._batch_size = batch_size
        self._computing = threading.RLock()

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        *,
        model: str | Path | nn.Module | None = None,
        device: str = 'cuda',
        batch_size: int = 128,
    ) -> 'Gallery':
        """Open the gallery in an index folder.

        Args:
            folder: The index.
            model: The model, if the index has been made by one in memory, or if its folder has moved.
            device: Where to compute; falls back to the CPU.
            batch_size: Images per forward pass.

        Raises:
            FileNotFoundError: There is no index.
            ValueError: It is damaged, or the model has other weights than the one that made it.
        """
        check_range('batch_size', batch_size, 1)
        gallery = cls(Index(folder), None, resolve_device(device), batch_size)
        if model is not None:
            gallery._model = gallery._checked(model)
        return gallery

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        model: str | Path | nn.Module,
        modality: str,
        *,
        size: tuple[int, int] | None = None,
        features: str = 'auto',
        device: str = 'cuda',
        batch_size: int = 128,
    ) -> 'Gallery':
        """Make an empty gallery.

        Args:
            folder: Where to write its index.
            model: Any name that `load_model` takes, or a model in memory, which `open` has to be given again.
            modality: Modality of its images, `visible` or `infrared`.
            size: Height and width that images are resized to; None for the model's own.
            features: `after-bn`, `before-bn` or `auto`: those that the model returns.
            device: Where to compute; falls back to the CPU.
            batch_size: Images per forward pass.

        Raises:
            FileExistsError: The folder holds an index.
            ValueError: It holds other files, or an argument is wrong.
        """
        check_range('batch_size', batch_size, 1)
        where = resolve_device(device)
        network, source = loaded(model, where)
        index = Index.create(folder, describe(network, source, modality, size, features))
        return cls(index, network, where, batch_size)

    def __len__(self) -> int:
        return len(self.index)

    def add(
        self,
        paths: Sequence[str | os.PathLike],
        *,
        cameras: Sequence[int | str | None] | None = None,
        times: Sequence[str | None] | None = None,
        identities: Sequence[str | None] | None = None,
        features: torch.Tensor | np.ndarray | None = None,
        skip_broken: bool = False,
    ) -> int:
        """Add images; one whose path is in the gallery already is replaced.

        Args:
            paths: Their files, [N].
            cameras: Number or name of each camera.
            times: When each was taken, in ISO 8601.
            identities: Name of each person.
            features: L2-normalised features [N, D] computed before, e.g. by `embed`; None to read the files.
            skip_broken: Leave out images that cannot be read, with a warning, instead of raising.

        Returns:
            How many images were added.

        Raises:
            ValueError: An image cannot be read, a time is not ISO 8601, columns have different lengths, or another
                process is writing the index.
        """
        images = _listed(paths, cameras, times, identities)
        if features is not None:
            self.index.append(images, self._checked_features(features, len(images)).numpy())
            return len(images)
        added, broken = 0, []
        for rows, table, problems in self._batches([image.path for image in images], self.modality, skip_broken):
            self.index.append([images[row] for row in rows], table.numpy())
            added += len(rows)
            broken += problems.values()
        Findings().add('broken-image', 'images cannot be read and are left out', broken)
        return added

    def remove(self, paths: Iterable[str | os.PathLike]) -> int:
        """Remove images by their paths; return how many of them were in the gallery."""
        return self.index.remove(os.path.abspath(path) for path in paths)

    def save(self) -> None:
        """Make what was added and removed durable and visible to other processes, all at once.

        Raises:
            OSError: It cannot be written; the index is as it was.
        """
        self.index.commit()

    def close(self) -> None:
        """Discard what was not saved, and let other processes write."""
        self.index.close()

    def search(
        self,
        queries: Sequence[Query | Sequence[Query]],
        modality: str,
        *,
        top: int = 10,
        where: str | None = None,
        by_identity: bool = False,
        centre: bool = False,
        skip_broken: bool = False,
    ) -> list[Answer]:
        """Return the gallery images that are most similar to each query.

        Args:
            queries: Images as `embed` takes them, paths or in memory. A list among them is a tracklet, one query of
                several images: their features are averaged and normalised again.
            modality: Modality of the queries, `visible` or `infrared`.
            top: Number of results.
            where: SQL expression over `path`, `camera`, `time` and `identity` that results have to satisfy, such as
                `camera != 3 and time > '2026-11-01T22:00'`.
            by_identity: Return one result per identity, its best image. An image without identity stands for itself.
            centre: Subtract the mean of the queries' features from each query, and the gallery's mean from each of its
                images. Probabilities are None then, unless the calibration was fitted that way.
            skip_broken: Leave out queries that cannot be read, with a warning, instead of raising.

        Raises:
            ValueError: On a wrong expression or argument, or an image that cannot be read.
        """
        names, features, lengths = self._embed(queries, modality, skip_broken)
        options = dict(top=top, where=where, by_identity=by_identity, centre=centre)
        answers = self.search_features(features, modality, **options)
        # Averaged features are more similar to everything than those that the calibration was fitted to.
        return [
            answer._replace(query=name) if length == 1 else _without_probabilities(answer)._replace(query=name)
            for answer, name, length in zip(answers, names, lengths, strict=True)
        ]

    def search_features(
        self,
        features: torch.Tensor | np.ndarray,
        modality: str,
        *,
        top: int = 10,
        where: str | None = None,
        by_identity: bool = False,
        centre: bool = False,
    ) -> list[Answer]:
        """Search by L2-normalised features of queries [Q, D], as `embed` returns them; other arguments as `search`."""
        _check_modality(modality)
        check_range('top', top, 1)
        queries = self._checked_features(features).to(self._device)
        if centre and len(queries) < FEWEST_TO_CENTRE:
            raise ValueError(
                f'centring takes the mean of the queries, and {len(queries)} are too few: give at least '
                f'{FEWEST_TO_CENTRE}, or leave it out'
            )
        mean = None
        if centre:
            queries = centred(queries, np.full(len(queries), modality))
            view = self.index.view()
            mean = mean_features(torch.from_numpy(view.features), torch.from_numpy(view.rows)).to(queries.device)
        while True:
            view = self.index.view(where)
            try:
                found = self._find(queries, view, top, by_identity, mean)
            except Changed:
                continue
            calibration = self._calibration(modality, centre)
            people = None if calibration is None else self.index.images_per_person(where)
            return _answers(found, len(view.rows), calibration, people)

    @property
    def modality(self) -> str:
        """Modality of the images."""
        return self.index.about.modality

    def _find(
        self, queries: torch.Tensor, view: View, top: int, by_identity: bool, mean: torch.Tensor | None
    ) -> list[list[Hit]]:
        """Return what is found for each query, best first; raise `Changed` if the index has changed meanwhile."""
        if not by_identity:
            return self._nearest(queries, view, top, mean)
        count = _PER_IDENTITY * top
        results = []
        for query, hits in zip(queries, self._nearest(queries, view, count, mean), strict=True):
            best, remaining = _best_of_identities(hits), view
            while len(best) < top and len(hits) == count:  # again, without the identities found so far
                seen = self.index.rows_like([image for image, _ in hits])
                remaining = remaining._replace(rows=np.setdiff1d(remaining.rows, seen, assume_unique=True))
                (hits,) = self._nearest(query[None], remaining, count, mean)
                best += _best_of_identities(hits)
            results.append(best[:top])
        return results

    def _nearest(self, queries: torch.Tensor, view: View, count: int, mean: torch.Tensor | None) -> list[list[Hit]]:
        gallery, rows = torch.from_numpy(view.features), torch.from_numpy(view.rows)
        compressed = None if mean is not None else self.index.candidates(view)
        if compressed is None:
            found = exact_search(queries, gallery, count, rows, mean)
        else:
            found = compressed.nearest(queries, gallery, count, rows)
        images = self.index.images(view, found.rows.cpu().numpy())
        columns = zip(found.rows.tolist(), found.similarity.tolist(), strict=True)
        return [[(images[row], value) for row, value in zip(*pair, strict=True)] for pair in columns]

    def _calibration(self, modality: str, centre: bool) -> Calibration | None:
        """Return the calibration if it holds for such queries."""
        about = self.index.about
        if about.calibration is None or modality == about.modality:
            return None
        try:
            calibration = Calibration.from_dict(about.calibration)
        except ValueError as error:  # of another version
            _logger.warning(f'{self.index.folder}: the calibration in it cannot be read; index again ({error})')
            return None
        settings = {name: getattr(about, name) for name in ('weights', 'features')}
        settings |= {'size': list(about.size), 'flip_test': False, 'crops': 1, 'centre': centre, 'tracklets': False}
        differing = calibration.mismatch(settings)
        if differing:
            _logger.warning(f'Probabilities are left out: the calibration was fitted with another {differing}')
        return None if differing else calibration

    def _embed(
        self, queries: Sequence[Query | Sequence[Query]], modality: str, skip_broken: bool
    ) -> tuple[list[str], torch.Tensor, list[int]]:
        """Return the names of the queries, their features [Q, D], and of how many images each was averaged."""
        _check_modality(modality)
        if isinstance(queries, (str, Path, Image.Image)):
            raise ValueError(f'expected a list of queries, got a single one: {queries!r}')
        groups = [list(query) if isinstance(query, (list, tuple)) else [query] for query in queries]
        if [] in groups:
            raise ValueError(f'query {groups.index([])} is a tracklet without images')
        table, intact = self._query_features([image for group in groups for image in group], modality, skip_broken)
        names, features, lengths, first = [], [], [], 0
        for number, group in enumerate(groups):
            rows = [row for row in range(first, first + len(group)) if intact[row]]
            first += len(group)
            if rows:
                names.append(str(group[0]) if isinstance(group[0], (str, Path)) else f'query {number}')
                features.append(table[rows[0]] if len(rows) == 1 else F.normalize(table[rows].mean(dim=0), dim=0))
                lengths.append(len(rows))
        return names, torch.stack(features) if features else table[:0], lengths

    def _query_features(self, images: list[Query], modality: str, skip_broken: bool) -> tuple[torch.Tensor, list[bool]]:
        """Return the features of images [N, D], and which of them could be read."""
        if not all(isinstance(image, (str, Path)) for image in images):
            about = self.index.about
            with self._computing:
                model = self.network()
                options = dict(size=about.size, features=about.features, batch_size=self._batch_size)
                return embed(model, images, modality, **options)[0], [True] * len(images)
        table = torch.zeros(len(images), self.index.about.dimensions)
        intact = [True] * len(images)
        broken = []
        for rows, features, problems in self._batches([str(image) for image in images], modality, skip_broken):
            table[rows] = features
            broken += problems.values()
            for row in problems:
                intact[row] = False
        Findings().add('broken-image', 'queries cannot be read and are left out', broken)
        return table, intact

    def _batches(
        self, paths: list[str], modality: str, skip_broken: bool
    ) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
        """Compute features as `embed_batches` does."""
        about = self.index.about
        options = dict(size=about.size, features=about.features, batch_size=self._batch_size)
        extraction = Extraction(device=self._device, cache='off', skip_broken=skip_broken, **options)
        with closing(embed_batches(self.network(), paths, modality, extraction)) as batches:
            while True:
                with self._computing:  # threads take turns batch by batch
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def network(self) -> nn.Module:
        """Return the model, loaded when it is first needed."""
        with self._computing:
            if self._model is None:
                if self.index.about.model is None:
                    raise ValueError(
                        f'the index {self.index.folder} was made by a model in memory; open it with model=...'
                    )
                self._model = self._checked(self.index.about.model)
            return self._model

    def _checked(self, model: str | Path | nn.Module) -> nn.Module:
        """Load a model, and check that it has made the index."""
        network, source = loaded(model, self._device)
        about = self.index.about
        check_same(self.index, describe(network, source, about.modality, about.size, about.features))
        return network

    def _checked_features(self, features: torch.Tensor | np.ndarray, count: int | None = None) -> torch.Tensor:
        table = as_tensor(features, 'features').float()
        width = self.index.about.dimensions
        if table.ndim != 2 or table.shape[1] != width or count not in (None, len(table)):
            wanted = 'Q' if count is None else count
            raise ValueError(f'expected features [{wanted}, {width}], got {list(table.shape)}')
        check_finite(table, [f'features {row}' for row in range(len(table))])
        return table.cpu() if count is not None else table


def _check_modality(modality: str) -> None:
    if modality not in MODALITIES:
        raise ValueError(f'the modality of the queries must be one of {", ".join(MODALITIES)}, got {modality!r}')


def _answers(
    found: list[list[Hit]], gallery_size: int, calibration: Calibration | None, images_per_person: float | None
) -> list[Answer]:
    answers = []
    for number, results in enumerate(found):
        similarity = torch.tensor([value for _, value in results])
        probabilities, nobody = [None] * len(results), None
        if calibration is not None and results:
            probabilities = calibration.probability(similarity, gallery_size, images_per_person).tolist()
            nobody = calibration.nobody(similarity[:1], gallery_size).item()
        matches = [Match(*image, value, odds) for (image, value), odds in zip(results, probabilities, strict=True)]
        answers.append(Answer(f'query {number}', nobody, matches))
    return answers


def _without_probabilities(answer: Answer) -> Answer:
    return Answer(answer.query, None, [match._replace(probability=None) for match in answer.results])


def loaded(model: str | Path | nn.Module, device: torch.device) -> tuple[nn.Module, str | None]:
    """Return a model on a device, and the name by which it can be loaded from any working folder.

    A model in memory has no such name, and is left as it is and where it is.
    """
    if isinstance(model, nn.Module):
        return require_dual_stream(model), None
    name = str(model)
    is_registered = isinstance(model, str) and timm.is_model(name.partition('.')[0])
    network = load_model(model).to(device).eval()
    if name.startswith('local-dir:'):
        return network, f'local-dir:{os.path.abspath(name.removeprefix("local-dir:"))}'
    return network, name if is_registered or not os.path.exists(name) else os.path.abspath(name)


def describe(model: nn.Module, source: str | None, modality: str, size: tuple[int, int] | None, features: str) -> About:
    """Return what an index by this model says about itself.

    Args:
        model: The model.
        source: The name by which it can be loaded.
        modality: Modality of the images.
        size: Height and width that images are resized to; None for the model's own.
        features: `after-bn`, `before-bn` or `auto`: those that the model returns.
    """
    if modality not in MODALITIES:
        raise ValueError(f'the modality of the gallery must be one of {", ".join(MODALITIES)}, got {modality!r}')
    config = resolve_model_data_config(model)
    calibration = None if source is None else model_calibration(source)
    return About(
        model=source,
        weights=weights_fingerprint(model, classifiers=False),
        architecture=model.pretrained_cfg.get('architecture', ''),
        modality=modality,
        size=image_size(model, Extraction(features=features, size=size)),
        features=feature_kind(model, features),
        dimensions=model.head_hidden_size,
        mean=tuple(config['mean']),
        std=tuple(config['std']),
        calibration=None if calibration is None else calibration.to_dict(),
    )


def check_same(index: Index, about: About) -> None:
    """Check that a model and its settings fit to an index.

    Raises:
        ValueError: They do not; the message says where.
    """
    difference = index.about.difference(about)
    if difference:
        raise ValueError(
            f'the index {index.folder} does not fit: it has {difference}. Use the model and the settings that it was '
            'made with, or make another index'
        )


def _listed(
    paths: Sequence[str | os.PathLike],
    cameras: Sequence[int | str | None] | None,
    times: Sequence[str | None] | None,
    identities: Sequence[str | None] | None,
) -> list[ListedImage]:
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f'expected a list of paths, got a single one: {paths!r}')
    columns = {'cameras': cameras, 'times': times, 'identities': identities}
    for name, values in columns.items():
        if values is not None and len(values) != len(paths):
            raise ValueError(f'expected as many {name} as paths ({len(paths)}), got {len(values)}')
    rows = zip(paths, *([None] * len(paths) if values is None else values for values in columns.values()))
    return [
        listed_image(path, _plain(camera), None if time is None else normalized_time(str(time)), _plain(identity))
        for path, camera, time, identity in rows
    ]


def _plain(value: object) -> object:
    """Return a NumPy number or text as Python's own, which SQLite takes."""
    return value.item() if isinstance(value, np.generic) else value


def _best_of_identities(hits: list[Hit]) -> list[Hit]:
    """Keep the first image of each identity, and every image without one."""
    best, seen = [], set()
    for image, similarity in hits:
        identity = image[-1]
        if identity is None or identity not in seen:
            best.append((image, similarity))
        seen.add(identity)
    return best
