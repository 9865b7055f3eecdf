"""The learner's kernels beside their peers, correctness first.

    python -m bench.kernels                                 a small shape on the CPU: errors only, times mean nothing
    python -m bench.kernels --device cuda [--only head attention step] [--out bench/results/kernels_h200.json]

head        policy_head against naive PyTorch (all logits at once), Liger's fused linear GRPO loss and Liger's fused linear
            scaled cross-entropy: time of forward + backward, peak memory above the inputs, error against float64
epilogue    the Triton kernel alone, over tiles and warps, against the bytes it must move; the head over sizes of chunks and
            spans; and its matmuls alone, over rows
attention   the shared-prefix cascade against the same rows laid out whole (merged), forward + backward, with FlashAttention
            from torch and from flash-attn where it is installed
step        a whole optimizer step of a random-weight model of a real shape, with and without Liger's layers: tokens/s and MFU

Contenders take turns; medians count. Peers that are not installed are named as missing. The last line is JSON.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.at_least import at_least
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.results_folder import results_file
from l0fast.ids import Ids
from l0fast.learner.cost import SHAPES, ModelShape
from l0fast_kernels.policy_head import k3, policy_head, policy_loss_tokens, token_stats

CLIPS = {"clip_low": 0.2, "clip_high": 0.25, "dual_clip": 3.0}


TINY = ModelShape(
    vocab=512, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, tied=True, qk_norm=True
)
"""What stands for a model on a CPU."""
PEAK_TFLOPS = 989.0
"""Dense bf16 of an H100 or H200 SXM, by the vendor's datasheet: what MFU is a share of."""


# --- measuring


