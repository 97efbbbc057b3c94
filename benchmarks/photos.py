"""``python -m benchmarks.photos``: what a stage costs before its first useful work, with a great many photos.

An experiment of N tiny photos with captions of their own is made and checked, and its store filled with rows of the
right shapes; and another one of 100 photos.  With everything encoded, each step then runs in a process of its own:

    tasks        Luigi's own process: the photos are surveyed, and each task of Sample says whether it is done, twice
    STAGE        the stage's process, given the survey: it encodes nothing, trains one step, draws two pictures
    parts        without MindSpore, one after another, what the stages do with all photos

Seconds are of the clock and, about the same on a busy machine, of the processor.  "photos" is the processor's time
beyond that of 100 photos: what the photos cost, without Python, MindSpore and the model.  Peaks are of the whole
process.  Everything is in the page cache.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.figures import Figure
from pipeline.data import survey_file
from pipeline.data.survey_file import SurveyFile
from pipeline.methods import LORA
from pipeline.plan.survey import Survey
from pipeline.settings.reading import load_experiment

ROOT = Path(__file__).parents[1]
FEW, PER_FOLDER, SIDE = 100, 1000, 16
STAGES = ("EncodeCLIP", "EncodeT5", "EncodeImages", "TrainLoRA", "SampleLatents", "Sample")
COMPARED = ("EncodeCLIP", "TrainLoRA")
"""Stages whose figures `python -m benchmarks` keeps."""
EXPERIMENT = f"""
[data]
images = "photos"
resolution = {SIDE}
max_sequence_length = 8
[train]
steps = 1
mode = "pynative"
[sample]
prompts = ["a red circle"]
num_inference_steps = 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=100_000, metavar="N")
    parser.add_argument("--folder", type=Path, help="where it is made: 4 to 8 KB a photo (default: TMPDIR or /tmp)")
    parser.add_argument("--captions", choices=("metadata", "files"), default="metadata", help="where they lie")
    parser.add_argument("--keep", action="store_true", help="leave all in --folder, and take what is there")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)  # a function below, an experiment, a survey
    options = parser.parse_args()
    if options.child:
        return CHILDREN[options.child[0]](*map(Path, options.child[1:]))
    with tempfile.TemporaryDirectory(prefix="benchmark-photos-", dir=options.folder) as temporary:
        folder = options.folder if options.keep else Path(temporary)
        few, many = (make(folder / f"{number}-{options.captions}", number) for number in (FEW, options.photos))
        print(f"{options.photos:,} photos, captions in {options.captions}")
        print(f"{'':<36}{'seconds':>9}{'CPU':>9}{f'of {FEW}':>9}{'photos':>9}{'peak MiB':>10}{f'of {FEW}':>9}")
        for (name, seconds, busy, peak), (_, _, busy_of_few, peak_of_few) in zip(measured(many), measured(few)):
            times = seconds, busy, busy_of_few, busy - busy_of_few
            cells = "".join(f"{each:>9.2f}" for each in times) + f"{peak:>10.0f}{peak_of_few:>9.0f}"
            print(f"{name:<36}{cells}", flush=True)


def figures(rounds: int, photos: int) -> Iterator[Figure]:
    """What a stage's process costs with many photos and nothing to encode, by what it costs with a hundred."""
    with tempfile.TemporaryDirectory(prefix="benchmark-photos-") as folder:
        paths = [make(Path(folder, f"{number}-metadata"), number) for number in (photos, FEW)]
        turns = [[list(of_stages(path, COMPARED)) for path in paths] for _ in range(rounds)]
    for place, stage in enumerate(COMPARED):
        many, few = ([turn[side][place] for turn in turns] for side in (0, 1))
        for column, what in ((2, "processor"), (3, "memory")):
            costs = ([row[column] for row in side] for side in (many, few))
            yield Figure.of(f"{stage}, {what}", f"{FEW} photos", *costs)


# --- the experiment -----------------------------------------------------------------------------------------------


def make(folder: Path, number: int) -> Path:
    """The path of an experiment file whose photos are known and whose captions and photos are in the store."""
    path = folder / "experiment.toml"
    if not path.exists():
        began = time.perf_counter()
        write_photos(folder / "photos", number, in_files=folder.name.endswith("files"))
        (folder / "new.toml").write_text(EXPERIMENT)
        say(f"{number:,} photos written in {time.perf_counter() - began:.0f} s")
        time.sleep(3.1)  # younger ones are waited for by CheckData
        run("-m", "pipeline", "run", "CheckData", "--experiment", folder / "new.toml")
        run("-m", "benchmarks.photos", "--child", "fill", folder / "new.toml")
        (folder / "new.toml").rename(path)
        say(f"checked, and the store filled, in {time.perf_counter() - began:.0f} s altogether")
    return path


def write_photos(folder: Path, number: int, in_files: bool) -> None:
    """Pictures of one colour but for their number, in subfolders, with captions of their own."""
    header = struct.pack("<2sI4xI", b"BM", 54 + 3 * SIDE**2, 54)  # BMP: nothing is compressed, so nothing is computed
    header += struct.pack("<IiiHHI20x", 40, SIDE, SIDE, 1, 24, 0) + bytes(3 * SIDE**2 - 8)
    lines = []
    for start in range(0, number, PER_FOLDER):
        subfolder = folder / f"{start // PER_FOLDER:04}"
        subfolder.mkdir(parents=True)
        for index in range(start, min(number, start + PER_FOLDER)):
            caption = f"picture number {index} of many, with a caption of about the usual length, in morning light"
            (subfolder / f"{index:07}.bmp").write_bytes(header + struct.pack("<Q", index))
            if in_files:
                (subfolder / f"{index:07}.txt").write_text(caption)
            lines.append(json.dumps({"file_name": f"{subfolder.name}/{index:07}.bmp", "text": caption}) + "\n")
    if not in_files:
        (folder / "metadata.jsonl").write_text("".join(lines))


