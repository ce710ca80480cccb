"""The words for modalities and splits, one each, everywhere."""

VISIBLE = 'visible'
INFRARED = 'infrared'
MODALITIES = (VISIBLE, INFRARED)
SPLITS = ('train', 'query', 'gallery', 'test')  # test: an image that may serve as query and as gallery
UNKNOWN_CAMERA = 0
