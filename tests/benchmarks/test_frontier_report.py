"""benchmarks/frontier: how what its arms forget is compared."""

import math
from functools import partial

import pytest

from benchmarks.frontier.compare import (
    Comparison,
    comparable,
    is_finite,
    log_divergence,
    log_mean_divergence,
)
from benchmarks.frontier.damage import damage_table, fit, plot_damages, read_damages
from benchmarks.frontier.data import DOMAINS
from benchmarks.frontier.report import _of_one_seed, _of_ours, _ours
from loki_kernels.demo.frontier import at_loss, frontier


def test_a_frontier_is_what_no_point_beats():
    points = [(3.0, -4.0), (2.5, -3.0), (2.6, -2.0), (2.0, 0.0), (3.5, -3.9)]
    front = frontier(points)
    assert front == [(2.0, 0.0), (2.5, -3.0), (3.0, -4.0)]
    assert at_loss(front, 2.25) == pytest.approx(-1.5)
    assert at_loss(front, 3.0) == -4.0
    assert at_loss(front, 1.9) is None
    assert at_loss(front, 3.1) is None


def test_arms_are_compared_at_equal_loss():
    def record(arm, factor):
        points = [
            {"scale": s, "loss": 4 - s, **dict.fromkeys(DOMAINS, factor * 0.1 * s * s)}
            for s in (0.25, 0.5, 0.75, 1.0)
        ]
        return {"arm": arm, "seed": 0, "rate": 1, "before": 4.0, "points": points}

    comparison = Comparison([record("full", 1.0), record("rows", 0.2)])
    ratio = comparison.log_ratios("rows", "full")
    assert ratio.logs[0] == pytest.approx(math.log(5))
    assert tuple(ratio.shares) == (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    assert ratio.shares[0.9] == pytest.approx(math.log(5))
    assert comparison.log_ratios("rows", "LoRA").logs == {}


def test_what_is_forgotten_is_either_mean_or_that_of_one_text():
    factors = {"full": (1.0, 1.0, 1.0), "rows": (0.1, 0.2, 0.5)}
    records = [
        {
            "arm": arm, "seed": 0, "rate": 1, "before": 4.0,
            "points": [
                {"scale": s, "loss": 4 - s}
                | {domain: f * s * s for domain, f in zip(DOMAINS, of_texts, strict=True)}
                for s in (0.25, 0.5, 0.75, 1.0)
            ],
        }
        for arm, of_texts in factors.items()
    ]  # fmt: skip
    for forgotten, ratio in [
        (log_divergence, (10 * 5 * 2) ** (1 / 3)),
        (log_mean_divergence, 3 / (0.1 + 0.2 + 0.5)),
        (partial(log_divergence, domains=("chat",)), 2),
    ]:
        logs = Comparison(records, forgotten).of({"full", "rows"}).log_ratios("rows", "full").logs
        assert math.exp(logs[0]) == pytest.approx(ratio)


def test_a_table_is_of_the_seed_that_most_arms_have():
    points = [{"scale": 1.0, "loss": 3.0, **dict.fromkeys(DOMAINS, 0.1)}]
    records = [
        {"arm": arm, "seed": seed, "rate": 1, "before": 4.0, "points": points}
        for arm, seed in [("late", 1), ("late", 2), ("full", 0), ("full", 1), ("a", 0), ("b", 0)]
    ]
    table = _of_one_seed(Comparison(records))
    assert sorted(table.points) == [("a", 0), ("b", 0), ("full", 0)]


def test_ours_is_drawn_with_the_seed_of_most_that_it_is_compared_with():
    ours = "down_proj protected, 110"
    points = [{"scale": 1.0, "loss": 3.0, **dict.fromkeys(DOMAINS, 0.1)}]
    records = [
        {"arm": arm, "seed": seed, "rate": 1, "before": 4.0, "points": points}
        for arm, seed in [(ours, 1), (ours, 2), ("full", 2), ("full", 0), ("LoRA", 0), ("rows", 2)]
    ]
    every = Comparison(records)
    assert _ours(every) == ours
    assert sorted(_of_ours(every, ours).points) == [(ours, 2), ("full", 2)]
    assert _ours(Comparison(records[2:])) is None


def test_a_pair_is_compared_where_both_get_with_every_seed():
    def record(arm, seed, rate, end=1.0, factor=1.0):
        points = [
            {"scale": s, "loss": 4 + seed - s * end, **dict.fromkeys(DOMAINS, factor * s * s)}
            for s in (0.25, 0.5, 0.75, 1.0)
        ]
        return {"arm": arm, "seed": seed, "rate": rate, "before": 4.0 + seed, "points": points}

    records = [
        *(record("full", seed, 1) for seed in (0, 1, 2)),
        record("ours", 0, 1, 0.9, 0.5), record("ours", 0, 2, 1.0, 0.01),
        record("ours", 1, 1, 0.72, 0.5),
        record("other", 2, 1), record("other", 1, 1),
        record("lost", 0, 1, math.nan),
    ]  # fmt: skip
    comparison = Comparison(records)
    logs, shares = comparison.log_ratios("ours", "full")
    assert tuple(shares) == (0.5, 0.6, 0.7)  # seed 1 gets no further
    assert list(logs) == [0, 1]
    assert logs[0] == pytest.approx(math.log(2 * 0.9**2), abs=0.05)  # seed 1 has no second rate
    assert list(comparison.log_ratios("ours", "other").logs) == [1]
    assert "lost" not in comparison.arms()


def test_an_arm_does_not_lose_by_having_more_rates():
    """A low rate's whole update is above what a higher one's is when scaled back to its loss."""

    def record(rate, ends, divergences):
        points = [
            {"scale": s, "loss": loss, **dict.fromkeys(DOMAINS, kl)}
            for s, loss, kl in zip((0.25, 0.5, 0.75, 1.0), ends, divergences, strict=True)
        ]
        return {"arm": "full", "seed": 0, "rate": rate, "before": 4.0, "points": points}

    high = record(2, (3.6, 3.2, 2.9, 2.7), (0.01, 0.04, 0.09, 0.16))
    low = record(1, (3.8, 3.6, 3.4, 3.25), (0.02, 0.04, 0.06, 0.041))
    one, both = Comparison([high]), Comparison([high, low])
    for loss in (3.3, 3.21, 3.0):
        assert both.at("full", 0, loss) == one.at("full", 0, loss)
    assert both.at("full", 0, 3.7) == pytest.approx(math.log(0.02 * 2**0.5))
    assert both.at("full", 0, 2.6) is None


def test_seeds_compare_at_the_rates_of_all_of_them():
    def kept(*trainings):
        records = [
            {"arm": arm, "seed": seed, "rate": rate, "points": [{"loss": 1.0}]}
            for arm, seed, rate in trainings
        ]
        return [(r["arm"], r["seed"], r["rate"]) for r in comparable(records)]

    rates = [("a", 0, 1), ("a", 0, 2), ("a", 0, 3), ("a", 1, 2), ("a", 1, 3)]
    assert kept(*rates) == rates[1:]
    assert kept(*rates, ("b", 0, 1)) == [*rates[:3], ("b", 0, 1)]  # the seed that both have
    # seed 0 has no rate of b's others: it goes, and they stay
    others = [("b", 1, 4), ("a", 2, 2), ("b", 2, 4)]
    assert kept(*rates, ("b", 0, 1), *others) == [("a", 1, 2), *others]
    assert kept(("a", 0, 1), ("b", 1, 1)) == []
    assert kept() == []


def test_trainings_that_came_to_no_numbers_are_told_apart():
    assert is_finite({"points": [{"loss": 1.0}]})
    assert not is_finite({"points": [{"loss": 1.0, "wikitext": math.nan}]})


def test_damages_of_a_power_law_have_its_slope(tmp_path):
    def record(arm, size):
        points = [dict.fromkeys(DOMAINS, 3 * size**1.5)]
        return {"arm": arm, "predicted": size, "points": points}

    records = [record("a", 10.0**-i) for i in range(5)] + [record("b", 0.5), {"arm": "c"}]
    damages = read_damages(records)
    assert len(damages) == 6
    assert fit(damages) == pytest.approx((1.5, 1.0))
    rows = list(damage_table(damages))
    assert any(row.startswith("| a | 5 | 1.50 | 1.00 |") for row in rows)
    assert not any(row.startswith("| b") for row in rows)
    plot_damages(damages, tmp_path / "damage.png")
    assert (tmp_path / "damage.png").stat().st_size > 1000
