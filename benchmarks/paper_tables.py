"""The paper's tables as recipes: what each row changes, what the paper reports for it, and what a table claims.

Tables 5 and 6 compare the method with others, whose results are quoted from the paper. The table `plus` is not the
paper's: it has what other papers add to such a method, each alone.
"""

from typing import Any

from vireid_timm.training.config import load_yaml

PLAIN = {'augment': []}
BASELINE = {'model': 'baseline'}
PLUS_AUGMENTATIONS = ('erasing', 'mrle rrle', 'rfa', 'rfa exchange=1', 'exchange', 'three_way')

# A cell is what it changes in the paper's full method, in which both branches of a pair learn, as its equations can be
# read. The package's own default is 'teacher constant'.
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
    'static weights': {'model_kwargs': {'spatial_weights': 'static'}},
    'last stride 2': {'model_kwargs': {'last_stride': 2}},
    'fixed fill': {'cre_fill': [0.4914, 0.4822, 0.4465]},
    'partner constant': {'mutual_constant': 'partner'},
    'teacher constant': {'mutual_constant': 'teacher'},
    **{f'+ {name}': {'augment': ['rcc', 'cre', *name.split()]} for name in PLUS_AUGMENTATIONS},
    **{
        f'+ {name} {weight}': {'loss': {'triplet': 1.0, name: weight}}
        for name, weight in (('prototype', 1.0), ('hetero_center', 0.05), ('hetero_center_triplet', 2.0))
    },
    **{f'smoothing {share}': {'smoothing': share} for share in (0.1, 0.2)},
    'triplet 3': {'loss': {'triplet': 3.0}},
    'no cre': {'augment': ['rcc']},
    'plus': {'mutual_constant': 'teacher', 'augment': ['rcc', 'rfa']},
    'agw': {**BASELINE, **PLAIN, 'model_kwargs': {'non_local_blocks': (0, 1, 1, 0)}},  # (0, 2, 3, 0) in ResNet-50
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
        ('and the joint branch constant: our default', 'teacher constant', None),
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
        ('joint and both, joint constant: our default', 'teacher constant', None),
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
    **{
        table: [('baseline', 'baseline', None), ("AGW's network", 'agw', None), ('the method', 'full', None)]
        for table in ('table5', 'table6')
    },
    'plus': [
        ('the method', 'full', None),
        *((f'and {name}', f'+ {name}', None) for name in PLUS_AUGMENTATIONS),
        ('without CRE', 'no cre', None),
        ('averaged weights', 'ema', None),
        ('label smoothing 0.1', 'smoothing 0.1', None),
        ('label smoothing 0.2', 'smoothing 0.2', None),
        ('prototype contrast', '+ prototype 1.0', None),
        ('hetero-center loss', '+ hetero_center 0.05', None),
        ('hetero-center triplet', '+ hetero_center_triplet 2.0', None),
        ('the triplet as heavy as three identity losses', 'triplet 3', None),
        ('RCC and RFA without CRE, the joint branch constant', 'plus', None),
    ],
    'best': [
        ("the paper's method", 'full', None),
        ('and the joint branch constant', 'teacher constant', None),
        ('RCC and RFA without CRE, the joint branch constant', 'plus', None),
    ],
    'readings': [
        ('baseline with RCC and CRE', 'rcc+cre', None),
        ('fusion without mutual learning', 'no mutual', None),
        ('both branches of a pair learn', 'full', None),
        ('in each direction the partner is constant', 'partner constant', None),
        ('the joint branch teaches and is constant', 'teacher constant', None),
        ('both learn, fusion 256 channels wide', 'width 256', None),
        ('both learn, α, β, γ the same in all images', 'static weights', None),
        ('both learn, last stride 2', 'last stride 2', None),
        ("both learn, CRE with CAJ's fixed fill", 'fixed fill', None),
    ],
}
# The paper's figures of trained networks, and the cells that they show.
FIGURES = {'fig5': ['full'], 'fig6': ['baseline', 'full']}
# Rows of tables 5 and 6 as the paper prints them: its dataset, and of each method the name, where it was published, and
# rank-1, rank-10, rank-20, mAP and mINP, visible to infrared and reverse, or all-search and indoor-search.
PUBLISHED: dict[str, tuple[str, list[tuple[str, str, str, str]]]] = {
    'table5': (
        'regdb',
        [
            ('Zero-Pad', 'ICCV17', '17.75 34.21 44.35 18.90 -', '16.63 34.68 44.25 17.82 -'),
            ('BDTR', 'IEEE19', '34.62 58.96 68.72 33.46 -', '34.21 58.74 68.64 32.49 -'),
            ('D2RL', 'CVPR19', '43.40 66.10 76.30 44.10 -', '- - - - -'),
            ('X-model', 'AAAI20', '62.21 83.13 91.72 60.18 -', '- - - - -'),
            ('DDAG', 'ECCV20', '69.34 86.19 91.49 63.46 49.24', '68.06 85.15 90.31 61.80 48.62'),
            ('AGW', 'TPAMI21', '70.05 86.21 94.55 66.37 50.19', '70.49 87.21 91.84 65.90 51.24'),
            ('Hi-CMD', 'CVPR20', '70.93 86.39 - 66.04 -', '- - - - -'),
            ('cm-SSFT', 'CVPR20', '72.30 - - 72.90 -', '71.00 - - 71.70 -'),
            ('SFA-Net', 'IEEE21', '76.31 91.02 94.27 68.00 -', '70.15 85.24 89.27 63.77 -'),
            ('MCLNet', 'ICCV21', '80.31 92.70 96.03 73.07 57.39', '75.93 90.93 94.59 69.49 52.63'),
            ('NFS', 'CVPR21', '80.54 94.96 95.07 72.10 -', '77.95 90.45 93.62 69.79 -'),
            ('MFCS', 'IEEE24', '85.34 - - 76.39 -', '83.88 - - 75.16 -'),
            ('MID', 'AAAI22', '87.45 - - 84.85 -', '84.29 93.44 - 81.41 -'),
            ('AGMNet', 'IEEE23', '88.40 95.10 96.94 81.45 68.51', '85.34 94.56 97.48 81.19 65.76'),
            ('FMCNet', 'CVPR22', '89.12 - - 84.43 -', '88.38 - - 83.86 -'),
            ('the method', 'the paper', '92.00 97.34 98.38 88.01 79.77', '90.01 96.90 98.30 86.15 75.31'),
        ],
    ),
    'table6': (
        'sysu_mm01',
        [
            ('Zero-Pad', 'ICCV17', '14.80 54.21 71.33 15.95 -', '20.58 63.38 85.79 26.92 -'),
            ('cmGAN', 'IJCAI18', '26.97 67.51 80.56 27.80 -', '31.63 77.23 89.18 42.19 -'),
            ('BDTR', 'IEEE19', '27.32 66.96 81.07 27.32 -', '32.46 77.42 89.62 42.46 -'),
            ('D2RL', 'CVPR19', '28.90 70.60 82.40 29.20 -', '- - - - -'),
            ('Hi-CMD', 'CVPR20', '34.94 77.58 - 35.94 -', '- - - - -'),
            ('AGW', 'TPAMI21', '47.50 84.39 92.14 47.65 35.30', '54.17 91.14 95.98 62.97 59.20'),
            ('X-model', 'AAAI20', '49.92 89.79 95.96 50.73 -', '- - - - -'),
            ('DDAG', 'ECCV20', '54.75 90.39 95.81 53.02 39.62', '61.02 94.06 98.41 67.98 62.61'),
            ('NFS', 'CVPR21', '56.91 91.34 96.52 55.45 -', '62.79 96.53 99.07 69.79 -'),
            ('MID', 'AAAI22', '60.27 92.90 - 59.40 -', '64.86 96.12 - 70.12 -'),
            ('cm-SSFT', 'CVPR20', '61.60 89.20 93.90 63.20 -', '70.50 94.90 97.70 72.60 -'),
            ('MCLNet', 'ICCV21', '65.40 93.33 97.14 61.98 47.39', '72.56 96.98 99.20 72.10 -'),
            ('FMCNet', 'CVPR22', '66.34 - - 62.51 -', '68.15 - - 74.09 -'),
            ('AGMNet', 'IEEE23', '69.63 96.27 98.82 66.11 52.24', '74.68 97.51 99.14 78.30 74.00'),
            ('MFCS', 'IEEE24', '70.59 96.22 98.77 67.49 -', '75.98 98.12 99.62 80.24 -'),
            ('the method', 'the paper', '72.57 96.60 98.89 68.61 54.64', '78.01 98.13 99.64 81.39 77.54'),
        ],
    ),
}
# What a table claims: the first cell is better than the second. After a comma stands a feature other than 'after BN'.
TABLE1_CLAIMS = [
    ('fusion', 'baseline'),
    ('rcc', 'baseline'),
    ('cre', 'baseline'),
    ('rcc+cre', 'baseline'),
    ('no mutual', 'rcc+cre'),
    ('full', 'no mutual'),
    ('full', 'rcc+cre'),
    ('full', 'baseline'),
    *(('teacher constant', cell) for cell in ('rcc+cre', 'full', 'no mutual', 'fusion', 'rcc', 'baseline')),
]
CLAIMS: dict[str, list[tuple[str, str]]] = {
    'table1': TABLE1_CLAIMS + [(f'{better}, before BN', f'{worse}, before BN') for better, worse in TABLE1_CLAIMS],
    'table2': [('full', row[1]) for row in TABLES['table2'] if row[1] != 'full'],
    'table3': [('full', row[1]) for row in TABLES['table3'] if row[1] != 'full'],
    'table4': [(row[1], 'no mutual') for row in TABLES['table4'] if row[1] != 'no mutual'],
    'fig4': [(row[1], 'full') for row in TABLES['fig4'] if row[1] != 'full'],
    **{table: [('full', 'baseline'), ('full', 'agw')] for table in ('table5', 'table6')},
    'plus': [(row[1], 'full') for row in TABLES['plus'] if row[1] != 'full'],
    'best': [('teacher constant', 'full'), ('plus', 'full'), ('plus', 'teacher constant')],
    'readings': [(row[1], 'rcc+cre') for row in TABLES['readings'] if row[1] != 'rcc+cre']
    + [('teacher constant', 'full'), ('partner constant', 'full')]
    + [('full', cell) for cell in ('width 256', 'static weights', 'last stride 2', 'fixed fill')]
    + [(f'{cell}, before BN', cell) for cell in dict.fromkeys(row[1] for row in TABLES['table1'])]
    + [(f'full, {feature}', 'full') for feature in ('flip test', 'centred', 'global')],
}

