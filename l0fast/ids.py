"""Token ids of conversations that grow, without a copy of all of them at each turn.

    buffer      p p p p | r r r | o o | r r      int32, only ever appended to
    prompt 1    [0, 4)
    prompt 2    [0, 9)   = prompt 1 + response + output
    segment     [0, 11)

Prompts of one conversation are beginnings of one buffer, so to make, keep and compare the next one costs what is new in it:
an episode of T turns and n ids has n of them in memory, 4 bytes each, where tuples would have T n / 2 references.
"""

import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_growing = threading.Lock()
"""Two threads that append to one buffer would each believe that what follows is theirs."""


class Ids(Sequence[int]):
    """Ids that never change; like a tuple, and equal to one.

    Args:
        ids: numbers that fit in 32 bits.

    Raises:
        ValueError: one does not fit.
    """

    __slots__ = ("_buffer", "_length")

    def __init__(self, ids: Iterable[int] = ()):
        self._buffer = _int32s(ids)
        self._length = len(self._buffer)

    def __add__(self, more: Iterable[int]) -> "Ids":
        """Appended in place, unless other ids follow these in the buffer already."""
        new, buffer, length = _int32s(more), self._buffer, self._length
        with _growing:
            there = buffer[length : length + len(new)]
            if there == new[: len(there)]:
                buffer.extend(new[len(there) :])
            else:
                buffer = buffer[:length] + new
        return _beginning(buffer, length + len(new))

    @classmethod
    def from_int32s(cls, data: bytes) -> "Ids":
        """As `numpy().tobytes()` gives them."""
        buffer = array("i", data)
        return _beginning(buffer, len(buffer))

    def starts_with(self, other: "Ids") -> bool:
        """Whether `other` is the beginning; beginnings of one buffer are not compared."""
        n = other._length
        return n <= self._length and (self._buffer is other._buffer or self._buffer[:n] == other._buffer[:n])

    def common(self, other: "Ids") -> int:
        """Leading ids that are equal."""
        n = min(self._length, other._length)
        if self._buffer is other._buffer or self._buffer[:n] == other._buffer[:n]:
            return n
        return next(i for i, (a, b) in enumerate(zip(self, other, strict=False)) if a != b)

    def numpy(self, start: int = 0, stop: int | None = None) -> "NDArray[np.int32]":
        """A copy of ids [start, stop): a view would keep the buffer from growing."""
        # types.py, and with it --help, shall not load it
        import numpy as np

        return np.frombuffer(self._slice(slice(start, stop)), np.int32)

    def _slice(self, of: slice) -> "array[int]":
        start, stop, step = of.indices(self._length)
        return self._buffer[start:stop] if step == 1 else self._buffer[: self._length][of]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "NDArray[Any]":
        if copy is False:
            raise ValueError("ids are copied to become an array: leave out copy=False")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return self._length

    def __contains__(self, id: object) -> bool:
        return id in self._buffer[: self._length]

    def index(self, id: int, start: int = 0, stop: int | None = None) -> int:
        return self._buffer[: self._length].index(id, start, self._length if stop is None else stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self._buffer[: self._length])

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> "Ids": ...
    def __getitem__(self, place: int | slice) -> "int | Ids":
        if isinstance(place, slice):
            part = self._slice(place)
            return _beginning(part, len(part))
        if not -self._length <= place < self._length:
            raise IndexError(f"id {place} of {self._length}")
        return self._buffer[place % self._length]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids):
            return self._length == other._length and self.starts_with(other)
        if isinstance(other, tuple):
            return self._length == len(other) and tuple(self) == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Ids({list(self)})"

    def __reduce__(self) -> Any:
        # what follows in the buffer is somebody else's
        return Ids, (tuple(self),)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        numbers = core_schema.list_schema(core_schema.int_schema())
        return core_schema.union_schema(
            [core_schema.is_instance_schema(cls), core_schema.no_info_after_validator_function(cls, numbers)]
        )


def _beginning(buffer: "array[int]", length: int) -> Ids:
    ids = Ids.__new__(Ids)
    ids._buffer, ids._length = buffer, length
    return ids


def _int32s(ids: Iterable[int]) -> "array[int]":
    if isinstance(ids, Ids):
        return ids._buffer[: ids._length]
    try:
        return array("i", ids)
    except OverflowError:
        raise ValueError("an id needs more than 32 bits: is it from a model's tokenizer?") from None
