"""What the authors of Robust Trust Region chose for each scribble length, on Pascal VOC (C = 21)."""

from dataclasses import dataclass

from repro.methods.scribbles.losses import rescaled_epsilon

PUBLISHED_CLASSES = 21


@dataclass(frozen=True)
class Tuned:
    """epsilon: probability that a proposal label is wrong. gamma: weight of the network's prediction in stage A."""

    epsilon: float
    gamma: float


# share of each scribble that is left, 0 a click -> values of the released README
PUBLISHED = {
    1.0: Tuned(0.9440, 0.05),
    0.8: Tuned(0.9460, 0.075),
    0.5: Tuned(0.9514, 0.1),
    0.3: Tuned(0.9516, 0.1),
    0.0: Tuned(0.9522, 0.1),
}


def tuned_for(length: float, classes: int = PUBLISHED_CLASSES) -> Tuned:
    """The published gamma, and the published epsilon brought over to C = `classes`.

    length: one of the published ones. Lengths between them are refused: both values were tuned for each length alone,
    and nothing says how they run between. Raises ValueError.
    """
    if length not in PUBLISHED:
        known = ", ".join(f"{known:g}" for known in sorted(PUBLISHED))
        raise ValueError(f"length is {length}; published values are for {known}: for another set epsilon and gamma")
    found = PUBLISHED[length]
    return Tuned(rescaled_epsilon(found.epsilon, PUBLISHED_CLASSES, classes), found.gamma)
