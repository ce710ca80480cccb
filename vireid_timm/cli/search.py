"""`vireid search`."""

import argparse
import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..constants import MODALITIES
from ..files import expanded_path
from .parser import Parser, add_batch_size_flag, add_device_flag

if TYPE_CHECKING:
    from ..figures.rank_list import RankRow
    from ..retrieval.gallery import Answer, Gallery
    from ..retrieval.queries import ListedQuery

_logger = logging.getLogger(__name__)

MOST_DRAWN = 50  # queries in an image
MOST_SHOWN = 500  # queries on a page


def add_arguments(parser: Parser) -> None:
    """Add the flags."""
    parser.usage = '%(prog)s QUERY... --index INDEX --modality infrared [flags]'
    parser.description = 'Search an index: find the images that show the same person as each query.'
    text = 'images, folders of images, or CSV files with a column path'
    parser.add_argument('queries', nargs='+', type=expanded_path, metavar='QUERY', help=text)
    text = 'folder that `vireid index` has written'
    parser.add_argument('--index', type=expanded_path, required=True, metavar='INDEX', help=text)
    parser.add_argument('--modality', choices=MODALITIES, required=True, help='modality of the queries')
    _add_search(parser.add_argument_group('search'))
    _add_output(parser.add_argument_group('output'))
    parser.set_defaults(run=run)


def _add_search(group: Any) -> None:
    group.add_argument('--top', type=int, default=10, metavar='N', help='number of results (default: 10)')
    text = "search only where an SQL expression over path, camera, time, identity holds, e.g. 'camera != 3' "
    group.add_argument('--where', metavar='SQL', help=f'{text}(default: everywhere)')
    text = 'one result per identity, its best image (default: off)'
    group.add_argument('--by-identity', action='store_true', help=text)
    text = 'each folder is one query: average the features of its images (default: off)'
    group.add_argument('--tracklet', action='store_true', help=text)
    text = "subtract the mean of the queries' features, and from gallery images the gallery's mean (default: off)"
    group.add_argument('--centre', action='store_true', help=text)
    text = 'where the model of the index is now (default: where it was)'
    group.add_argument('--model', type=expanded_path, metavar='NAME', help=text)
    add_batch_size_flag(group)
    add_device_flag(group)


def _add_output(group: Any) -> None:
    group.add_argument('--json', action='store_true', help='print JSON (default: off)')
    text = 'write a web page with the images (default: none)'
    group.add_argument('--page', type=expanded_path, metavar='FILE.html', help=text)
    text = 'draw queries and results (default: none)'
    group.add_argument('--picture', type=expanded_path, metavar='FILE.png', help=text)


def run(args: argparse.Namespace) -> None:
    """Search an index."""
    from ..files import check_writable
    from ..options import check_range
    from ..retrieval.gallery import Gallery
    from ..retrieval.queries import list_queries

    check_range('--top', args.top, 1)
    if args.picture and not args.picture.lower().endswith('.png'):
        raise ValueError(f'--picture {args.picture}: expected the name of a PNG file, e.g. found.png')
    for path in (args.page, args.picture):
        if path is not None:
            check_writable(path)
    queries = list_queries(args.queries, tracklet=args.tracklet)
    gallery = Gallery.open(args.index, model=args.model, device=args.device, batch_size=args.batch_size)
    _warn(gallery, args.where)
    found = gallery.search(
        [[image.path for image in query.images] for query in queries],
        args.modality,
        top=args.top,
        where=args.where,
        by_identity=args.by_identity,
        centre=args.centre,
        skip_broken=len(queries) > 1,
    )
    if not found:
        raise ValueError('none of the queries can be read')
    of_path = {query.images[0].path: query for query in queries}
    answered = [of_path[answer.query] for answer in found]
    answers = [answer._replace(query=query.name) for query, answer in zip(answered, found, strict=True)]
    print(_json(answers) if args.json else '\n\n'.join(map(_table, answers)))
    title = f'{len(answers):,} {args.modality} queries in {len(gallery):,} {gallery.modality} images'
    if args.centre:
        title += ', centred by their means'
        _logger.info(f'Centred: the mean of the {len(answers):,} queries, and that of the gallery, were subtracted')
    if args.page or args.picture:
        _draw(args, title, [_rank_row(query, answer) for query, answer in zip(answered, answers, strict=True)])


def _warn(gallery: 'Gallery', where: str | None) -> None:
    """Say what a search may miss."""
    pending = gallery.index.pending
    if pending:
        _logger.warning(
            f'The index is incomplete: {pending:,} images are still to come; it has {len(gallery):,}. Unless '
            '`vireid index` is running, run it again to finish'
        )
    for column in ('camera', 'time', 'identity'):
        if where is not None and re.search(rf'\b{column}\b', where, re.IGNORECASE):
            unknown = gallery.index.unknown(column)
            if unknown:
                _logger.warning(
                    f'{unknown:,} images have no {column}, so no comparison of it finds them; add to --where: '
                    f'OR {column} IS NULL'
                )


def _json(answers: Sequence['Answer']) -> str:
    values = [{**answer._asdict(), 'results': [match._asdict() for match in answer.results]} for answer in answers]
    return json.dumps(values, indent=2)


def _table(answer: 'Answer') -> str:
    """Return a query and its results as lines; columns of which nothing is known are left out."""
    from ..text import aligned

    nobody = '' if answer.nobody is None else f' (not in the gallery: {answer.nobody:.1%})'
    if not answer.results:
        return f'{answer.query}{nobody}\n  no result'
    rows = [
        [
            str(rank),
            f'{match.similarity:.4f}',
            '' if match.probability is None else f'{match.probability:.1%}',
            *('' if value is None else str(value) for value in (match.camera, match.time, match.identity)),
            match.path,
        ]
        for rank, match in enumerate(answer.results, 1)
    ]
    table = [['rank', 'similarity', 'probability', 'camera', 'time', 'identity', 'path'], *rows]
    known = [column for column in range(len(table[0])) if any(row[column] for row in rows)]
    lines = aligned([[row[column] for column in known] for row in table], left=tuple(range(3, len(known))))
    return '\n'.join([f'{answer.query}{nobody}', *(f'  {line}' for line in lines)])


def _rank_row(query: 'ListedQuery', answer: 'Answer') -> 'RankRow':
    from ..figures.rank_list import RankRow, Result

    first = query.images[0]
    wanted = first.identity
    results = [
        Result(**match._asdict(), hit=None if None in (wanted, match.identity) else match.identity == wanted)
        for match in answer.results
    ]
    notes = [query.name]
    if len(query.images) > 1:
        notes.append(f'tracklet of {len(query.images)} images')
    if answer.nobody is not None:
        notes.append(f'not in the gallery: {answer.nobody:.1%}')
    return RankRow(Result(first.path, wanted, first.camera, first.time), results, ', '.join(notes))


def _draw(args: argparse.Namespace, title: str, rows: list['RankRow']) -> None:
    from ..figures.rank_list import rank_list_image, rank_list_page
    from ..files import whole_file

    for path, most in ((args.page, MOST_SHOWN), (args.picture, MOST_DRAWN)):
        if path is not None and len(rows) > most:
            _logger.warning(f'{path} shows the first {most} of {len(rows):,} queries')
    if args.page:
        with whole_file(args.page) as temporary:
            temporary.write_text(rank_list_page(rows[:MOST_SHOWN], title), encoding='utf-8')
    if args.picture:
        with whole_file(args.picture) as temporary:
            rank_list_image(rows[:MOST_DRAWN]).save(temporary, format='PNG')
