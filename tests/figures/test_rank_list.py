import numpy as np
import pytest
from PIL import Image

from vireid_timm.data.images import ImageError
from vireid_timm.figures.rank_list import HIT, MISS, rank_list_image
from vireid_timm.synthvi.render import image_address


def test_hits_are_framed_green_and_misses_red() -> None:
    address = image_address('visible', 0, 1, 0, size=(64, 32))
    sheet = rank_list_image([address], [[address, address]], [[True, False]], size=(64, 32))
    pixels = np.asarray(sheet)
    assert sheet.mode == 'RGB'
    green, red = (np.flatnonzero((pixels == colour).all(axis=2).any(axis=0)) for colour in (HIT, MISS))
    assert len(green) and len(red) and green.max() < red.min()


def test_a_missing_image_is_named(tmp_path) -> None:
    Image.new('RGB', (8, 16)).save(tmp_path / 'a.png')
    with pytest.raises(ImageError, match='missing.png'):
        rank_list_image([str(tmp_path / 'a.png')], [[str(tmp_path / 'missing.png')]], [[True]])
