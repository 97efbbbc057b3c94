"""The ranks that train a run together: where they meet, and what of a step each of them does.

Of one process alone all of it is there too, and costs nothing.
"""

import contextlib
import errno
import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache.core.files import make_folder
from pipeline.devices.communication import Collectives
from pipeline.errors import UserError
from pipeline.plan.plan import Plan
from pipeline.plan.run_folder import RunFolder
from pipeline.process.progress import say
from pipeline.process.ranks import ALONE, Ranks, joined, place
from pipeline.settings.reading import unshared
from pipeline.training import checkpoint
from pipeline.training.exchange import Sum, sum_of
from pipeline.training.sharding import Shards

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def met(run: RunFolder) -> Iterator[Ranks]:
    """A block that all ranks of a run go through together.  Raises UserError where another process trains the run."""
    make_folder(run.path)
    is_first = place().is_first
    with locked(run) if is_first else contextlib.nullcontext(), joined(run.meeting) as found:
        yield found


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Keep a second process from training in the same run folder at the same time."""
    with open(run.lock, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run.path}: another process trains this run; wait for it, or change the experiment"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            say(f"{run.path}: this file system has no locks; see that no second process trains this run")
        yield


@dataclass(frozen=True)
class Share:
    """What a rank does of each step, as `loop.Training` takes it.

    ranks: all that share a step's batches.  sums, shards: what adds up the gradients, and what of the optimizer's state
    this rank keeps; None of one rank alone.
    """

    ranks: Ranks = ALONE
    sums: Sum | None = None
    shards: Shards | None = None


WHOLE_STEP = Share()


class Team:
    """The ranks, once they have met.  Raises UserError where so many cannot do what the plan says."""

    def __init__(self, plan: Plan, ranks: Ranks):
        check_division(plan, ranks)
        self._settings, self._ranks = plan.experiment.parallel, ranks
        self._collectives = Collectives(ranks, plan.device) if ranks.size > 1 else None

    def share(self, trained: Sequence) -> Share:
        """This rank's, where these parameters are trained."""
        if self._collectives is None:
            return Share(self._ranks)
        sums = sum_of(self._collectives, self._settings.reduce, trained)
        return Share(self._ranks, sums, Shards(self._collectives, trained) if self._settings.shard_optimizer else None)

    @contextlib.contextmanager
    def refusing(self, run: RunFolder) -> Iterator[None]:
        """A block whose UserError, of any rank, is raised on all; then no later run goes on from this one."""
        error = None
        try:
            yield
        except UserError as found:
            error = found
        if end := self._ranks.ending(error):
            if self._ranks.is_first:
                checkpoint.set_all_aside(run)
            raise end


def check_division(plan: Plan, ranks: Ranks) -> None:
    """Raise UserError where so many ranks cannot do what the plan says; it may have been msrun that started them."""
    uneven = unshared(plan.experiment, ranks.size)
    if uneven:
        raise UserError(uneven)
    if plan.experiment.parallel.reduce == "fast" and ranks.size != plan.num_ranks:
        raise UserError(
            f"parallel.ranks = {ranks.size}: so many train here, and reduce = 'fast' gives other bits for each number; "
            f"found ranks = {plan.num_ranks}"
        )
