"""Recipes: the complete hyper-parameters of a method on one data set at one scale, by kind of supervision."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from repro.settings import SettingError, check, hyper
from repro.train import OPTIMISERS, SCHEDULES

SCALES = ("tiny", "mini", "paper")


class Cell(Protocol):
    """What tasks read of an experiment: which data, how many labels, and the seed of the draw."""

    method: str
    data: str
    labels: int
    seed: int
    scale: str
    split: str


@dataclass(frozen=True)
class Recipe:
    """Complete hyper-parameters of one method on one data set at one scale. A scale changes these numbers only.

    What every paper has; each kind of supervision adds its own fields. Defaults are FixMatch's.
    """

    method: Any = None  # the method's own settings, a frozen dataclass
    network: str = hyper("wrn-28-2", source="a name of models.wide_resnet or, for masks, models.resnet")
    batch: int = hyper(64, "B", source="FixMatch", low=1)
    unlabelled_ratio: int = hyper(7, "mu", source="FixMatch; ComMatch states 5", low=1)
    # optimisation
    steps: int = hyper(2**20, source="FixMatch; of each stage", low=1)
    epoch_steps: int = hyper(1024, source="USB calls this an epoch", low=1)
    optimiser: str = hyper("sgd", choices=OPTIMISERS)
    lr: float = hyper(0.03, "eta", source="FixMatch", low=0)
    momentum: float = hyper(0.9, "beta", source="FixMatch", low=0, high=1)
    nesterov: bool = hyper(True, source="FixMatch")
    weight_decay: float = hyper(5e-4, source="FixMatch; 1e-3 on CIFAR-100; none on BN and biases", low=0)
    schedule: str = hyper("cosine-7/16", source="FixMatch", choices=SCHEDULES)
    warmup_steps: int = hyper(0, low=0)
    ema: float = hyper(0.999, source="FixMatch", low=0, high=1)
    # measurement
    eval_every: int = hyper(5120, source="USB", low=1)
    log_every: int = hyper(256, low=1)
    checkpoint_every: int = hyper(5120, low=1)
    # execution
    precision: str = hyper("bf16", source="ours; toolboxes use float16 mixed precision", choices=("fp32", "bf16"))
    channels_last: bool = hyper(True)
    compile: bool = hyper(False, source="torch.compile the network")
    threads: int = hyper(0, source="CPU threads; 0 leaves torch's default", low=0)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class LabelRecipe(Recipe):
    """A recipe for classification from few labels."""

    variant: str = hyper("usb", source="which toolbox's wide ResNet", choices=("usb", "ups"))
    discard_bn: bool = hyper(True, source="the toolboxes' quirk; see models.wide_resnet")
    dropout: float = hyper(0.0, "p", source="rate inside blocks", low=0, high=0.95)
    bn_momentum: float = hyper(0.001, source="USB, TorchSSL", low=1e-6, high=1)
    strong: str = hyper("randaugment-usb", source="a flavour of data.augment")
    flip: bool = hyper(True, source="horizontal flip; wrong for digits")
    holdout: int = hyper(0, source="ours: labelled images a class kept out of the pool to fit a temperature", low=0)
    padding: int = hyper(4, source="reflect padding before the random crop, pixels", low=0)


@dataclass(frozen=True)
class MaskRecipe(Recipe):
    """A recipe for segmentation from few masks. Defaults are CSL's on Pascal (released configuration)."""

    output_stride: int = hyper(8, source="CSL; UniMatch 16. resnet-mini, half the strides, has half", choices=(8, 16))
    weights: str = hyper("pretrained", source="ImageNet, or a stand-in at mini; `scratch`, a file or a hub id")
    crop: int = hyper(321, source="UniMatch, CSL; 801 on Cityscapes", low=16)
    scale_low: float = hyper(0.5, source="UniMatch, CSL: smallest long side of a training view, relative", low=0.05)
    scale_high: float = hyper(2.0, source="UniMatch, CSL: largest long side of a training view, relative", low=0.05)
    labelled_loss: str = hyper("ce", source="UniMatch, CSL: OHEM on Cityscapes", choices=("ce", "ohem"))
    head_factor: float = hyper(10.0, source="learning rate outside the backbone; 1 on Cityscapes", low=0)
    window: int = hyper(0, source="side of the evaluation's sliding window, 801 on Cityscapes; 0: whole images", low=0)
    images: int = hyper(0, source="ours: training images of the embedded scenes; 0 for published sets", low=0)
    tests: int = hyper(0, source="ours: test images of the embedded scenes; 0 for published sets", low=0)
    lists: str = hyper("own", source="published lists of Pascal's blended splits", choices=("own", "u2pl"))


