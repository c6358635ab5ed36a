"""The ladder on a machine that only keeps time: which rung it holds, what trials cost, how it changes its mind."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from machines import TUNING, linear, server_of

from echo_trt.speculation.goodput.ladder import UNDRAFTED, Ladder, load_of
from echo_trt.speculation.goodput.model.costs import Curve

TRIAL = TUNING.trial_iterations
VERIFICATION_SIZES = (6, 8, 12, 16)
Rates = Callable[[int], float]


def rates_of(*gains: float) -> Rates:
    """Tokens a second of plain decoding, 100, and of VERIFICATION_SIZES, in it."""
    known = dict(zip((UNDRAFTED, *VERIFICATION_SIZES), (1.0, *gains), strict=True))
    return lambda verification_size: 100 * known[verification_size]


def predict(*gains: float):
    return lambda: (np.array(VERIFICATION_SIZES), np.log(np.array(gains)))


FLAT = predict(1.0, 1.0, 1.0, 1.0)


class Machine:
    """Iterations of 4 tokens, or of ``requests``; ``noise``: deviation of the log of what one takes."""

    def __init__(self, ladder: Ladder, noise: float = 0.0):
        self.ladder, self.noise, self.rng = ladder, noise, np.random.default_rng(0)
        self.tokens = self.seconds = 0.0

    def run(self, rate: Rates, iterations: int, requests: int = 4, predicted=FLAT) -> list[int]:
        """Return the rung of each iteration; counts tokens and seconds from here on."""
        verification_sizes, self.tokens, self.seconds = [], 0.0, 0.0
        for _ in range(iterations):
            verification_size = self.ladder.size(requests, predicted)
            seconds = requests / rate(verification_size) * float(np.exp(self.noise * self.rng.normal()))
            self.ladder.observe(requests, seconds)
            verification_sizes.append(verification_size)
            self.tokens, self.seconds = self.tokens + requests, self.seconds + seconds
        return verification_sizes

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def usual(verification_sizes: list[int]) -> int:
    return Counter(verification_sizes).most_common(1)[0][0]


def test_the_gain_is_that_of_the_present_rung_over_plain_decoding():
    ladder = Ladder()
    assert ladder.gain is None
    Machine(ladder).run(rates_of(1.1, 1.3, 1.2, 1.15), 2000)
    assert ladder.gain == pytest.approx(1.3, abs=0.05)
    slow = Ladder()
    Machine(slow).run(rates_of(0.7, 0.7, 0.7, 0.7), 2000)
    assert slow.gain == 1.0


@pytest.mark.parametrize("predicted", [FLAT, predict(0.5, 0.5, 0.5, 0.5), predict(1.1, 1.15, 1.2, 1.25)])
@pytest.mark.parametrize("best", [VERIFICATION_SIZES[0], VERIFICATION_SIZES[-1]])
def test_the_best_rung_is_found_whatever_was_foreseen(best, predicted):
    machine = Machine(Ladder())
    rate = rates_of(*(1.5 if verification_size == best else 1.2 for verification_size in VERIFICATION_SIZES))
    machine.run(rate, 6000, predicted=predicted)
    verification_sizes = machine.run(rate, 2000)
    assert usual(verification_sizes) == best
    assert machine.rate > 0.985 * rate(best)


@pytest.mark.parametrize(("gain", "predicted"), [(0.8, 0.8), (1.35, 1.35), (0.9, 0.8), (1.5, 1.35)])
@pytest.mark.parametrize("iterations", [40, 120])
def test_a_short_run_loses_little_where_forecasts_can_be_trusted(gain, predicted, iterations):
    """A rung that was foreseen to lose is tried later than one that is nearly as good."""
    machine = Machine(Ladder(trusts=True))
    rates = predict(predicted, predicted - 0.02, predicted - 0.05, predicted - 0.1)
    machine.run(rates_of(gain, gain - 0.02, gain - 0.05, gain - 0.1), iterations, predicted=rates)
    assert machine.rate > 0.96 * max(gain, 1.0)


def test_a_forecast_that_was_trusted_in_vain_is_given_up():
    machine = Machine(Ladder(trusts=True))
    verification_sizes = machine.run(rates_of(0.7, 0.7, 0.7, 0.7), 40 * TRIAL, 8, predict(1.2, 1.4, 1.3, 1.1))
    assert (
        sum(verification_size != UNDRAFTED for verification_size in verification_sizes[30 * TRIAL :])
        < 0.35 * 10 * TRIAL
    )


@pytest.mark.parametrize("predicted", [1.2, 0.8])
def test_trials_lose_about_a_hundredth_of_the_time(predicted):
    machine = Machine(Ladder())
    rate = rates_of(2.0, 1.0, 1.0, 1.0)
    machine.run(rate, 6000, predicted=predict(predicted, 1.0, 1.0, 1.0))
    verification_sizes = machine.run(rate, 10000)
    others = sum(verification_size != 6 for verification_size in verification_sizes)
    assert 0 < others < 0.03 * len(verification_sizes)
    assert machine.rate > (1 - 1.2 * TUNING.trial_cost) * rate(6)


def test_it_holds_without_flapping():
    """Rungs a hundredth apart, and iterations that differ by a tenth."""
    machine = Machine(Ladder(), noise=0.1)
    rate = rates_of(1.30, 1.31, 1.30, 1.29)
    machine.run(rate, 2000, predicted=predict(1.3, 1.3, 1.3, 1.3))
    verification_sizes = np.array(machine.run(rate, 8000))
    assert (verification_sizes[1:] != verification_sizes[:-1]).sum() < 8000 / 80  # to a trial and back
    assert machine.rate > 0.97 * rate(8)


def test_a_machine_that_changes_its_speed_favours_no_rung():
    """All that runs takes twice as long for some seconds, and then does not."""
    machine = Machine(Ladder())
    base, plain = rates_of(1.3, 1.2, 1.1, 1.0), 0
    machine.run(base, 500, predicted=predict(1.3, 1.2, 1.1, 1.0))
    for turn in range(80):
        factor = 1 + turn % 2
        verification_sizes = machine.run(
            lambda verification_size, by=factor: base(verification_size) / by, 100 + 7 * (turn % 3)
        )
        plain += sum(verification_size != 6 for verification_size in verification_sizes)
    assert plain < 0.1 * 80 * 107


def test_loads_learn_apart_and_a_new_one_begins_with_what_the_last_has_shown():
    machine = Machine(Ladder())
    machine.run(rates_of(1.5, 1.2, 1.1, 1.0), 2000, requests=4)
    machine.run(rates_of(0.5, 0.5, 0.5, 0.5), 2000, requests=5)  # another load, a step away
    assert load_of(4) != load_of(5)
    assert usual(machine.run(rates_of(1.5, 1.2, 1.1, 1.0), 20, requests=4)) == 6
    first = machine.run(rates_of(0.5, 0.5, 0.5, 0.5), TRIAL, requests=5)
    assert usual(first) == UNDRAFTED
    new = machine.run(rates_of(0.5, 0.5, 0.5, 0.5), TRIAL, requests=40, predicted=predict(1.2, 1.1, 1.0, 1.0))
    assert set(new) == {UNDRAFTED}  # the draft is as bad there


@pytest.mark.parametrize("lasts", [15])
def test_a_load_that_comes_and_goes_hides_no_loss(lasts):
    ladder, verification_sizes = Ladder(), []
    machine, rate = Machine(ladder), rates_of(0.7, 0.7, 0.7, 0.7)
    for turn in range(6000 // lasts):
        verification_sizes += machine.run(rate, lasts, 1 + turn % 2, predict(1.2, 1.4, 1.3, 1.1))
    assert np.mean(np.array(verification_sizes[2000:]) == UNDRAFTED) > 0.9


#: A change of size costs a third of a pass.
FEW_SIZES = {"change": 3e-3, "sizes": tuple(range(2, 600, 2))}


@pytest.mark.parametrize("count", [4, 32])
def test_that_larger_passes_take_longer_than_the_table_says_is_found_out(count):
    server = server_of(linear(0.01, 1e-5), linear(1e-3, 1e-5), [0.45, 0.1, 0.05], count, **FEW_SIZES)
    server.target = Curve([1, count, 2 * count, 999], [0.01, 0.01, 0.016, 0.16])
    server.run(1200)
    server.run(3000)
    assert server.rate > 0.97 * count / server.target(count)


@pytest.mark.parametrize("count", [60, 300])
def test_many_requests_speculate_where_it_pays(count):
    server = server_of(Curve([1, 999], [0.01, 0.011]), linear(1e-3, 1e-7), [0.7, 0.1, 0.05], count, **FEW_SIZES)
    server.run(100)
    assert server.run(200).rate > 1.3 * count / server.target(count)
