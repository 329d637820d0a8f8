"""The people, things and places that the bundled stories are about."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    """The words of a table written as plain text."""
    return tuple(text.split())


GIRLS = _words(
    "Anna Mary Emma Lucy Rosa Jane Sara Clara Alice Ella Ruth Nora Grace Helen Julia Kate "
    "Lily Maria Nina Olga Paula Susan Tina Wendy"
)
BOYS = _words(
    "Tom Ben Jack Sam John Peter Paul Max Leo Adam David Frank George Henry Ivan James "
    "Karl Luke Mark Oscar Robert Simon Victor William"
)
NAMES = (*GIRLS, *BOYS)
ITEMS = _words(
    "apples books coins pens cards shells stones eggs stamps pears balls nuts cups keys "
    "flowers buttons marbles oranges plates tickets"
)
PLACES = _words(
    "kitchen garden school church barn library market office park forest bedroom cellar "
    "station castle hospital field attic harbour"
)
