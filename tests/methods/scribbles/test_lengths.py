"""The published table, other numbers of classes, and what each method's settings are for a length."""

import pytest

from repro.methods.scribbles import METHODS, settings_for
from repro.methods.scribbles.common import PUBLISHED, Tuned, outlier_model, tuned_for
from repro.settings import SettingError, replace
from repro.solvers.cuts import SolverSettings
from tests.methods.scribbles import fakes


def test_the_table_is_the_readmes():
    assert {length: (tuned.epsilon, tuned.gamma) for length, tuned in PUBLISHED.items()} == {
        1.0: (0.9440, 0.05), 0.8: (0.9460, 0.075), 0.5: (0.9514, 0.1), 0.3: (0.9516, 0.1), 0.0: (0.9522, 0.1),
    }  # fmt: skip
    assert all(tuned_for(length) == tuned for length, tuned in PUBLISHED.items())


def test_other_classes_keep_slope_and_gamma():
    for length, tuned in PUBLISHED.items():
        a, b = outlier_model(tuned.epsilon, 21)
        found = tuned_for(length, 6)
        slope = (lambda a, b: b / a)(*outlier_model(found.epsilon, 6))
        assert slope == pytest.approx(b / a) and found.gamma == tuned.gamma
    assert tuned_for(1, 4) == Tuned(pytest.approx(0.7166, abs=5e-5), 0.05)


def test_lengths_between_are_refused():
    with pytest.raises(ValueError, match="length is 0.6; published values are for 0, 0.3, 0.5, 0.8, 1"):
        tuned_for(0.6)


def test_settings_of_each_method():
    assert list(METHODS) == [
        "partial_ce", "dense_gd", "grid_gd", "adm", "trust_region", "robust_trust_region", "full",
    ]  # fmt: skip
    for name, method in METHODS.items():
        published = settings_for(name, 1.0)
        assert published == method.Settings() and type(published) is method.Settings, name
    plain, robust = (settings_for(name, 0.3, 6) for name in ("trust_region", "robust_trust_region"))
    assert (plain.epsilon, plain.gamma, robust.gamma) == (0.0, 0.1, 0.1)
    assert robust.epsilon == tuned_for(0.3, 6).epsilon
    assert replace(plain, epsilon=robust.epsilon).solver == robust.solver
    assert settings_for("adm", 0.6) == METHODS["adm"].Settings()
    with pytest.raises(ValueError, match="length is 0.6"):
        settings_for("trust_region", 0.6)


def test_published_defaults_of_stage_a_reach_the_solver():
    assert METHODS["trust_region"].Settings().solver == SolverSettings(100.0, 0.05, 5, True, 1, "scipy")
    changed = METHODS["trust_region"].Settings(
        potts_weight=3.0, gamma=0.2, sweeps=2, restricted=False, downscale=2, back_end="ortools"
    )
    assert changed.solver == SolverSettings(3.0, 0.2, 2, False, 2, "ortools")


def test_an_epsilon_of_other_classes_is_refused():
    method = METHODS["robust_trust_region"]
    with pytest.raises(SettingError, match="epsilon is 0.944; with 3 classes"):
        method(method.Settings(), fakes.TinyNetwork(), fakes.views(), 3, fakes.options(), (5, 10, 10))
