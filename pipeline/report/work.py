"""What the stages of a run did: how many items each made and reused, how long it took, in how much memory."""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.core.folders import folders
from cache.core.needs import NotedNeed
from pipeline.report.run import Record, Run, read_records

MADE = {"encoded": "items", "drawn": "pictures", "decoded": "pictures", "steps": "steps"}
"""Keys of a stage's outcome that count what it made, and what that is."""

PART_DTYPES = {"params": "parameters", "compute": "computes in", "storage": "stored as"}


@dataclass(frozen=True)
class Work:
    """A stage, all its shards together.

    made, reused: None where the stage counts nothing, or nothing says how many it needed.  reused_from: the earlier run
    that had the same entries made.  seconds, peaks: of the process that made them; of shards the sum, and the highest.
    """

    stage: str
    unit: str
    made: int | None
    reused: int | None
    seconds: float
    process_bytes: int | None
    device_bytes: int | None
    device: str
    finished: str
    reused_from: str = ""


def of_run(run: Run) -> list[Work]:
    """In the order of work: what encoders left in the store, then what lies in the run's folder."""
    rows = [_encoding(run, stage, needs) for stage, needs in _by_stage(run).items()]
    rows += [_in_run(run, record) for record in run.records]
    return [row for row in rows if row]


def encoders_records(run: Run) -> list[Record]:
    return [record for stage, needs in _by_stage(run).items() for record in _records_of(run, stage, needs)]


def _by_stage(run: Run) -> dict[str, list[NotedNeed]]:
    """What a training reads, by the stage that made it; pictures with its result are in the run's own records."""
    found: dict[str, list[NotedNeed]] = {}
    for need in run.needs:
        if need.stage != run.method.stages.draw:
            found.setdefault(need.stage, []).append(need)
    return found


def _records_of(run: Run, stage: str, needs: Sequence[NotedNeed]) -> list[Record]:
    """Those of the stage, or of its shards, which lie with the first of its entries."""
    own = [record for folder in _folders_of(run, needs[0]) for record in read_records(folder, run.missing)]
    own = [record for record in own if record.stage == stage]
    whole = [record for record in own if not record.shard]
    return whole[-1:] or own


def _folders_of(run: Run, need: NotedNeed) -> list[Path]:
    """Of the entries of a recipe, in each store that has some."""
    if run.experiment is None or not run.has_origin:
        return []
    several = [(store, name) for store in run.experiment.stores for name in folders([store])]
    return [store / "entries" / name for store, name in several if name.endswith(f"-{need.id}")]


def _encoding(run: Run, stage: str, needs: Sequence[NotedNeed]) -> Work | None:
    records = _records_of(run, stage, needs)
    if not records:
        return None
    needed = sum(len(need.items) for need in needs)
    counted = next((key for key in MADE if key in records[0].outcome), "")
    made = min(needed, sum(_count(record.outcome, counted) for record in records))
    earlier = _earlier_user(run, needs, records)
    made = 0 if earlier else made
    return _summed(stage, MADE.get(counted, ""), made, needed - made, records, earlier)


def _earlier_user(run: Run, needs: Sequence[NotedNeed], records: Sequence[Record]) -> str:
    """The run beside this one that trained on the same entries before this one began; "" where this was the first."""
    made, own_ids = max(record.finished for record in records), {need.id for need in needs}
    began = _began(run.record(run.method.stages.train))
    users = []
    for other in run.folder.others():
        for record in read_records(other.path, []):
            entries = record.inputs.get("entries")
            several = entries.values() if isinstance(entries, Mapping) and record.stage.startswith("Train") else ()
            ids = {each for found in several if isinstance(found, list) for each in found if isinstance(each, str)}
            if own_ids <= ids and made <= _began(record) < began:
                users.append((_began(record), other.path.name))
    return min(users)[1] if users else ""


LATER = "9999"


