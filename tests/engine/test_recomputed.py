"""What is computed twice is counted, and what is new is not."""

from l0fast.engine.recomputed import Prefixes


def test_a_second_turn_that_found_its_prefix_computes_nothing_again():
    prefixes = Prefixes()
    prefixes.observe("a", [1, 2, 3], [4, 5], cached=0)
    prefixes.observe("a", [1, 2, 3, 4, 5, 6], [7], cached=4)
    assert prefixes.recomputed == 0


def test_what_was_evicted_is_computed_again():
    prefixes = Prefixes()
    prefixes.observe("a", [1, 2, 3], [4, 5], cached=0)
    prefixes.observe("a", [1, 2, 3, 4, 5, 6], [7], cached=1)
    # 1 to 4 had been computed, 5 had not
    assert prefixes.recomputed == 3


def test_a_prompt_that_was_trimmed_shares_only_its_beginning():
    prefixes = Prefixes()
    prefixes.observe("a", [1, 2, 3, 4], [5], cached=0)
    prefixes.observe("a", [1, 2, 8, 9], [5], cached=0)
    assert prefixes.recomputed == 2


def test_another_episode_is_another_matter_and_a_prefix_shared_with_it_is_no_debt():
    prefixes = Prefixes()
    prefixes.observe("a", [1, 2, 3], [4], cached=0)
    prefixes.observe("b", [1, 2, 3], [4], cached=2)
    prefixes.forget("a")
    prefixes.forget("never seen")
    prefixes.observe("a", [1, 2, 3], [4], cached=0)
    assert prefixes.recomputed == 0


def test_new_weights_over_a_response_cost_all_there_was_of_it():
    prefixes = Prefixes()
    prefixes.observe("a", [1, 2, 3], [4, 5, 6, 7], cached=0, cuts=[2])
    assert prefixes.recomputed == 5
