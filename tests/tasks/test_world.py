"""The split between training and held-out names, the questions, and the plans, in both worlds."""

import random
import subprocess
import sys
from collections import Counter

import pytest

from l0fast.config import TaskConfig
from l0fast.tasks import load_world
from l0fast.tasks.facts import CHAINS, NAME_VALUED, PHRASINGS, RELATIONS, UNTRAINED_CHAINS, Fact, words
from l0fast.tasks.geography import geography, respelled_world
from l0fast.tasks.invented import invented_world
from l0fast.tasks.world import Names, World, hold_out
from l0fast.tools.local_search import LocalSearch


@pytest.fixture(params=["geography", "invented"])
def world(request):
    return load_world(TaskConfig(kind=request.param, world_seed=3))


def train_tasks(world, n, *, two_hop_share=0.7, seed=0):
    rng = random.Random(seed)
    return [world.train_task(rng, two_hop_share=two_hop_share) for _ in range(n)]


def test_no_heldout_name_occurs_in_training_sentences_questions_or_answers(world):
    tasks = train_tasks(world, 8000)
    texts = [*world.train_corpus, *(task.question for task in tasks), *(a for task in tasks for a in task.answers)]
    seen = " | ".join(f" {' '.join(words(text))} " for text in dict.fromkeys(texts))
    assert "|" in seen
    assert [name for name in world.heldout_names if f" {' '.join(words(name))} " in seen] == []


def test_a_heldout_country_is_held_out_with_its_capital_and_all_its_cities(world):
    countries = {fact.entity for fact in world.facts if fact.relation != "country"}
    held = countries & world.heldout_names
    assert len(held) == (52 if world.name == "geography" else 13)
    for fact in world.facts:
        if fact.relation == "country" and fact.value in held:
            assert fact.entity in world.heldout_names
        if fact.relation == "capital" and fact.entity in held:
            assert fact.value in world.heldout_names


def test_training_and_heldout_names_are_disjoint_and_training_keeps_most_names(world):
    names = {fact.entity for fact in world.facts} | {f.value for f in world.facts if f.relation in NAME_VALUED}
    assert not world.train_names & world.heldout_names
    assert world.train_names | world.heldout_names <= names
    assert len(world.train_names) > 0.55 * len(names)


def test_every_heldout_task_asks_about_a_heldout_name(world):
    for task in [*world.heldout_tasks(600, two_hop_share=0.7), *world.untrained_chain_tasks(200)]:
        assert task.id.split("|")[2] in world.heldout_names
        assert task.id.split("|")[2] in task.question


def test_training_never_asks_the_untrained_chains_and_asks_every_other_kind(world):
    kinds = Counter(task.kind for task in train_tasks(world, 4000, two_hop_share=0.6))
    assert set(kinds) == {*RELATIONS, *CHAINS} - set(UNTRAINED_CHAINS)
    assert min(kinds.values()) > 80
    assert {task.kind for task in world.untrained_chain_tasks(50)} == set(UNTRAINED_CHAINS)
    assert not {task.kind for task in world.heldout_tasks(600, two_hop_share=0.7)} & set(UNTRAINED_CHAINS)


@pytest.mark.parametrize(("share", "hops"), [(0.0, {1}), (1.0, {2})])
def test_two_hop_share_decides_how_many_lookups_are_needed(world, share, hops):
    assert {task.hops for task in train_tasks(world, 100, two_hop_share=share)} == hops
    assert {task.hops for task in world.heldout_tasks(100, two_hop_share=share)} == hops


def test_two_hop_share_is_kept_on_average(world):
    assert sum(task.hops == 2 for task in world.heldout_tasks(600, two_hop_share=0.7)) == pytest.approx(420, abs=45)


def test_ids_and_questions_belong_together_one_to_one(world):
    tasks = [*train_tasks(world, 5000), *world.heldout_tasks(600, two_hop_share=0.7)]
    assert len({t.id for t in tasks}) == len({t.question for t in tasks}) == len({(t.id, t.question) for t in tasks})


