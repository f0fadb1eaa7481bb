"""The metrics that runs store: what each is called, how it is shown, and which way is better."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a stored metric is shown.

    percent: stored as a fraction, shown in percent. lower: whether less is better. bins: how values were binned, as
    words for a sentence.
    """

    title: str
    percent: bool = True
    lower: bool = True
    bins: str = ""

    @property
    def name(self) -> str:
        """The title without its unit: `error`, `ECE`, `mIoU`."""
        return self.title.split(" (")[0]

    @property
    def unit(self) -> str:
        """Unit of a difference: points, or nothing."""
        return " points" if self.percent else ""

    def show(self, value: float, signed: bool = False) -> str:
        """A stored value as text: percent with two decimals, others with three."""
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.2f}" if self.percent else f"{value:{sign}.3f}"

    def say(self, value: float | None) -> str:
        """A stored value as words: `error 12.34 %`, `ECE 3.21 % (15 right-closed bins)`; `undefined` for None."""
        if value is None:
            return f"{self.name} undefined"
        return f"{self.name} {self.show(value)}{' %' * self.percent}{f' ({self.bins})' if self.bins else ''}"


METRICS = {
    # few labels: of test images
    "error": Metric("error (%)"),
    "ece_15": Metric("ECE (%), 15 bins (lo, hi]", bins="15 right-closed bins"),  # segmentation: of test pixels
    "ece_10_left": Metric("ECE (%), 10 bins [lo, hi)", bins="10 left-closed bins"),
    "nll": Metric("NLL (nats)", percent=False),
    "brier": Metric("Brier", percent=False),
    "accuracy": Metric("accuracy (%)", lower=False),
    "scaled_ece_15": Metric("ECE (%) after temperature scaling, 15 bins (lo, hi]", bins="15 right-closed bins, scaled"),
    "scaled_nll": Metric("NLL (nats) after temperature scaling", percent=False),
    "temperature": Metric("temperature", percent=False),
    # segmentation
    "miou": Metric("mIoU (%)", lower=False),
    "miou_present": Metric("mIoU (%) of classes that occur", lower=False),
    "pixel_accuracy": Metric("pixel accuracy (%)", lower=False),
    "mean_class_accuracy": Metric("mean class accuracy (%)", lower=False),
    "boundary_iou": Metric("boundary IoU (%)", lower=False),
    "boundary_f": Metric("boundary F-score (%)", lower=False),
    "miou_ms": Metric("mIoU (%), several scales", lower=False),
    "miou_crf": Metric("mIoU (%), several scales and CRF", lower=False),
    "cam_miou": Metric("CAM mIoU (%)", lower=False),
    "cam_miou_train": Metric("CAM mIoU (%), training images", lower=False),
    "cam_miou_best": Metric("CAM mIoU (%), best threshold", lower=False),
    "cam_beta_best": Metric("best background threshold", percent=False),
    "cam_above_chance": Metric("CAM mIoU above maps that see no pixel (%)", lower=False),
    "over_activation_mean": Metric("over-activation FP/TP", percent=False),
    "over_activation_bounded_mean": Metric("over-activation FP/(FP+TP) (%)"),
    "potts_energy": Metric("Potts energy of the argmax", percent=False),
    "potts_energy_soft": Metric("Potts energy of the probabilities, bilinear", percent=False),
    "proposal_accuracy": Metric("proposal accuracy (%)", lower=False),
    "proposal_miou": Metric("proposal mIoU (%)", lower=False),
    "pixel_confidence": Metric("mean confidence of pixels (%)", lower=False),
}


def sentence(values: Mapping, names: Iterable[str]) -> str:
    """`mIoU 61.50 %, ECE 4.20 % (15 right-closed bins)`: the named metrics that were stored, in order, each once.

    values: stored metrics by name, None where undefined. names: keys of METRICS.
    """
    return ", ".join(METRICS[name].say(values[name]) for name in dict.fromkeys(names) if name in values)
