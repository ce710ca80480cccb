import pytest
from reports import SETTINGS, make_images, make_trials

from vireid_timm.evaluation.report import summarise


@pytest.fixture
def images():
    return make_images()


@pytest.fixture
def result(images):
    return summarise(make_trials(images, drop=4), images, root='data', **SETTINGS)