def _began(record: Record | None) -> str:
    """When a stage's process was started, as records write times; later than all where there is none."""
    if record is None:
        return LATER
    try:
        began = datetime.datetime.fromisoformat(record.finished) - datetime.timedelta(seconds=record.seconds)
    except (ValueError, OverflowError):
        return LATER
    return began.strftime("%Y-%m-%dT%H:%M:%SZ")


def _in_run(run: Run, record: Record) -> Work:
    counted = next((key for key in MADE if key in record.outcome), "")
    made = _count(record.outcome, counted) if counted else None
    return _summed(record.stage, MADE.get(counted, ""), made, _reused_pictures(run, record), [record])


def _reused_pictures(run: Run, record: Record) -> int | None:
    """Of the stage that draws: pictures that were in the store already, as the base's are from the second run on."""
    if "drawn" not in record.outcome or record.shard or run.listing is None:
        return None
    wanted = sum(bool(row.base) + bool(row.trained) for row in run.listing.pictures)
    return max(0, wanted - _count(record.outcome, "drawn"))


def _count(outcome: Mapping, key: str) -> int:
    value = outcome.get(key)
    return value if isinstance(value, int) and value >= 0 else 0


def _summed(
    stage: str, unit: str, made: int | None, reused: int | None, records: Sequence[Record], earlier: str = ""
) -> Work:
    def highest(kind: str) -> int | None:
        return max(
            (record.peak_memory_bytes[kind] for record in records if kind in record.peak_memory_bytes), default=None
        )

    seconds, last = sum(record.seconds for record in records), records[-1]
    name = stage if len(records) == 1 and not last.shard else f"{stage}, {len(records)} shards"
    peaks = highest("process"), highest("device")
    return Work(name, unit, made, reused, seconds, *peaks, last.device, last.finished, earlier)


# --- precision ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """A component: what the policy asked for, and what was found of its parameters and of its output."""

    component: str
    asked: str
    parameters: str
    output: str


def precision_of(run: Run) -> tuple[str, list[Precision]]:
    """The preset, and each component as the last stage that loaded it measured it."""
    asked: dict[str, Mapping] = {}
    found: dict[str, Mapping] = {}
    preset = ""
    for record in [*encoders_records(run), *run.records]:
        preset = str(record.precision.get("preset", preset))
        asked |= {name: policy for name, policy in record.precision.items() if isinstance(policy, Mapping)}
        found |= _measured(record)
    names = [*asked, *(name for name in found if name not in asked)]
    trained = next((name for name in found if name not in asked), "")
    rows = []
    for name in names:
        measured = found.get(trained if name == "trained" else name, {})
        if name == trained and "trained" in asked:
            continue
        label = f"trained ({trained})" if name == "trained" and trained else name
        rows.append(Precision(label, _policy(asked.get(name)), _dtypes(measured), str(measured.get("output", ""))))
    return preset, rows


def _measured(record: Record) -> dict[str, Mapping]:
    """By component; an encoder's record names the component among what it read."""
    measured = record.outcome.get("precision")
    if isinstance(measured, Mapping) and "output" in measured:
        return {name: measured for name in record.inputs if name not in ("items", "items_digest")}
    return {name: each for name, each in _items(measured) if isinstance(each, Mapping)}


def _items(value) -> Iterator:
    return iter(value.items()) if isinstance(value, Mapping) else iter(())


def _policy(policy: Mapping | None) -> str:
    if policy is None:
        return ""
    dtypes = [str(policy.get(part, "")) for part in PART_DTYPES]
    said = dtypes[0] if len(set(dtypes)) == 1 else ", ".join(map(" ".join, zip(PART_DTYPES.values(), dtypes)))
    return said + (", simulated" if policy.get("simulated") else "")


def _dtypes(measured: Mapping) -> str:
    counts = measured.get("parameters")
    return ", ".join(f"{dtype}: {count:,}" for dtype, count in _items(counts) if isinstance(count, int))
