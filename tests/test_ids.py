import pickle
import sys

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from l0fast.ids import Ids

NUMBERS = st.lists(st.integers(-2, 2), max_size=4)


@given(st.lists(st.tuples(st.integers(0, 9), NUMBERS), max_size=12), st.data())
def test_they_are_tuples_whatever_grew_out_of_them(steps, data):
    """Any of them may grow at any time, twice and differently too: nothing ever changes in another."""
    made, expected = [Ids()], [()]
    for which, more in steps:
        which %= len(made)
        made.append(made[which] + data.draw(st.sampled_from([list, tuple, Ids]))(more))
        expected.append((*expected[which], *more))
    for one, right in zip(made, expected, strict=True):
        assert one == right
        assert (hash(one), len(one), list(one)) == (hash(right), len(right), list(right))
        assert one.numpy().tolist() == list(right) == np.asarray(one, np.int64).tolist()
        assert pickle.loads(pickle.dumps(one)) == right
        for other, other_right in zip(made, expected, strict=True):
            common = next(
                (i for i, (a, b) in enumerate(zip(right, other_right, strict=False)) if a != b),
                min(len(right), len(other_right)),
            )
            assert one.common(other) == common
            assert one.starts_with(other) == (common == len(other_right))
            assert (one == other) == (right == other_right)


@given(
    NUMBERS, NUMBERS, st.none() | st.integers(-6, 6), st.none() | st.integers(-6, 6), st.sampled_from([None, 1, 2, -1])
)
def test_places_and_slices_are_a_tuples(numbers, more, start, stop, step):
    ids, right = Ids(numbers), tuple(numbers)
    longer = ids + more
    assert ids[start:stop:step] == right[start:stop:step]
    assert ids.numpy(max(start or 0, 0), stop).tolist() == list(right[max(start or 0, 0) : stop])
    for place in range(-len(right), len(right)):
        assert ids[place] == right[place]
    for place in (len(right), -len(right) - 1):
        with pytest.raises(IndexError):
            ids[place]
    for number in range(-3, 3):
        assert (number in ids) == (number in right)
        if number in right:
            assert ids.index(number) == right.index(number)
    assert list(longer) == [*right, *more]


def test_a_conversation_of_many_turns_is_in_memory_once():
    prompts = [Ids(range(1000))]
    for turn in range(50):
        response = Ids(range(turn, turn + 300))
        # an engine may remember less than all of it before the next prompt is made
        assert (prompts[-1] + response[:-1]).common(prompts[-1]) == len(prompts[-1])
        prompts.append(prompts[-1] + response + [7] * 100)
    assert len({id(prompt._buffer) for prompt in prompts}) == 1
    assert sys.getsizeof(prompts[0]._buffer) < 1.2 * 4 * len(prompts[-1])


def test_a_file_gives_them_back():
    written = orjson.dumps({"ids": Ids([3, 1, 2])}, default=Ids.numpy, option=orjson.OPT_SERIALIZE_NUMPY)
    assert written == b'{"ids":[3,1,2]}'
    read = TypeAdapter(dict[str, Ids]).validate_json(written)["ids"]
    assert isinstance(read, Ids)
    assert read == (3, 1, 2)
    assert Ids.from_int32s(read.numpy().tobytes()) == read
    with pytest.raises(ValidationError):
        TypeAdapter(dict[str, Ids]).validate_json(b'{"ids":["three"]}')


def test_what_no_vocabulary_has_is_refused():
    for wrong in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match="more than 32 bits"):
            Ids([1, wrong])
        with pytest.raises(ValueError, match="more than 32 bits"):
            Ids([1]) + (wrong,)
    with pytest.raises(ValueError, match="copy"):
        np.array(Ids([1]), copy=False)
