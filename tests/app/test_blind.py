"""The blind test: fair shuffling, votes that are kept, and exact binomial numbers."""

import json
import math
import threading

import pytest

from comfy_sage3.app.blind import VOTES_FILE, Tally, Trial, Votes
from comfy_sage3.errors import InputError


@pytest.mark.parametrize(("right", "votes", "chance"), [(10, 10, 1 / 1024), (0, 3, 1.0), (1, 1, 0.5), (8, 10, 56 / 1024)])
def test_the_chance_of_guessing_is_the_exact_binomial_tail(right, votes, chance):
    assert Tally(right, votes - right).chance() == pytest.approx(chance, rel=1e-12)


def test_the_interval_is_clopper_and_pearsons():
    low, high = Tally(8, 2).interval()
    assert (low, high) == (pytest.approx(0.44390, abs=1e-5), pytest.approx(0.97479, abs=1e-5))  # R: binom.test(8, 10)
    assert Tally(0, 4).interval()[0] == 0
    assert Tally(5, 0).interval() == (pytest.approx(0.025 ** (1 / 5)), 1.0)


def test_the_words_say_how_sure_one_may_be():
    assert "No vote" in Tally(0, 0, 2).sentences()[0]
    assert "2 more could not tell" in Tally(0, 0, 2).sentences()[0]
    assert "Too few votes" in Tally(3, 0).sentences()[1]
    assert "Confidence that people can tell: 96.9 %." in Tally(5, 0).sentences()[1]
    assert "not enough" in Tally(5, 5).sentences()[1]
    assert "100 %" not in Tally(60, 0).sentences()[1]  # never certain


def test_shuffling_is_fair_and_a_vote_is_right_when_it_names_a():
    first = sum(Trial.shuffled("run").a_first for _ in range(400))
    assert 120 < first < 280  # 8 standard deviations
    assert Trial("run", True, "first").right is True
    assert Trial("run", False, "first").right is False
    assert Trial("run", False, "cannot tell").right is None
    assert Trial("run", True).right is None


def test_votes_are_kept_by_pair_and_by_many_at_once(tmp_path):
    votes = Votes(tmp_path / "out")
    threads = [threading.Thread(target=votes.add, args=("exact against fp4", Trial("r", True, "first"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes.add("exact against int8", Trial("r", True, "second"))
    again = Votes(tmp_path / "out")
    assert again.tally("exact against fp4") == Tally(20, 0, 0)
    assert again.tally("exact against int8") == Tally(0, 1, 0)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [VOTES_FILE]


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '[{"pair": "x", "right": "yes"}]', "\x00"])
def test_a_damaged_file_of_votes_counts_as_none(tmp_path, text):
    (tmp_path / VOTES_FILE).write_text(text)
    votes = Votes(tmp_path)
    assert votes.tally("x") == Tally()
    votes.add("x", Trial("r", True, "first"))
    assert votes.tally("x") == Tally(1, 0, 0)
    assert json.loads((tmp_path / VOTES_FILE).read_text()) == [{"pair": "x", "run": "r", "right": True}]


def test_votes_that_cannot_be_written_are_said_to_be_lost(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="cannot be kept"):
        Votes(tmp_path / "out").add("x", Trial("r", True, "first"))


def test_many_votes_do_not_overflow():
    assert math.isclose(Tally(600, 600).chance(), 0.5, abs_tol=0.02)
    assert "1200 votes" in Tally(600, 600).sentences()[0]
