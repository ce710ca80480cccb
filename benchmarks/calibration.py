"""Do probabilities hold on people and cameras that neither network nor calibration has seen; and what centring does.

    python benchmarks/calibration.py                              half an hour on 2 cores, most of it rendering
    python benchmarks/calibration.py --save benchmarks/results/calibration.json

Each SynthVI world (seed) has its own people and cameras. The weights in the package were trained in world 1. In one
world with many cameras a calibration is fitted; it is then tested in others, with the six cameras of the standard
setting or with many. Features go to --output as soon as they are there: a second call extracts what is missing. Prints
tables in per cent, mean ± standard deviation over the worlds, and as its last line one JSON object.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import publish

import vireid_timm
from vireid_timm.device import resolve_device
from vireid_timm.evaluation.calibration import FIRST, Calibration
from vireid_timm.evaluation.evaluate import calibrate_features, evaluate_features
from vireid_timm.evaluation.features import centred
from vireid_timm.files import whole_file

WEIGHTS = 'vireid_dml_r10t.synthvi'
MANY_CAMERAS = dict(visible_cameras=24, infrared_cameras=12)
FIT = dict(seed=14, test_identities=400, **MANY_CAMERAS)
TESTS = {f's{seed}': dict(seed=seed, test_identities=200) for seed in range(20, 28)}
MANY = {'m28': dict(seed=28, test_identities=400, **MANY_CAMERAS)}
PROTOCOLS = ('visible-to-infrared', 'infrared-to-visible')
KINDS = ('before-bn', 'after-bn')  # those that the weights retrieve with come first
VARIANTS = {f'{name}{", centred" if centre else ""}': (name, centre) for name in KINDS for centre in (False, True)}
PARTS = ('pairs', 'first', 'nobody')
CURVE = ('count', 'probability', 'share')
PEOPLE = (12, 50)  # in smaller galleries


def world(options: dict[str, Any]) -> vireid_timm.Dataset:
    """Return a world's dataset."""
    return vireid_timm.create_dataset('synthetic', identities=0, images_per_modality=4, **options)


def features_of(name: str, options: dict[str, Any], output: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the features of a world's images after and before the BN-neck, extracted once."""
    path = output / f'{name}.pt'
    if not path.is_file():
        model = vireid_timm.load_model(WEIGHTS).to(device)
        images = world(options).test
        features = {kind: vireid_timm.embed(model, images, features=kind, cache='disk')[0] for kind in KINDS}
        output.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            torch.save({'features': features}, temporary)
        print(f'{name}: done')
    return torch.load(path, weights_only=True)['features']


def scores(report: vireid_timm.Report) -> dict[str, float]:
    """Return the mean over both directions of everything that is measured in a world."""
    values: dict[str, list[float]] = {}
    for result in report.protocols.values():
        found = {name: result.mean[name] for name in ('rank1', 'mAP')} | result.decisions
        for part, measured in result.calibration.items():
            found |= {f'{name}_{part}': measured[name] for name in ('ece', 'log_loss', 'constant_log_loss')}
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(value)) for name, value in values.items()}


def pooled_bins(reports: list[vireid_timm.Report]) -> dict[str, dict[str, list[float]]]:
    """Return the reliability curves over all worlds and both directions: count, mean probability, share of truths."""
    curves = {}
    for part in PARTS:
        bins = [result.calibration[part]['bins'] for report in reports for result in report.protocols.values()]
        count, *sums = (
            np.array([each[name] for each in bins], dtype=float) for name in ('count', 'probability', 'share')
        )
        means = [np.nan_to_num(values * count).sum(axis=0) / np.maximum(1, count.sum(axis=0)) for values in sums]
        curves[part] = dict(zip(CURVE, [count.sum(axis=0).tolist(), *map(list, means)]))
    return curves


def smaller_galleries(
    features: torch.Tensor, options: dict[str, Any], calibration: Calibration
) -> dict[str, dict[str, float]]:
    """Return the mean probability of the first answers in galleries of few people, with and without the other prior."""
    found = {}
    for people in PEOPLE:
        records = world(options).test
        rows = np.flatnonzero(np.isin(records.identity, records.identities()[:people]))
        records, own = records[rows], features[torch.from_numpy(rows)]
        sides = [np.flatnonzero(records.modality == modality) for modality in ('infrared', 'visible')]
        similarity = own[sides[0]] @ own[sides[1]].T
        match = torch.from_numpy(records.identity[sides[0]][:, None] == records.identity[sides[1]])
        first = similarity.topk(FIRST, dim=1)
        found[str(people)] = {
            'share': match.gather(1, first.indices).double().mean().item(),
            'probability': calibration.probability(first.values, similarity.shape[1]).mean().item(),
            'probability_at_the_prior_of_the_fit': calibration.probability(first.values).mean().item(),
        }
    return found