LITE0_WEIGHTS = 'lite0.safetensors'  # in --output; written if it is missing
AS_PRINTED = {'mutual_constant': 'none'}
SMALL = {  # from scratch, AdamW got further than the paper's SGD in the same time
    **AS_PRINTED,
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
LITE0_NETWORKS = {
    'method': 'vireid_dml',
    'baseline': 'vireid_base',
    'model_kwargs': {'backbone': 'tf_efficientnet_lite0'},
}
FROM_IMAGENET = {'pretrained': True, 'pretrained_path': LITE0_WEIGHTS, 'backbone_lr_scale': 0.3}
LITE0_SETTINGS = {**SMALL, **FROM_IMAGENET, 'input_size': [3, 128, 64]}
# Budget: its description, the two networks (method and baseline), and what differs from the recipe of the paper.
BUDGETS: dict[str, dict[str, Any]] = {
    'smoke': {
        'title': 'a thin ResNet-10-T from scratch, one epoch at 64x32: shows only that it runs',
        'method': 'vireid_dml_r10t',
        'baseline': 'vireid_base_r10t',
        'model_kwargs': {
            'resnet_args': dict(stem_width=8, stem_type='deep_tiered', avg_down=True, channels=(8, 16, 24, 32))
        },
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
        'title': 'ResNet-10-T from scratch, 6 epochs of batches of 64 at 128x64 (251 on SynthVI)',
        'method': 'vireid_dml_r10t',
        'baseline': 'vireid_base_r10t',
        'settings': {**SMALL, 'epochs': 6},
    },
    'long': {
        'title': 'ResNet-10-T from scratch, 24 epochs of batches of 64 at 128x64 (251 on SynthVI)',
        'method': 'vireid_dml_r10t',
        'baseline': 'vireid_base_r10t',
        'settings': {**SMALL, 'epochs': 24},
    },
    'imagenet': {
        'title': 'EfficientNet-Lite0 from ImageNet weights, 3 epochs of batches of 64 at 128x64 (251 on SynthVI)',
        **LITE0_NETWORKS,
        'settings': {**LITE0_SETTINGS, 'epochs': 3},
    },
    'imagenet-long': {
        'title': 'EfficientNet-Lite0 from ImageNet weights, 12 epochs of batches of 64 at 128x64 (251 on SynthVI)',
        **LITE0_NETWORKS,
        'settings': {**LITE0_SETTINGS, 'epochs': 12},
    },
    'imagenet-frozen': {
        'title': 'EfficientNet-Lite0 from ImageNet weights and their batch-norm statistics, 3 epochs of batches of 64 '
        'at 128x64 (251 on SynthVI)',
        **LITE0_NETWORKS,
        'settings': {**LITE0_SETTINGS, 'epochs': 3, 'freeze_bn': True},
    },
    'gpu': {
        'title': 'ResNet-50 from scratch, 40 epochs of batches of 64 images at 288x144',
        'method': 'vireid_dml_r50',
        'baseline': 'vireid_base_r50',
        'settings': {**SMALL, 'pad': 10, 'epochs': 40},
    },
    'full': {
        'title': "the paper's recipe: ResNet-50 from ImageNet weights, 80 epochs at 288x144",
        'method': 'vireid_dml_r50.tv_in1k',
        'baseline': 'vireid_base_r50.tv_in1k',
        'settings': {
            **{name: value for name, value in load_yaml('sysu_mm01').items() if name not in ('dataset', 'model')},
            **AS_PRINTED,
        },
    },
}
