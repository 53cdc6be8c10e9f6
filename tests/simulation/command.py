"""`bin/simulate`: many seeds at once, or one seed with its story."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from time import monotonic

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.simulation.faults import CLASSES
from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.run import Outcome, shrink, simulate

BATCH = 8
ALL = "all"
"""For `--mutation`: look for each of them, one after the other, until a seed finds it."""

SHRUNK = 3
"""So many violations are shrunk at the end."""


def run_batch(seeds: tuple[int, ...], without: tuple[str, ...], mutation: str) -> list[Outcome]:
    """Run some seeds in this process."""
    # Nothing of a seed is garbage before its end, and all of it is then.
    gc.disable()
    with mutated(mutation):
        outcomes = [simulate(seed, without) for seed in seeds]
    gc.collect()
    return outcomes


def run_all(
    seeds: Iterable[int], jobs: int, without: tuple[str, ...], mutation: str = ""
) -> Iterator[Outcome]:
    """Run all seeds, in `jobs` processes; outcomes come in the order of the seeds."""
    rest = iter(seeds)
    batches = iter(lambda: tuple(islice(rest, BATCH)), ())
    if jobs == 1:
        for batch in batches:
            yield from run_batch(batch, without, mutation)
        return
    with ProcessPoolExecutor(jobs) as pool:
        waiting = []
        for batch in batches:
            waiting.append(pool.submit(run_batch, batch, without, mutation))
            if len(waiting) > 4 * jobs:
                yield from waiting.pop(0).result()
        for future in waiting:
            yield from future.result()


def hunt(name: str, seeds: range) -> Outcome | None:
    """The first seed in which a mutation is a violation, and the core as it is has none."""
    gc.disable()
    for seed in seeds:
        with mutated(name):
            outcome = simulate(seed)
        if outcome.violation and not simulate(seed).violation:
            return outcome
        if seed % BATCH == 0:
            gc.collect()
    return None


def _hunt_all(seeds: range, jobs: int) -> int:
    """Look for each mutation; 1 if one is not found."""
    lacking = []
    with ProcessPoolExecutor(jobs) as pool:
        hunts = {name: pool.submit(hunt, name, seeds) for name in MUTATIONS}
        for name, future in hunts.items():
            outcome = future.result()
            if outcome is None:
                lacking.append(name)
                click.echo(f"{name}: not found")
            else:
                click.echo(f"{name}: seed {outcome.seed}: {outcome.violation}")
    found = len(MUTATIONS) - len(lacking)
    click.echo(f"seeds {seeds[0]} to {seeds[-1]}: {found} of {len(MUTATIONS)} mutations found")
    return 1 if lacking else 0


def _range(_context: click.Context, _parameter: click.Parameter, text: str | None) -> range:
    if text is None:
        return range(0)
    first, dots, last = text.partition("..")
    if not first.isdigit() or (dots and not last.isdigit()):
        raise click.BadParameter(f"{text!r}: give A..B, two numbers, the last one included")
    return range(int(first), int(last if dots else first) + 1)


def _names(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    unknown = [name for name in names if name not in CLASSES]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there are {', '.join(CLASSES)}")
    return names


@click.command()
@click.option("--seeds", callback=_range, help="A..B: the seeds to run, the last one included.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True)
@click.option("--replay", type=int, help="Run one seed and tell its story.")
@click.option("--without", callback=_names, default="", help="Leave out these classes of faults.")
@click.option(
    "--mutation",
    type=click.Choice([*MUTATIONS, ALL]),
    help="Put this defect in; `all`: for each, look for the first seed that finds it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one object with all counters.")
def main(  # noqa: PLR0917 - click passes them by name
    seeds: range,
    jobs: int,
    replay: int | None,
    without: tuple[str, ...],
    mutation: str | None,
    as_json: bool,
) -> None:
    """Simulate whole clusters under faults, and look for what may not happen."""
    if mutation == ALL and (replay is not None or without or as_json):
        raise click.UsageError("--mutation all goes with --seeds and --jobs only")
    if replay is not None:
        raise SystemExit(_replay(replay, without, mutation or "", as_json))
    if not seeds:
        raise click.UsageError("give --seeds A..B, or --replay SEED")
    if mutation == ALL:
        raise SystemExit(_hunt_all(seeds, jobs))
    raise SystemExit(_run(seeds, jobs, without, mutation or "", as_json))


def _replay(seed: int, without: tuple[str, ...], mutation: str, as_json: bool) -> int:
    with mutated(mutation):
        outcome = simulate(seed, without, None if as_json else click.echo)
    if as_json:
        click.echo(json.dumps(_object(outcome)))
    else:
        click.echo(f"seed {seed}: faults {', '.join(outcome.classes) or 'none'}")
        click.echo(f"trace {outcome.digest}, {outcome.entries} entries")
        click.echo(outcome.detail or "no violation")
    return 1 if outcome.violation else 0


def _object(outcome: Outcome) -> dict[str, object]:
    return {
        "seed": outcome.seed,
        "classes": outcome.classes,
        "digest": outcome.digest,
        "violation": outcome.violation,
        "counters": outcome.counters,
        "simulated_s": round(outcome.simulated_s, 3),
    }


def _run(seeds: range, jobs: int, without: tuple[str, ...], mutation: str, as_json: bool) -> int:
    counters: Counter[str] = Counter()
    bad: list[Outcome] = []
    began, simulated, cpu = monotonic(), 0.0, 0.0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for outcome in run_all(seeds, jobs, without, mutation):
            counters.update(outcome.counters)
            simulated += outcome.simulated_s
            cpu += outcome.cpu_s
            if outcome.violation:
                bad.append(outcome)
                progress.update(task, description=f"seeds ({len(bad)} bad)")
            progress.advance(task)
    told = {
        "seeds": [seeds.start, seeds.stop - 1],
        "violations": [{"seed": o.seed, "what": o.violation, "classes": o.classes} for o in bad],
        "simulated_s": round(simulated, 1),
        "wall_s": round(monotonic() - began, 1),
        "cpu_s": round(cpu, 1),
        "counters": dict(sorted(counters.items())),
    }
    if as_json:
        click.echo(json.dumps(told))
    else:
        _tell(told, bad, without, mutation)
    return 1 if bad else 0


def _tell(
    told: dict[str, object], bad: list[Outcome], without: tuple[str, ...], mutation: str
) -> None:
    counters = told["counters"]
    assert isinstance(counters, dict)
    for name, count in counters.items():
        click.echo(f"{count:>9}  {name}")
    for number, outcome in enumerate(bad):
        click.echo(f"seed {outcome.seed}: {outcome.violation}")
        if number < SHRUNK:
            with mutated(mutation):
                less = (*without, *shrink(outcome.seed, outcome.classes, outcome.violation))
        else:
            less = without
        also = f" --without {','.join(less)}" if less else ""
        also += f" --mutation {mutation}" if mutation else ""
        click.echo(f"    bin/simulate --replay {outcome.seed}{also}")
    seeds = told["seeds"]
    assert isinstance(seeds, list)
    click.echo(
        f"seeds {seeds[0]} to {seeds[1]}: {len(bad)} violations, "
        f"{told['simulated_s']} s simulated in {told['wall_s']} s ({told['cpu_s']} s of CPU)"
    )