def clock(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns; events on CUDA, wall clock elsewhere."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, run in contenders.items():
            if torch.cuda.is_available():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                took = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                run()
                took = 1e3 * (time.perf_counter() - begin)
            if round_:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_gb(run: Callable[[], Any], leaves: Iterable[Tensor]) -> float:
    """Most memory in use at a time on the GPU above what was in use before, gradients of the leaves included [GB]."""
    gc.collect()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def rel(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm()).item()


# --- the head


def head_problem(T: int, V: int, D: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(T + V + D)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    hidden, weight = draw(T, D).to(dtype), (draw(V, D) * D**-0.5).to(dtype)
    ids = torch.randint(V, (T,), generator=g, device=device)
    # near the policy's own, so that some ratios are clipped and some are not
    old = token_stats(hidden, weight, ids)[0] + draw(T)
    advantages = draw(max(1, T // 512)).repeat_interleave(min(T, 512))[:T]
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "ids": ids,
        "old": old,
        "ref": old + 0.1 * draw(T),
        "advantages": advantages,
    }


def our_head(p: dict[str, Tensor], **options: Any) -> Tensor:
    loss, _ = policy_head(
        p["hidden"],
        p["weight"],
        p["ids"],
        advantages_T=p["advantages"],
        loss_weights_T=torch.ones_like(p["advantages"]),
        old_logprobs_T=p["old"],
        ref_logprobs_T=p["ref"],
        kl_coef=0.001,
        **CLIPS,
        **options,
    )
    return loss / len(p["ids"])


def loss_of(logprobs: Tensor, p: dict[str, Tensor]) -> Tensor:
    loss, _ = policy_loss_tokens(logprobs, p["old"].to(logprobs.dtype), p["advantages"].to(logprobs.dtype), **CLIPS)
    return (loss + 0.001 * k3(logprobs, p["ref"].to(logprobs.dtype))).mean()


def naive_head(p: dict[str, Tensor]) -> Tensor:
    logits = (p["hidden"] @ p["weight"].T).float()
    return loss_of(torch.log_softmax(logits, -1).gather(1, p["ids"][:, None])[:, 0], p)


LIGER_GRPO_TOKENS = 10_240
HEADS = ("Qwen3-0.6B", "Qwen3-4B", "Qwen2.5-7B")
"""Whose heads are measured."""


def liger_cross_entropy(p: dict[str, Tensor]) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(p["hidden"], p["weight"], p["ids"])
    return loss_of(-nll, p)


def liger_grpo(p: dict[str, Tensor]) -> Tensor:
    """Its rows are whole sequences with one advantage each: here 512 tokens, no padding, which is its best case.

    Its `delta` is what we call dual_clip. Compiled, as it is by default, for one length only: compiling takes longer than the rest.
    """
    from liger_kernel.chunked_loss.grpo_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearGRPOLoss,
    )

    rows = (-1, min(512, len(p["ids"])))
    module = LigerFusedLinearGRPOLoss(
        beta=0.001,
        epsilon_low=0.2,
        epsilon_high=0.25,
        loss_type="dapo",
        chunk_size=2,
        delta=3.0,
        compiled=len(p["ids"]) == LIGER_GRPO_TOKENS,
    )
    loss, *_ = module(
        p["hidden"].view(*rows, p["hidden"].shape[-1]),
        p["weight"],
        p["ids"].view(rows),
        torch.ones_like(p["ids"].view(rows)),
        p["advantages"].view(rows)[:, 0].contiguous(),
        ref_per_token_logps=p["ref"].view(rows),
        old_per_token_logps=p["old"].view(rows),
    )
    return loss


def forward_backward(head: Callable[..., Tensor], p: dict[str, Tensor], **options: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        p["hidden"].grad = p["weight"].grad = None
        loss = head(p, **options)
        loss.backward()
        return loss.detach()

    return run


def exact_gradients(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, dh and dW of `loss_of` in float64, 512 rows at a time."""
    hidden, weight = p["hidden"].detach().double(), p["weight"].detach().double()
    logprobs, dhidden, dweight = [], [], torch.zeros_like(weight)
    for start in range(0, len(hidden), 512):
        rows = slice(start, start + 512)
        part = {
            name: p[name][rows].double() if p[name].is_floating_point() else p[name][rows]
            for name in ("ids", "old", "ref", "advantages")
        }
        logits = hidden[rows] @ weight.T
        lp = (logits.gather(1, part["ids"][:, None]) - logits.logsumexp(1, keepdim=True))[:, 0]
        leaf = lp.detach().requires_grad_()
        (dlp,) = torch.autograd.grad(loss_of(leaf, part) * (len(leaf) / len(hidden)), leaf)
        dlogits = logits.softmax(1).mul_(-dlp[:, None])
        dlogits.scatter_add_(1, part["ids"][:, None], dlp[:, None])
        logprobs.append(lp)
        dhidden.append(dlogits @ weight)
        dweight += dlogits.T @ hidden[rows]
    return torch.cat(logprobs), torch.cat(dhidden), dweight


def contenders_of_head() -> tuple[dict[str, Callable[..., Tensor]], list[str]]:
    found: dict[str, Callable[..., Tensor]] = {"policy_head": our_head, "naive": naive_head}
    try:
        import liger_kernel  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found, ["liger_cross_entropy, liger_grpo: liger-kernel is not installed"]
    return found | {"liger_cross_entropy": liger_cross_entropy, "liger_grpo": liger_grpo}, []


def bench_head(device: str, rounds: int) -> dict[str, Any]:
    contenders, missing = contenders_of_head()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu":
        shapes, lengths = {"small": (1000, 64)}, [96]
        contenders.pop("liger_grpo", None)  # compiles for minutes on a CPU
    else:
        shapes = {name: (SHAPES[name].vocab, SHAPES[name].hidden) for name in HEADS}
        lengths = [2048, 10_240, 32_768]
    rows: list[dict[str, Any]] = []
    for shape, (V, D) in shapes.items():
        for T in lengths:
            p = head_problem(T, V, D, device, dtype)
            row: dict[str, Any] = {"shape": shape, "tokens": T, "vocab": V, "hidden": D}
            # the definition keeps some five [T, V] blocks of fp32
            able = {n: c for n, c in contenders.items() if n != "naive" or T * V * 20 < 60e9}
            if T not in (lengths[0], LIGER_GRPO_TOKENS):
                able.pop("liger_grpo", None)
            if device == "cuda":
                # what liger_grpo compiled for another shape only confuses it
                torch._dynamo.reset()
            for name in list(able):
                try:
                    forward_backward(able[name], p)()
                except torch.OutOfMemoryError:
                    row[f"{name}_ms"] = row[f"{name}_peak_gb"] = "out of memory"
                    del able[name]
                except Exception as e:  # noqa: BLE001 - a peer that can't run here is named, and we go on without it
                    missing.append(f"{name}: {type(e).__name__}: {str(e).strip()[:300]}")
                    del able[name], contenders[name]
            if T == lengths[0]:
                row["errors"] = head_errors(able, p)
            timed = {n: c for n, c in able.items() if n != "liger_grpo" or T == LIGER_GRPO_TOKENS}
            runs = {name: forward_backward(head, p) for name, head in timed.items()}
            if device == "cuda":
                row |= {f"{n}_peak_gb": round(peak_gb(run, (p["hidden"], p["weight"])), 3) for n, run in runs.items()}
                # dW is kept in fp32 until it is handed on in the dtype of W
                if "policy_head" in runs:
                    row["policy_head_peak_above_dw_gb"] = round(row["policy_head_peak_gb"] - 4 * V * D / 1e9, 3)
            row |= {f"{name}_ms": round(ms, 3) for name, ms in clock(runs, rounds).items()}
            row["matmul_floor_ms"] = round(6 * T * V * D / 750e12 * 1e3, 2)
            if "policy_head" in runs:
                peers = [row[f"{name}_ms"] for name in runs if name != "policy_head"]
                row["ratio_to_best_peer"] = round(min(peers) / row["policy_head_ms"], 2) if peers else None
            rows.append(row)
            say(row)
            del p, runs
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return {"rows": rows, "missing": missing}


def head_errors(contenders: dict[str, Callable[..., Tensor]], p: dict[str, Tensor]) -> dict[str, Any]:
    """Relative errors of the gradients against float64, and of our log-probs the largest [nats]."""
    logprobs, *true = exact_gradients(p)
    errors: dict[str, Any] = {}
    for name, head in contenders.items():
        forward_backward(head, p)()
        dhidden, dweight = p["hidden"].grad, p["weight"].grad
        assert dhidden is not None
        assert dweight is not None
        errors[name] = {"dhidden": rel(dhidden, true[0]), "dweight": rel(dweight, true[1])}
    ours, _ = token_stats(p["hidden"].detach(), p["weight"].detach(), p["ids"])
    errors["policy_head"]["logprob_max_abs"] = (ours.double() - logprobs).abs().max().item()
    naive = (p["hidden"] @ p["weight"].T).detach().float().log_softmax(-1).gather(1, p["ids"][:, None])[:, 0]
    errors["naive"]["logprob_max_abs"] = (naive.double() - logprobs).abs().max().item()
    return errors


# --- the epilogue alone


def bench_epilogue(device: str, rounds: int) -> dict[str, Any]:
    from l0fast_kernels import policy_epilogue
    from l0fast_kernels.policy_head import MAX_K3, MAX_LOG_RATIO, OUT, PER_TOKEN

    if device == "cpu":
        return {"skipped": "Triton's interpreter has no speed to measure"}
    C, V, D = 1024, 152_064, 3584
    logits = 3 * torch.randn(C, V, device=device)
    dlogits = torch.empty(C, V, device=device, dtype=torch.bfloat16)
    targets = torch.randint(V, (C,), device=device)
    per_token = {name: torch.randn(C, device=device) for name in PER_TOKEN}
    out = {name: torch.empty(C, device=device) for name in OUT}
    settings = {"objective": "ppo", "temperature": 1.0, "kl_coef": 0.001, "tis_cap": 2.0, **CLIPS}
    settings |= {"max_log_ratio": MAX_LOG_RATIO, "max_k3": MAX_K3}
    runs = {}
    for block_v in (2048, 4096, 8192, 16_384):
        for num_warps in (4, 8, 16, 32):
            if 4 <= block_v // (32 * num_warps) <= 64:

                def run(block_v: int = block_v, num_warps: int = num_warps) -> None:
                    policy_epilogue.triton_epilogue(
                        logits, dlogits, targets, per_token, out, settings, block_v=block_v, num_warps=num_warps
                    )

                runs[f"{block_v} x {num_warps} warps"] = run
    ms = clock(runs, rounds)
    moved = C * V * (4 + 4 + 2)
    rows = [{"tile": name, "ms": round(t, 4), "tb_per_s": round(moved / t / 1e9, 2)} for name, t in ms.items()]
    for row in rows:
        say(row)
    p = head_problem(10_240, V, D, device, torch.bfloat16)
    sizes = [(c, s) for s in (2048, 2560, 3456, 5120) for c in (256, 384, 512, 768, 1024)] + [
        (1024, 1024),
        (1152, 1152),
    ]
    chunks = {f"{c} of {s}": forward_backward(our_head, p, chunk=c, span=s) for c, s in sizes}
    chunk_rows = [
        {
            "chunk": chunk,
            "ms": round(t, 3),
            "peak_above_dw_gb": round(peak_gb(chunks[chunk], (p["hidden"], p["weight"])) - 4 * V * D / 1e9, 3),
        }
        for chunk, t in clock(chunks, rounds).items()
    ]
    for row in chunk_rows:
        say(row)
    return {"rows": rows, "chunks": chunk_rows, "matmuls": matmuls(p, rounds)}


def matmuls(p: dict[str, Tensor], rounds: int) -> list[dict[str, Any]]:
    """What the matmuls alone take, as called, over rows."""
    hidden, weight = p["hidden"].detach(), p["weight"].detach()
    V, D = weight.shape
    dw = torch.zeros(V, D, device=weight.device)
    rows = []
    for n in (256, 512, 1024, 2048, 2560, 3424, 5120):
        h = hidden[:n]
        dz, dh = torch.randn(n, V, device=weight.device, dtype=weight.dtype), torch.empty_like(h)
        runs: dict[str, Callable[[], Any]] = {
            "dhidden": lambda dz=dz, dh=dh: torch.mm(dz, weight, out=dh),
            "dweight": lambda dz=dz, h=h: torch.addmm(dw, dz.T, h, out_dtype=torch.float32, out=dw),
            "dweight_first": lambda dz=dz, h=h: torch.addmm(dw, dz.T, h, out_dtype=torch.float32, beta=0.0, out=dw),
        }
        if n <= 1024:
            block = torch.empty(n, V, device=weight.device)
            runs["logits"] = lambda h=h, block=block: torch.mm(h, weight.T, out_dtype=torch.float32, out=block)
        ms = clock(runs, rounds)
        rows.append({"rows": n} | {name: round(2 * n * V * D / t / 1e9) for name, t in ms.items()})
        say({"tflop_per_s": rows[-1]})
    return rows


# --- attention


def attention_sources() -> dict[str, Any]:
    """FlashAttention of torch, and of the flash-attn package where that is installed."""
    from l0fast.learner import attention

    found = {"torch": attention.torch_ops()}
    if importlib.util.find_spec("flash_attn_2_cuda"):
        found["flash_attn"] = attention.flash_attn_ops()
    return found


def bench_attention(device: str, rounds: int) -> dict[str, Any]:
    import numpy as np

    from l0fast.learner import attention
    from l0fast.learner.packing import Row, pack_rows

    def packs(prefix: int, branches: list[int], share: bool) -> Any:
        rng = np.random.default_rng(0)
        head = rng.integers(0, 1000, prefix)
        rows = []
        for i, n in enumerate(branches):
            ids = np.concatenate([head, [2000 + i], rng.integers(0, 1000, n - 1)])
            m = n - 1
            rows.append(
                Row(
                    token_ids=ids,
                    predictors=np.arange(prefix, prefix + m),
                    advantages=np.zeros(m, np.float32),
                    sampler_logprobs=np.zeros(m, np.float32),
                    loss_weights=np.ones(m, np.float32),
                    turns=np.zeros(m, np.int32),
                )
            )
        (pack,) = pack_rows([rows], 10**7, share_prefixes=share)
        return pack

    heads = {"Qwen3-0.6B": (16, 8), "Qwen2.5-7B": (28, 4)} if device == "cuda" else {"small": (4, 2)}
    scale = 1 if device == "cuda" else 64
    sources = attention_sources() if device == "cuda" else {"sdpa": None}
    rows = []
    for (shape, (H, K)), (source, ops) in itertools.product(heads.items(), sources.items()):
        for prefix, count, branch in ((2048, 16, 1024), (2048, 8, 3072), (4096, 16, 1536), (8192, 8, 1024)):
            prefix, branch = prefix // scale, branch // scale
            E = 128 if device == "cuda" else 32
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            runs, tokens = {}, {}
            for name, share in (("cascade", True), ("merged", False)):
                pack = packs(prefix, [branch] * count, share)
                layout = attention.PackLayout.of(pack, device)
                tokens[name] = T = pack.num_tokens
                q, k, v = (torch.randn(1, h, T, E, device=device, dtype=dtype, requires_grad=True) for h in (H, K, K))
                upstream = torch.randn(1, T, H, E, device=device, dtype=dtype)

                def run(q=q, k=k, v=v, layout=layout, upstream=upstream, ops=ops, E=E) -> None:
                    if ops is None:
                        out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout)
                    else:
                        parts = (x[0].transpose(0, 1) for x in (q, k, v))
                        out = attention.Cascade.apply(*parts, layout, E**-0.5, ops)[None]  # pyright: ignore[reportOptionalSubscript]
                    torch.autograd.grad(out, (q, k, v), upstream)

                runs[name] = run
            ms = clock(runs, rounds)
            row = {"heads": shape, "source": source, "prefix": prefix, "branches": count, "branch": branch}
            row |= {f"{name}_tokens": n for name, n in tokens.items()}
            row |= {f"{name}_ms": round(value, 3) for name, value in ms.items()}
            row["ratio"] = round(ms["merged"] / ms["cascade"], 2)
            rows.append(row)
            say(row)
    found: dict[str, Any] = {"rows": rows}
    if device == "cuda":
        found["self_test_error"] = {name: attention.self_test(ops, "cuda") for name, ops in attention_sources().items()}
        say(found["self_test_error"])
    return found


# --- a whole step


def bench_step(device: str, rounds: int) -> dict[str, Any]:
    if device == "cuda":
        import torch.distributed as dist

        # FSDP2 wants a process group, for one rank too
        dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda:0"))
        try:
            return _bench_step(device, rounds)
        finally:
            dist.destroy_process_group()
    return _bench_step(device, rounds)


def _bench_step(device: str, rounds: int) -> dict[str, Any]:
    if device == "cuda":
        cases: list[tuple[str, bool, Literal["on", "off"]]] = [
            ("Qwen3-0.6B", False, "on"),
            ("Qwen3-0.6B", True, "on"),
            ("Qwen3-0.6B", True, "off"),
            ("Qwen3-4B", True, "on"),
        ]
    else:
        cases = [("tiny", False, "off")]
    rows = []
    for name, liger, checkpointing in cases:
        try:
            rows.append(whole_step(name, liger, checkpointing, device, rounds))
        except torch.OutOfMemoryError as e:
            rows.append({"model": name, "liger": liger, "failed": f"{type(e).__name__}: {str(e)[:200]}"})
        say(rows[-1])
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows}


def whole_step(name: str, liger: bool, checkpointing: Literal["on", "off"], device: str, rounds: int) -> dict[str, Any]:
    """Steps of a random-weight model on a batch of L0's shape: groups of 8, a prompt of 2,048 tokens, 4 turns of 300 + 500."""
    from transformers import AutoModelForCausalLM

    from l0fast.config import LearnerConfig
    from l0fast.learner import loading
    from l0fast.learner.packing import pack_rows
    from l0fast.learner.policy_model import PolicyModel

    tiny = device == "cpu"
    shape = TINY if tiny else SHAPES[name]
    groups = random_rows(shape.vocab, *((1, 4, 64, 10, 16, 3) if tiny else (4, 8, 2048, 300, 500, 4)))
    packs = pack_rows(groups, 32_768, share_prefixes=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                model_config(shape), dtype=torch.bfloat16 if not tiny else torch.float32
            )
        model.save_pretrained(folder)
        parameters = sum(p.numel() for p in model.parameters())
        del model
        apply_liger = loading.apply_liger
        if not liger:
            # what Liger has changed in transformers stays changed, so cases without it come first
            loading.apply_liger = lambda model_type: None
        try:
            config = LearnerConfig(kl_coef=0.0, lr=1e-6, activation_checkpointing=checkpointing)
            policy = PolicyModel(Path(folder), config, num_steps=100, temperature=1.0, device=device)
        finally:
            loading.apply_liger = apply_liger
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, metrics = [], {}
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            metrics = policy.step(packs)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        tokens, sampled = sum(pack.num_tokens for pack in packs), sum(len(pack.predictors) for pack in packs)
        flops = step_flops(shape, packs)
        step_s = statistics.median(seconds[1:])
        return {
            "model": name,
            "liger": liger,
            "activation_checkpointing": checkpointing,
            "parameters": parameters,
            "packs": len(packs),
            "tokens_laid_out": tokens,
            "tokens_merged": sum(len(row.token_ids) for rows in groups for row in rows),
            "sampled_tokens": sampled,
            "step_s": round(step_s, 3),
            "first_step_s": round(seconds[0], 3),
            "tokens_per_s": round(tokens / step_s),
            "model_tflop": round(flops / 1e12, 1),
            "mfu": round(flops / step_s / (PEAK_TFLOPS * 1e12), 3) if device == "cuda" else None,
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
            "seconds": {k: round(v, 3) for k, v in metrics.items() if k.endswith("_s")},
        }


def random_rows(
    vocab: int, num_groups: int, group_size: int, prompt: int, response: int, output: int, num_turns: int
) -> list[list[Any]]:
    """Rows of a batch, group by group. `prompt`, `response` and `output`: lengths [tokens]."""
    import numpy as np

    from l0fast.learner.packing import row_of
    from l0fast.segments import segments_of
    from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn

    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(0, vocab, n).tolist())  # noqa: E731
    groups = []
    for g in range(num_groups):
        task = Task(id=f"t{g}", question="?", answers=("a",))
        first, rows = Ids(draw(prompt)), []
        for i in range(group_size):
            turns, ids = [], first
            for _ in range(num_turns):
                said = draw(response)
                turns.append(
                    Turn(
                        prompt_ids=ids,
                        response_ids=Ids(said),
                        sampler_logprobs=(-12.0,) * response,
                        finish_reason="stop",
                        policy_version=0,
                        text="",
                        output="",
                        well_formed=True,
                    )
                )
                ids = ids + said + draw(output)
            trajectory = Trajectory(
                task=task, index=i, status=TrajectoryStatus.COMPLETED, turns=tuple(turns), rewards=(0.0,) * num_turns
            )
            rows += [row_of(s, trajectory, rng.normal(size=num_turns)) for s in segments_of(trajectory)]
        groups.append(rows)
    return groups


def model_config(shape: ModelShape) -> Any:
    """transformers' configuration of a model of this shape: a Qwen3 where queries and keys are normed, else a Qwen2."""
    from transformers import Qwen2Config, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 40_960,
    }
    return Qwen3Config(**common, head_dim=shape.head_dim) if shape.qk_norm else Qwen2Config(**common)


def step_flops(shape: ModelShape, packs: list[Any]) -> float:
    """Model FLOPs of a step, what MFU counts: forward and twice that backward, nothing recomputed, the head on sampled tokens only."""
    from l0fast.learner.packing import attention_pairs

    forward = 0.0
    for pack in packs:
        forward += 2 * pack.num_tokens * shape.layer_matmul_parameters * shape.layers
        forward += attention_pairs(pack) * shape.flops_per_pair
        forward += 2 * len(pack.predictors) * shape.vocab * shape.hidden
    return 3 * forward


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


SECTIONS = {"epilogue": bench_epilogue, "head": bench_head, "attention": bench_attention, "step": bench_step}


def main() -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--out", type=results_file, metavar="FILE", help="write the JSON here too, after every section")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no GPU here: leave the flag out for a small run on the CPU")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    result: dict[str, Any] = {
        "bench": "kernels",
        "machine": f"{device}; {machine()}; torch {torch.__version__}",
        "rounds": args.rounds,
    }
    print(result["machine"], flush=True)
    failed = False
    for name in args.only:
        print(f"--- {name}", flush=True)
        begin = time.perf_counter()
        try:
            result[name] = SECTIONS[name](args.device, args.rounds)
        except Exception:  # noqa: BLE001 - what the other sections measure is not lost with this one
            failed = True
            result[name] = {"failed": traceback.format_exc()}
            print(result[name]["failed"], file=sys.stderr, flush=True)
        result[name]["seconds"] = round(time.perf_counter() - begin, 1)
        if args.out is not None:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
