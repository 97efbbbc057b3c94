"""Train a small FLUX.1 that paints one shape on a plain background, from nothing, on CPU: this takes hours of CPU time.

    PYTHONPATH=. python examples/pretrain --out my-model

Needs PyTorch and diffusers beside this project's own requirements.  A killed run goes on from its last checkpoint; the
stages run one by one too: --stage vae, painter, measure.
"""

import argparse
from pathlib import Path

import torch

STAGES = ("vae", "painter", "measure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the checkpoint to")
    parser.add_argument("--stage", choices=STAGES, action="append", help="by default all, in this order")
    parser.add_argument("--threads", type=int, default=2, help="1 is faster where other programs run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scratch = options.out.with_name(f"{options.out.name}-training")
    for stage in options.stage or STAGES:
        _run(stage, options.out, scratch)


def _run(stage: str, out: Path, scratch: Path) -> None:
    if stage == "vae":
        import autoencoder

        autoencoder.train(out / "vae", scratch)
    elif stage == "painter":
        import painter

        painter.train(out, scratch)
    else:
        import measure

        measure.report(out)


main()
