"""The pictures of one run or several: a row for each prompt, a column for each model, steps in order in a column."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.page.pictures import Shown, Unreadable, embed
from pipeline.report.run import Listing, Run

MOST_PICTURES = 400
"""In a page; the others are counted."""

Asked = tuple[str, int]
"""A prompt and the seed of its noise."""


@dataclass(frozen=True)
class Shot:
    """A picture.  step: of the training, after which it was drawn; 0: by the pretrained model.

    is_quick: whether it is a quick look, not decoded by the VAE.
    """

    asked: Asked
    step: int
    path: Path
    is_quick: bool = False


@dataclass(frozen=True)
class Cell:
    """What a column has of a prompt: by place of the column's steps; None: not drawn.

    quick: the steps of which it is a quick look.
    """

    label: str
    steps: Sequence[tuple[int, Shown | None]]
    quick: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Card:
    """A prompt with its cells, and the picture that it is conditioned on."""

    prompt: str
    seed: int
    condition: Shown | None
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Gallery:
    """steps: what the slider goes through; none or one where nothing slides.  left_out: prompts that are not shown."""

    cards: Sequence[Card]
    steps: Sequence[int]
    left_out: int = 0

    @property
    def has_quick(self) -> bool:
        """Whether any of it is a quick look."""
        return any(cell.quick for card in self.cards for cell in card.cells)


def shots(run: Run) -> tuple[list[Shot], list[Shot]]:
    """Of a run: what the pretrained model drew, and what was drawn with its results, by rising step.

    Where there is no picture yet there may be a quick look.
    """
    found: dict[tuple[Asked, int], Shot] = {}
    for listing, is_quick in ((run.looks, True), (run.listing, False)):
        for shot in _listed(run, listing, is_quick):
            found[shot.asked, shot.step] = shot
    several = sorted(found.values(), key=lambda shot: shot.step)  # stable: the prompts stay in order
    return [shot for shot in several if not shot.step], [shot for shot in several if shot.step]


def _listed(run: Run, listing: Listing | None, is_quick: bool) -> Iterator[Shot]:
    for row in listing.pictures if listing else []:
        steps = {int(step): name for step, name in row.steps.items() if step.isdecimal() and int(step)}
        steps |= ({0: row.base} if row.base else {}) | ({run.last_step or 1: row.trained} if row.trained else {})
        for step, name in steps.items():
            yield Shot((row.prompt, row.seed), step, _inside(run, name), is_quick)


def conditions(run: Run) -> dict[Asked, Path]:
    rows = run.listing.pictures if run.listing else []
    return {(row.prompt, row.seed): _inside(run, row.condition) for row in rows if row.condition}


def _inside(run: Run, name: str) -> Path:
    """A file that samples.json names; a name that leads out of the run's folder leads nowhere."""
    path = run.folder.path / name
    is_inside = path.resolve().is_relative_to(run.folder.path.resolve())
    return path if is_inside else run.folder.path / "outside the run's folder"


def of_run(run: Run) -> Gallery:
    """The base's pictures beside the run's."""
    base, trained = shots(run)
    return gallery({"base": base, f"with the {run.method.label}": trained}, conditions(run))


def of_several(runs: Mapping[str, Run], are_lengths_of_one: bool) -> Gallery:
    """The base's pictures beside those of each run; or, of one training at several lengths, beside these in turn."""
    both = {label: shots(run) for label, run in runs.items()}
    base = {shot.asked: shot for found, _ in both.values() for shot in found}
    columns = {"base": list(base.values())}
    if are_lengths_of_one:
        label = next(iter(runs.values())).method.label
        columns[f"with the {label}"] = [shot for _, trained in both.values() for shot in trained]
    else:
        columns |= {label: _last(trained) for label, (_, trained) in both.items()}
    asked_with: dict[Asked, Path] = {}
    for run in runs.values():
        asked_with |= conditions(run)
    return gallery(columns, asked_with, is_slid=are_lengths_of_one)


def _last(several: Sequence[Shot]) -> list[Shot]:
    """The newest of each prompt; by rising step."""
    return list({shot.asked: shot for shot in several}.values())


def gallery(columns: Mapping[str, Sequence[Shot]], asked_with: Mapping[Asked, Path], is_slid: bool = True) -> Gallery:
    """columns: the pictures by what the column is called; one that has none is left out.

    is_slid: whether a slider goes through the steps of a column that has several.
    """
    columns = {label: found for label, found in columns.items() if found}
    every = list(dict.fromkeys(shot.asked for found in columns.values() for shot in found))
    each = max(1, sum(len({shot.step for shot in found}) if is_slid else 1 for found in columns.values()))
    kept = every[: max(1, MOST_PICTURES // each)]
    wanted = [shot.path for found in columns.values() for shot in found if shot.asked in set(kept)]
    pictures = embed([*wanted, *(asked_with[asked] for asked in kept if asked in asked_with)])
    cards = [_card(asked, columns, asked_with, pictures) for asked in kept]
    steps = max((sorted({shot.step for shot in found}) for found in columns.values()), key=len, default=[])
    return Gallery(cards, steps if is_slid else [], len(every) - len(kept))


def _card(
    asked: Asked,
    columns: Mapping[str, Sequence[Shot]],
    asked_with: Mapping[Asked, Path],
    pictures: Mapping[Path, Shown],
) -> Card:
    cells = [
        Cell(
            label,
            list(_steps(asked, found, pictures)),
            frozenset(shot.step for shot in found if shot.asked == asked and shot.is_quick),
        )
        for label, found in columns.items()
    ]
    condition = asked_with.get(asked)
    return Card(*asked, pictures[condition] if condition else None, cells)


def _steps(
    asked: Asked, found: Sequence[Shot], pictures: Mapping[Path, Shown]
) -> Iterable[tuple[int, Shown | Unreadable | None]]:
    own = {shot.step: pictures[shot.path] for shot in found if shot.asked == asked}
    for step in sorted({shot.step for shot in found}):
        yield step, own.get(step)