def test_heldout_tasks_are_fixed_distinct_and_a_prefix_of_more_of_them(world):
    tasks = world.heldout_tasks(600, two_hop_share=0.7)
    assert len({task.id for task in tasks}) == 600
    assert world.heldout_tasks(200, two_hop_share=0.7) == tasks[:200]
    assert world.untrained_chain_tasks(100)[:40] == world.untrained_chain_tasks(40)


def test_training_draws_depend_on_the_generator_alone(world):
    assert train_tasks(world, 50, seed=1) == train_tasks(world, 50, seed=1)
    assert train_tasks(world, 50, seed=1) != train_tasks(world, 50, seed=2)


def test_asking_for_more_heldout_questions_than_there_are_is_refused(world):
    with pytest.raises(ValueError, match="ask for fewer"):
        world.heldout_tasks(10**6, two_hop_share=0.7)
    with pytest.raises(ValueError, match="ask for fewer"):
        world.untrained_chain_tasks(10**6)


def test_a_plan_ends_in_a_right_answer_and_each_hop_starts_where_the_last_one_ended(world):
    for task in [*train_tasks(world, 500), *world.heldout_tasks(500, two_hop_share=0.7)]:
        plan = world.plan(task)
        assert len(plan.hops) == task.hops
        assert plan.answer in task.answers
        assert plan.hops[0].entity in task.question
        assert [hop.value for hop in plan.hops[:-1]] == [hop.entity for hop in plan.hops[1:]]
        for hop in plan.hops:
            assert hop.value in hop.sentence
            assert hop.entity in hop.sentence


def test_no_question_names_its_own_answer_entity(world):
    for task in [*train_tasks(world, 2000), *world.heldout_tasks(600, two_hop_share=0.7)]:
        assert task.id.split("|")[2] != task.answers[0]


@pytest.mark.parametrize("heldout", [True, False])
def test_a_perfect_agents_searches_find_the_sentences_of_its_plan(world, heldout):
    if heldout:
        tasks = [*world.heldout_tasks(600, two_hop_share=0.7), *world.untrained_chain_tasks(100)]
    else:
        tasks = train_tasks(world, 600)
    index = LocalSearch(world.full_corpus if heldout else world.train_corpus)
    found = [all(hop.sentence in index.search(hop.query) for hop in world.plan(task).hops) for task in tasks]
    assert sum(found) >= 0.99 * len(found)


def test_the_right_sentence_comes_among_distractors_and_at_every_place(world):
    index = LocalSearch(world.full_corpus)
    places = Counter()
    for task in world.heldout_tasks(300, two_hop_share=1.0):
        last = world.plan(task).hops[-1]
        results = index.search(last.query)
        assert len(results) == 3
        places[results.index(last.sentence)] += 1
    assert min(places[place] for place in range(3)) > 30


def test_a_task_of_another_world_is_not_planned():
    task = invented_world(0).heldout_tasks(1, two_hop_share=0.5)[0]
    with pytest.raises(ValueError, match="of the world"):
        geography().plan(task)


def test_every_name_can_stand_in_a_quoted_string_and_a_task_id(world):
    assert not [n for n in world.train_names | world.heldout_names if set(n) & set('"\\|{}\n') or not n.isascii()]


def test_no_sentence_is_said_twice(world):
    assert len(set(world.full_corpus)) == len(world.full_corpus) == len(world.facts)


def test_names_are_found_as_whole_words_whatever_their_case():
    names = Names(["Niger", "San Jose"])
    assert names.occur_in("The NIGER river")
    assert names.occur_in("San-Jose del Monte")
    assert not names.occur_in("Nigeria, San Juan, Jose San")


def test_a_name_that_stands_inside_another_one_is_not_drawn():
    facts = [Fact("Guinea", "continent", "Africa"), Fact("Papua New Guinea", "continent", "Oceania")]
    assert hold_out(facts, num_countries=2, num_cities=2) == {"Papua New Guinea"}


