"""``python -m tasks.worker PARENT ARGUMENTS``: one of several workers, as `tasks.launch` starts them.

It is the ``luigi`` command with what it takes to work beside others, and to end with them.
"""

import sys

from luigi.cmdline import luigi_run

from pipeline.process.children import interrupted_by_sigterm
from pipeline.process.stopping import INTERRUPTED_EXIT, end_with_parent
from tasks import endings, manners

DEFAULTS = {
    ("core", "no_lock"): True,  # the same command is run several times here
    ("worker", "keep_alive"): True,
    ("worker", "ping_interval"): 1,
    ("worker", "wait_interval"): 1,
    ("worker", "wait_jitter"): 1,
    # Each task in a process of its own, which looks anew at what this one did not know when it asked what is complete:
    # another worker may have checked the photos since.
    ("worker", "force_multiprocessing"): True,
}
"""Where the user's own configuration says nothing: an idle worker asks for work each second or two, and stays as long
as something is to be done."""


def work(parent: int, arguments: list[str]) -> int:
    """Run ``luigi ARGUMENTS``, and end with the process that started this one."""
    end_with_parent(parent)
    for (section, option), value in DEFAULTS.items():
        manners.set_default(section, option, value)
    for name, code in manners.EXIT_CODES.items():  # `tasks.launch` reads them
        manners.set_always("retcode", name, code)
    manners.set_always("core", "local_scheduler", False)
    endings.leave_to_others()
    manners.give_up_where_told()
    try:
        with interrupted_by_sigterm():
            luigi_run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1]), sys.argv[2:]))
