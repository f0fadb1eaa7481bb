"""`python -m repro`: run one experiment or many, plan them, report on them, and export results.

A command imports what it needs when it is called, so that `--help` does not wait for torch.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from repro.settings import SettingError

BAD_INPUT = {"SettingError", "DataError", "WeightsError"}
FAILED = {"CorruptFile", "RunBusy", "NonFiniteLoss", "OSError"}
SEVERAL = ("--paper", "--table", "--ablation", "--claims")  # of `plan` and `rerun`: one name or more
EVERY = "all"


class Commands(TyperGroup):
    """The commands; what goes wrong in one is one line and a status."""

    def invoke(self, ctx) -> None:
        """Execute a command. Its status is 2 for bad input, 130 after an interruption, 1 for another failure."""
        try:
            raise typer.Exit(super().invoke(ctx) or 0)
        except KeyboardInterrupt as error:
            _stop(130, str(error) or "interrupted")
        except Exception as error:
            names = {kind.__name__ for kind in type(error).__mro__}
            if names & BAD_INPUT:
                _stop(2, str(error))
            if names & FAILED:
                _stop(1, f"{type(error).__name__}: {error}")
            raise


def _stop(status: int, message: str) -> None:
    print(f"repro: {message}", file=sys.stderr)
    raise typer.Exit(status)


app = typer.Typer(cls=Commands, help=__doc__.partition("\n")[0], add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, do what it asks, and return the exit status."""
    try:
        app(spelled_out(sys.argv[1:] if arguments is None else arguments), prog_name="python -m repro")
    except SystemExit as end:
        return end.code
    raise AssertionError("typer always exits")


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """`plan --paper csl pcre --claims` as typer reads it: `plan --paper csl --paper pcre --claims all`."""
    if not arguments or arguments[0] not in ("plan", "rerun"):
        return list(arguments)
    words, option = [], None
    for word, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        if word.startswith("-"):
            option = word if word in SEVERAL else None
            if not option or following.startswith("-"):  # a value adds its option
                words += [word, EVERY] if word == "--claims" else [word]
        else:
            words += [option, word] if option else [word]
    return words


def option(*names: str, **how) -> Any:
    """A command line option without the environment's and the default's value in its help."""
    return typer.Option(*names, show_default=False, **how)


Runs = Annotated[Path | None, option(help="folder of runs (default: REPRO_RUNS, then runs/ beside the package)")]
Data = Annotated[Path | None, option(help="folder of local data sets (default: REPRO_DATA, then the hub)")]
Scale = Annotated[str, option(help="tiny, mini or paper (default: mini)")]
Seeds = Annotated[int, option(help="number of seeds, from 0 (default: 1; of a report 5)")]
Workers = Annotated[int, option(help="runs at a time (default: one a core, or one a GPU)")]
Device = Annotated[str, option(help="auto, cpu, cuda, cuda:1 ... (default: auto)")]
# One experiment
Overrides = Annotated[
    list[str],
    option("--set", metavar="NAME=VALUE", help="change one setting, e.g. --set threshold=0.9; repeat for more"),
]
# A selection of runs
Papers = Annotated[list[str], option("--paper", metavar="P ...", help="papers (default: all)")]
Tables = Annotated[list[str], option("--table", metavar="T ...", help="tables, or ablations, by name")]
Ablations = Annotated[list[str], option("--ablation", metavar="A ...", help="ablations by name")]
Claims = Annotated[list[str], option("--claims", metavar="[ID ...]", help="claims: those named, or all")]
Main = Annotated[bool, option("--main", help="the main job")]
Stale = Annotated[bool, option("--stale", help="run again what other code of this package finished")]


@app.command()
def run(
    paper: str = "commatch", method: str = "commatch", data: str = "fashion", labels: int = 100, seed: int = 0,
    scale: Scale = "mini", overrides: Overrides = (),
    record: Annotated[str | None, option(help="the experiment as one JSON object, instead of these options")] = None,
    runs: Runs = None, data_root: Data = None, device: Device = "auto",
    progress_lines: Annotated[bool, option("--progress-lines", help="print progress as JSON lines")] = False,
) -> None:  # fmt: skip
    """Run one experiment (skipped if finished, continued if half-trained)."""
    from repro.batch.progress import StepBar, title
    from repro.experiment import from_record
    from repro.measure.metrics import sentence
    from repro.papers import SPECS
    from repro.runs import execute, folder_of

    if record is None:
        experiment = _experiment(paper, method, data, labels, seed, scale, overrides)
    else:
        try:
            experiment = from_record({"experiment": json.loads(record)})
        except json.JSONDecodeError as error:
            raise SettingError(f"--record {record!r} is not JSON ({error})") from error
    on_step = _print_progress if progress_lines else StepBar(title(experiment))
    metrics = execute(experiment, runs, data_root=data_root, device=device, on_step=on_step)
    print(folder_of(experiment, runs))
    names = (*SPECS[experiment.paper].headlines, "nll", "brier", "pixel_accuracy", "boundary_f")
    print(f"{sentence(metrics['reported']['last']['ema'], names)} (EMA weights, last evaluation)")


