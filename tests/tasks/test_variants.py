"""Variants of a world: training material beside it that tells none of its facts and none of its held-out names."""

import random

import pytest

from l0fast.config import TaskConfig
from l0fast.tasks import load_variants, load_world
from l0fast.tasks.world import Names, world_of


@pytest.mark.parametrize("kind", ["geography", "invented"])
def test_variants_hold_no_held_out_name_of_the_world(kind: str):
    config = TaskConfig(kind=kind, num_variants=3)
    names = Names(load_world(config).heldout_names)
    for variant in load_variants(config):
        assert not [sentence for sentence in variant.train_corpus if names.occur_in(sentence)]


@pytest.mark.parametrize("kind", ["geography", "invented"])
def test_facts_of_the_world_are_not_told_in_its_variants(kind: str):
    config = TaskConfig(kind=kind, num_variants=3)
    told = set(load_world(config).full_corpus)
    for variant in load_variants(config):
        assert sum(sentence in told for sentence in variant.train_corpus) < 0.05 * len(variant.train_corpus)


def test_a_task_names_its_world():
    config = TaskConfig(num_variants=2)
    worlds = [load_world(config), *load_variants(config)]
    assert len({world.name for world in worlds}) == 3
    for world in worlds:
        assert world_of(world.train_task(random.Random(0), two_hop_share=0.5).id) == world.name


def test_a_share_of_zero_makes_none():
    assert load_variants(TaskConfig(variant_share=0.0)) == []
