"""The kernels become machine code for a GPU that is not here, without spilling a register."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="kernels are compiled where triton is installed")

COMPILE = """
import itertools, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from l0fast_kernels.merge_attention_triton import merge_attention_kernel
from l0fast_kernels.policy_epilogue import BLOCK_V, NUM_WARPS, policy_epilogue_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def resources(kernel, types, constants, num_warps):
    names = kernel.arg_names
    default = lambda n: "*fp32" if n.endswith("_ptr") else "i32" if n in ("V", "H") or "stride" in n else "fp32"
    signature = {n: "constexpr" if n in constants else types.get(n, default(n)) for n in names}
    # what the launcher sees of real tensors: aligned pointers, sizes and strides that 16 divides
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and signature[n] != "fp32"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        told = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\\d+)", told.stdout.partition("Function")[2])}

found = {}
for objective, given, grad in itertools.product(("ppo", "cispo"), (False, True), (False, True)):
    flags = dict.fromkeys(("HAS_OLD", "HAS_REF", "HAS_SAMPLER"), given)
    constants = {"OBJECTIVE": objective, **flags, "WITH_LOSS": True, "WITH_GRAD": grad, "BLOCK_V": BLOCK_V}
    types = {"dlogits_ptr": "*bf16", "target_ids_ptr": "*i64"}
    found[f"policy_epilogue {objective} {given} {grad}"] = resources(policy_epilogue_kernel, types, constants, NUM_WARPS)
for heads in (16, 32):
    constants = {"E": 128, "BLOCK_H": 16, "BLOCK_E": 128}
    types = {"out_ptr": "*bf16", "other_ptr": "*bf16"}
    found[f"merge_attention {heads}"] = resources(merge_attention_kernel, types, constants, 4)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_kernels_compile_for_sm_90_without_spills(capsys, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=110,
        # not the interpreter, which this process may be using
        env={
            "PYTHONPATH": ":".join(sys.path),
            "TRITON_DEFAULT_FP_FUSION": "1",
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        print("\nregisters a thread on sm_90:", {name: used["REG"] for name, used in found.items()})  # noqa: T201
    assert len(found) == 10
    for name, used in found.items():
        assert used["LOCAL"] == used["STACK"] == 0, f"{name} spills: {used}"
        # 8 warps x 32 lanes x 128 registers: two programs a multiprocessor
        assert 0 < used["REG"] <= 128, f"{name}: {used}"
