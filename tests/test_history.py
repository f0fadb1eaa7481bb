"""History: rows appended, cut back on resume, and read again after a kill."""

import pytest

from repro.files import HISTORY, CorruptFile, History

ROWS = [
    {"kind": "train", "step": 2, "terms": {"supervised": 0.1}},
    {"kind": "evaluation", "step": 2, "ema": {"error": 0.5}},
    {"kind": "train", "step": 4, "terms": {}},
    {"kind": "train", "step": 6, "terms": {}},
]


@pytest.fixture
def history(tmp_path):
    made = History(tmp_path / "run")
    for row in ROWS:
        made.append(row)
    return made


def test_rows_are_on_disk_at_once_and_in_order(history, tmp_path):
    assert History(tmp_path / "run").rows == history.rows == ROWS
    assert history.of("train") == [ROWS[0], ROWS[2], ROWS[3]] and history.of("none") == []
    assert (tmp_path / "run" / HISTORY).read_text().count("\n") == 4


def test_a_folder_without_history_has_no_rows_and_is_not_made(tmp_path):
    assert History(tmp_path / "run").rows == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "left"), [(0, 0), (1, 0), (2, 2), (5, 3), (6, 4), (9, 4)])
def test_truncate_keeps_rows_up_to_a_step(history, tmp_path, step, left):
    history.truncate(step)
    assert history.rows == ROWS[:left] == History(tmp_path / "run").rows


def test_appending_continues_after_truncating_a_row_cut_by_a_kill(history, tmp_path):
    path = tmp_path / "run" / HISTORY
    whole = path.read_text()
    for length in range(1, len(whole.splitlines()[3])):
        path.write_text(whole[: -length - 1])
        cut = History(tmp_path / "run")
        assert cut.rows == ROWS[:3]
    cut.truncate(4)
    cut.append(ROWS[3])
    assert path.read_text() == whole


def test_any_other_bad_line_is_named(history, tmp_path):
    path = tmp_path / "run" / HISTORY
    path.write_text(path.read_text().replace('"step": 4', '"step" 4'))
    with pytest.raises(CorruptFile, match=r"history.jsonl, line 3, is not JSON"):
        History(tmp_path / "run")
