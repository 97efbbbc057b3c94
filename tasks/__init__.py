"""What runs after what: a Luigi task for each row of `pipeline.stage_table`.  ``luigi --module tasks TrainLoRA``

`tasks.table` makes them; here they are as people import them, ``tasks.TrainLoRA``.
"""

import signal
import threading

_is_main = threading.current_thread() is threading.main_thread()
if _is_main:  # Ctrl-C while modules load is not worth a traceback
    _before = signal.signal(signal.SIGINT, signal.SIG_DFL)

from tasks.sweep import Sweep  # noqa: E402, F401
from tasks.table import *  # noqa: E402, F403

if _is_main:
    signal.signal(signal.SIGINT, _before)
