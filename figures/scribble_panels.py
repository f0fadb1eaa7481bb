"""Pictures of scribbles, proposals and predictions beside each other.

Hidden masks of training images are for these figures alone; of the methods, only full supervision sees them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from figures import common
from figures.style import Root, Runs, label_of, message, themed, where
from repro.data.masks import IGNORE
from repro.experiment import Experiment
from repro.grid import EMBEDDED
from repro.methods.scribbles.common import PUBLISHED
from repro.runs import folder_of, is_finished, load_outputs

CEILING = "full"  # the method that sees masks: a level, whatever the scribbles' length


@themed
def length_panels(experiment: Experiment, root: Root = None, images: int = 2) -> Figure:
    """Training images of a run under scribbles of every published length, and the truth that they are drawn into.

    images: how many, from the first. Below a scribble: how much of the image it marks. Scribbles in files were drawn by
    people, so that only the length of the run is known.
    """
    title = "Scribbles by length on training images"
    kept = load_outputs(folder_of(experiment, root)) if is_finished(experiment, root) else {}
    if "pool_reach" not in kept:
        return common.unavailable(title, [experiment], root)
    if experiment.data not in EMBEDDED:
        return message(title, f"{where([experiment])}: other lengths of these scribbles are not known")
    truth, lengths, names = kept["pool_truth"], sorted(PUBLISHED), common.classes_of(experiment.data)
    colours, rows, count = common.class_colours(len(names)), [], min(images, len(truth))
    for index in range(count):
        row = []
        for length in lengths:
            # half precision rounds a reach: it is compared with a length that is rounded alike
            reached = kept["pool_reach"][index] <= torch.tensor(length).half()
            marked = torch.where(reached, truth[index], IGNORE)
            share = float((marked != IGNORE).double().mean())
            row.append((scribbled(kept["pool_images"][index], marked, colours), f"{100 * share:.2f} %"))
        rows.append([*row, colours[truth[index]]])
    heads = [*(f"{100 * length:g} %{' (click)' * (length == 0)}" for length in lengths), "hidden truth"]
    captions = [f"{where_of([experiment])}; below: share of marked pixels"]
    return common.image_grid(f"{title}: {count} of {len(truth)} kept", captions, heads, rows, names, [truth[:count]])[0]


@themed
def proposal_panels(experiment: Experiment, root: Root = None, images: int = 4) -> Figure:
    """Training images of a run with scribble, last proposal, prediction and hidden truth.

    images: how many, from the first. Below a map: how much of it is right.
    """
    title = f"Proposals of {label_of(experiment)} on training images"
    kept = load_outputs(folder_of(experiment, root)) if is_finished(experiment, root) else {}
    if "pool_proposal" not in kept:
        return common.unavailable(title, [experiment], root)
    heads = ["last proposal", "prediction"]
    maps = [kept["pool_proposal"], kept["pool_prediction"]]
    captions = [where([experiment]), "below: share of right pixels"]
    return _panels(title, captions, experiment, heads, kept, maps, images, stated=True)


@themed
def method_panels(experiments: Runs, root: Root = None, images: int = 4) -> Figure:
    """Training images with scribble, the prediction of each finished run and hidden truth; test mIoU above.

    experiments: of one data set, scale, seed and length, one a method; full supervision may have any length. images:
    how many, from the first. Raises SettingError for runs that learned from different images or scribbles.
    """
    done = {item: load_outputs(folder_of(item, root)) for item in experiments if is_finished(item, root)}
    title = "Predictions on training images"
    if not done:
        return common.unavailable(title, experiments, root)
    weak = [item for item in done if item.method != CEILING]
    common.check_alike(done.values(), "pool_images", "different training images")
    common.check_alike((done[item] for item in weak), "pool_scribbles", "learned from different scribbles")
    first = (weak or list(done))[0]
    captions = [where_of(done), "above: mIoU over all test images", common.absent(experiments, done)]
    maps = [kept["pool_prediction"] for kept in done.values()]
    return _panels(title, captions, first, common.heads_of(done, root, "miou"), done[first], maps, images)


def _panels(
    title: str, captions: Sequence[str], experiment: Experiment, heads: Sequence[str], kept: Mapping[str, Tensor],
    maps: Sequence[Tensor], images: int, stated: bool = False,
) -> Figure:  # fmt: skip
    """A row an image: picture, scribble, label maps (P, H, W) and truth. stated: the accuracy stands below a map."""
    truth, names = kept["pool_truth"], common.classes_of(experiment.data)
    count, colours, rows = min(images, len(truth)), common.class_colours(len(names)), []
    for index in range(count):
        known, row = truth[index] != IGNORE, []
        for labels in maps:
            right = float((labels[index] == truth[index])[known].double().mean())
            row.append((colours[labels[index]], f"{100 * right:.1f} %" * stated))
        image = kept["pool_images"][index]
        scribble = scribbled(image, kept["pool_scribbles"][index], colours)
        rows.append([common.picture(image), scribble, *row, colours[truth[index]]])
    heads = ["image", f"scribble, {experiment.labels} %", *heads, "hidden truth"]
    sides = [f"image {int(index)}" for index in kept["pool_index"][:count]]
    shown = [labels[:count] for labels in (*maps, truth)]
    return common.image_grid(f"{title}: {count} of {len(truth)} kept", captions, heads, rows, names, shown, sides)[0]


def scribbled(image: Tensor, scribbles: Tensor, colours):
    """A pale grey image under its scribbles, (H, W, 3) in 0..1.

    image: (3, H, W) uint8. scribbles: (H, W) uint8, 255 where there is none. colours: (256, 3) in 0..1 by class.
    """
    return common.overlay(image, scribbles != IGNORE, colours[scribbles], paleness=0.5)


def where_of(experiments: Iterable[Experiment]) -> str:
    """Like `where`, without the runs under full masks, which have no scribble length."""
    experiments = list(experiments)
    return where([item for item in experiments if item.method != CEILING] or experiments)
