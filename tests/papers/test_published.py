
import pytest

from repro.papers import published
from repro.papers.published import PublishedError, Reference, lookup, read

HEADER = "paper,table,dataset,split,backbone,method,setting,metric,value,std,source"
ROW = "USB,T,CIFAR-10,40,WRN-28-2 (per config),FixMatch,best,error_rate,8.33,1.41,readme"
USB = Reference("USB", "T")


def rows(tmp_path, *lines, header=HEADER):
    path = tmp_path / "numbers.csv"
    path.write_text("\n".join((header, *lines)) + "\n")
    return read(path)


def test_a_row_is_read_as_printed(tmp_path):
    (row,) = rows(tmp_path, ROW)
    assert (row.value, row.std, row.data, row.network, str(row)) == (
        8.33,
        1.41,
        "cifar10",
        "wrn-28-2",
        "8.33 ± 1.41",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ROW.replace("8.33", "8,33"), "line 3: 12 cells; there must be 11"),
        (ROW.replace("8.33", "eight"), "line 3: value is 'eight'"),
        (ROW.replace("8.33", "833"), "line 3: value is 833.0; error_rate is a percentage"),
        (ROW.replace("8.33", "nan"), "line 3: value is nan"),
        (ROW.replace("1.41", "-1"), "line 3: std is -1.0"),
        (ROW.replace("1.41", "inf"), "line 3: std is inf"),
        (ROW.replace("8.33", ""), "line 3: std is 1.41; it must be finite, from 0, and beside a value"),
        (ROW.replace("error_rate", "err"), "line 3: unknown metric 'err'; known: error_rate, accuracy"),
        (ROW.replace("CIFAR-10", "CIFAR10"), "line 3: unknown dataset 'CIFAR10'; known: CIFAR-10"),
        (ROW.replace("FixMatch", ""), "line 3: method is empty"),
        (ROW.replace("readme", ""), "line 3: source is empty"),
        (ROW.replace("readme", "Derived from two tables"), "line 3: a derived number is not a published one"),
        (ROW.replace("8.33", "8.34"), "line 3: a second row for USB, T, CIFAR-10, 40"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, line, message):
    with pytest.raises(PublishedError, match="numbers.csv, " + message):
        rows(tmp_path, ROW, line)


def test_a_wrong_header_is_named(tmp_path):
    with pytest.raises(PublishedError, match="numbers.csv: the header is paper,value; it must be paper,table,dataset"):
        rows(tmp_path, header="paper,value")


def test_accuracy_becomes_error_and_nothing_else_does(tmp_path):
    error, accuracy, points = rows(
        tmp_path,
        ROW,
        ROW.replace("error_rate,8.33", "accuracy,91.67").replace("USB", "TorchSSL"),
        ROW.replace("error_rate,8.33,1.41", "error_rate_reduction_points,3.6,"),
    )
    assert error.fraction() == pytest.approx((0.0833, 0.0141))
    assert accuracy.fraction() == pytest.approx((0.0833, 0.0141))
    with pytest.raises(PublishedError, match="error_rate_reduction_points of USB T cannot be read as 'error'"):
        points.fraction()


def test_svhn_is_what_each_source_trains_on(tmp_path):
    line = ROW.replace("CIFAR-10", "SVHN")
    usb, torchssl, fixmatch, commatch = rows(
        tmp_path, *(line.replace("USB", name) for name in ("USB", "TorchSSL", "FixMatch", "ComMatch"))
    )
    assert (usb.data, torchssl.data, fixmatch.data, commatch.data) == (
        "svhn_extra",
        "svhn_extra",
        None,
        "svhn",
    )


def test_lookup_prefers_the_first_name_and_marks_what_is_not_there(tmp_path):
    numbers = rows(tmp_path, ROW, ROW.replace("FixMatch", "FixMatch (RA)").replace("8.33", "9.99"))
    assert lookup(numbers, USB, "cifar10", 40, ("FixMatch", "FixMatch (RA)")).value == 8.33
    assert lookup(numbers, USB, "cifar10", 40, ("FixMatch (RA)",)).value == 9.99
    for data, labels, name in (
        ("cifar10", 250, "FixMatch"),
        ("cifar100", 40, "FixMatch"),
        ("cifar10", 40, "UPS"),
    ):
        absent = lookup(numbers, USB, data, labels, (name,))
        assert absent.value is None and str(absent) == absent.source == "not available"
        assert absent.fraction() == (None, None) and absent.split == str(labels)
    with pytest.raises(PublishedError, match="no published number is on 'fashion'"):
        lookup(numbers, USB, "fashion", 100, ("FixMatch",))


