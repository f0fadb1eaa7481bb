"""Classification from few labels, one file a method; `task` puts a method, its data and its measurements together."""

from repro.methods.few_labels.calibratemix import CalibrateMix
from repro.methods.few_labels.commatch import ComMatch
from repro.methods.few_labels.fixmatch import FixMatch
from repro.methods.few_labels.flexmatch import FlexMatch
from repro.methods.few_labels.freematch import FreeMatch
from repro.methods.few_labels.marginmatch import MarginMatch
from repro.methods.few_labels.mean_teacher import MeanTeacher
from repro.methods.few_labels.mixmatch import MixMatch
from repro.methods.few_labels.pseudo_label import PseudoLabel
from repro.methods.few_labels.remixmatch import ReMixMatch
from repro.methods.few_labels.softmatch import SoftMatch
from repro.methods.few_labels.supervised import Supervised
from repro.methods.few_labels.uda import UDA
from repro.methods.few_labels.ups import UPS
from repro.train import Method

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "pseudo_label": PseudoLabel,
    "mean_teacher": MeanTeacher,
    "mixmatch": MixMatch,
    "remixmatch": ReMixMatch,
    "uda": UDA,
    "fixmatch": FixMatch,
    "flexmatch": FlexMatch,
    "ups": UPS,
    "commatch": ComMatch,
    "freematch": FreeMatch,
    "softmatch": SoftMatch,
    "marginmatch": MarginMatch,
    "calibratemix": CalibrateMix,
}
