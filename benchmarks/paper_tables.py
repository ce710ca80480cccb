"""The paper's tables as recipes: what each row changes, what the paper reports for it, and what a table claims.

The table `plus` is not the paper's: it has what other papers add to such a method, each alone.
"""

from typing import Any

from vireid_timm.training.config import load_yaml

PLAIN = {'augment': []}
BASELINE = {'model': 'baseline'}
PLUS_AUGMENTATIONS = ('erasing', 'mrle rrle', 'rfa', 'rfa exchange=1', 'exchange', 'three_way')

# A cell is what it changes in the paper's full method.
CELLS: dict[str, dict[str, Any]] = {
    'full': {},
    'baseline': {**BASELINE, **PLAIN},
    'fusion': {'mutual': 'none', **PLAIN},
    'rcc': {**BASELINE, 'augment': ['rcc']},
    'cre': {**BASELINE, 'augment': ['cre']},
    'rcc+cre': BASELINE,
    'no mutual': {'mutual': 'none'},
    **{
        f'layers {" ".join(map(str, layers))}': {'model_kwargs': {'fuse_layers': layers}}
        for layers in ((1, 2), (1, 3), (2, 3), (1, 2, 4), (1, 3, 4), (2, 3, 4), (1, 2, 3, 4))
    },
    'joint only': {'id_branches': ['joint'], 'mutual': 'none'},
    'mutual only': {'id_branches': ['joint'], 'global_weight': 1.0, 'fusion_weight': 1.0},
    'unweighted': {'global_weight': 1.0, 'fusion_weight': 1.0},
    'global-to-fusion': {'mutual': 'global-to-fusion'},
    'joint-to-global': {'mutual': 'joint-to-global'},
    'joint-to-fusion': {'mutual': 'joint-to-fusion'},
    **{
        f'theta1 {weight}': {'global_weight': weight, 'fusion_weight': 1.0} for weight in (0.0, 0.2, 0.4, 0.6, 1.5, 2.0)
    },
    **{f'theta2 {weight}': {'fusion_weight': weight} for weight in (0.0, 0.4, 1.4, 2.0)},
    'width 256': {'model_kwargs': {'fuse_width': 256}},
    'partner constant': {'mutual_constant': 'partner'},
    'teacher constant': {'mutual_constant': 'teacher'},
    **{f'+ {name}': {'augment': ['rcc', 'cre', *name.split()]} for name in PLUS_AUGMENTATIONS},
    **{
        f'+ {name} {weight}': {'loss': {'triplet': 1.0, name: weight}}
        for name, weight in (('prototype', 1.0), ('hetero_center', 0.05), ('hetero_center_triplet', 2.0))
    },
    **{f'smoothing {share}': {'smoothing': share} for share in (0.1, 0.2)},
    'triplet 3': {'loss': {'triplet': 3.0}},
    'ema': {'model_ema': True, 'model_ema_decay': 0.999, 'model_ema_warmup': True},
}
# Rows of a table: label, cell, and what the paper reports (rank-1 and mAP on SYSU-MM01, all-search, single-shot).
TABLES: dict[str, list[tuple[str, str, tuple[float, float] | None]]] = {
    'table1': [
        ('baseline', 'baseline', (49.86, 46.55)),
        ('+ fusion', 'fusion', (54.12, 52.99)),
        ('+ RCC', 'rcc', (56.87, 54.30)),
        ('+ CRE', 'cre', (59.48, 59.16)),
        ('+ RCC, CRE', 'rcc+cre', (65.45, 60.78)),
        ('+ RCC, CRE, fusion', 'no mutual', (69.68, 65.66)),
        ('+ RCC, CRE, fusion, DML: the method', 'full', (72.57, 68.61)),
    ],
    'table2': [
        ('layers 1, 2', 'layers 1 2', (66.01, 62.30)),
        ('layers 1, 3', 'layers 1 3', (71.58, 67.19)),
        ('layers 2, 3', 'layers 2 3', (72.39, 68.10)),
        ('layers 1, 2, 3: the method', 'full', (72.57, 68.61)),
        ('layers 1, 2, 4', 'layers 1 2 4', (67.59, 65.39)),
        ('layers 1, 3, 4', 'layers 1 3 4', (70.21, 66.83)),
        ('layers 2, 3, 4', 'layers 2 3 4', (71.08, 67.43)),
        ('layers 1, 2, 3, 4', 'layers 1 2 3 4', (71.69, 67.52)),
    ],
    'table3': [
        ('neither', 'joint only', (69.59, 65.36)),
        ('L_id', 'no mutual', (69.68, 65.66)),
        ('L_KD', 'mutual only', (68.37, 65.32)),
        ('L_id, L_KD', 'unweighted', (71.24, 67.38)),
        ('L_id, L_KD, LSR: the method', 'full', (72.57, 68.61)),
    ],
    'table4': [
        ('none', 'no mutual', (69.68, 65.66)),
        ('global and fusion', 'global-to-fusion', (68.67, 64.31)),
        ('joint and global', 'joint-to-global', (70.18, 65.95)),
        ('joint and fusion', 'joint-to-fusion', (70.87, 66.78)),
        ('joint and both: the method', 'full', (72.57, 68.61)),
    ],
    'fig4': [
        ('θ1 = 0, θ2 = 1', 'theta1 0.0', None),
        ('θ1 = 0.2, θ2 = 1', 'theta1 0.2', None),
        ('θ1 = 0.4, θ2 = 1', 'theta1 0.4', None),
        ('θ1 = 0.6, θ2 = 1', 'theta1 0.6', None),
        ('θ1 = 1, θ2 = 1', 'unweighted', (71.24, 67.38)),
        ('θ1 = 1.5, θ2 = 1', 'theta1 1.5', None),
        ('θ1 = 2, θ2 = 1', 'theta1 2.0', None),
        ('θ1 = 0.6, θ2 = 0', 'theta2 0.0', None),
        ('θ1 = 0.6, θ2 = 0.4', 'theta2 0.4', None),
        ('θ1 = 0.6, θ2 = 1.4', 'theta2 1.4', None),
        ('θ1 = 0.6, θ2 = 1.8: the method', 'full', (72.57, 68.61)),
        ('θ1 = 0.6, θ2 = 2', 'theta2 2.0', None),
    ],
    'plus': [
        ('the method', 'full', None),
        *((f'and {name}', f'+ {name}', None) for name in PLUS_AUGMENTATIONS),
        ('averaged weights', 'ema', None),
        ('label smoothing 0.1', 'smoothing 0.1', None),
        ('label smoothing 0.2', 'smoothing 0.2', None),
        ('prototype contrast', '+ prototype 1.0', None),
        ('hetero-center loss', '+ hetero_center 0.05', None),
        ('hetero-center triplet', '+ hetero_center_triplet 2.0', None),
        ('the triplet as heavy as three identity losses', 'triplet 3', None),
    ],
    'readings': [
        ('baseline with RCC and CRE', 'rcc+cre', None),
        ('fusion without mutual learning', 'no mutual', None),
        ('both branches of a pair learn', 'full', None),
        ('in each direction the partner is constant', 'partner constant', None),
        ('the joint branch teaches and is constant', 'teacher constant', None),
        ('both learn, fusion 256 channels wide', 'width 256', None),
    ],
}
# What a table claims: the first cell is better than the second.
CLAIMS: dict[str, list[tuple[str, str]]] = {
    'table1': [
        ('fusion', 'baseline'),
        ('rcc', 'baseline'),
        ('cre', 'baseline'),
        ('rcc+cre', 'baseline'),
        ('no mutual', 'rcc+cre'),
        ('full', 'no mutual'),
        ('full', 'rcc+cre'),
    ],
    'table2': [('full', row[1]) for row in TABLES['table2'] if row[1] != 'full'],
    'table3': [('full', row[1]) for row in TABLES['table3'] if row[1] != 'full'],
    'table4': [(row[1], 'no mutual') for row in TABLES['table4'] if row[1] != 'no mutual'],
    'fig4': [],
    'plus': [(row[1], 'full') for row in TABLES['plus'] if row[1] != 'full'],
    'readings': [(row[1], 'rcc+cre') for row in TABLES['readings'] if row[1] != 'rcc+cre']
    + [('teacher constant', 'full'), ('partner constant', 'full'), ('full', 'width 256')],
}

