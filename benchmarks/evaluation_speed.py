"""How fast evaluation is beside the similarity product, and beside a loop over the queries as re-ID code has it.

    python benchmarks/evaluation_speed.py                     on the CPU, about two minutes
    python benchmarks/evaluation_speed.py --device cuda
    python benchmarks/evaluation_speed.py --save benchmarks/results/evaluation_speed.cpu.json

Features of SYSU-MM01's size (3,803 queries, 6,775 visible test images, 2,816 numbers each, the cameras and identities
of the real test set) are drawn at random, so that no image is needed. Before anything is timed, the library and the
loop have to agree. Prints a table and, as its last line, one JSON object. Ratios are of medians, measured alternately.
"""

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import publish, seconds

import vireid_timm
from vireid_timm.data.layouts import plan_layout
from vireid_timm.evaluation.evaluate import evaluate_features
from vireid_timm.evaluation.metrics import RankMetrics

DIMENSION = 2816
SIGNAL = 0.2  # share of the identity in the features
MANY = 100_000
SAMPLE = 1_000  # queries of the large case that are really ranked
IMAGES_PER_PERSON = 10


def sysu_mm01(**size: Any) -> vireid_timm.Dataset:
    """The test table of SYSU-MM01's size, or of another (as `plan_layout` takes it), without images."""
    plan = plan_layout('sysu_mm01', **(size or {'full_size': True}))
    tested = {int(number) for number in plan.lists['exp/test_id.txt'].split(',')}
    images = [image for image in plan.images if image.identity in tested]
    rows = [(f'/{p.path}', f'{p.identity:04d}', p.camera, p.modality, 'test') for p in images]
    empty = vireid_timm.Records.from_rows([])
    return vireid_timm.Dataset('sysu_mm01', '/', empty, vireid_timm.Records.from_rows(rows))


def many() -> vireid_timm.Dataset:
    """A large gallery of visible images and a sample of the infrared ones that would search it."""
    rows = [(f'/visible/{i:06d}.jpg', f'{i // IMAGES_PER_PERSON:05d}', 0, 'visible', 'gallery') for i in range(MANY)]
    step = MANY // SAMPLE
    rows += [
        (f'/infrared/{i:06d}.jpg', f'{i // IMAGES_PER_PERSON:05d}', 0, 'infrared', 'query')
        for i in range(0, MANY, step)
    ]
    empty = vireid_timm.Records.from_rows([])
    return vireid_timm.Dataset('folder', '/', empty, vireid_timm.Records.from_rows(rows))


def random_features(dataset: vireid_timm.Dataset) -> torch.Tensor:
    """L2-normalised, with something of the identity in them, [N, D]."""
    _, identities = np.unique(dataset.test.identity, return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(int(identities.max()) + 1, DIMENSION, generator=generator)
    features = torch.empty(len(identities), DIMENSION)  # filled in place, so that no copy counts as memory
    for part, people in zip(features.split(4096), torch.from_numpy(identities).split(4096), strict=True):
        part.normal_(generator=generator).add_(centres[people], alpha=SIGNAL)
        part /= part.norm(dim=1, keepdim=True)
    return features


def loop(
    similarity: np.ndarray,
    query: np.ndarray,
    gallery: np.ndarray,
    ignore: np.ndarray,
) -> tuple[np.ndarray, float, float]:
    """CMC, mAP and mINP one query after the other, with the steps and number formats of the field's scripts."""
    order = np.argsort(-similarity.astype(np.float64), axis=1)
    ranked, hits = gallery[order], (gallery[order] == query[:, None]).astype(np.int32)
    curves, precisions, penalties = [], [], []
    for row in range(len(query)):
        seen = ~ignore[row][order[row]]
        identities, right = ranked[row][seen], hits[row][seen]
        if not right.any():
            continue
        first_places = np.unique(identities, return_index=True)[1]
        distinct = [identities[place] for place in sorted(first_places)]
        curves.append((np.asarray(distinct) == query[row]).cumsum()[:20])
        found = right.cumsum()
        last = np.max(np.where(right == 1))
        penalties.append(found[last] / (last + 1.0))
        precision = [count / (place + 1.0) for place, count in enumerate(found)]
        precisions.append((np.asarray(precision) * right).sum() / right.sum())
    return np.mean(curves, axis=0), float(np.mean(precisions)), float(np.mean(penalties))


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes by which a call raises the high-water mark of the process, or of the GPU's memory."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = _high_water()
    work()
    return _high_water() - before


def _high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == 'Darwin' else 1024)


