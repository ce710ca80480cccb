"""Words with one spelling everywhere: modalities, splits, and the choices that functions and flags share."""

VISIBLE = 'visible'
INFRARED = 'infrared'
MODALITIES = (VISIBLE, INFRARED)
SPLITS = ('train', 'query', 'gallery', 'test')  # a test image can be both a query and a gallery image
UNKNOWN_CAMERA = 0

DATASETS = ('buptcampus', 'csv', 'folder', 'hitsz_vcm', 'llcm', 'regdb', 'synthetic', 'sysu_mm01')
LAYOUT_NAMES = ('folder', 'market', 'sysu_mm01', 'regdb', 'llcm', 'hitsz_vcm', 'buptcampus')
FULL_SIZES = ('sysu_mm01', 'regdb', 'llcm')  # layouts that can have the real dataset's numbers of images
NAMES = ('folders', 'market')  # where a folder's images tell who they show: their folder, or their own name
SPECTRA = ('near-infrared', 'thermal')
CACHES = ('auto', 'disk', 'ram', 'device', 'off')
DRAWS = ('seeded', 'official')
RETRIEVALS = ('after-bn', 'before-bn')  # features after or before the BN-neck
FEATURES = ('auto', *RETRIEVALS)  # auto: what the model itself returns
CROPS = (1, 5)
RERANKINGS = ('none', 'k-reciprocal', 'cross-modality')
GROUPINGS = ('camera', 'identity', 'modality')  # of a breakdown
EXPORT_FORMATS = ('onnx', 'pt2')  # ONNX, and programs of torch.export
SOURCES = ('agw', 'caj')  # whose checkpoints can be converted
DIST_BN = ('reduce', 'broadcast')  # running statistics of batch norm: the mean over the ranks, or those of rank 0

# Augmentations by name, in the order in which they are applied, with the probability for each image that their papers
# use (RFA: ours). `docs/losses_and_augmentations.md` describes them.
AUGMENTATIONS = {
    'rcc': 1.0,
    'rfa': 0.5,
    'exchange': 0.75,
    'three_way': 1.0,
    'mrle': 0.5,
    'rrle': 0.5,
    'cre': 0.5,
    'erasing': 0.5,
}
PAPER_AUGMENTATIONS = ('rcc', 'cre')
