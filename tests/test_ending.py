"""The end of a stage's process: nothing is left out but taking Python apart."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import sys; sys.path.insert(0, sys.argv[1])
from pipeline.process import ending
ending.prepare()
import atexit, threading, time
class Kept:
    def __del__(self): print("taken apart")
kept = Kept()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("is safe", ending.is_safe())
if sys.argv[2] == "at once":
    ending.at_once(3)
sys.exit(4)
"""


def ended(how: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", CODE, str(ROOT), how]
    return subprocess.run(command, env=environment, text=True, timeout=60, **options)


def test_threads_and_what_is_registered_come_before_an_end_at_once():
    ran = ended("at once", capture_output=True)
    assert (ran.returncode, ran.stdout) == (3, "is safe False\nthread\nregistered\n")
    ran = ended("as ever", capture_output=True)
    assert (ran.returncode, ran.stdout) == (4, "is safe False\nthread\nregistered\ntaken apart\n")


def test_output_that_cannot_be_written_is_an_error_all_the_same():
    with open("/dev/full", "w") as full:
        ran = ended("at once", stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 120 and "No space left" in ran.stderr
