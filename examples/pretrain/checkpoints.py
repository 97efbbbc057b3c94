"""What a killed training goes on from, and what it says meanwhile."""

import json
import os
import time
from pathlib import Path

import torch


class Checkpoint:
    """One file with the state of everything in ``parts``, which have state_dict and load_state_dict."""

    def __init__(self, path: Path, *parts):
        self.path, self.parts, self.started = path, parts, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, steps: int) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save({"steps": steps, "parts": [part.state_dict() for part in self.parts]}, partial)
        os.replace(partial, self.path)

    def restore(self) -> int:
        """How many steps are done; 0 without a file."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=False)
        for part, state in zip(self.parts, saved["parts"]):
            part.load_state_dict(state)
        return saved["steps"]

    def say(self, step: int, **figures: float) -> None:
        line = {"stage": self.path.stem, "step": step, "seconds": time.monotonic() - self.started, **figures}
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
        print(json.dumps(rounded), flush=True)
