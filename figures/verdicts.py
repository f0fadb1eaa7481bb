"""Claims at a glance: the effect of each with its interval and its seeds, and the verdict."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from figures.claims import CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, Verdict
from figures.style import BLUE, GREY, INK, RED, Drawing, message, start, themed

LOOKS = {  # colour, marker, fill
    SUPPORTED: (BLUE, "o", BLUE),
    CONTRADICTED: (RED, "X", RED),
    INCONCLUSIVE: (GREY, "s", "white"),
}
ROW, WRAP = 0.36, 74  # inches of a claim, letters of a line of it


@themed
def claim_effects(verdicts: Sequence[Verdict], title: str) -> Drawing:
    """The verdicts of a paper's claims, in order: mean, 95 % interval and each seed's difference; right is as claimed.

    verdicts: of `claims.decide`. Effects in points share a panel; every other unit has its own. A claim without a
    finished pair is marked as not run. A dotted line left of zero is the margin of a "not worse" claim.
    """
    if all(verdict.verdict == NOT_RUN for verdict in verdicts):
        return message(title, f"{len(verdicts)} claims: no pair of runs is finished")
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        unit = "points" if verdict.metric.percent else verdict.metric.title
        groups.setdefault(unit, []).append(verdict)
    heights = [len(group) + 1.6 for group in groups.values()]
    scales = ", ".join(dict.fromkeys(verdict.scope.rsplit(", ", 1)[1] for verdict in verdicts))
    caption = f"{scales}; large: mean over seeds, bar: 95 % bootstrap interval, ticks: seeds; right of zero: as claimed"
    size = (10.5, ROW * sum(heights) + 1.2)
    figure, grid = start(title, [caption], size, len(groups), 1, height_ratios=heights)
    for axes, (unit, group) in zip(grid[:, 0], groups.items(), strict=True):
        _effects(axes, group)
        axes.set_xlabel(f"effect in the claim's direction ({unit})")
    shown = [verdict for verdict in LOOKS if any(item.verdict == verdict for item in verdicts)]
    keys = [Line2D([], [], color=LOOKS[name][0], marker=LOOKS[name][1], markerfacecolor=LOOKS[name][2], label=name)
            for name in shown]  # fmt: skip
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    return figure


def _effects(axes: Axes, verdicts: Sequence[Verdict]) -> None:
    """A row a claim."""
    axes.axvline(0, color=INK, linewidth=1)
    for y, verdict in enumerate(verdicts):
        if verdict.effect is None:
            middle = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
            axes.annotate(NOT_RUN, (0.5, y), color="0.45", fontsize=8, **middle)
            continue
        sign = (-1 if verdict.claim.direction == "lower" else 1) * (100 if verdict.metric.percent else 1)
        colour, marker, fill = LOOKS[verdict.verdict]
        axes.plot([sign * value for value in verdict.differences], [y] * verdict.n, "|", color="0.55", markersize=9)
        if verdict.low is not None:
            axes.plot([sign * verdict.low, sign * verdict.high], [y, y], color=colour, linewidth=2)
        axes.plot(sign * verdict.effect, y, marker, color=colour, markerfacecolor=fill, markersize=7)
        if verdict.claim.margin:
            limit = -abs(sign) * verdict.claim.margin
            axes.plot([limit, limit], [y - 0.4, y + 0.4], color=INK, linewidth=1, linestyle=":")
    names = [f"{textwrap.shorten(item.claim.text, 2 * WRAP, placeholder=' …')} (n~=~{item.n})" for item in verdicts]
    wrapped = [textwrap.fill(name, WRAP).replace("~", " ") for name in names]  # no break within "n = 5"
    axes.set_yticks(range(len(verdicts)), wrapped, fontsize=7.5)
    axes.set_ylim(len(verdicts) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.tick_params(axis="x", labelsize=8)
