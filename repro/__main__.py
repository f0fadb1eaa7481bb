"""`python -m repro`: run one experiment or many, plan them, report them, and exchange results."""

import argparse
import json
import sys
from pathlib import Path

from repro.settings import SettingError

SEEDS = "number of seeds, from 0 (default: 1)"
WORKERS = "runs at a time (default: one a core, or one with CUDA)"
RUNS = "folder of runs (default: REPRO_RUNS, then runs/ beside the package)"
DATA = "folder of local data sets (default: REPRO_DATA, then the hub)"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do it; returns the exit status (2: bad input, 130: interrupted, 1: failed)."""
    options = parser().parse_args(arguments)
    from repro.data.catalogue import DataError
    from repro.files import CorruptFile
    from repro.models.pretrained import WeightsError
    from repro.runs import RunBusy
    from repro.train import NonFiniteLoss

    try:
        return options.call(options)
    except (SettingError, DataError, WeightsError) as error:
        print(f"repro: {error}", file=sys.stderr)
        return 2
    except (CorruptFile, RunBusy, NonFiniteLoss, OSError) as error:
        print(f"repro: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"repro: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m repro", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run one experiment (skipped if finished, continued if half-trained)")
    _add_experiment(run)
    run.add_argument("--record", help="the experiment as one JSON object, instead of the options above")
    run.add_argument("--runs", type=Path, help=RUNS)
    run.add_argument("--data-root", type=Path, help=DATA)
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    run.add_argument("--progress-lines", action="store_true", help="print progress as JSON lines, for another program")
    run.set_defaults(call=_run)

    show = commands.add_parser("show", help="print an experiment's run id and complete recipe; runs nothing")
    _add_experiment(show)
    show.set_defaults(call=_show)

    job = commands.add_parser("reproduce", help="the main job: runs, tables, figures, HTML report")
    job.add_argument("--scale", default="mini", help="tiny, mini or paper (default: mini)")
    job.add_argument("--seeds", type=int, default=1, help=SEEDS)
    job.add_argument("--workers", type=int, default=0, help=WORKERS)
    job.add_argument("--runs", type=Path, help=RUNS)
    job.add_argument("--device", default="auto")
    job.set_defaults(call=_reproduce)

    plan = commands.add_parser("plan", help="which runs tables, ablations and claims need, why, and what they cost")
    _add_selection(plan)
    plan.add_argument("--workers", type=int, default=0, help=WORKERS)
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(call=_plan)

    rerun = commands.add_parser("rerun", help="execute what `plan` lists: a notebook a run, through papermill")
    _add_selection(rerun)
    rerun.add_argument("--engine", default="auto", help="sequential, snakemake, or auto: snakemake if installed")
    rerun.add_argument("--workers", type=int, default=0, help=WORKERS)
    rerun.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    rerun.add_argument("--retries", type=int, default=1, help="further attempts where trying again can help")
    rerun.add_argument("--time-limit", type=float, metavar="SECONDS", help="of one run (default: none)")
    rerun.add_argument("--profile", help="a Snakemake profile: slurm, kubernetes, or a folder")
    rerun.add_argument("--data-root", type=Path, help=DATA)
    rerun.set_defaults(call=_rerun)

    report = commands.add_parser(
        "report", help="tables, figures and pages from the runs that are there; trains nothing"
    )
    report.add_argument("--scale", default="mini", help="tiny, mini or paper (default: mini)")
    report.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default: 5)")
    report.add_argument("--runs", type=Path, help=RUNS)
    report.add_argument(
        "--publish", action="store_true", help="renew figures/rendered/ too, where no committed run is dropped"
    )
    report.set_defaults(call=_report)

    export = commands.add_parser("export", help="finished runs as one tidy table, a row a run and metric")
    export.add_argument("--to", type=Path, required=True, metavar="FILE", help="a .csv or .parquet file")
    export.add_argument("--scale", help="only runs of this scale (default: all)")
    export.add_argument("--label", default="unnamed", help="who exports, kept with every row")
    export.add_argument("--runs", type=Path, help=RUNS)
    export.set_defaults(call=_export)

    bring = commands.add_parser("import", help="another person's exported results, to be shown beside yours")
    bring.add_argument("file", type=Path, help="what `export` wrote")
    bring.add_argument("--label", required=True, help="whose results they are")
    bring.add_argument("--runs", type=Path, help=RUNS)
    bring.set_defaults(call=_import)
    return top


def _add_selection(command: argparse.ArgumentParser) -> None:
    several = {"nargs": "+", "action": "extend", "default": []}
    command.add_argument("--paper", **several, metavar="P", help="papers (default: all)")
    command.add_argument("--table", **several, metavar="T", help="tables, or ablations, by name")
    command.add_argument("--ablation", **several, metavar="A", help="ablations by name")
    command.add_argument("--claims", nargs="*", action="extend", metavar="ID", help="claims: those named, or all")
    command.add_argument("--main", action="store_true", help="the main job")
    command.add_argument("--scale", default="mini", help="tiny, mini or paper (default: mini)")
    command.add_argument("--seeds", type=int, default=1, help=SEEDS)
    command.add_argument(
        "--stale", action="store_true", help="again what was finished by other sources of this package"
    )
    command.add_argument("--runs", type=Path, help=RUNS)


def _planned(options: argparse.Namespace) -> list:
    from repro.batch import plan

    selection = plan.select(
        options.paper,
        options.table,
        options.ablation,
        options.claims if options.claims else options.claims is not None,
        options.main,
        options.scale,
        _seeds(options),
    )
    return plan.plan(selection, options.runs, options.stale)


def _seeds(options: argparse.Namespace) -> range:
    if options.seeds < 1:
        raise SettingError(f"seeds is {options.seeds}; it must be at least 1")
    return range(options.seeds)


def _workers(options: argparse.Namespace) -> int:
    from repro.batch.local import default_workers

    if options.workers < 0:
        raise SettingError(f"workers is {options.workers}; it must be 0 (one a CPU core, or one with CUDA) or more")
    return options.workers or default_workers()


def _plan(options: argparse.Namespace) -> int:
    from repro.batch import plan

    planned, workers = _planned(options), _workers(options)
    print(json.dumps(plan.as_json(planned, workers), indent=1) if options.json else plan.as_text(planned, workers))
    return 0


def _rerun(options: argparse.Namespace) -> int:
    from repro import runs
    from repro.batch.execute import rerun

    names = ("engine", "workers", "device", "retries", "time_limit", "profile", "data_root")
    settings = {name: getattr(options, name) for name in names}
    return rerun(_planned(options), options.runs or runs.runs_folder(), **settings).exit_status


def _report(options: argparse.Namespace) -> int:
    from repro import runs
    from repro.batch import report

    root = options.runs or runs.runs_folder()
    print(report.build(options.scale, tuple(_seeds(options)), root, options.publish))
    return 0


def _export(options: argparse.Namespace) -> int:
    from figures.exchange import export

    frame = export(options.to, options.runs, options.scale, options.label)
    print(f"{frame['run'].nunique()} runs, {len(frame)} numbers: {options.to}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from figures.exchange import bring_in

    print("\n".join(bring_in(options.file, options.label, options.runs).lines()))
    return 0


def _add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("--paper", default="commatch")
    command.add_argument("--method", default="commatch")
    command.add_argument("--data", default="fashion")
    command.add_argument("--labels", type=int, default=100)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--scale", default="mini", help="tiny, mini or paper")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides",
                         help="change one hyper-parameter, e.g. --set threshold=0.9; repeat for more")  # fmt: skip


def _experiment(options: argparse.Namespace):
    from repro.experiment import Experiment, from_record

    if getattr(options, "record", None):
        try:
            return from_record({"experiment": json.loads(options.record)})
        except json.JSONDecodeError as error:
            raise SettingError(f"--record {options.record!r} is not JSON ({error})") from error
    names = ("paper", "method", "data", "labels", "seed", "scale")
    overrides = tuple(parse_override(text) for text in options.overrides)
    return Experiment(**{name: getattr(options, name) for name in names}, overrides=overrides)


def parse_override(text: str) -> tuple[str, object]:
    """`name=value` as a pair; the value is read as JSON (numbers, true, false), anything else is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingError(f"--set {text!r} does not read NAME=VALUE, for example --set threshold=0.9")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _run(options: argparse.Namespace) -> int:
    from repro import runs
    from repro.batch.local import title
    from repro.batch.progress import StepBar
    from repro.grid import PAPERS
    from repro.measure.metrics import sentence

    experiment = _experiment(options)
    on_step = _print_progress if options.progress_lines else StepBar(title(experiment))
    metrics = runs.execute(
        experiment, options.runs, data_root=options.data_root, device=options.device, on_step=on_step
    )
    final = metrics["reported"]["last"]["ema"]
    print(f"{runs.folder_of(experiment, options.runs)}")
    further = ("nll", "brier", "pixel_accuracy", "boundary_f")
    print(f"{sentence(final, (*PAPERS[experiment.paper].HEADLINES, *further))} (EMA weights, last evaluation)")
    return 0


def _print_progress(done: int, total: int, row: dict) -> None:
    print(json.dumps({"done": done, "total": total}), flush=True)


def _show(options: argparse.Namespace) -> int:
    from repro.experiment import record, run_id

    experiment = _experiment(options)
    print(run_id(experiment))
    print(json.dumps(record(experiment), indent=1))
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from repro.batch.reproduce import reproduce

    return reproduce(options.scale, options.seeds, options.workers, options.runs, options.device)


if __name__ == "__main__":
    sys.exit(main())
