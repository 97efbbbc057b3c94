"""Weights & Biases and SwanLab: a process beside the training that sends them what metrics.jsonl says.

Neither is imported by the process that trains, so that a network that is down, or a service that fails, never stops or
delays a training.  ``python -m pipeline track SERVICE RUN FIRST_STEP`` is that process.
"""

import importlib.util
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cache import printable_lines, write_atomically
from pipeline.plan.run_folder import RunFolder
from pipeline.process import children
from pipeline.runs import hyperparameters, metrics_file

PROJECT = "flux-finetune"
FINISH_SECONDS = 60
"""How long a service may take, at the end of a training, to send the rest; less than a stage's grace to stop."""

LOOK_SECONDS = 1.0
SECRETS = "WANDB_API_KEY", "SWANLAB_API_KEY"

Log = Callable[[dict[str, Any], int], object]


class Tracker:
    """One of the writers of `metrics.Metrics`: starts the process beside the training, and ends it."""

    def __init__(self, service: str, run: RunFolder, first_step: int):
        self.path, self._run, self._first_step = service, run, first_step
        self._process: subprocess.Popen | None = None

    def open(self) -> None:
        if importlib.util.find_spec(self.path) is None:
            raise OSError(f"not installed; pip install '.[{self.path}]' brings it")
        command = [sys.executable, "-P", "-m", "pipeline", "track", self.path, str(self._run.path)]
        self._process = subprocess.Popen(
            [*command, str(self._first_step)],
            env=children.environment(),
            stdin=subprocess.PIPE,  # ends with this process, however that ends
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # no terminal: nothing there can ask for a key, and Ctrl-C does not reach it
        )

    def add(self, line: dict) -> None:
        """Nothing: it reads metrics.jsonl."""

    def sync(self) -> None:
        """Nothing: what it has not sent before a kill, it sends when the training goes on."""

    def close(self, is_finished: bool) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            process.wait(FINISH_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with what the service has started itself
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise OSError(f"took more than {FINISH_SECONDS} seconds to send the rest, and was ended") from None


def follow(service: str, folder: Path, first_step: int) -> int:
    """Send all lines of a run's metrics.jsonl after ``first_step`` as they come, until the standard input ends.

    Returns the exit code.  What goes wrong is said in one line.
    """
    over = _end_of_input()
    ours = _silence()
    try:
        run = RunFolder(folder)
        log, finish = SERVICES[service](run, _id_of(run), hyperparameters.of_run(run))
        _send(run.metrics, first_step, log, over)
        finish()
        return 0
    except Exception as error:  # of a service, anything at all
        reason = " ".join(printable_lines(_without_secrets(str(error) or type(error).__name__)).split())
        print(f"{service}: {reason}; nothing more is sent there, the training goes on", file=ours, flush=True)
        return 1


def _send(metrics: Path, first_step: int, log: Log, over: threading.Event) -> None:
    rest = ""
    with open(metrics, errors="replace") as file:
        is_over = False
        while not is_over:
            is_over = over.wait(LOOK_SECONDS)  # then once more, to the end
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                found = metrics_file.parsed(line + "\n")
                if found and found["step"] > first_step:
                    step = found.pop("step")
                    log({f"train/{name}": value for name, value in found.items() if value is not None}, step)


def _end_of_input() -> threading.Event:
    """Is set once the training has ended.  Some time after that, this process ends in any case."""
    over, until_then = threading.Event(), os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def wait() -> None:
        while os.read(until_then, 1):
            pass
        over.set()
        time.sleep(FINISH_SECONDS + 5)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    return over


def _id_of(run: RunFolder) -> str:
    """Of a run at a service, of 21 small letters and digits, as SwanLab wants it: a resumed training has the same."""
    path = run.path / "tracker.id"
    if path.exists() and re.fullmatch("[0-9a-f]{21}", found := path.read_text(errors="replace").strip()):
        return found
    own = secrets.token_hex(11)[:21]
    write_atomically(path, own + "\n")
    return own


def _silence():
    """Have this process say nothing from now on, as services print banners.  Returns where to print all the same."""
    ours = os.fdopen(os.dup(2), "w", errors="replace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return ours


def _without_secrets(text: str) -> str:
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, f"${name}")
    return text


def _wandb(run: RunFolder, own: str, settings: dict) -> tuple[Log, Callable[[], object]]:
    """https://docs.wandb.ai/ref/python/init; offline with WANDB_MODE=offline."""
    import wandb

    # Nothing of the command, the host or the code: a remote of git may have a token in it.
    private = wandb.Settings(
        console="off", save_code=False, disable_code=True, disable_git=True, x_disable_meta=True, init_timeout=45
    )
    project, name = os.environ.get("WANDB_PROJECT", PROJECT), run.path.name
    board = wandb.init(
        project=project, id=own, name=name, config=settings, dir=run.path, resume="allow", settings=private
    )
    return lambda line, step: board.log(line, step=step), board.finish


def _swanlab(run: RunFolder, own: str, settings: dict) -> tuple[Log, Callable[[], object]]:
    """https://docs.swanlab.cn/en/api/py-init.html; offline with SWANLAB_MODE=offline."""
    import swanlab

    private = swanlab.Settings(interactive=False, probe=swanlab.Settings.Probe(git=False, requirements=False))
    swanlab.init(
        project=os.environ.get("SWANLAB_PROJECT", PROJECT),
        name=run.path.name,
        id=own,
        resume="allow",
        config=settings,
        log_dir=str(run.path / "swanlog"),
        mode=os.environ.get("SWANLAB_MODE") or None,
        settings=private,
    )
    return lambda line, step: swanlab.log(line, step=step), swanlab.finish


SERVICES = {"wandb": _wandb, "swanlab": _swanlab}
