"""The kernels' benchmark says in JSON what it measured, also where there is no GPU whose memory it could measure."""

import json

from bench.kernels import bench_head


def test_memory_that_no_gpu_has_is_no_figure():
    [row] = json.loads(json.dumps(bench_head("cpu", 1), allow_nan=False))["rows"]
    assert row["policy_head_ms"] > 0
    assert not [name for name in row if "peak_gb" in name or "above_dw" in name]
