"""The commands that give results to other programs, and take theirs."""

import argparse
import math
from pathlib import Path

from cache.terminal.arguments import above_zero
from pipeline.exchange import extracting, merging, runs
from pipeline.exchange.lora_names import LAYOUTS
from pipeline.exchange.rounding import DTYPES
from pipeline.settings.values import LORA_TARGETS


def add_to(commands) -> None:
    """commands: what `argparse.ArgumentParser.add_subparsers` returned."""
    _add_export(commands)
    _add_merge(commands)
    _add_extract(commands)
    _add_resize(commands)


def _add_export(commands) -> None:
    export = commands.add_parser(
        "export", help="a run's LoRA or ControlNet for other programs: kohya's layout, ComfyUI's, diffusers'"
    )
    export.add_argument("source", type=Path, metavar="RUN", help="a run's folder, or a LoRA file in any layout")
    _add_file(export, layout="", dtype="bf16")
    export.add_argument(
        "--checkpoint",
        type=above_zero,
        metavar="STEP",
        help="as it was after this step, where that is kept",
    )
    _add_model(export)
    export.set_defaults(command=_export)


def _add_merge(commands) -> None:
    merge = commands.add_parser("merge", help="LoRAs into a model's weights")
    merge.add_argument("loras", type=Path, nargs="+", metavar="LORA", help="LoRA files in any layout")
    merge.add_argument(
        "--into",
        type=Path,
        required=True,
        metavar="MODEL",
        help="a model's folder, its transformer's, or a single file as Black Forest Labs or ComfyUI have it",
    )
    merge.add_argument("--out", type=Path, required=True, metavar="PATH", help="a folder or a file, as MODEL is")
    merge.add_argument(
        "--scale",
        type=_number,
        nargs="+",
        default=[1.0],
        metavar="NUMBER",
        help="strength: one for each LoRA, or one for all (1)",
    )
    merge.set_defaults(command=_merge)


def _add_extract(commands) -> None:
    extract = commands.add_parser("extract", help="a LoRA of what a fine-tuned transformer changed")
    extract.add_argument("base", type=Path, metavar="BASE", help="a folder of a model or transformer, or a single file")
    extract.add_argument("tuned", type=Path, metavar="TUNED", help="the same, fine-tuned")
    extract.add_argument("--rank", type=above_zero, required=True)
    extract.add_argument(
        "--targets",
        default="",
        metavar="NAMES",
        help=f"{', '.join(LORA_TARGETS)}, or names with commas between them (all linear layers)",
    )
    _add_file(extract, layout="diffusers", dtype="fp32")
    extract.set_defaults(command=_extract)


def _add_resize(commands) -> None:
    resize = commands.add_parser("resize", help="a LoRA of a lower rank")
    resize.add_argument("source", type=Path, metavar="LORA", help="a LoRA file in any layout")
    resize.add_argument("--rank", type=above_zero, required=True)
    _add_file(resize, layout="diffusers", dtype="fp32")
    _add_model(resize)
    resize.set_defaults(command=_resize)


def _add_file(parser, layout: str, dtype: str) -> None:
    said = layout or "kohya; a ControlNet: comfyui"
    parser.add_argument("--format", default=layout, choices=LAYOUTS, dest="layout", help=f"layout ({said})")
    parser.add_argument("--dtype", default=dtype, choices=DTYPES, help=f"of the numbers ({dtype})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (beside the source)")
    parser.add_argument("--title", default="", help="name that programs show")
    parser.add_argument("--trigger", default="", metavar="WORDS", help="of prompts for it, that programs show")
    parser.add_argument("--thumbnail", type=Path, metavar="PICTURE", help="a picture that programs show")


def _add_model(parser) -> None:
    parser.add_argument("--model", default="", metavar="MODEL", help="that the LoRA is for: a folder, FLUX.1-dev, ...")


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}")
    return number


def _wanted(options) -> runs.Wanted:
    names = "layout", "dtype", "out", "title", "trigger", "thumbnail"
    return runs.Wanted(**{name: getattr(options, name) for name in names}, model=getattr(options, "model", ""))


def _export(options) -> None:
    print(runs.written(*runs.export(options.source, _wanted(options), options.checkpoint)))


def _merge(options) -> None:
    print(runs.written(options.out, merging.merge(options.loras, options.scale, options.into, options.out)))


def _extract(options) -> None:
    targets = LORA_TARGETS.get(options.targets) or tuple(name for name in options.targets.split(",") if name)
    print(runs.written(*extracting.extract(options.base, options.tuned, options.rank, targets, _wanted(options))))


def _resize(options) -> None:
    print(runs.written(*extracting.resize(options.source, options.rank, _wanted(options))))
