"""Made-up test images, trials and reports."""

import os

import numpy as np

from vireid_timm.constants import INFRARED, VISIBLE
from vireid_timm.data.records import Records
from vireid_timm.evaluation.metrics import rank_metrics
from vireid_timm.evaluation.report import Report

CAMERAS = (1, 2, 3, 6)
SETTINGS = dict(
    direction='infrared to visible',
    draw='seeded',
    per_identity_cmc=True,
    gallery_size=7,
    trials_fingerprint='trials',
)
FAILURE = dict(
    path='cam3/0001/1.jpg',
    identity='0001',
    camera=3,
    modality=INFRARED,
    AP=0.0312,
    rank=17,
    found=[{'path': 'cam1/0002/0.jpg', 'identity': '0002'}, {'path': 'cam2/0003/1.jpg', 'identity': '0003'}],
)


def make_images(root='data', identities=6):
    """Every identity twice in two infrared cameras and in two visible ones."""
    return Records.from_rows(
        [
            (os.path.join(root, f'cam{camera}', f'{number:04d}', f'{i}.jpg'), f'{number:04d}', camera, modality, 'test')
            for number in range(identities)
            for camera, modality in zip(CAMERAS, (VISIBLE, VISIBLE, INFRARED, INFRARED))
            for i in range(2)
        ]
    )


def make_trials(images, num_trials=3, seed=0, drop=0, shift=0.0):
    """Random similarities of infrared queries and a random gallery without identity 0000 and some others."""
    generator = np.random.default_rng(seed)
    infrared = np.flatnonzero(images.modality == INFRARED)
    visible = np.flatnonzero((images.modality == VISIBLE) & (images.identity != '0000'))
    noise = np.random.default_rng(99)
    trials = []
    for _ in range(num_trials):
        query = np.sort(generator.choice(infrared, len(infrared) - drop, replace=False))
        gallery = generator.choice(visible, 7, replace=False)
        match = images.identity[query][:, None] == images.identity[gallery]
        similarity = noise.random(match.shape) + shift * match
        metrics = rank_metrics(similarity, images.identity[query], images.identity[gallery], per_identity_cmc=True)
        trials.append((query, metrics))
    return trials


def make_report(protocols, **options):
    defaults = dict(
        dataset='sysu_mm01',
        options={'trial': 1, 'size': [128, 64]},
        model='vireid_dml_r50',
        weights='0123456789ab',
        features='after-bn',
        size=(288, 144),
        precision='float32',
        versions={'torch': '2.5.0', 'numpy': '1.24.0'},
    )
    return Report(protocols=protocols, **{**defaults, **options})
