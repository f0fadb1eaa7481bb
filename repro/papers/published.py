"""Published numbers: each with its paper, table, row, column and source, read from the CSV files beside the
papers.

A cell that could not be had is a `Published` whose value is None; it prints as "not available" and is never
filled with a guess.
"""

import csv
import dataclasses
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

NOT_AVAILABLE = "not available"
# How a budget is written, by kind of supervision; every image has its scribbles.
LABELS, MASKS, TAGS, SCRIBBLES = "{} labels", "{} masks", "{} tagged images", "scribble length {} %"
# Published metric -> ours (None: a statement that no run's metric can stand beside). All are percentages or
# points, but for seconds and for settings that a source states.
METRICS = {
    "error_rate": "error",
    "accuracy": "error",
    "mIoU": "miou",
    "seg_miou_no_crf": "miou",
    "seg_miou": "miou_crf",
    "cam_miou": "cam_miou",
    "cam_miou_train": "cam_miou_train",
    "seg_iou": None,
    "accuracy_lower_bound": None,
    "error_rate_reduction_points": None,
    "ece_reduction_percent": None,
    "epsilon": None,
    "unary weight gamma": None,
    "seconds per iteration": None,
}
# Data set as printed -> our name. Both toolboxes' SVHN is train + extra (604,388 images); FixMatch's code can
# make either and what its table used is not verified, so its SVHN compares with nothing of ours.
DATASETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "SVHN": "svhn", "STL-10": "stl10",
            "Pascal VOC 2012 (classic)": "voc", "Cityscapes": "cityscapes", "COCO": "coco2017",
            "Pascal VOC 2012": "voc", "COCO 2014": "coco2014",
            "VOC2012 ScribbleSup": "voc", "VOC2012": "voc"}  # fmt: skip
SEGMENTED = ("voc", "cityscapes", "coco2017", "coco2014")
SCRIBBLED = ("VOC2012 ScribbleSup", "VOC2012")  # of sources whose budget is a scribble length; full masks too
PARTS = ("train", "val", "test")  # splits of papers that train on one budget only, the whole training set
OTHER_SVHN = {"USB": "svhn_extra", "TorchSSL": "svhn_extra", "FixMatch": None}
# Backbone as printed -> our network. Tables of few masks leave out that its stem has three convolutions.
ENCODERS = {"ResNet-50": "resnet50s", "ResNet-101": "resnet101s", "ViT-B/16": "vit_base_patch16_224",
            "DeiT-B/16": "deit_base_patch16_224", "DeepLabV3+ MobileNetV2": "mobilenetv2_100"}  # fmt: skip
STEM = "deep stem in UniMatch's released code"


class PublishedError(ValueError):
    """A row of published numbers that is malformed, or a look-up that more than one row answers
    differently."""


@dataclass(frozen=True)
class Published:
    """One published number as printed.

    dataset, split (number of labels: `40`, `1/16 (92)`; scribble length in percent), backbone, method, setting: in the
    source's own words
    metric: a key of METRICS; value, std: percent or points, None where not available (std: also where not
    printed)
    source: where we read it
    """

    paper: str
    table: str
    dataset: str
    split: str
    backbone: str
    method: str
    setting: str
    metric: str
    value: float | None
    std: float | None
    source: str

    def __post_init__(self):
        several = self.dataset.split("/")  # an average over data sets has no one label budget
        for name in ("paper", "table", "dataset", "split", "method", "source"):
            if not getattr(self, name) and not (name == "split" and len(several) > 1):
                raise PublishedError(f"{name} is empty; every published number names it")
        if self.metric not in METRICS:
            raise PublishedError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if not set(several) <= set(DATASETS):
            raise PublishedError(f"unknown dataset {self.dataset!r}; known: {', '.join(DATASETS)}")
        if self.value is not None and not 0 <= self.value <= 100:
            raise PublishedError(f"value is {self.value}; {self.metric} is a percentage in [0, 100]")
        if self.std is not None and not (self.value is not None and 0 <= self.std < math.inf):
            raise PublishedError(f"std is {self.std}; it must be finite, from 0, and beside a value")
        if any("derived" in getattr(self, name).lower() for name in ("table", "setting", "source")):
            raise PublishedError("a derived number is not a published one")

    @property
    def data(self) -> str | None:
        """Our name of the data it was measured on; None where that is not known."""
        return OTHER_SVHN.get(self.paper, "svhn") if self.dataset == "SVHN" else DATASETS.get(self.dataset)

    @property
    def labels(self) -> int | None:
        """Number of labels or masks, or scribble length: 40 of `40`, 92 of `1/16 (92)`; None where none is printed."""
        number = re.fullmatch(r"(?:.*\()?(\d+)\)?", self.split)
        return int(number[1]) if number else None

    @property
    def budget(self) -> str:
        """`40 labels`, `92 masks`, `scribble length 100 %`; a part that was evaluated, as printed: `val`."""
        if self.split in PARTS:
            return self.split
        words = SCRIBBLES if self.dataset in SCRIBBLED else MASKS if self.data in SEGMENTED else LABELS
        return words.format(self.split if self.labels is None else self.labels)

    @property
    def network(self) -> str:
        """The backbone as our network name: `WRN-28-2 (per committed config)` is wrn-28-2, `ResNet-101` resnet101s."""
        name = self.backbone.split(" (")[0]
        return ENCODERS.get(name, name.lower())

    @property
    def encoder(self) -> str:
        """The backbone as printed, with what that leaves out: `ResNet-101 (deep stem in UniMatch's ...)`."""
        return f"{self.backbone} ({STEM})" if self.network.startswith("resnet") else self.backbone

    def fraction(self, metric: str = "error") -> tuple[float | None, float | None]:
        """Value and spread as fractions in [0, 1] of our `metric` (accuracy a % is error 1 - a / 100).

        Raises PublishedError when this number states something else.
        """
        if METRICS[self.metric] != metric:
            raise PublishedError(f"{self.metric} of {self.paper} {self.table} cannot be read as {metric!r}")
        if self.value is None:
            return None, None
        value = self.value / 100
        return 1 - value if self.metric == "accuracy" else value, None if self.std is None else self.std / 100

    def __str__(self) -> str:
        if self.value is None:
            return NOT_AVAILABLE
        return f"{self.value:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Reference:
    """A published column beside ours: the rows of one paper's table that state `metric` (ours, a fraction).

    backbone: as printed, of a table that has several; empty for any. part: of PARTS, for papers that print the part
    which was evaluated in place of a budget.
    """

    paper: str
    table: str
    metric: str = "error"
    backbone: str = ""
    part: str = ""

    @property
    def title(self) -> str:
        """`USB, results/classic_cv.csv`, `UniMatch, README Cityscapes, ResNet-50`."""
        return ", ".join(filter(None, (self.paper, self.table, self.backbone, self.part)))


