"""The queries of a search: images, folders of images, tracklets, and CSV files."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from ..data.listing import ListedImage, list_images, listed_image

TABLES = ('.csv', '.tsv')  # suffixes of files that list queries


class ListedQuery(NamedTuple):
    """One query.

    Attributes:
        name: What the user knows it by.
        images: Its images, several for a tracklet.
    """

    name: str
    images: list[ListedImage]


def list_queries(sources: Sequence[str], *, tracklet: bool = False) -> list[ListedQuery]:
    """List queries: each image, each image in a folder (at any depth), and each image in a CSV file is one.

    Args:
        sources: Images, folders and CSV files.
        tracklet: Each folder is one query instead; all sources must be folders.

    Raises:
        FileNotFoundError: One of them is not there.
        ValueError: A folder or CSV file has no image, or a tracklet is no folder.
    """
    queries = []
    for source in sources:
        if tracklet:
            if not os.path.isdir(source):
                raise ValueError(f'{source} is no folder; each tracklet (--tracklet) is a folder of images')
            queries.append(ListedQuery(source, list_images(source)))
        elif os.path.isdir(source) or source.lower().endswith(TABLES):
            show = str if os.path.isabs(source) else os.path.relpath
            queries += [ListedQuery(show(image.path), [image]) for image in list_images(source)]
        elif os.path.exists(source):
            queries.append(ListedQuery(source, [listed_image(source)]))
        else:
            raise FileNotFoundError(f'there is no query {source}: no such image, folder or CSV file')
    return queries
