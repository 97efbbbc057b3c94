"""Answers about an experiment's photos that are worked out once in a process: of a million, each takes seconds."""

import functools
from collections.abc import Callable, Sequence


def once(method: Callable) -> Callable:
    """Keep what a method of a plan says of some photos, until it is asked about others.

    The same photos are the same tuple, which cannot change; to compare a million would take as long as to answer.
    Photos in a list are looked at each time.  Whoever asks again gets the same object: it must not be changed.
    """

    @functools.wraps(method)
    def answer(plan, photos: Sequence):
        if not isinstance(photos, tuple):
            return method(plan, photos)
        answers = vars(plan).setdefault("_answers", {})
        asked, found = answers.get(method.__name__, (None, None))
        if asked is not photos:
            found = method(plan, photos)
            answers[method.__name__] = photos, found
        return found

    return answer
