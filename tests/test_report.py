"""The report: what it says of runs from labels and from masks, and what it writes into a checkout."""

import re
from html import unescape

import pytest
from matplotlib.figure import Figure

from repro import report, runs
from repro.experiment import Experiment
from repro.papers import calibratemix, commatch, csl
from tests.fake_mask_runs import write_mask_run
from tests.fake_runs import METRICS, write_run

PAPERS = {"commatch": commatch, "calibratemix": calibratemix, "csl": csl}
MASKS = {"supervised": 0.4, "fixmatch": 0.5, "unimatch": 0.6, "csl": 0.625}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The main job's runs of a label paper and of the mask paper, one seed each; figures and notebooks are left out."""
    for experiment in commatch.main_experiments("mini", (0,)):
        write_run(experiment, tmp_path / "runs", error=0.25)
    for experiment in csl.main_experiments("mini", (0,)):
        write_mask_run(experiment, tmp_path / "runs", figures=False, miou=MASKS[experiment.method], ece_15=0.05)
    figures = dict.fromkeys(PAPERS, lambda *_: [("empty", "An empty figure", Figure())])
    monkeypatch.setattr(report, "FIGURES", figures)
    monkeypatch.setattr(report, "PAPERS", PAPERS)
    monkeypatch.setattr(report, "execute_notebooks", lambda *_: [])
    return tmp_path / "runs"


def test_each_run_is_told_in_its_own_papers_metrics(root):
    experiments = [*commatch.main_experiments("mini", (0,)), *csl.main_experiments("mini", (0, 1))]
    results = {row["id"]: row["result"] for row in report.finished(experiments, root)}
    assert len(results) == 8  # the second seed of masks is not run
    ids = {item.method: runs.folder_of(item, root).name for item in experiments[4:8]}
    assert results[ids["unimatch"]] == "mIoU 60.00 %, ECE 5.00 % (15 right-closed bins)"
    assert results[runs.folder_of(experiments[0], root).name] == (
        f"error 25.00 %, ECE {100 * METRICS['ece_15']:.2f} % (15 right-closed bins)"
    )


def test_the_command_that_repeats_a_run():
    experiment = Experiment("csl", "csl", "scenes", 20, 1, "mini", {"masking": "none"})
    options = "--paper csl --method csl --data scenes --labels 20 --seed 1 --scale mini --set masking=none"
    assert report.command(experiment) == f"python -m repro run {options}"


def test_the_page_lays_out_both_kinds_of_papers(root):
    text = unescape(re.sub(r"\s+", " ", report.build("mini", (0,), root).read_text()))
    header, *rows = re.findall("<tr>.*?</tr>", text.split("<h2>Runs</h2>")[1])
    assert re.findall("<th>(.*?)</th>", header)[:3] == ["run", "result", "training"]
    results = [re.findall("<td>(.*?)</td>", row)[1] for row in rows]
    assert len(results) == 8 and sum(result.startswith("error 25.00 %, ECE") for result in results) == 4
    assert "on the embedded data (Fashion scenes, 20 masks), mini scale only" in text
    assert csl.NOTE in text and "Cityscapes: mIoU by number of masks" in text  # among those not run


def test_a_part_has_a_block_for_each_measured_number_of_masks(root):
    part = report.paper_parts("csl", "mini", (0,), root, root / "report")
    assert [block["title"] for block in part["tables"]][:1] == ["mIoU by number of masks — Fashion scenes, 20 masks"]
    frame = part["tables"][0]["frame"]
    assert frame.iloc[:, 0].to_dict() == {
        "Supervised": "40.00 (n = 1)", "FixMatch": "50.00 (n = 1)", "UniMatch": "60.00 (n = 1)",
        "UniMatch, output stride 8": "not run", "CSL": "62.50 (n = 1)",
    }  # fmt: skip
    verdicts = {claim["claim"]: claim["verdict"] for claim in part["claims"]}
    assert verdicts["CSL has a higher mIoU than UniMatch."] == "inconclusive" and "not run" in verdicts.values()


def test_a_checkout_gets_the_first_measured_table_and_the_claims(root, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    readme = checkout / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.build("mini", (0,), root, checkout)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n") and "\nold\n" not in text
    assert f"{csl.TITLE}: measured: Fashion scenes, 20 masks, mini scale, last evaluation, EMA weights" in text
    table = text.split(csl.TITLE)[1].split("| claim |")[0]
    assert "| mIoU by number of masks | mIoU (%) | pixel accuracy (%) |" in table and "published" not in table
    assert "| CSL | 62.50 (n = 1) |" in table and "output stride 8" not in table
    assert {path.name for path in (checkout / "figures").iterdir()} == {
        "results.md", "runs.csv", *(f"{name}_empty.png" for name in PAPERS),
    }  # fmt: skip
    results = (checkout / "figures" / "results.md").read_text()
    assert "### mIoU by number of masks — Fashion scenes, 20 masks" in results and "ResNet-101 (deep stem" in results


def test_nothing_is_written_twice(root):
    page = report.build("mini", (0,), root)
    before = page.stat().st_mtime_ns
    assert report.build("mini", (0,), root) == page and page.stat().st_mtime_ns == before
    write_run(commatch.main_experiments("mini", (1,))[0], root)
    assert report.build("mini", (0, 1), root).stat().st_mtime_ns != before