@functools.cache
def load(name: str) -> tuple[Published, ...]:
    """All rows of `papers/<name>.csv`. Raises PublishedError naming file, line and field of a malformed
    one."""
    return read(Path(__file__).with_name(f"{name}.csv"))


def read(path: Path) -> tuple[Published, ...]:
    """All rows of a CSV of published numbers, its header being the fields of `Published`; raises as
    `load`."""
    columns = [field.name for field in dataclasses.fields(Published)]
    rows: dict[tuple, Published] = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if (header := next(reader, [])) != columns:
            raise PublishedError(f"{path}: the header is {','.join(header)}; it must be {','.join(columns)}")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(columns):
                raise PublishedError(f"{where}: {len(cells)} cells; there must be {len(columns)}")
            fields = dict(zip(columns, cells, strict=True))
            try:
                row = Published(**fields | {name: _number(name, fields[name]) for name in ("value", "std")})
            except PublishedError as error:
                raise PublishedError(f"{where}: {error}") from error
            key = tuple(v for k, v in fields.items() if k not in ("value", "std", "source"))
            if key in rows:
                raise PublishedError(f"{where}: a second row for {', '.join(filter(None, key))}")
            rows[key] = row
    return tuple(rows.values())


def _number(name: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise PublishedError(f"{name} is {text!r}; it must be a number or empty") from None


def lookup(
    rows: tuple[Published, ...], reference: Reference, data: str, labels: int, names: tuple[str, ...]
) -> Published:
    """The number that `reference` prints for a method on `data` with `labels` labels, masks or percent of scribbles;
    value None where there is none.

    names: what the sources call the method, or the setting that a row of an ablation states, at least one, the
        preferred one first.
    svhn and svhn_extra both find "SVHN": compare the result's `.data` before taking a difference.
    Raises PublishedError for data that no source has, and when rows of one name differ by more than .01
    points.
    """
    ours = data.removesuffix("_extra")
    titles = [title for title, name in DATASETS.items() if name == ours]
    if not titles:
        known = ", ".join(dict.fromkeys(DATASETS.values()))
        raise PublishedError(f"no published number is on {data!r}; known: {known}")
    dataset = next((row.dataset for row in rows if row.dataset in titles), titles[0])
    backbones = (reference.backbone,) if reference.backbone else {row.backbone for row in rows}
    for name in names:
        found = [
            row
            for row in rows
            if (row.paper, row.table) == (reference.paper, reference.table)
            and row.dataset in titles
            and (row.split == reference.part if reference.part else row.labels == labels)
            and name in (row.method, row.setting)
            and METRICS[row.metric] == reference.metric
            and row.backbone in backbones
        ]
        values = [row.fraction(reference.metric)[0] for row in found if row.value is not None]
        if values and max(values) - min(values) > 1e-4:
            raise PublishedError(
                f"{reference.title} has different numbers for {name} on {dataset} with {found[0].budget}: "
                f"{', '.join(f'{row.metric} {row} ({row.setting}, {row.backbone})' for row in found)}"
            )
        if found:
            return next((row for row in found if row.value is not None), found[0])
    metric = next(printed for printed, ours in METRICS.items() if ours == reference.metric)
    return Published(
        reference.paper,
        reference.table,
        dataset,
        reference.part or str(labels),
        reference.backbone,
        names[0],
        "",
        metric,
        None,
        None,
        NOT_AVAILABLE,
    )
