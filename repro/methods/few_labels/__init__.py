"""Classification from few labels, one file a method; `task` puts a method, its data and its measurements together."""

from repro.methods.few_labels.baselines import UDA, MeanTeacher, PseudoLabel, Supervised
from repro.methods.few_labels.calibratemix import CalibrateMix
from repro.methods.few_labels.commatch import ComMatch
from repro.methods.few_labels.fixmatch import FixMatch, FlexMatch, FreeMatch, SoftMatch
from repro.methods.few_labels.marginmatch import MarginMatch
from repro.methods.few_labels.mixmatch import MixMatch, ReMixMatch
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
