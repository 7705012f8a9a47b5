"""The solver: feasible, within its proven bound, and as good as trying everything."""

import itertools
import math
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comfy_sage3.errors import InputError
from comfy_sage3.plan.solve import BUDGETS, Choice, budget_of, solve

EXACT = Choice(1.0, 0.0)
number = st.floats(0.0, 1.0, allow_subnormal=False)
cell = st.lists(st.builds(Choice, number, number), max_size=3).map(lambda c: [EXACT, *c])
problem = st.lists(st.tuples(cell, st.integers(1, 9)), min_size=1, max_size=5)


def brute_force(cells, weights, budget, most):
    """The least cost of all assignments, and the best there is."""
    best = math.inf
    for picks in itertools.product(*(range(len(c)) for c in cells)):
        chosen = [c[p] for c, p in zip(cells, picks, strict=True)]
        error = math.fsum(w * c.error for w, c in zip(weights, chosen, strict=True))
        if error <= budget * sum(weights) * (1 + 1e-9) and all(c.error <= most for c in chosen):
            best = min(best, math.fsum(w * c.cost for w, c in zip(weights, chosen, strict=True)))
    return best


@example([([EXACT, Choice(0.0, 0.375), Choice(0.5, 0.25)], 1)], 0.25, 0.5)  # the search finds nothing better than is known
@example([([EXACT, Choice(0.0, 0.7)], 8), ([EXACT, Choice(0.1, 0.9)], 4)], 0.3, math.inf)  # 4 x 0.9 is more than 12 x 0.3
@given(problem, st.floats(0.0, 0.5), st.sampled_from([0.1, 0.5, math.inf]))
def test_no_assignment_is_cheaper_than_the_bound_and_none_of_ours_breaks_the_budget(made, budget, most):
    cells, weights = [list(x) for x in zip(*made, strict=True)]
    found = solve(cells, weights, budget, most)
    chosen = [c[p] for c, p in zip(cells, found.picks, strict=True)]
    assert found.error == pytest.approx(
        sum(w * c.error for w, c in zip(weights, chosen, strict=True)) / sum(weights), abs=1e-12
    )
    assert found.error <= budget * (1 + 1e-9) + 1e-15
    assert all(c.error <= most for c in chosen)
    assert found.cost == pytest.approx(sum(w * c.cost for w, c in zip(weights, chosen, strict=True)))
    optimum = brute_force(cells, weights, budget, most)
    assert found.cost == pytest.approx(optimum, rel=1e-6, abs=1e-6)
    assert found.bound <= optimum * (1 + 1e-6) + 1e-9
    assert found.bound == pytest.approx(found.cost)  # and it knows


@given(problem, st.floats(0.0, 0.5))
def test_without_the_search_the_gap_is_less_than_what_one_cell_can_save(made, budget):
    cells, weights = [list(x) for x in zip(*made, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comfy_sage3.plan.solve.WORK", 0)
        found = solve(cells, weights, budget)
    optimum = brute_force(cells, weights, budget, math.inf)
    assert found.bound <= optimum * (1 + 1e-9) + 1e-12
    assert optimum <= found.cost + 1e-9
    largest = max(w * (max(c.cost for c in choices) - min(c.cost for c in choices)) for choices, w in made)
    assert found.cost - found.bound <= largest + 1e-9


def test_forty_layers_at_eight_steps_are_solved_to_the_optimum():
    cells = [
        [EXACT, Choice(0.45, 0.004 + (i * 7919 % 97) / 4000), Choice(0.25, 0.02 + (i * 104729 % 89) / 300)]
        for i in range(320)
    ]
    found = solve(cells, [1 + i % 3 for i in range(320)], 0.04, 0.12)
    assert found.bound == found.cost


@given(problem)
def test_with_no_limit_every_cell_has_its_cheapest_choice(made):
    cells, weights = [list(x) for x in zip(*made, strict=True)]
    found = solve(cells, weights, 1.0)
    assert found.cost == pytest.approx(sum(w * min(c.cost for c in choices) for choices, w in made))
    assert found.bound == pytest.approx(found.cost)


def test_a_budget_of_nothing_is_exact_everywhere():
    cells = [[EXACT, Choice(0.3, 0.01), Choice(0.1, 0.1)]] * 4
    assert solve(cells, [1] * 4, 0.0).picks == (0, 0, 0, 0)


def test_the_error_is_spent_where_it_saves_most():
    sensitive = [EXACT, Choice(0.5, 0.02), Choice(0.25, 0.4)]
    robust = [EXACT, Choice(0.5, 0.01), Choice(0.25, 0.05)]
    assert solve([sensitive, robust], [1, 1], 0.04).picks == (1, 2)


def test_no_cell_is_sacrificed_for_the_mean():
    cells = [[EXACT, Choice(0.1, 0.5)], *[[EXACT, Choice(0.9, 0.0)]] * 9]
    assert solve(cells, [1] * 10, 0.06).picks[0] == 1
    assert solve(cells, [1] * 10, 0.06, most=0.18).picks[0] == 0


def test_a_dearer_precision_is_never_taken():
    assert solve([[EXACT, Choice(1.5, 0.0), Choice(1.0, 0.1)]], [1], 1.0).picks == (0,)


def test_what_the_hull_leaves_of_the_budget_is_filled():
    # The middle choice lies above the line from the first to the last, which does not fit.
    cells = [[EXACT, Choice(0.9, 0.05), Choice(0.1, 0.2)]]
    found = solve(cells, [1], 0.1)
    assert found.picks == (1,)


def test_as_many_steps_weigh_as_a_column_stands_for():
    cells = [[EXACT, Choice(0.2, 0.1)], [EXACT, Choice(0.1, 0.1)]]
    assert solve(cells, [9, 1], 0.091).picks == (1, 0)


def test_equal_cells_are_taken_in_order():
    cells = [[EXACT, Choice(0.5, 0.1)]] * 4
    assert solve(cells, [1] * 4, 0.05).picks == (1, 1, 0, 0)


def test_sixty_layers_and_sixty_steps_are_solved_in_no_time_and_to_a_thousandth():
    cells = [
        [EXACT, Choice(0.45, 0.004 + (i * 7919 % 97) / 4000), Choice(0.25, 0.02 + (i * 104729 % 89) / 300)]
        for i in range(3600)
    ]
    began = time.monotonic()
    found = solve(cells, [1] * 3600, 0.04, 0.12)
    assert time.monotonic() - began < 10
    assert (found.cost - found.bound) / found.cost < 1e-3


def test_without_an_exact_choice_it_says_that_the_budget_is_too_small():
    with pytest.raises(InputError, match="raise the budget"):
        solve([[Choice(0.5, 0.2)]], [1], 0.1)
    with pytest.raises(InputError, match="exact attention must be among"):
        solve([[Choice(0.5, 0.2)]], [1], 0.1, most=0.1)


def test_budgets_have_names_or_are_numbers():
    assert BUDGETS["faithful"] < BUDGETS["balanced"] < BUDGETS["draft"]
    assert budget_of("draft", 0.5) == BUDGETS["draft"]
    assert budget_of("custom", 0.5) == 0.5
    for name, custom in (("custom", -0.1), ("custom", math.nan), ("lavish", 0.1)):
        with pytest.raises(InputError, match=r"give a relative error|choose one of draft"):
            budget_of(name, custom)
