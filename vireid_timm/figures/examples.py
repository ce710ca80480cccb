"""Rank lists of an evaluation: its best, worst and random queries, as images and as a page per protocol."""

import os
from pathlib import Path
from typing import Any

from ..constants import UNKNOWN_CAMERA
from ..evaluation.report import Report
from ..files import whole_file
from .rank_list import RankRow, Result, rank_list_image, rank_list_page

SIZE = (192, 96)  # height and width of each image


def save_rank_lists(report: Report, root: str, folder: str | Path) -> list[Path]:
    """Write `<protocol>.html` and `<protocol>-best.png`, `-worst.png` and `-random.png` for each protocol of a report.

    Args:
        report: A report with examples, see `evaluate`.
        root: The dataset's folder or CSV file; empty for rendered images.
        folder: Where the files go; it is created, and other files in it stay.

    Returns:
        The files.

    Raises:
        OSError: A file cannot be written.
    """
    files = []
    for protocol, result in report.protocols.items():
        rows = []
        for name, listed in result.examples.items():
            rows += [rank_row(example, root, name) for example in listed]
            image = rank_list_image([rank_row(example, root) for example in listed], SIZE)
            files.append(Path(folder) / f'{protocol}-{name}.png')
            with whole_file(files[-1]) as temporary:
                image.save(temporary, format='PNG')
        title = ' '.join(filter(None, [f'{protocol} of {report.dataset}', report.model, report.weights]))
        files.append(Path(folder) / f'{protocol}.html')
        with whole_file(files[-1]) as temporary:
            temporary.write_text(rank_list_page(rows, title, SIZE), encoding='utf-8')
    return files


def rank_row(example: dict[str, Any], root: str, name: str = '') -> RankRow:
    """Return the row of an example of a report.

    Args:
        example: One of `ProtocolResult.examples`.
        root: As for `save_rank_lists`.
        name: What the note above the row begins with.
    """
    note = f'AP {example["AP"]:.1%}, first match at rank {example["rank"]}'
    return RankRow(
        _result(example, root),
        [_result(answer, root, hit=answer['identity'] == example['identity']) for answer in example['found']],
        f'{name}: {note}' if name else note,
    )


def _result(image: dict[str, Any], root: str, hit: bool | None = None) -> Result:
    folder = os.path.dirname(root) if os.path.isfile(root) else root
    return Result(
        path=os.path.join(folder, image['path']),
        identity=image['identity'],
        camera=None if image['camera'] == UNKNOWN_CAMERA else image['camera'],
        similarity=image.get('similarity'),
        hit=hit,
    )
