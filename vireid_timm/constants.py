"""Names of the modalities and the splits."""

VISIBLE = 'visible'
INFRARED = 'infrared'
MODALITIES = (VISIBLE, INFRARED)
SPLITS = ('train', 'query', 'gallery', 'test')  # a test image can be both a query and a gallery image
UNKNOWN_CAMERA = 0
