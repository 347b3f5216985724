import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.schedule import Schedule


def test_warm_up_stable_decay_by_hand() -> None:
    schedule = Schedule("wsd", peak=1.0, total=1000, warmup=100, decay=200, final=0.0)
    rates = [schedule.rate(tokens, 10) for tokens in range(0, 1000, 10)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == pytest.approx(0.95)
    assert rates[10:80] == [1.0] * 70
    assert rates[80] == pytest.approx(0.975)
    assert rates[99] == pytest.approx(0.025)


def test_cosine_by_hand() -> None:
    schedule = Schedule("cosine", peak=2.0, total=1100, warmup=100, decay=0, final=0.1)
    assert schedule.rate(595, 10) == pytest.approx(2.0 * 0.55)
    assert schedule.rate(1099, 2) == pytest.approx(0.2)


@given(
    st.sampled_from(["wsd", "cosine"]), st.integers(1, 500), st.integers(0, 500), st.floats(0, 1), st.integers(1, 50)
)
def test_rates_are_never_zero_within_the_run_nor_above_the_peak(name, warmup, decay, final, batch) -> None:
    schedule = Schedule(name, 3.0, 1000 // batch * batch, warmup, decay, final)
    for tokens in range(0, schedule.total, batch):
        assert 0 < schedule.rate(tokens, batch) <= 3.0 + 1e-9
