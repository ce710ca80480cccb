"""SynthVI v1: the standard setting, frozen. A test holds the checksum of its test images.

Networks learn from `TRAINING`: 2,000 people, seen by visible cameras 1, 2, 4, 5 and infrared cameras 3 and 6. Every
choice (a default, a recipe, an epoch) is made on the validation people, and only results are measured on the test
people. Both are also seen by cameras that no training image comes from.
"""

_WORLD = dict(images_per_modality=4, seed=0)

TRAINING = dict(identities=2000, test_identities=0, **_WORLD)
SPLITS = {
    'validation': dict(identities=0, first_identity=2200, test_identities=200, **_WORLD),
    'test': dict(identities=0, first_identity=2000, test_identities=200, **_WORLD),
    'validation, new cameras': dict(identities=0, first_identity=2200, test_identities=200, first_camera=201, **_WORLD),
    'test, new cameras': dict(identities=0, first_identity=2000, test_identities=200, first_camera=101, **_WORLD),
}
