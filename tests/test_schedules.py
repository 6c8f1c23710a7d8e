"""Learning rates against literal numbers."""

import jax
import numpy as np
import pytest

from simclr_jax.schedules import scaled_learning_rate, warmup_cosine


@pytest.mark.parametrize(
    ("base", "batch_size", "scaling", "expected"),
    [
        (0.3, 4096, "linear", 4.8),
        (0.075, 4096, "sqrt", 4.8),
        (0.03, 512, "linear", 0.06),
        (0.3, 512, "none", 0.3),
    ],
)
def test_scaling(base, batch_size, scaling, expected):
    assert scaled_learning_rate(base, batch_size, scaling) == pytest.approx(expected)


def test_warm_up_then_cosine():
    schedule = jax.jit(warmup_cosine(2.0, total_steps=7, warmup_steps=3))
    # Quarters of the peak, the peak, then 2 · (1 + cos(π t / 4)) / 2 for t = 1, 2, 3, 4.
    expected = [0.5, 1.0, 1.5, 2.0, 1.7071068, 1.0, 0.2928932, 0.0]
    np.testing.assert_allclose([schedule(step) for step in range(8)], expected, atol=1e-6)


def test_ends_at_the_final_fraction_and_stays():
    schedule = warmup_cosine(2.0, total_steps=10, warmup_steps=0, final_fraction=0.1)
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 99)], [2, 1.1, 0.2, 0.2], rtol=1e-6)


def test_no_step_is_wasted():
    schedule = warmup_cosine(1.0, total_steps=20, warmup_steps=5)
    assert min(float(schedule(step)) for step in range(20)) > 0


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="scaling is 'cubic'; expected one of linear, sqrt, none"):
        scaled_learning_rate(0.3, 256, "cubic")
    with pytest.raises(ValueError, match="batch_size is 0"):
        scaled_learning_rate(0.3, 0, "linear")
    for warmup_steps in (-1, 5, 6):
        with pytest.raises(ValueError, match=f"warmup_steps is {warmup_steps}"):
            warmup_cosine(1.0, total_steps=5, warmup_steps=warmup_steps)