@dataclass(frozen=True)
class TagRecipe(Recipe):
    """A recipe for segmentation from image tags. Defaults are PCRE's on Pascal (released code)."""

    weights: str = hyper("pretrained", source="ImageNet, or a stand-in at mini; `scratch`, a file or a hub id")
    auxiliary: int = hyper(-3, source="ToCo, DuPL, PCRE: block whose patches feed the auxiliary classifier")
    value_only: bool = hyper(False, source="PCRE (released code): the last block mixes nothing; peers: off")
    crop: int = hyper(448, source="ToCo, DuPL, PCRE", low=16)
    scale_low: float = hyper(0.5, source="ToCo, DuPL, PCRE: smallest long side of a training view, relative", low=0.05)
    scale_high: float = hyper(2.0, source="ToCo, DuPL, PCRE: largest long side of a training view, relative", low=0.05)
    colour: bool = hyper(True, source="PCRE on VOC: views are coloured; ToCo, DuPL, and PCRE on COCO: off")
    head_factor: float = hyper(10.0, source="ToCo, DuPL, PCRE: learning rate of classifiers and heads", low=0)
    cam_scales: str = hyper("1,0.5,0.75,1.5", source="PCRE, with flips; ToCo and DuPL 1, .5, 1.5")
    cam_low: float = hyper(0.25, source="PCRE: at most this is background", low=0, high=1)
    cam_high: float = hyper(0.7, source="PCRE: above this is a class", low=0, high=1)
    beta: float = hyper(0.5, "beta", "PCRE, Tab. 1b: background of hard labels when CAMs are evaluated", low=0, high=1)
    warm_up: float = hyper(0.1, source="PCRE: share of training before the head learns", low=0, high=1)
    images: int = hyper(0, source="ours: training images of the embedded scenes; 0 for published sets", low=0)
    tests: int = hyper(0, source="ours: test images of the embedded scenes; 0 for published sets", low=0)

    def __post_init__(self):
        super().__post_init__()
        scales_of(self.cam_scales)
        if self.cam_low > self.cam_high:
            raise SettingError(f"cam_low is {self.cam_low}, cam_high {self.cam_high}; the first must not be larger")

    @property
    def scales(self) -> tuple[float, ...]:
        """The numbers of `cam_scales`."""
        return scales_of(self.cam_scales)


@dataclass(frozen=True)
class ScribbleRecipe(Recipe):
    """A recipe for segmentation from scribbles. Defaults are Robust Trust Region's on Pascal (released scripts).

    There an epoch is 882 batches, and both stages have 60: `start_steps` of partial cross-entropy, then `steps`.
    """

    network: str = hyper("mobilenetv2_100", source="released code; a name of models.deeplab.BACKBONES")
    batch: int = hyper(12, "B", source="released script", low=1)
    steps: int = hyper(52_920, source="released code: 60 epochs of the second stage", low=1)
    epoch_steps: int = hyper(882, source="10,582 images in batches of 12", low=1)
    lr: float = hyper(0.007, "eta", source="rloss; assumed of the first stage. Methods say their share later", low=0)
    nesterov: bool = hyper(False, source="released code")
    weight_decay: float = hyper(5e-4, source="released code; on everything", low=0)
    schedule: str = hyper("poly-0.9", source="released code", choices=SCHEDULES)
    ema: float = hyper(0.0, source="released code", low=0, high=1)
    output_stride: int = hyper(16, source="released code. resnet-mini, half the strides, has half", choices=(8, 16))
    weights: str = hyper("pretrained", source="ImageNet, or a stand-in at mini; `scratch`, a file or a hub id")
    crop: int = hyper(513, source="released script", low=16)
    scale_low: float = hyper(0.5, source="released code: smallest short side of a view, over the crop", low=0.05)
    scale_high: float = hyper(2.0, source="released code: largest short side of a view, over the crop", low=0.05)
    blur: bool = hyper(True, source="released code: half of the views are blurred, by a radius of U(0, 1)")
    start_steps: int = hyper(52_920, source="released README: 60 epochs of partial cross-entropy first", low=0)
    head_factor: float = hyper(10.0, source="released code: learning rate outside the backbone", low=0)
    width: int = hyper(3, source="rloss: pixels of a scribble; drawn into scenes alone, ours at 64 px: 1", low=1)
    workers: int = hyper(0, source="ours: processes that solve stage A; 0: none beside this one", low=0)
    images: int = hyper(0, source="ours: training images of the embedded scenes; 0 for published sets", low=0)
    tests: int = hyper(0, source="ours: test images, all those of a published set if 0", low=0)


def scales_of(text: str) -> tuple[float, ...]:
    """Scales written as `1,0.5,1.5`. Raises SettingError unless there is one and all are positive and finite."""
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise SettingError(f"scales are {text!r}; they must be positive numbers between commas, as in '1,0.5,1.5'")
    return scales