def fill(path: Path) -> None:
    """Write a row for everything that encoders would make, under its real recipe."""
    from pipeline.experiments import needs_of

    store, needs = needs_of(path)
    for need in needs:
        if need.stage.startswith("Encode"):
            entries = store.entries(need.recipe)
            row = np.full(entries.shape, 0.5, entries.layout.real)
            with entries.writer() as writer:
                for source in need.sources:
                    writer.write(source.item, row, source.name)


# --- what is measured ---------------------------------------------------------------------------------------------

Row = tuple[str, float, float, float]
"""What was measured, its seconds by the clock and of the processor, and the peak of its process so far in MiB."""


def measured(path: Path) -> Iterator[Row]:
    shutil.rmtree(path.parent / "runs", ignore_errors=True)
    yield from rows_of("-m", "benchmarks.photos", "--child", "tasks", path)
    yield from of_stages(path, STAGES)
    yield from rows_of("-m", "benchmarks.photos", "--child", "tasks", path)
    yield from rows_of("-m", "benchmarks.photos", "--child", "parts", path)


def of_stages(path: Path, stages: Sequence[str]) -> Iterator[Row]:
    shutil.rmtree(path.parent / "runs", ignore_errors=True)
    survey = SurveyFile()
    run("-m", "benchmarks.photos", "--child", "hand_over", path, survey.path, files=[survey.fileno()])
    for stage in stages:
        arguments = "-m", "pipeline", "run", stage, "--experiment", path, "--survey", survey.path
        yield (stage, *timed(*arguments, files=[survey.fileno()]))


def tasks(path: Path) -> None:
    """What Luigi's own process does: it surveys the photos, and asks every task."""
    import tasks as module

    done = module.Sample(str(path))
    several = {each.task_family: each for each in luigi_tasks(done)}
    watch("tasks: survey", lambda: module.survey(str(path)).photos(LORA))
    for turn in ("first", "again"):
        watch(f"tasks: all complete(), {turn}", lambda: [each.complete() for each in several.values()])


def hand_over(path: Path, survey: Path) -> None:
    """Put the photos of an experiment where its stages take them from, as Luigi's process does."""
    experiment = load_experiment(path)
    with open(survey, "r+b") as file:
        survey_file.write(file, survey_file.subject(experiment, False), Survey(experiment).photos(LORA))


def luigi_tasks(task) -> Iterator:
    from luigi.task import flatten

    yield task
    for each in flatten(task.requires()):
        yield from luigi_tasks(each)


def parts(path: Path) -> None:
    """What stages do with all photos, one part after another."""
    from cache import lease, needs_text, read_needs, write_atomically
    from pipeline.estimate import preflight
    from pipeline.plan import needs
    from pipeline.plan.plan import resolve
    from pipeline.training.batches import Batches
    from pipeline.training.checkpoint import identity_of

    plan = resolve(load_experiment(path), LORA)
    watch("part: photos", lambda: plan.photos)
    watch("part: captions", lambda: plan.captions)
    watch("part: image_needs", lambda: plan.image_needs)
    watch("part: run_id", lambda: plan.run_id)
    watch("part: identity of checkpoints", lambda: identity_of(plan.decisive))
    needed = watch("part: needed", lambda: needs.needed(plan))
    watch("part: missing", lambda: [plan.entries(each.recipe).missing(each.items) for each in needed])
    text = watch("part: needs_text", lambda: needs_text(needed))
    file = path.parent / "needs.json"
    watch(f"part: write, {len(text) / 1e6:.0f} MB", lambda: write_atomically(file, text))
    watch("part: read_needs", lambda: read_needs(file))
    file.unlink()

    def put_down():
        with lease(plan.store.path, needed):
            pass

    watch("part: lease", put_down)
    watch("part: preflight", lambda: preflight.of_plan(plan))
    batches = watch("part: Batches", lambda: Batches(plan))
    watch("part: first batch", lambda: batches.training(0))


CHILDREN = {"fill": fill, "tasks": tasks, "hand_over": hand_over, "parts": parts}


def watch(name: str, work: Callable):
    """The result of ``work()``; a row says what it took."""
    began, began_busy = time.perf_counter(), time.process_time()
    result = work()
    seconds, busy = time.perf_counter() - began, time.process_time() - began_busy
    print(json.dumps((name, seconds, busy, peak_MiB())), flush=True)
    return result


def peak_MiB() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))


def rows_of(*arguments) -> list[Row]:
    return [tuple(json.loads(line)) for line in run(*arguments).splitlines()]


def timed(*arguments, files: Sequence[int]) -> tuple[float, float, float]:
    """The figures of a `Row` for a process, as the kernel has them."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command(arguments), cwd=ROOT, stdout=said, stderr=said, pass_fds=files)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            said.seek(0)
            sys.exit(said.read().decode())
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**10


def run(*arguments, files: Sequence[int] = ()) -> str:
    done = subprocess.run(command(arguments), cwd=ROOT, capture_output=True, text=True, pass_fds=files)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def command(arguments) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