def _print_progress(done: int, total: int, row: dict) -> None:
    print(json.dumps({"done": done, "total": total}), flush=True)


@app.command()
def show(
    paper: str = "commatch", method: str = "commatch", data: str = "fashion", labels: int = 100, seed: int = 0,
    scale: Scale = "mini", overrides: Overrides = (),
) -> None:  # fmt: skip
    """Print an experiment's run id and complete recipe; runs nothing."""
    from repro.experiment import record, run_id

    experiment = _experiment(paper, method, data, labels, seed, scale, overrides)
    print(run_id(experiment))
    print(json.dumps(record(experiment), indent=1))


def _experiment(paper, method, data, labels, seed, scale, overrides):
    from repro.experiment import Experiment

    return Experiment(paper, method, data, labels, seed, scale, tuple(map(parse_override, overrides)))


def parse_override(text: str) -> tuple[str, object]:
    """`name=value` as a pair; the value is read as JSON (numbers, true, false), anything else is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingError(f"--set {text!r} does not read NAME=VALUE, for example --set threshold=0.9")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


@app.command()
def plan(
    paper: Papers = (), table: Tables = (), ablation: Ablations = (), claims: Claims = (), main: Main = False,
    scale: Scale = "mini", seeds: Seeds = 1, stale: Stale = False, runs: Runs = None, workers: Workers = 0,
    as_json: Annotated[bool, option("--json", help="print JSON instead of a table")] = False,
) -> None:  # fmt: skip
    """Print which runs tables, ablations and claims need, why, and what they cost."""
    from repro.batch import plan
    from repro.batch.execute import default_workers

    planned = _planned(paper, table, ablation, claims, main, scale, seeds, stale, runs)
    if workers < 0:
        raise SettingError(f"workers is {workers}; it must be 0 (one a CPU core, or one with CUDA) or more")
    workers = workers or default_workers()
    print(json.dumps(plan.as_json(planned, workers), indent=1) if as_json else plan.as_text(planned, workers))


@app.command()
def rerun(
    paper: Papers = (), table: Tables = (), ablation: Ablations = (), claims: Claims = (), main: Main = False,
    scale: Scale = "mini", seeds: Seeds = 1, stale: Stale = False, runs: Runs = None, workers: Workers = 0,
    engine: Annotated[str, option(help="local, snakemake, or auto: snakemake if installed (default: auto)")] = "auto",
    device: Device = "auto",
    retries: Annotated[int, option(help="further attempts where trying again can help (default: 1)")] = 1,
    time_limit: Annotated[float | None, option(metavar="SECONDS", help="of one run (default: none)")] = None,
    profile: Annotated[str | None, option(help="a Snakemake profile: slurm, kubernetes, or a folder")] = None,
    data_root: Data = None,
) -> int:  # fmt: skip
    """Execute what `plan` lists: a notebook a run, through papermill."""
    from repro.batch.execute import execute

    planned = _planned(paper, table, ablation, claims, main, scale, seeds, stale, runs)
    return execute(planned, runs, engine=engine, workers=workers, device=device, retries=retries,
                   time_limit=time_limit, profile=profile, data_root=data_root).exit_status  # fmt: skip


def _planned(paper, table, ablation, claims, main, scale, seeds, stale, runs) -> list:
    from repro.batch import plan

    claims = EVERY in claims or claims
    selection = plan.select(paper, table, ablation, claims, main, scale, plan.first_seeds(seeds))
    return plan.plan(selection, runs, stale)


@app.command()
def reproduce(
    scale: Scale = "mini", seeds: Seeds = 1, workers: Workers = 0, runs: Runs = None, device: Device = "auto"
) -> int:
    """Run the main job: runs, tables, figures, HTML report."""
    from repro.batch.reproduce import reproduce

    return reproduce(scale, seeds, workers, runs, device)


@app.command()
def report(
    scale: Scale = "mini", seeds: Seeds = 5, runs: Runs = None,
    publish: Annotated[
        bool, option("--publish", help="renew figures/rendered/ too, where no committed run is dropped")
    ] = False,
) -> None:  # fmt: skip
    """Write tables, figures and pages from the runs that are there; trains nothing."""
    from repro.batch import plan, report
    from repro.runs import runs_folder

    print(report.build(scale, plan.first_seeds(seeds), runs or runs_folder(), publish=publish))


@app.command()
def export(
    to: Annotated[Path, option(metavar="FILE", help="a .csv or .parquet file")],
    scale: Annotated[str | None, option(help="only runs of this scale (default: all)")] = None,
    label: Annotated[str, option(help="who exports, kept with every row")] = "unnamed",
    runs: Runs = None,
) -> None:
    """Write the finished runs as one tidy table: a row a run, reporting rule, kind of weights and metric."""
    from repro.batch.records import export

    frame = export(to, runs, scale, label)
    print(f"{frame['run'].nunique()} runs, {len(frame)} numbers: {to}")


if __name__ == "__main__":
    sys.exit(main())
