"""Large galleries: compressed features that fit into memory and find candidates, which are then compared exactly.

FAISS (https://github.com/facebookresearch/faiss, arXiv 2401.08281) does the work. Here are only its settings, chosen by
the size of the gallery; docs/large_galleries.md has the measurements behind them.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..files import check_writable, whole_folder
from .search import Found, exact_search, merged, rescored

INDEX = 'index.faiss'
FEW = 10_000  # images below which features stay in half precision: k-means would have too few of them
DIMENSIONS = 256  # that features are projected to
BYTES = 64  # of an image's code
PROBED = 384  # lists that a query is compared with
CANDIDATES = 400  # at least, for a query

_SAMPLE = 1 << 16  # images that the projection is learned from
_FEWEST_PER_LIST = 39  # below that, FAISS warns
_PER_LIST = 64  # images for each list that the lists and codes are learned from
_BLOCK = 1 << 24  # numbers that are converted to float32 at once


class Compressed:
    """Compressed features on disk, mapped into memory. Threads may share it.

    Attributes:
        count: Number of images N that were compressed.
        lists: Number of lists that they were divided into.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `build` has written.

        Raises:
            FileNotFoundError: There is nothing.
            ValueError: It is damaged, or FAISS is not installed.
        """
        self._faiss = require_faiss()
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f'there are no compressed features in {folder}')
        flags = self._faiss.IO_FLAG_MMAP | self._faiss.IO_FLAG_READ_ONLY
        try:
            self._index = self._faiss.read_index(str(folder / INDEX), flags)
        except RuntimeError as error:
            raise ValueError(f'{folder / INDEX} is damaged ({error}); build it again') from error
        lists = self._faiss.extract_index_ivf(self._index)
        lists.parallel_mode = 1  # all cores for a single query, too
        self.lists = lists.nlist
        # Threads that read ahead cost each query more than they save.
        self._faiss.downcast_InvertedLists(lists.invlists).prefetch_nthread = 0
        self.count = self._index.ntotal

    def nearest(self, queries: torch.Tensor, gallery: torch.Tensor, count: int, rows: torch.Tensor) -> Found:
        """Return the most similar gallery images as `exact_search` does, but for the few that a candidate list misses.

        Images that were added since `build` are compared exactly, and removed ones are not found.

        Args:
            queries: L2-normalised features [Q, D]; their type and device are computed in.
            gallery: The features that were compressed, and any number of later ones, [G, D] on the CPU.
            count: Number of images K; fewer if there are fewer rows.
            rows: Rows of the gallery to search, ascending [R] int64.
        """
        total = int(torch.searchsorted(rows, self.count))  # of them are compressed
        allowed = None
        if total < self.count:
            allowed = np.zeros(self.count, bool)
            allowed[rows[:total].numpy()] = True
        candidates = torch.from_numpy(self.search(queries.float().cpu().numpy(), count, allowed))
        found = rescored(queries, gallery, candidates, min(count, total))
        if total < len(rows):
            found = merged(found, exact_search(queries, gallery, count, rows[total:]), count)
        return found

    def search(self, queries: np.ndarray, count: int, allowed: np.ndarray | None = None) -> np.ndarray:
        """Return candidates for the most similar images, to be compared exactly.

        Args:
            queries: L2-normalised features [Q, D].
            count: Number of images that are wanted in the end.
            allowed: Which images may be found, [N] bool; None for all.

        Returns:
            Rows [Q, K] int64 in no useful order; K is `count` or more, and -1 stands where fewer images are allowed.
        """
        total = self.count if allowed is None else int(np.count_nonzero(allowed))
        wanted = max(40 * count, CANDIDATES)
        # The fewer are allowed, the more lists, so that as many images are compared.
        probed = PROBED * self.count // max(total, 1)
        rows = self._search(queries, wanted, probed, allowed)
        is_short = (rows >= 0).sum(axis=1) < min(wanted, total)
        if is_short.any():  # most of the allowed images are in other lists
            rows[is_short] = self._search(queries[is_short], wanted, self.lists, allowed)
        return rows

    def _search(self, queries: np.ndarray, count: int, probed: int, allowed: np.ndarray | None) -> np.ndarray:
        faiss, chosen = self._faiss, {}
        if allowed is not None:
            chosen['sel'] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder='little'))
        inner = faiss.SearchParametersIVF(nprobe=min(probed, self.lists), **chosen)
        parameters = faiss.SearchParametersPreTransform(index_params=inner)
        return self._index.search(np.ascontiguousarray(queries, np.float32), count, params=parameters)[1]


def open(folder: str | Path) -> Compressed:
    """Open what `build` has written; see `Compressed`."""
    return Compressed(Path(folder))


def build(features: np.ndarray, folder: str | Path, seed: int = 0) -> None:
    """Compress features into a folder, which appears whole or not at all.

    Features are read block by block. Memory is needed for the codes, 72 bytes per image, and for a sample.

    Args:
        features: L2-normalised [N, D] of any floating-point type, such as a memory-mapped file.
        folder: Where to write; what is there is replaced.
        seed: Of the sample that is learned from, and of k-means.

    Raises:
        ValueError: FAISS is not installed, or there are no features.
        OSError: The folder cannot be written.
    """
    faiss, folder = require_faiss(), Path(folder)
    if not len(features):
        raise ValueError(f'there are no features to compress into {folder}')
    check_writable(folder, is_folder=True)
    with whole_folder(folder) as temporary:
        index = _learned(faiss, features, seed)
        for rows in _slices(*features.shape):
            index.add(features[rows].astype(np.float32))
        try:
            faiss.write_index(index, str(temporary / INDEX))
        except RuntimeError as error:
            raise OSError(f'cannot write {folder}: {error}') from error


def _learned(faiss: ModuleType, features: np.ndarray, seed: int) -> Any:
    """Return an empty index; its projection, lists and codes are learned from a sample of the features."""
    total, width = features.shape
    if total < FEW:
        one_list = faiss.index_factory(width, 'IVF1,SQfp16', faiss.METRIC_INNER_PRODUCT)
        one_list.cp.min_points_per_centroid = 1  # or it warns
        one_list.train(features[:1].astype(np.float32))
        return faiss.IndexPreTransform(one_list)
    random = np.random.default_rng(seed)
    size = min(BYTES, width)
    components = faiss.PCAMatrix(width, min(DIMENSIONS, width) // size * size)
    components.train(features[_sample(total, _SAMPLE, random)].astype(np.float32))
    # Strong directions share a byte with weak ones, so that no byte has to tell more than the others.
    order = np.arange(components.d_out).reshape(-1, size)
    order[1::2] = order[1::2, ::-1]
    directions = faiss.vector_to_array(components.A).reshape(-1, width)[order.T.ravel()]
    projection = faiss.LinearTransform(width, len(directions), False)  # inner products must not lose the mean
    faiss.copy_array_to_vector(directions.ravel(), projection.A)
    projection.is_trained = True
    lists = 2 ** int(math.log2(min(4.2 * math.sqrt(total), total / _FEWEST_PER_LIST)))
    inner = faiss.index_factory(projection.d_out, f'IVF{lists},PQ{size}np', faiss.METRIC_INNER_PRODUCT)
    inner.cp.seed = inner.pq.cp.seed = seed
    inner.pq.cp.niter, inner.pq.cp.max_points_per_centroid = 10, 64  # enough for 256 centroids of few numbers
    rows = _sample(total, _PER_LIST * lists, random)
    blocks = (features[rows[part]].astype(np.float32) for part in _slices(len(rows), width))
    inner.train(np.concatenate([projection.apply(block) for block in blocks]))
    index = faiss.IndexPreTransform(inner)
    index.prepend_transform(projection)
    return index


def _sample(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw rows, ascending."""
    return np.sort(random.choice(total, min(count, total), replace=False))


def _slices(count: int, width: int) -> Iterator[slice]:
    """Split rows into blocks."""
    step = max(1, _BLOCK // width)
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def require_faiss() -> ModuleType:
    """Return the module; without it, raise an error that names the extra."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            'searching a compressed index needs the extra `search` (pip install "vireid_timm[search]")'
        ) from error
    return faiss
