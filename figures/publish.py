"""The published files beside the figures: `results.md` with all tables and claims, and the runs as CSV."""

from collections.abc import Iterator

from figures import claims, desk, tables
from repro.batch import plan, records
from repro.files import write_text
from repro.grid import PAPERS


def results(request: desk.Request) -> None:
    """Write `results.md`, `runs.csv` and `runs_numbers.csv` if the notebook is asked to save."""
    if request.save_to:
        write_text(request.save_to / "results.md", "\n".join(markdown(request)))
        planned = plan.select(scale=request.scale, seeds=request.seeds)
        records.save(tables.collect(planned, request.root), request.save_to / "runs.csv")


def markdown(request: desk.Request) -> Iterator[str]:
    """The lines of `results.md`: every table and ablation of which two rows have a finished run, and every claim."""
    yield f"# Results at scale {request.scale}, seeds {', '.join(map(str, request.seeds))}\n"
    made = f"make reproduce SCALE={request.scale} SEEDS={len(request.seeds)}"
    yield f"Written by `{made}` from run records; do not edit.\n"
    for name, paper in PAPERS.items():
        yield f"## {paper.spec.title}\n\n{paper.spec.note}\n"
        for table in (*paper.tables.values(), *paper.ablations.values()):
            for title, laid, notes in desk.blocks(table, request, 2):
                yield "\n".join([f"### {title}\n\n{tables.to_markdown(laid)}", *(f"- {note}" for note in notes), ""])
        columns = ["claim", "verdict", "effect", "95 % interval", "n", "published effect"]
        frame = claims.as_frame(desk.decided(request, name))[columns].set_index("claim")
        frame = frame.replace({"published effect": {"": "not available"}})
        where = f"Verdicts hold {claims.scope(paper.claims.values(), request.scale)} only."
        yield f"### Claims\n\n{tables.to_markdown(frame)}\n{where}\n\n"