def test_an_ambiguous_name_is_never_asked_about_but_stays_in_the_corpus():
    facts = [
        Fact("Alba", "continent", "Europe"),
        Fact("Borea", "continent", "Asia"),
        Fact("Alba", "capital", "Alba"),
        Fact("Borea", "capital", "Cid"),
        Fact("Dor", "country", "Alba"),
        Fact("Dor", "country", "Borea"),
        Fact("Cid", "country", "Alba"),
        Fact("Alba", "country", "Borea"),
        Fact("Eld", "country", "Borea"),
    ]
    world = World("small", facts, frozenset({"Alba", "Borea", "Cid", "Dor", "Eld"}))
    asked = {}
    for kind in PHRASINGS:
        asked[kind] = {entity for entity, _ in world._pool(kind)}
    assert asked["country"] == {"Eld"}
    assert asked["city>continent"] == {"Eld"}
    assert asked["city>capital"] == {"Eld"}
    assert asked["capital"] == {"Borea"}
    assert asked["capital>continent"] == {"Cid"}
    assert "Dor is a city in Borea." in world.full_corpus


def test_every_value_of_a_fact_is_a_right_answer():
    facts = [Fact("Alba", "language", value) for value in ("Long Name", "Short", "Word")]
    world = World("small", [*facts, Fact("Dor", "country", "Alba")], frozenset({"Dor", "Alba"}))
    task = world._task("city>language", "Dor", 0)
    assert set(task.answers) == {"Long Name", "Short", "Word"}
    assert world.plan(task).answer == "Short"


def test_worlds_do_not_depend_on_the_hash_seed():
    script = (
        "import random\n"
        "from l0fast.tasks.geography import geography, respelled_world\n"
        "from l0fast.tasks.invented import invented_world\n"
        "rng = random.Random(5)\n"
        "for world in (geography(), respelled_world(1), invented_world(1)):\n"
        "    print(world.full_corpus[::97], sorted(world.heldout_names)[::41])\n"
        "    print([world.train_task(rng, two_hop_share=0.5).id for _ in range(30)])\n"
        "print([task.id for task in geography().heldout_tasks(50, two_hop_share=0.5)])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 1000


def test_a_respelled_world_has_the_shapes_of_the_real_one_and_neither_its_long_names_nor_its_facts():
    real, respelled = geography(), respelled_world(4)
    assert not respelled.heldout_names
    assert Counter(f.relation for f in respelled.facts) == Counter(f.relation for f in real.train_facts)
    told = set(real.full_corpus)
    assert sum(sentence in told for sentence in respelled.full_corpus) < 0.01 * len(told)
    kept = respelled.train_names & {name for f in real.facts for name in (f.entity, f.value)}
    assert len(kept) < 0.03 * len(real.train_names)  # "Osh", "Xi'an": no long word to spell anew
    names = Names(real.heldout_names)
    assert not [sentence for sentence in respelled.train_corpus if names.occur_in(sentence)]
    assert respelled.full_corpus != respelled_world(5).full_corpus


def test_a_word_is_respelled_the_same_wherever_it_stands():
    """ "Guinea" stays inside "Equatorial Guinea": a search has the same distractors."""
    real, respelled = geography(), respelled_world(4)
    renamed = {}
    for before, after in zip(real.train_facts, respelled.facts, strict=True):
        if before.relation == "country":
            renamed |= zip(
                words(f"{before.entity} {before.value}"), words(f"{after.entity} {after.value}"), strict=True
            )
    for before, after in zip(real.train_facts, respelled.facts, strict=True):
        if before.relation == "country":
            assert [renamed[word] for word in words(before.entity)] == list(words(after.entity))


def test_an_invented_world_shares_no_word_with_the_real_one_but_the_wording():
    real = {word for sentence in geography().full_corpus for word in words(sentence)}
    wording = {word for relation in RELATIONS.values() for word in words(relation.sentence.format(e="", v=""))}
    for seed in range(3):
        world = invented_world(seed)
        names = world.train_names | world.heldout_names
        assert not {word for name in names for word in words(name)} & real
        invented = {word for fact in world.facts for word in words(fact.value) if word.isalpha() and len(word) > 2}
        assert not invented & (real | wording)


def test_an_invented_world_differs_from_seed_to_seed():
    assert not invented_world(0).train_names & invented_world(1).train_names