def test_two_rows_may_say_the_same_but_not_different_things(tmp_path):
    same = rows(tmp_path, ROW, ROW.replace("error_rate,8.33", "accuracy,91.67"))
    assert lookup(same, USB, "cifar10", 40, ("FixMatch",)).value == 8.33
    different = rows(tmp_path, ROW, ROW.replace("error_rate,8.33", "accuracy,91.00"))
    with pytest.raises(PublishedError, match="USB, T has different numbers for FixMatch on CIFAR-10 with 40 labels"):
        lookup(different, USB, "cifar10", 40, ("FixMatch",))


# Masks

PASCAL = "UniMatch,R,Pascal VOC 2012 (classic),1/16 (92),ResNet-101,UniMatch,crop 321,mIoU,75.2,,readme"
CITY = "UniMatch,R,Cityscapes,1/16 (186),ResNet-101,UniMatch,crop 801,mIoU,76.6,,readme"


@pytest.mark.parametrize(
    ("split", "labels", "budget"),
    [
        ("40", 40, "40 masks"),
        ("1/16 (92)", 92, "92 masks"),
        ("Full (1464)", 1464, "1464 masks"),
        ("1/512 (232)", 232, "232 masks"),
        ("val", None, "val"),
        ("1/16", None, "1/16 masks"),
    ],
)
def test_the_number_of_masks_is_read_from_the_split(tmp_path, split, labels, budget):
    (row,) = rows(tmp_path, PASCAL.replace("1/16 (92)", split))
    assert (row.labels, row.budget, row.split) == (labels, budget, split)


def test_labels_are_counted_where_there_are_no_masks(tmp_path):
    assert [row.budget for row in rows(tmp_path, ROW, ROW.replace("CIFAR-10", "SVHN"))] == ["40 labels"] * 2


def test_miou_is_a_fraction_and_no_error(tmp_path):
    (row,) = rows(tmp_path, PASCAL.replace("75.2,", "75.2,0.5"))
    assert row.fraction("miou") == pytest.approx((0.752, 0.005)) and row.data == "voc"
    with pytest.raises(PublishedError, match="mIoU of UniMatch R cannot be read as 'error'"):
        row.fraction()


@pytest.mark.parametrize(
    ("printed", "network", "encoder"),
    [
        ("ResNet-101", "resnet101s", "ResNet-101 (deep stem in UniMatch's released code)"),
        ("ResNet-50", "resnet50s", "ResNet-50 (deep stem in UniMatch's released code)"),
        ("Xception-65", "xception-65", "Xception-65"),
        ("WRN-28-2 (per config)", "wrn-28-2", "WRN-28-2 (per config)"),
    ],
)
def test_a_backbone_is_ours_with_its_stem_or_another(tmp_path, printed, network, encoder):
    (row,) = rows(tmp_path, PASCAL.replace("ResNet-101", printed))
    assert (row.network, row.encoder) == (network, encoder)


def test_a_table_of_two_backbones_is_looked_up_by_backbone(tmp_path):
    numbers = rows(tmp_path, PASCAL, CITY, CITY.replace("ResNet-101", "ResNet-50").replace("76.6", "75.0"))
    names = ("UniMatch",)
    for backbone, value in (("ResNet-101", 76.6), ("ResNet-50", 75.0), ("Xception-65", None)):
        reference = Reference("UniMatch", "R", "miou", backbone)
        found = lookup(numbers, reference, "cityscapes", 186, names)
        assert (found.value, found.backbone) == (value, backbone) and reference.title == f"UniMatch, R, {backbone}"
    with pytest.raises(PublishedError, match="different numbers for UniMatch on Cityscapes with 186 masks.*ResNet-50"):
        lookup(numbers, Reference("UniMatch", "R", "miou"), "cityscapes", 186, names)
    assert lookup(numbers, Reference("UniMatch", "R", "miou"), "voc", 92, names).value == 75.2
    absent = lookup(numbers, Reference("UniMatch", "R", "miou"), "voc", 183, names)
    assert (absent.value, absent.metric, absent.labels) == (None, "mIoU", 183)


