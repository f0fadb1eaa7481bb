"""Pictures of scribbles, proposals and predictions beside each other.

Hidden masks of training images are for these figures alone; of the methods, only full supervision sees them.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures.claims import statistic
from figures.plane import class_colours, class_legend, classes_of, tile, unavailable
from figures.style import Drawing, label_of, message, themed, where
from figures.tables import NOT_RUN
from repro.data.masks import IGNORE
from repro.experiment import Experiment
from repro.grid import EMBEDDED
from repro.methods.scribbles.common import PUBLISHED
from repro.runs import folder_of, is_finished, load_outputs
from repro.settings import SettingError

CEILING = "full"  # the method that sees masks: a level, whatever the scribbles' length
LONG = 14  # letters of a name that fit above a picture


# Images


@themed
def length_panels(experiment: Experiment, root: Path | None = None, images: int = 2) -> Figure:
    """Training images of a run under scribbles of every published length, and the truth that they are drawn into.

    images: how many, from the first. Below a scribble: how much of the image it marks. People drew those of files: what
    they are at another length than the run's is not known there.
    """
    title = "Scribbles by length on training images"
    kept = load_outputs(folder_of(experiment, root)) if is_finished(experiment, root) else {}
    if "pool_reach" not in kept:
        return unavailable(title, [experiment], root)
    if experiment.data not in EMBEDDED:
        return message(title, f"{where([experiment])}: other lengths of these scribbles are not known")
    reach, truth, lengths = kept["pool_reach"], kept["pool_truth"], sorted(PUBLISHED)
    shown, (high, wide), columns = min(images, len(truth)), truth.shape[1:], len(lengths) + 1
    figure = Drawing(figsize=(10, (10 / columns * high / wide + 0.3) * shown + 0.7), layout="constrained")
    figure.suptitle(f"{title}: {shown} of {len(truth)} kept\n{where_of([experiment])}; below: share of marked pixels")
    names, colours = classes_of(experiment.data), class_colours(len(classes_of(experiment.data)))
    for index, row in enumerate(figure.subplots(shown, columns, squeeze=False)):
        picture = kept["pool_images"][index].permute(1, 2, 0).numpy()
        for length, axes in zip(lengths, row, strict=False):
            # half precision rounds a reach: it is compared with a length that is rounded alike
            marked = torch.where(reach[index] <= torch.tensor(length).half(), truth[index], IGNORE)
            share = float((marked != IGNORE).double().mean())
            tile(axes, scribbled(picture, marked.numpy(), colours), f"{100 * share:.2f} %")
            axes.set_title(f"{100 * length:g} %{' (click)' * (length == 0)}" if index == 0 else "", fontsize=10)
        tile(row[-1], colours[truth[index].numpy()])
        row[-1].set_title("hidden truth" if index == 0 else "", fontsize=10)
    class_legend(figure, names, [truth[:shown]])
    return figure


@themed
def proposal_panels(experiment: Experiment, root: Path | None = None, images: int = 4) -> Figure:
    """Training images of a run with scribble, last proposal, prediction and hidden truth.

    images: how many, from the first. Below a map: how much of it is right.
    """
    title = f"Proposals of {label_of(experiment)} on training images"
    kept = load_outputs(folder_of(experiment, root)) if is_finished(experiment, root) else {}
    if "pool_proposal" not in kept:
        return unavailable(title, [experiment], root)
    heads = ["image", f"scribble, {experiment.labels} %", "last proposal", "prediction", "hidden truth"]
    maps = [kept["pool_proposal"], kept["pool_prediction"], kept["pool_truth"]]
    note = "below: share of right pixels"
    return _panels(title, where([experiment]), heads, kept, maps, images, classes_of(experiment.data), note, stated=2)


@themed
def method_panels(experiments: Sequence[Experiment], root: Path | None = None, images: int = 4) -> Figure:
    """Training images with scribble, the prediction of each finished run and hidden truth; test mIoU above.

    experiments: of one data set, scale, seed and length, one a method; full supervision may have any length. images:
    how many, from the first. Raises SettingError for runs that learned from different images or scribbles.
    """
    done = {item: load_outputs(folder_of(item, root)) for item in experiments if is_finished(item, root)}
    title = "Predictions on training images"
    if not done:
        return unavailable(title, experiments, root)
    weak = [item for item in done if item.method != CEILING]
    first = done[weak[0]] if weak else next(iter(done.values()))
    if not all(torch.equal(kept["pool_images"], first["pool_images"]) for kept in done.values()):
        raise SettingError("these runs keep different training images; show runs of one data set and scale together")
    if not all(torch.equal(done[item]["pool_scribbles"], first["pool_scribbles"]) for item in weak):
        raise SettingError("these runs learned from different scribbles; show runs of one length together")
    several = len({item.seed for item in done}) > 1
    heads = ["image", f"scribble, {(weak or list(done))[0].labels} %"]
    for item in done:
        name = label_of(item) + f", seed {item.seed}" * several
        name = name.replace(" ", "\n", 1) if len(name) > LONG else name
        heads.append(f"{name}\n{100 * statistic(item, 'miou', root, 'last', 'ema'):.1f} %")
    heads.append("hidden truth")
    maps = [*(kept["pool_prediction"] for kept in done.values()), first["pool_truth"]]
    note = "above: mIoU over all test images" + named(NOT_RUN, experiments, done)
    return _panels(title, where_of(done), heads, first, maps, images, classes_of(experiments[0].data), note)


def _panels(
    title: str, caption: str, heads: Sequence[str], kept: Mapping[str, Tensor], maps: Sequence[Tensor], images: int,
    names: Sequence[str], note: str, stated: int = 0,
) -> Figure:  # fmt: skip
    """A row an image: picture, scribble and label maps (P, H, W). stated: of how many maps the accuracy is below."""
    truth, columns = kept["pool_truth"], len(maps) + 2
    shown, (high, wide) = min(images, len(truth)), truth.shape[1:]
    width = min(10, 1.9 * columns)
    side = width / columns * high / wide + 0.03 + 0.18 * bool(stated)
    lines = title.count("\n") + note.count("\n") + max(head.count("\n") for head in heads)
    figure = Drawing(figsize=(width, side * shown + 0.85 + 0.2 * lines), layout="constrained")
    figure.suptitle(f"{title}: {shown} of {len(truth)} kept\n{caption}\n{note}")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0)
    grid, colours = figure.subplots(shown, columns, squeeze=False), class_colours(len(names))
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10 if columns < 8 else 9)
    for index, row in enumerate(grid):
        picture = kept["pool_images"][index].permute(1, 2, 0).numpy()
        tile(row[0], picture)
        row[0].set_ylabel(f"image {int(kept['pool_index'][index])}", fontsize=8.5)
        tile(row[1], scribbled(picture, kept["pool_scribbles"][index].numpy(), colours))
        for number, (axes, labels) in enumerate(zip(row[2:], maps, strict=True)):
            right = (labels[index] == truth[index])[truth[index] != IGNORE].double().mean()
            tile(axes, colours[labels[index].numpy()], f"{100 * float(right):.1f} %" if number < stated else "")
    class_legend(figure, names, [labels[:shown] for labels in maps])
    return figure


def scribbled(picture: np.ndarray, scribbles: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A pale grey picture under its scribbles, (H, W, 3) in 0..1.

    picture: (H, W, 3) uint8. scribbles: (H, W) uint8, 255 where there is none. colours: (256, 3) in 0..1 by class.
    """
    pale = 0.5 + 0.5 * picture.mean(2, keepdims=True) / 255
    return np.where((scribbles != IGNORE)[..., None], colours[scribbles], pale)


def named(why: str, experiments: Iterable[Experiment], others: Iterable[Experiment]) -> str:
    """A line that names the methods of `experiments` that are not among `others`; empty where there are none."""
    left = set(others)
    names = dict.fromkeys(label_of(item) for item in experiments if item not in left)
    return f"\n{why}: {', '.join(names)}" if names else ""


def where_of(experiments: Iterable[Experiment]) -> str:
    """`where`, of the length that the scribbles have: masks know none."""
    experiments = list(experiments)
    return where([item for item in experiments if item.method != CEILING] or experiments)
