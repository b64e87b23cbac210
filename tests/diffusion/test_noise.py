"""Noise schedules against published numbers, textbook formulas and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion.noise import PREDICTIONS, WEIGHTS, make_noise_schedule
from jaxvid.errors import UserError

POWER = {  # alpha^2 by timestep, from the official code of AR-Diffusion and Diffusion Forcing
    "linear": {
        0: 0.9999,
        1: 0.999797362,
        21: 0.997138835,
        481: 0.36832641,
        500: 0.33127458,
        961: 0.00153923714,
        981: 0.00104898745,
        999: 0.00073341246,
    },
    "linear_baseline": {
        0: 0.99915,
        1: 0.99829603,
        21: 0.98038075,
        481: 0.30229566,
        500: 0.27633268,
        961: 0.00728173,
        981: 0.0057755,
        999: 0.0046601,
    },
    "cosine": {
        0: 0.999958716,
        1: 0.999912576,
        99: 0.972092737,
        499: 0.493843590,
        899: 0.0240917241,
    },
    "sigmoid": {0: 0.999699721, 1: 0.999397807, 99: 0.960507217, 499: 0.5, 899: 0.0394927827},
}
MADE = {
    **{name: make_noise_schedule(name) for name in (*POWER, "flow")},
    "linear_zero": make_noise_schedule("linear", zero_terminal_snr=True),
    "flow_shifted": make_noise_schedule("flow", shift=3.0),
}


ALL = [
    (name, prediction)
    for name, schedule in MADE.items()
    for prediction in PREDICTIONS
    if prediction != "eps" or not schedule.ends_in_pure_noise
]


def clip(seed, shape=(3, 5, 2, 4)):
    return tuple(jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed)))


def some_t(num_steps=1000, first=0, shape=(3, 5)):
    return jax.random.randint(jax.random.key(9), shape, first, num_steps)


def test_published_tables():
    for name, power in POWER.items():
        power_S = MADE[name].alpha_S.astype(np.float64) ** 2
        np.testing.assert_allclose(power_S[list(power)], list(power.values()), rtol=1e-6)
    schedule = MADE["linear"]
    for power_S, steps, betas in [  # the table that float32 keeps precise at these steps
        (1 - schedule.sigma_S.astype(np.float64) ** 2, [0, 1], [1e-4, 1.0265e-4]),
        (schedule.alpha_S.astype(np.float64) ** 2, [499, 999], [0.00572215, 0.02]),
    ]:
        beta_S = 1 - power_S / np.append(1, power_S[:-1])
        np.testing.assert_allclose(beta_S[steps], betas, rtol=5e-5)
    log_snr = schedule.log_snr(jnp.array([0, 500, 999]))
    np.testing.assert_allclose(log_snr, [9.2102, -0.7024, -7.2171], atol=1e-4)


def test_tables_are_monotone_and_float32():
    for schedule in MADE.values():
        assert schedule.alpha_S.dtype == schedule.sigma_S.dtype == np.float32
        assert schedule.alpha_S.shape == schedule.sigma_S.shape == (1000,)
        assert (np.diff(schedule.alpha_S) < 0).all() and (np.diff(schedule.sigma_S) > 0).all()


def test_another_number_of_steps_has_the_same_curve():
    for name in ("linear", "linear_baseline"):
        for num_steps in (8, 100, 2000):
            alpha_S = make_noise_schedule(name, num_steps).alpha_S
            np.testing.assert_allclose(alpha_S[-1], MADE[name].alpha_S[-1], rtol=1e-6)
            halfway = alpha_S[num_steps // 2 - 1]
            np.testing.assert_allclose(halfway, MADE[name].alpha_S[499], rtol=1e-6)


def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_noise():
    plain, zero = MADE["linear"].alpha_S, MADE["linear_zero"]
    assert zero.ends_in_pure_noise and zero.sigma_S[-1] == 1 and zero.log_snr(999) == -np.inf
    np.testing.assert_allclose(zero.alpha_S[0], plain[0], rtol=1e-6)
    ratio = np.diff(zero.alpha_S) / np.diff(plain)  # an affine map of sqrt(abar)
    np.testing.assert_allclose(ratio, plain[0] / (plain[0] - plain[-1]), rtol=2e-3)
    assert not MADE["linear"].ends_in_pure_noise and MADE["flow"].ends_in_pure_noise


def test_flow_is_a_straight_line_and_shift_scales_its_odds():
    plain, shifted = MADE["flow"], MADE["flow_shifted"]
    np.testing.assert_allclose(plain.sigma_S, np.arange(1000) / 999, rtol=1e-6)
    odds = plain.sigma_S[1:-1] / plain.alpha_S[1:-1]
    np.testing.assert_allclose(shifted.sigma_S[1:-1] / shifted.alpha_S[1:-1], 3 * odds, rtol=1e-4)
    assert list(shifted.sigma_S[[0, -1]]) == [0, 1]


def test_add_noise_gives_every_frame_its_own_level():
    schedule, (x0, eps), t_BT = MADE["linear"], clip(0), np.asarray(some_t())
    x_BTNC, x0, eps = map(np.asarray, (schedule.add_noise(x0, eps, t_BT), x0, eps))
    for b, f in np.ndindex(*t_BT.shape):
        t = t_BT[b, f]
        expected = schedule.alpha_S[t] * x0[b, f] + schedule.sigma_S[t] * eps[b, f]
        np.testing.assert_allclose(x_BTNC[b, f], expected, rtol=1e-6, atol=1e-6)


def test_split_inverts_target():
    (x0, eps), (pred, other) = clip(1), clip(2)
    for name, prediction in ALL:
        schedule, message = MADE[name], f"{name} {prediction}"
        # eps loses x0 where alpha is tiny, and x0 loses eps where sigma is 0.
        t_BT = some_t(900) if prediction == "eps" else some_t(first=1)
        x_t = schedule.add_noise(x0, eps, t_BT)
        target = schedule.target(x0, eps, t_BT, prediction)
        got_x0, got_eps = schedule.split(target, x_t, t_BT, prediction)
        np.testing.assert_allclose(got_x0, x0, atol=2e-4, err_msg=message)
        np.testing.assert_allclose(got_eps, eps, atol=2e-3, err_msg=message)
        for t in (0, 999):
            parts = schedule.split(pred, other, t, prediction)
            assert all(np.isfinite(part).all() for part in parts), message


def test_definition_of_v():
    x0, eps = clip(3)
    np.testing.assert_allclose(MADE["flow_shifted"].target(x0, eps, 700, "v"), eps - x0, rtol=1e-6)
    linear = MADE["linear"]
    expected = linear.alpha_S[700] * eps - linear.sigma_S[700] * x0
    np.testing.assert_allclose(linear.target(x0, eps, 700, "v"), expected, rtol=1e-5, atol=1e-6)


def test_ddim_step_is_the_official_update():
    schedule, (x0, x_t) = MADE["linear"], clip(4)
    power = 1 - schedule.sigma_S.astype(np.float64) ** 2
    for t_from, t_to in [(981, 961), (481, 461), (1, 0)]:
        eps = (x_t / np.sqrt(power[t_from]) - x0) / np.sqrt(1 / power[t_from] - 1)
        expected = np.sqrt(power[t_to]) * x0 + np.sqrt(1 - power[t_to]) * eps
        got = schedule.step(*schedule.split(x0, x_t, t_from, "x0"), t_from, t_to)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_ddim_on_the_flow_schedule_is_euler():
    schedule, (x_t, velocity) = MADE["flow_shifted"], clip(5)
    t_from = some_t(first=1)
    t_to = t_from * 2 // 3
    sigma_from, sigma_to = (schedule.sigma_S[t][..., None, None] for t in (t_from, t_to))
    for prediction, pred in (("v", velocity), ("x0", x_t - sigma_from * velocity)):
        got = schedule.step(*schedule.split(pred, x_t, t_from, prediction), t_from, t_to)
        np.testing.assert_allclose(got, x_t + (sigma_to - sigma_from) * velocity, atol=2e-5)


@pytest.mark.parametrize("name", ["linear", "linear_zero", "flow_shifted"])
def test_eta_one_is_the_posterior_of_the_forward_process(name):
    schedule, (x0, eps) = MADE[name], clip(6)
    noise, _ = clip(7)
    for t, s in [(999, 900), (600, 580), (40, 1)]:
        alpha_t, alpha_s = schedule.alpha_S[[t, s]].astype(np.float64)
        sigma_t, sigma_s = schedule.sigma_S[[t, s]].astype(np.float64)
        alpha_ts = alpha_t / alpha_s
        var_ts = sigma_t**2 - (alpha_ts * sigma_s) ** 2
        x_t = alpha_t * x0 + sigma_t * eps
        mean = (alpha_ts * sigma_s**2 * x_t + alpha_s * var_ts * x0) / sigma_t**2
        expected = mean + np.sqrt(var_ts) * sigma_s / sigma_t * noise
        got = schedule.step(x0, eps, t, s, eta=1.0, noise=noise)
        np.testing.assert_allclose(got, expected, atol=1e-4)
        x_t = schedule.add_noise(x0, eps, t)
        for eta in (0.0, 1.0):  # a step to the same level changes nothing
            np.testing.assert_array_equal(schedule.step(x0, eps, t, t, eta, noise=x0), x_t)


LEVELS = jnp.array([50, 250, 500, 750])
PUBLISHED_WEIGHTS = {
    ("cosine", "fused_snr", "v"): [0.041377, 0.830627, 0.828731, 0.823231],
    ("cosine", "min_snr", "v"): [0.041377, 0.770560, 0.492285, 0.143179],
    ("cosine", "fused_snr", "x0"): [5, 5, 4.838784, 4.657090],
    ("cosine", "fused_snr", "eps"): [0.041722, 0.996105, 1, 1],
    ("sigmoid", "fused_snr", "v"): [0.087844, 0.829680, 0.828759, 0.823273],
    ("sigmoid", "min_snr", "v"): [0.087844, 0.750685, 0.498343, 0.148160],
}


def test_published_weights():
    for (name, kind, prediction), expected in PUBLISHED_WEIGHTS.items():
        got = MADE[name].weight(LEVELS, kind, prediction)
        np.testing.assert_allclose(got, expected, atol=2e-6, err_msg=f"{name} {kind} {prediction}")


def test_fused_weight_is_the_loop_over_frames():
    t_BT, snr_clip = some_t(first=1, shape=(4, 7)), 20
    for name, prediction in ALL:
        schedule = MADE[name]
        snr_S = (schedule.alpha_S[1:].astype(np.float64) / schedule.sigma_S[1:]) ** 2 / snr_clip
        expected = np.zeros(t_BT.shape)
        for b in range(4):
            past = total = 0.0
            for f, t in enumerate(np.asarray(t_BT[b])):
                s = snr_S[t - 1]
                clipped, full = (1 - (1 - 0.96 * past) * (1 - x) for x in (min(s, 1), s))
                total = min(s, 1) if f == 0 else 0.96 * total + 0.04 * min(s, 1)
                past = total
                snr = snr_clip * full
                per_v = (1 + np.sqrt(snr)) ** 2 if schedule.is_flow else 1 + snr
                choices = {
                    "x0": snr_clip * clipped,
                    "eps": clipped / full,
                    "v": snr_clip * clipped / per_v,
                }
                expected[b, f] = choices[prediction]
        got = schedule.weight(t_BT, "fused_snr", prediction, snr_clip)
        np.testing.assert_allclose(got, expected, rtol=2e-4, err_msg=f"{name} {prediction}")


def test_weights_are_of_the_x0_error_for_every_prediction():
    """weight * |prediction error|^2 = factor * |x0 error|^2, the error through split.

    The factor is 1 for x0, min(SNR, 5) for min_snr, and 1 / sigma^2 at that SNR for v.
    """
    t_BT = some_t(900, first=1)
    x0, eps = clip(10)
    for name, prediction in ALL:
        schedule = MADE[name]
        x_t = schedule.add_noise(x0, eps, t_BT)
        wrong = schedule.target(x0, eps, t_BT, prediction) + 0.1
        x0_error = (schedule.split(wrong, x_t, t_BT, prediction)[0] - x0)[..., 0, 0]
        clipped = jnp.minimum(jnp.exp(schedule.log_snr(t_BT)), 5)
        per_v = (1 + jnp.sqrt(clipped)) ** 2 if schedule.is_flow else 1 + clipped
        for kind, factor in (("x0", 1), ("v", per_v), ("min_snr", clipped)):
            got = schedule.weight(t_BT, kind, prediction) * 0.1**2
            message = f"{name} {prediction} {kind}"
            np.testing.assert_allclose(got, factor * x0_error**2, rtol=1e-2, err_msg=message)


def test_fused_weight_is_causal():
    t_BT = some_t(first=500, shape=(2, 12))  # no SNR reaches the clip, so every frame counts
    weights = MADE["linear"].weight(t_BT, "fused_snr", "v")
    moved = MADE["linear"].weight(t_BT - 100 * np.eye(12, dtype=int)[:, None], "fused_snr", "v")
    changed = np.asarray(moved != weights)  # [frame moved, clip, frame weighted]
    np.testing.assert_array_equal(changed, np.broadcast_to(np.tri(12).T[:, None], changed.shape))


def test_weights_are_finite_at_both_ends():
    t_BT = jnp.array([[0, 0, 999, 999], [999, 0, 500, 0]])
    for name, prediction in ALL:
        for kind in WEIGHTS:
            weights = MADE[name].weight(t_BT, kind, prediction)
            assert weights.shape == t_BT.shape and weights.dtype == jnp.float32
            message = f"{name} {prediction} {kind}"
            assert np.isfinite(weights).all() and (weights >= 0).all(), message
            if kind == "uniform":
                np.testing.assert_array_equal(weights, 1)


def test_levels():
    """The official grid; from pure noise if there is any; no level twice."""
    np.testing.assert_array_equal(MADE["linear"].levels(50), [*range(981, 0, -20), 0])
    np.testing.assert_array_equal(MADE["linear"].levels(5), [801, 601, 401, 201, 1, 0])
    for name in ("flow", "linear_zero"):
        np.testing.assert_array_equal(MADE[name].levels(3), [999, 666, 333, 0])
    for name in ("linear", "flow"):
        for num_steps in (2, 7, 300):
            schedule = make_noise_schedule(name, num_steps)
            for sample_steps in range(1, num_steps):
                levels = schedule.levels(sample_steps)
                assert levels.dtype == np.int32 and len(levels) == sample_steps + 1
                assert levels[-1] == 0 and levels[0] < num_steps and (np.diff(levels) < 0).all()


def test_a_schedule_is_static_under_jit_and_equal_by_options():
    traces = []

    def noised(schedule, x, t):
        traces.append(schedule)
        return schedule.add_noise(x, x, t)

    noised_jit = jax.jit(noised, static_argnums=0)
    x = jnp.ones((2, 3, 4, 5))
    for t in (some_t(shape=(2, 3)), some_t(first=500, shape=(2, 3))):
        got = noised_jit(make_noise_schedule("cosine"), x, t)
        np.testing.assert_allclose(got, MADE["cosine"].add_noise(x, x, t), rtol=1e-6)
    assert len(traces) == 1
    assert make_noise_schedule("flow", shift=2.0) != make_noise_schedule("flow", shift=3.0)


def test_refusals():
    linear, flow, zero = MADE["linear"], MADE["flow"], MADE["linear_zero"]
    for call, message in (
        (lambda: make_noise_schedule("quadratic"), "^name='quadratic': .* use one of linear,"),
        (lambda: make_noise_schedule("linear", 1), "^num_steps=1: .* at least 2"),
        (lambda: make_noise_schedule("linear", shift=3.0), "^shift=3.0: only name='flow' .* use 1"),
        (lambda: make_noise_schedule("flow", shift=0), "^shift=0: .* more than 0"),
        (lambda: linear.levels(1000), "^sample_steps=1000: .* between 1 and 999"),
        (lambda: linear.levels(0), "^sample_steps=0: .* between 1 and 999"),
        (lambda: linear.target(0, 0, 0, "x"), "^prediction='x': .* use one of x0, eps, v"),
        (lambda: flow.target(0, 0, 0, "eps"), "^prediction='eps': .* 'flow' .* use v or x0"),
        (lambda: zero.split(0, 0, 0, "eps"), "^prediction='eps': .* use v or x0"),
        (lambda: linear.step(0, 0, 9, 8, eta=1.5), "^eta=1.5: .* between 0 and 1"),
        (lambda: linear.weight(LEVELS, "snr", "v"), "^weight='snr': .* use one of uniform,"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
