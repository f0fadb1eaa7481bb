"""`python -m repro`: run one experiment, run the main job, or show what a recipe holds."""

import argparse
import json
import sys
from pathlib import Path

from repro.settings import SettingError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do it; returns the exit status (2: bad input, 130: interrupted, 1: failed)."""
    options = parser().parse_args(arguments)
    from repro.checkpoints import CorruptFile
    from repro.data.images import DataError
    from repro.models.pretrained import WeightsError
    from repro.runs import RunBusy
    from repro.training import NonFiniteLoss

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
    run.add_argument("--runs", type=Path, help="folder of runs (default: runs/ beside the package)")
    run.add_argument("--data-root", type=Path, help="folder of local data sets (default: REPRO_DATA, then the hub)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    run.add_argument("--progress-lines", action="store_true", help="print progress as JSON lines, for another program")
    run.set_defaults(call=_run)

    show = commands.add_parser("show", help="print an experiment's run id and complete recipe; runs nothing")
    _add_experiment(show)
    show.set_defaults(call=_show)

    job = commands.add_parser("reproduce", help="the main job: runs, tables, figures, HTML report")
    job.add_argument("--scale", default="mini", help="tiny, mini or paper (default: mini)")
    job.add_argument("--seeds", type=int, default=2, help="number of seeds, from 0 (default: 2)")
    job.add_argument("--workers", type=int, default=0, help="runs at a time (default: one a core, or one with CUDA)")
    job.add_argument("--runs", type=Path, help="folder of runs (default: runs/ beside the package)")
    job.add_argument("--device", default="auto")
    job.set_defaults(call=_reproduce)
    return top


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
    from repro.batch import title
    from repro.metrics import sentence
    from repro.papers import PAPERS
    from repro.progress import StepBar

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
    from repro.reproduce import reproduce

    return reproduce(options.scale, options.seeds, options.workers, options.runs, options.device)


if __name__ == "__main__":
    sys.exit(main())
