"""Decoding steps as CUDA graphs: a step of few rows takes the time of a thousand launches, and a graph is one.

A graph has fixed shapes and addresses, so it computes the first R slots, whether they run or not, over the first L
columns, for R and L that are powers of two: it is made when such a step first comes, and there are few. A slot that does
not run writes to the scratch column and attends to what it holds; nobody looks at what it gets. Weights and slab are
changed in place, where a graph reads them.

Shape letters: S slots, R rows of a graph, L its columns, n rows that run, E hidden size.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEAST_COLUMNS = 64

Ints = NDArray[np.int64]
Step = Callable[[Tensor, Tensor, int], Tensor]
"""ids [R], columns [R], L -> hidden states [R, E] of the first R slots."""


class DecodeGraphs:
    """`step` for the slots that run, as graphs that share their memory."""

    def __init__(self, step: Step, *, num_slots: int, max_len: int, device: torch.device):
        self._step, self._num_slots, self._max_len = step, num_slots, max_len
        self._ids_S, self._columns_S = torch.zeros(2, num_slots, dtype=torch.int64, device=device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # one for all: torch keeps a workspace for each stream that cuBLAS was called on, of 32 MiB on an H100
        self._stream = torch.cuda.Stream(device)

    def sizes(self, slots_n: Ints, positions_n: Ints) -> tuple[int, int]:
        """R and L of the graph for these."""
        return graph_sizes(slots_n, positions_n, num_slots=self._num_slots, max_len=self._max_len)

    def __call__(self, slots_n: Ints, ids_n: NDArray[np.int32], positions_n: Ints, rows: int, length: int) -> Tensor:
        """Hidden states after one id a row, [n, E], by the graph of R rows and L columns that `sizes` gives."""
        inputs_2R = np.zeros((2, rows), np.int64)
        inputs_2R[1] = self._max_len
        inputs_2R[:, slots_n] = ids_n, positions_n
        for own_S, now_R in zip((self._ids_S, self._columns_S), torch.from_numpy(inputs_2R), strict=True):
            own_S[:rows].copy_(now_R)
        if (rows, length) not in self._graphs:
            self._graphs[rows, length] = self._capture(rows, length)
        graph, hidden_RE = self._graphs[rows, length]
        graph.replay()
        return hidden_RE[torch.from_numpy(slots_n).to(hidden_RE.device)]

    def _capture(self, rows: int, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        ids_R, columns_R = self._ids_S[:rows], self._columns_S[:rows]
        # libraries set themselves up at their first call, which no graph may hold; on a stream of its own, as torch asks
        self._stream.wait_stream(torch.cuda.current_stream(ids_R.device))
        with torch.cuda.stream(self._stream):
            self._step(ids_R, columns_R, length)
        torch.cuda.current_stream(ids_R.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            hidden_RE = self._step(ids_R, columns_R, length)
        return graph, hidden_RE


def graph_sizes(slots_n: Ints, positions_n: Ints, *, num_slots: int, max_len: int) -> tuple[int, int]:
    """The smallest powers of two that hold these slots and columns, at most all of them."""
    rows, columns = int(slots_n[-1]) + 1, max(int(positions_n.max()) + 1, _LEAST_COLUMNS)
    return min(1 << (rows - 1).bit_length(), num_slots), min(1 << (columns - 1).bit_length(), max_len)
