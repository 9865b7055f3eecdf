"""What a run would need of GPUs: memory by part, FLOPs and seconds a step. `python -m bench.learner --plan RECIPE`."""

from pathlib import Path

from l0fast.cli import parse
from l0fast.config import RunConfig
from l0fast.errors import UsageError
from l0fast.learner import cost
from l0fast.policies import MODELS


def shape_of(name: str) -> cost.ModelShape:
    """Of a model folder, a config.json, a model that ships, or one that `cost.known_shape` knows by its name.

    Raises:
        UsageError: none of those.
    """
    if (shape := cost.known_shape(name)) is not None and not Path(name).exists():
        return shape
    for path in (Path(name), Path(name, "config.json"), MODELS / name / "config.json"):
        if path.is_file():
            return cost.read_shape(path)
    raise UsageError(
        f"{name!r} is no model folder, no config.json and none of {', '.join(cost.SHAPES)}: give one of those with --model"
    )


def plan(
    config: RunConfig,
    shape: cost.ModelShape,
    *,
    gpus: int,
    gpu_memory_bytes: float,
    rates: cost.Rates,
    tokens: float | None = None,
    sampled: float | None = None,
) -> tuple[str, str | None]:
    """The table, and why it can't be, if so. Raises UsageError: an episode with more sampled tokens than it has."""
    work = cost.workload_of(config, tokens=tokens, sampled=sampled)
    if work.sampled > work.tokens:
        raise UsageError(
            f"{work.sampled:,.0f} sampled tokens are more than the {work.tokens:,.0f} of an episode: set --sampled and --tokens "
            "to what is sampled of an episode and to all of it"
        )
    setup = cost.setup_of(config, work, gpus=gpus, gpu_memory_bytes=gpu_memory_bytes)
    memory, flops = cost.memory_of(shape, setup).parts, cost.flops(shape, work, setup)
    seconds = cost.seconds(shape, work, setup, rates)
    host = cost.host_parts(
        shape, setup, weights_by_host=config.engine.weights == "host", checkpoints=bool(config.checkpoint.every)
    )
    conversations = cost.kv_tokens(shape, setup) / setup.context_tokens
    rows = [
        (f"{shape.parameters:,} parameters; memory of one of {gpus} GPUs", "GiB"),
        *((name, f"{size / cost.GIB:.2f}") for name, size in memory.items() if size),
        ("together", f"{sum(memory.values()) / cost.GIB:.2f} of {gpu_memory_bytes / cost.GIB:.2f}"),
        (f"engine KV holds {max(conversations, 0):.1f} contexts of {setup.context_tokens:,} tokens", ""),
        ("", ""),
        ("main memory of the node", "GiB"),
        *((name, f"{size / cost.GIB:.1f}") for name, size in host.items() if size),
        ("together", f"{sum(host.values()) / cost.GIB:.1f}"),
        ("", ""),
        (f"a step: {work.episodes:,} episodes, {work.laid_out:,.0f} tokens in packs of {setup.pack_tokens:,}", "PFLOP"),
        *((name, f"{value / 1e15:.3g}") for name, value in flops.items() if value),
        ("together", f"{sum(flops.values()) / 1e15:.3g}"),
        ("", ""),
        (f"at {rates.tflops:g} TFLOP/s a GPU", "s"),
        *((name, f"{value:.3g}") for name, value in seconds.items()),
        ("together", f"{sum(seconds.values()):.3g}"),
    ]
    return "\n".join(f"{name:<72}{value:>16}".rstrip() for name, value in rows), cost.why_not(shape, setup)


def run_plan(recipe: str, flags: list[str], model: str | None, **kwargs) -> int:
    """Print the table; an exit code.

    Args:
        flags: settings on top of the recipe, as python -m l0fast.run takes them.
    """
    try:
        config = parse([recipe, *flags]).config
        table, refusal = plan(config, shape_of(model or config.model.path), **kwargs)
    except UsageError as e:
        print(f"error: {e}")
        return 2
    print(table)
    if refusal:
        print(f"does not fit: {refusal}")
    return 1 if refusal else 0
