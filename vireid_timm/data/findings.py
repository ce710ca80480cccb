"""Oddities of the data. The readers, the image store and `vireid data` report them in one counted line per kind."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..text import format_list

_logger = logging.getLogger(__name__)
_EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """One kind of oddity.

    Attributes:
        kind: Its short name, e.g. `unread-suffix`.
        count: How often it occurs.
        message: One line for people, with the count and examples.
        examples: The first few files, folders or identities.
        is_serious: Whether it makes results meaningless.
    """

    kind: str
    count: int
    message: str
    examples: list[str]
    is_serious: bool = False


class Findings(list[Finding]):
    """Findings in the order in which they were made. Each is logged as a warning when it is added."""

    def add(self, kind: str, what: str, names: Sequence[str], *, is_serious: bool = False) -> None:
        """Add a finding about some files, folders or identities; with no names, there is nothing to add.

        Args:
            kind: Short name of the finding.
            what: What follows the count, e.g. `folders have no image`.
            names: All that it is about.
            is_serious: Whether it makes results meaningless.
        """
        if names:
            message = f'{len(names):,} {what}: {format_list(names, _EXAMPLES)}'
            _logger.warning(message)
            self.append(Finding(kind, len(names), message, list(names[:_EXAMPLES]), is_serious))