def prepared(features: torch.Tensor, dataset: vireid_timm.Dataset, centre: bool) -> torch.Tensor:
    """Return the features, centred or not."""
    return centred(features, dataset.test.modality) if centre else features


def measure(output: Path, device: torch.device) -> dict[str, Any]:
    """Fit and test every variant."""
    fit, fitted_features = world(FIT), features_of('m14', FIT, output, device)
    result = {'fit': FIT, 'tests': TESTS, 'many': MANY, 'variants': {}}
    for variant, (kind, centre) in VARIANTS.items():
        calibration = calibrate_features(prepared(fitted_features[kind], fit, centre), fit, PROTOCOLS)
        found = {'calibration': calibration.to_dict(), 'worlds': {}, 'smaller': {}}
        reports = []
        for name, options in {**TESTS, **MANY}.items():
            dataset = world(options)
            features = prepared(features_of(name, options, output, device)[kind], dataset, centre)
            reports.append(evaluate_features(features, dataset, PROTOCOLS, calibration=calibration))
            found['worlds'][name] = scores(reports[-1])
            if name in TESTS:
                found['smaller'][name] = smaller_galleries(features, options, calibration)
        found['bins'] = pooled_bins(reports[: len(TESTS)])
        result['variants'][variant] = found
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = (
        ('rank-1', 'rank1'),
        ('mAP', 'mAP'),
        ('TAR at FAR 1 %', 'tar_at_far_1e-2'),
        ('TAR at FAR 0.1 %', 'tar_at_far_1e-3'),
        ('FNIR at FPIR 1 %', 'fnir_at_fpir_1e-2'),
        ('FNIR at FPIR 10 %', 'fnir_at_fpir_1e-1'),
        ('ECE, all pairs', 'ece_pairs'),
        ('ECE, first ten answers', 'ece_first'),
        ('ECE, nobody', 'ece_nobody'),
    )
    names = list(result['variants'])
    lines = [f'| | {" | ".join(names)} |', '|---' * (1 + len(names)) + '|']
    for title, name in rows:
        cells = []
        for variant in result['variants'].values():
            values = 100 * np.array([variant['worlds'][world][name] for world in TESTS])
            cells.append(f'{values.mean():.2f} ± {values.std():.2f}')
        lines.append(f'| {title} | {" | ".join(cells)} |')
    variants = result['variants'].values()
    for part in PARTS:
        losses = (f'log_loss_{part}', f'constant_log_loss_{part}')
        means = [np.mean([[v['worlds'][w][name] for name in losses] for w in TESTS], axis=0) for v in variants]
        cells = ' | '.join(f'{own:.4f} ({constant:.4f})' for own, constant in means)
        lines.append(f'| log loss, {part} (of a constant) | {cells} |')
    for people in map(str, PEOPLE):
        means = [100 * np.mean([list(v['smaller'][w][people].values()) for w in TESTS], axis=0) for v in variants]
        cells = ' | '.join(f'{share:.1f}, {own:.1f}, {fixed:.1f}' for share, own, fixed in means)
        lines.append(f'| first ten answers of {people} people: right, predicted, at the prior of the fit | {cells} |')
    for part in PARTS:
        lines += ['', f'Reliability, {part}, {names[0]}', '', '| predicted | true | count |', '|---|---|---|']
        curve = result['variants'][names[0]]['bins'][part]
        lines += [
            f'| {100 * predicted:.1f} | {100 * true:.1f} | {count:,.0f} |'
            for count, predicted, true in zip(*curve.values())
            if count
        ]
    return '\n'.join(lines)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--output', type=Path, default=Path('output/calibration'), help='where features are kept')
    parser.add_argument('--save', type=Path, help='write the JSON there, too')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    device = resolve_device(args.device)
    result = measure(args.output, device)
    publish(result, table(result), device, args.save)


if __name__ == '__main__':
    main()