# Scribbles

SCRIBBLED = 'R,T,VOC2012 ScribbleSup,100,DeepLabV3+ MobileNetV2,partial CE,"val, scribble length 1",mIoU,65.8,,readme'
MASKED = SCRIBBLED.replace("VOC2012 ScribbleSup", "VOC2012").replace("partial CE", "full").replace("65.8", "72.1")
SETTING = SCRIBBLED.replace("mIoU,65.8", "epsilon,0.944")


def test_a_scribble_length_is_a_budget_and_the_network_is_ours(tmp_path):
    row, masks, click = rows(tmp_path, SCRIBBLED, MASKED, SCRIBBLED.replace(",100,", ",0,"))
    assert (row.data, row.labels, row.budget) == ("voc", 100, "scribble length 100 %")
    assert (masks.data, masks.labels, masks.budget) == ("voc", 100, "scribble length 100 %")
    assert (click.labels, click.budget) == (0, "scribble length 0 %")
    assert (row.network, row.encoder) == ("mobilenetv2_100", "DeepLabV3+ MobileNetV2")


def test_sources_may_call_one_data_set_by_two_names(tmp_path):
    numbers, reference = rows(tmp_path, SCRIBBLED, MASKED), Reference("R", "T", "miou")
    for name, value in (("partial CE", 65.8), ("full", 72.1)):
        assert lookup(numbers, reference, "voc", 100, (name,)).value == value
        assert lookup(numbers, reference, "voc", 30, (name,)).value is None
    assert lookup(numbers, Reference("R", "T", "miou", "ResNet-101"), "voc", 100, ("full",)).value is None


@pytest.mark.parametrize("metric", ["epsilon", "unary weight gamma", "seconds per iteration"])
def test_a_setting_or_a_time_stands_beside_no_result(tmp_path, metric):
    (row,) = rows(tmp_path, SETTING.replace("epsilon", metric))
    assert row.value == 0.944 and lookup((row,), Reference("R", "T", "miou"), "voc", 100, ("partial CE",)).value is None
    with pytest.raises(PublishedError, match=f"{metric} of R T cannot be read as 'miou'"):
        row.fraction("miou")


@pytest.mark.parametrize(
    ("name", "count"), [("commatch", 9), ("ssl_baselines", 189), ("csl", 161), ("trust_region", 29)]
)
def test_the_packaged_files_are_whole_and_every_row_has_its_source(name, count):
    numbers = published.load(name)
    assert len(numbers) == count and all(row.source and row.value is not None for row in numbers)


@pytest.mark.parametrize(
    ("paper", "table", "data", "labels", "names", "error"),
    [  # typed from the summary table of the specification, not from the file
        ("USB", "results/classic_cv.csv", "cifar10", 40, ("FixMatch",), 8.33),
        ("USB", "results/classic_cv.csv", "cifar100", 10000, ("FlexMatch",), 27.12),
        ("USB", "results/classic_cv.csv", "svhn_extra", 1000, ("UDA",), 1.96),
        ("TorchSSL", "README main results", "cifar10", 4000, ("FixMatch",), 4.21),
        ("TorchSSL", "README main results", "cifar100", 400, ("ReMixMatch",), 42.75),
        ("TorchSSL", "README main results", "svhn_extra", 40, ("MixMatch",), 30.60),
        ("FixMatch", "Table 2", "cifar10", 4000, ("FixMatch", "FixMatch (RA)"), 4.26),
        ("FixMatch", "Table 2", "cifar10", 4000, ("FixMatch (CTA)",), 4.31),
    ],
)
def test_packaged_errors_are_the_published_ones(paper, table, data, labels, names, error):
    row = lookup(published.load("ssl_baselines"), Reference(paper, table), data, labels, names)
    assert 100 * row.fraction()[0] == pytest.approx(error, abs=5e-3)