def all_protocols(device: torch.device, repeats: int, dataset: vireid_timm.Dataset) -> dict[str, float]:
    """The 40 evaluations of SYSU-MM01 from features to the report, and the one product that they need."""
    features = random_features(dataset).to(device)
    peak = peak_memory(lambda: evaluate_features(features, dataset), device)
    query, gallery = (
        features[torch.from_numpy(dataset.test.modality == modality).to(device)] for modality in ('infrared', 'visible')
    )
    times = {'product': [], 'report': []}
    for _ in range(repeats):
        times['product'].append(seconds(lambda: query @ gallery.T, device))
        times['report'].append(seconds(lambda: evaluate_features(features, dataset), device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        'product_s': medians['product'],
        'report_s': medians['report'],
        'report_over_product': medians['report'] / medians['product'],
        'peak_mib': peak / 2**20,
    }


def one_trial(device: torch.device, repeats: int) -> dict[str, float]:
    """A multi-shot all-search trial from its similarities to the metrics, against the loop."""
    dataset = sysu_mm01()
    features = random_features(dataset)
    trial = vireid_timm.protocol_trials(dataset, 'all-multi')[0]
    similarity = features[trial.query] @ features[trial.gallery].T
    identities = dataset.test.identity.astype(np.int64)
    query, gallery = identities[trial.query], identities[trial.gallery]
    on_device, ignore = similarity.to(device), torch.from_numpy(trial.ignore).to(device)

    def library() -> RankMetrics:
        return vireid_timm.rank_metrics(on_device, query, gallery, ignore=ignore, per_identity_cmc=True)

    start = time.perf_counter()
    cmc, mean_ap, mean_inp = loop(similarity.numpy(), query, gallery, trial.ignore)
    looped = time.perf_counter() - start
    found = library()
    np.testing.assert_allclose(found.cmc, cmc, rtol=0, atol=1e-6)
    np.testing.assert_allclose([found.mAP, found.mINP], [mean_ap, mean_inp], rtol=0, atol=1e-6)
    ranked = statistics.median(seconds(library, device) for _ in range(repeats))
    return {'loop_s': looped, 'trial_s': ranked, 'loop_over_trial': looped / ranked, 'trial_mAP': found.mAP}


def large(device: torch.device) -> dict[str, float]:
    """A sample of the queries of a search of 100,000 among 100,000, and what all of them would take."""
    dataset = many()
    features = random_features(dataset).to(device)
    start = time.perf_counter()
    peak = peak_memory(lambda: evaluate_features(features, dataset, 'infrared-to-visible'), device)
    taken = time.perf_counter() - start
    everything = peak + 2 * MANY * DIMENSION * features.element_size()  # with the features of all queries
    return {
        'large_sample_queries': SAMPLE,
        'large_sample_s': taken,
        'large_projected_s': taken * MANY / SAMPLE,
        'large_peak_mib': peak / 2**20,
        'large_projected_gib': everything / 2**30,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = (
        ('similarity product 3,803 x 6,775 x 2,816', f'{result["product_s"]:.2f} s'),
        ('40 evaluations, from features to the report', f'{result["report_s"]:.2f} s'),
        ('... times the product', f'{result["report_over_product"]:.2f}'),
        ('... memory beyond the features', f'{result["peak_mib"]:.0f} MiB'),
        ('one multi-shot trial 3,803 x 3,010, loop over the queries', f'{result["loop_s"]:.2f} s'),
        ('... `rank_metrics`', f'{result["trial_s"]:.3f} s'),
        ('... times faster', f'{result["loop_over_trial"]:.0f}'),
        (f'100,000 x 100,000, {result["large_sample_queries"]:,} of the queries', f'{result["large_sample_s"]:.1f} s'),
        ('... all of them, projected', f'{result["large_projected_s"] / 60:.0f} min'),
        ('... memory with all features, projected', f'{result["large_projected_gib"]:.1f} GiB'),
    )
    return '\n'.join(['| | |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows)])


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--save', type=Path, help='write the JSON there, too')
    args = parser.parse_args()
    # The memory of the first two is measured before anything larger raises the high-water mark.
    result = {
        **all_protocols(args.device, args.repeats, sysu_mm01()),
        **one_trial(args.device, args.repeats),
        **large(args.device),
    }
    publish(result, table(result), args.device, args.save)


if __name__ == '__main__':
    main()