LITE0_WEIGHTS = 'lite0.safetensors'  # in --output; written if it is missing
SMALL = {  # from scratch, AdamW got further than the paper's SGD in the same time
    'val_share': 0.0,
    'identities_per_batch': 16,
    'images_per_modality': 2,
    'pad': 5,
    'opt': 'adamw',
    'lr': 0.001,
    'weight_decay': 0.02,
    'sched': 'cosine',
    'sched_on_updates': True,
    'warmup_epochs': 1,
    'warmup_lr': 0.0001,
}
# Budget: its description, the two networks (method and baseline), and what differs from the recipe of the paper.
BUDGETS: dict[str, dict[str, Any]] = {
    'smoke': {
        'title': 'a thin ResNet-10-T from scratch, one epoch on 8 rendered people at 64x32: shows only that it runs',
        'method': 'vireid_dml_r10t',
        'baseline': 'vireid_base_r10t',
        'model_kwargs': {
            'resnet_args': dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32))
        },
        'width': 8,
        'settings': {
            **SMALL,
            'identities_per_batch': 8,
            'pad': 2,
            'epochs': 1,
            'warmup_epochs': 0,
            'input_size': [3, 64, 32],
        },
    },
    'cpu': {
        'title': 'ResNet-10-T from scratch, 6 epochs of 251 batches of 64 images at 128x64',
        'method': 'vireid_dml_r10t',
        'baseline': 'vireid_base_r10t',
        'width': 64,
        'settings': {**SMALL, 'epochs': 6},
    },
    'long': {
        'title': 'ResNet-10-T from scratch, 24 epochs of 251 batches of 64 images at 128x64',
        'method': 'vireid_dml_r10t',
        'baseline': 'vireid_base_r10t',
        'width': 64,
        'settings': {**SMALL, 'epochs': 24},
    },
    'imagenet': {
        'title': 'EfficientNet-Lite0 from ImageNet weights, 3 epochs of 251 batches of 64 images at 128x64',
        'method': 'vireid_dml',
        'baseline': 'vireid_base',
        'model_kwargs': {'backbone': 'tf_efficientnet_lite0'},
        'settings': {
            **SMALL,
            'epochs': 3,
            'input_size': [3, 128, 64],
            'pretrained': True,
            'pretrained_path': LITE0_WEIGHTS,
            'backbone_lr_scale': 0.3,
        },
    },
    'gpu': {
        'title': 'ResNet-50 from scratch, 40 epochs of batches of 64 images at 288x144',
        'method': 'vireid_dml_r50',
        'baseline': 'vireid_base_r50',
        'width': 256,
        'settings': {**SMALL, 'pad': 10, 'epochs': 40},
    },
    'full': {
        'title': "the paper's recipe: ResNet-50 from ImageNet weights, 80 epochs at 288x144",
        'method': 'vireid_dml_r50.tv_in1k',
        'baseline': 'vireid_base_r50.tv_in1k',
        'width': 256,
        'settings': {name: value for name, value in load_yaml('sysu_mm01').items() if name not in ('dataset', 'model')},
    },
}
