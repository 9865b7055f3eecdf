"""One rank of the learner: `spawn_worker("l0fast.learner.rank", ...)`. Blocking code, one request at a time.

    accumulate(num_bytes, bounds)    packs in shared memory; those from bounds[rank][p] to bounds[rank][p + 1] are ours, for
                                     part p of the batch
    values(num_bytes, bounds)        what the critic says of each sampled token of ours: the payload of the answer, float32
    fit(num_bytes, bounds)           the critic's `accumulate`: packs with the returns in place of the advantages
    finish_step(denominator, policy_version)
                                     the optimizer step, then the weights into shared memory under that version
    export(first, ranks)             a bucket of the weights, for an engine on the same GPU that reads it where it lies
    offer(engines, ranks, ...), send()
                                     the weights to engines on other GPUs, by process groups (broadcast.py)
    save(path)                       a model folder in Hugging Face form
    save_checkpoint(path, driver_state, policy_version), wait_checkpoint(), load_checkpoint(path)

Every rank gets every request and makes the same collective calls for it. When all say they are ready, the start weights
are published as version 0. A request that fails is answered with the error; anything that is not an answer to a request
(an import that fails, a kill) ends the process. The driver reports the last words and ends the other ranks, which may
be waiting for this one inside a collective.

Ranks find each other through torch's TCPStore in rank 0, which listens on a socket that the driver bound: no race for a port.
"""

import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l0fast.allocator import without_expandable_segments
from l0fast.cgroups import cores
from l0fast.errors import UsageError
from l0fast.ipc import Channel, Message, SharedBytes, SharedWeights, stand_back

if TYPE_CHECKING:
    from l0fast.learner.broadcast import Broadcast
    from l0fast.learner.checkpoint import Checkpoints
    from l0fast.learner.critic import CriticModel
    from l0fast.learner.packing import Pack
    from l0fast.learner.policy_model import PolicyModel
    from l0fast.learner.profile import StepProfile

BUCKET_BYTES = 512 << 20
"""Of weights on their way to an engine [bytes]."""


def main() -> None:
    channel, args = Channel.open()
    try:
        run(channel, args)
    except UsageError as e:
        channel.refuse(e)


def run(channel: Channel, args: dict[str, Any]) -> None:
    """Load the model, say so, and answer until the driver closes the channel. Raises UsageError before it has said so."""
    channel.progress("importing torch")
    # idle OpenMP threads sleep: by default they spin, which starves engine and sandboxes on a small box.
    # libgomp reads this once, when torch loads it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args["meets_engines"]:
        # as SGLang sets it where nobody has: members of a group that differ in it do not understand each other's handles
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    if args["lends_memory"]:
        os.environ.update(without_expandable_segments(os.environ))
    import torch
    from transformers.utils import logging as transformers_logging

    from l0fast.config import LearnerConfig
    from l0fast.learner.checkpoint import Checkpoints
    from l0fast.learner.critic import CriticModel
    from l0fast.learner.policy_model import PolicyModel

    transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    config = LearnerConfig.model_validate(args["config"])
    rank, world = args["rank"], args["world"]
    torch.set_num_threads(config.threads or max(1, cores() // world))
    torch.manual_seed(args["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args["on_gpus"] and device == "cpu":
        raise UsageError(
            f"torch {torch.__version__} can use none of the GPUs here: is NVIDIA's driver new enough for its CUDA "
            f"{torch.version.cuda}? nvidia-smi says up to which it is, python -m l0fast.doctor what else there is"
        )
    publishes = args["weights"] is not None
    if device == "cpu" and publishes:
        # as the engine that takes them does; SGLang's processes do not, and wait for what we send them
        stand_back()
    channel.progress("meeting the other ranks", config.io_timeout_s)
    with process_group(device, rank, world, args["port"], args["listen_fd"], config.io_timeout_s):
        channel.progress("loading the model", config.io_timeout_s)
        policy = PolicyModel(
            Path(args["model_path"]),
            config,
            num_steps=args["num_steps"],
            temperature=args["temperature"],
            max_row=args["max_row"],
            device=device,
            rank=rank,
            world=world,
        )
        critic = None if config.critic == "none" else CriticModel(policy)
        weights = SharedWeights.attach(args["weights"]) if publishes and rank == 0 else None
        checkpoints = Checkpoints(policy, args["keep_checkpoints"], critic)
        policy.progress.report_to(channel.progress, config.stall_timeout_s, config.slow_timeout_s)
        ours = Rank(policy, critic, checkpoints, weights, SharedBytes(args["packs_fd"]), publishes=publishes)
        ours.publish(0)
        channel.ready(
            parameters=sum(p.numel() for p in policy.model.parameters()),
            device=device,
            threads=torch.get_num_threads(),
        )
        try:
            serve(channel, ours if args["profile"] is None else ours.profiled(**args["profile"]))
        finally:
            checkpoints.close()


def serve(channel: Channel, rank: "Rank | StepProfile") -> None:
    """Answer requests until the driver closes the channel."""
    while True:
        try:
            message = channel.recv()
        except EOFError:
            return
        assert message is not None, "a blocking recv returns a message or raises"
        try:
            channel.reply(message, **rank.answer(message))
        except Exception as e:  # noqa: BLE001 - goes to the driver, which raises it as LearnerError
            channel.fail(message, e, traceback.format_exc())


@contextmanager
def process_group(device: str, rank: int, world: int, port: int, listen_fd: int, timeout_s: float) -> Iterator[None]:
    """torch's default process group, where one is needed: several ranks, or a GPU.

    Args:
        port: of a listening socket on 127.0.0.1.
        listen_fd: that socket; of rank 0 alone, which has it from then on.
        timeout_s: time a collective may take.
    """
    import torch
    import torch.distributed as dist

    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    elif world == 1:
        yield
        return
    # ranks are on one machine, whose name need not resolve
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_s)
    listening = {"is_master": True, "master_listen_fd": listen_fd} if rank == 0 else {}
    dist.init_process_group(
        # checkpoints are written and read over gloo
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.TCPStore("127.0.0.1", port, world, timeout=timeout, **listening),
        rank=rank,
        world_size=world,
        timeout=timeout,
        # no device_id: with one torch splits every later group from this one, and all ranks of the learner would have to take
        # part in making those with engines (broadcast.py)
    )
    if on_gpu:
        _connect(device)
    yield
    # not after a failure: NCCL waits for all ranks here, and they may wait inside a collective
    dist.destroy_process_group()


def _connect(device: str) -> None:
    """NCCL does it at the first collective. What it lacks, such as room in /dev/shm or of a GPU's memory, would else be told at the
    first step, when all that a run evaluates before is done.
    """
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros((), device=device))
    torch.cuda.synchronize()


class Rank:
    """What a rank answers."""

    def __init__(
        self,
        policy: "PolicyModel",
        critic: "CriticModel | None",
        checkpoints: "Checkpoints",
        weights: SharedWeights | None,
        packs: SharedBytes,
        *,
        publishes: bool = True,
    ):
        self._publishes = publishes
        self._buckets: Iterator[list[tuple[str, Any]]] = iter(())
        self._exported: list[Any] = []
        self._broadcast: Broadcast | None = None
        self._policy, self._critic, self._checkpoints, self._weights = policy, critic, checkpoints, weights
        self._packs = packs

    def answer(self, message: Message) -> dict[str, Any]:
        """Fields of the answer, the payload among them where there is one."""
        policy, critic, header = self._policy, self._critic, message.header
        match header["op"]:
            case "accumulate":
                for part, ours in enumerate(self._ours(header)):
                    policy.accumulate(*ours, part)
                return {}
            case "values" if critic:
                return {"payload": b"".join(critic.values_of(*ours).tobytes() for ours in self._ours(header))}
            case "fit" if critic:
                for part, ours in enumerate(self._ours(header)):
                    critic.accumulate(*ours, part)
                return {}
            case "finish_step":
                # the critic first: a head judges by the hidden states of the policy, which then moves
                metrics = critic.finish_step(header["denominator"]) if critic else {}
                metrics |= policy.finish_step(header["denominator"])
                self.publish(header["policy_version"])
                return {"metrics": metrics | {"checkpoint_warning": self._checkpoints.unwritten()}}
            case "export":
                return {"bucket": self.export(header["first"], header["ranks"])}
            case "offer":
                return {"offer": self.offer(header)}
            case "send":
                return {"failures": self.send(header["wait_s"])}
            case "free_memory":
                self.free_memory(empty_cache=header["empty_cache"])
                return {}
            case "save":
                policy.save(Path(header["path"]))
                return {}
            case "save_checkpoint":
                self._takes_io_time("saving a checkpoint")
                self._checkpoints.save(Path(header["path"]), header["driver_state"], header["policy_version"])
                return {}
            case "wait_checkpoint":
                self._takes_io_time("writing a checkpoint")
                self._checkpoints.wait()
                return {}
            case "load_checkpoint":
                self._takes_io_time("reading a checkpoint")
                policy_version = self._checkpoints.load(Path(header["path"]))
                self.publish(policy_version)
                return {"policy_version": policy_version}
            case op:
                raise ValueError(f"the learner does not know {op!r}")

    def profiled(self, path: str, step: int) -> "StepProfile":
        """The same, with the profile of one step in a file."""
        from l0fast.learner.profile import StepProfile

        return StepProfile(self.answer, Path(path), step, lambda: self._takes_io_time("writing its profile"))

    def _takes_io_time(self, doing: str) -> None:
        self._policy.progress.say(doing, self._policy.config.io_timeout_s)

    def _ours(self, header: dict[str, Any]) -> Iterator[tuple[list["Pack"], int]]:
        """Of each part of the batch our packs, where they lie in shared memory, and the most that any rank has."""
        from l0fast.learner.packing import from_bytes

        packs, bounds = from_bytes(self._packs.view(header["num_bytes"])), header["bounds"]
        for part, (start, stop) in enumerate(pairwise(bounds[self._policy.place.rank])):
            yield packs[start:stop], max(of_rank[part + 1] - of_rank[part] for of_rank in bounds)

    def export(self, first: bool, ranks: Sequence[int]) -> str | None:
        """The next bucket of weights; None after the last. A collective. Its memory is kept until there are newer weights.

        Empty unless we are among `ranks`: torch would never free what it has told of and nobody has read.
        """
        from l0fast.engine.buckets import serialize_bucket

        if first:
            self._buckets = self._policy.buckets(BUCKET_BYTES, self._policy.place.compute_dtype)
            self._exported = []
        if (bucket := next(self._buckets, None)) is None:
            return None
        if self._policy.place.rank not in ranks:
            return ""
        payload, memory = serialize_bucket(bucket)
        self._exported.append(memory)
        return payload

    def offer(self, header: dict[str, Any]) -> dict[str, Any] | None:
        """Of rank 0: where engines can meet it, and what it will send them."""
        from l0fast.learner.broadcast import IMPORTS_S, Broadcast

        place = self._policy.place
        if place.rank > 0:
            return None
        if self._broadcast is not None:
            self._broadcast.close()
        self._policy.progress.say("importing sglang", IMPORTS_S)
        self._broadcast = sending = Broadcast(
            header["engines"], ranks=header["ranks"], device=place.device.type, wait_s=header["wait_s"]
        )
        return {
            "ports": sending.ports,
            "backend": sending.backend,
            "dtype": str(place.compute_dtype).removeprefix("torch."),
            "buckets": self._policy.bucket_shapes(BUCKET_BYTES, place.compute_dtype),
        }

    def send(self, wait_s: float) -> list[str | None]:
        """Send what was offered. A collective. Of rank 0: why an engine did not get it all, None where it did."""
        progress, (sending, self._broadcast) = self._policy.progress, (self._broadcast, None)
        # rank 0 waits for engines, and the others for it
        limit_s = wait_s + self._policy.config.stall_timeout_s
        buckets = self._policy.buckets(BUCKET_BYTES, self._policy.place.compute_dtype, limit_s=limit_s)
        if sending is None:
            for _ in buckets:
                pass
            return []
        sending.send(buckets, lambda doing, may_take_s: progress.say(doing, may_take_s + limit_s - wait_s))
        return sending.failures

    def free_memory(self, *, empty_cache: bool) -> None:
        import torch

        self._buckets, self._exported = iter(()), []
        if empty_cache and torch.cuda.is_available():
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def publish(self, policy_version: int) -> None:
        """The tensors first, then the version that names them; none while they are written."""
        if not self._publishes:
            return
        if self._weights is not None:
            self._weights.policy_version = -1
        self._policy.publish(None if self._weights is None else self._weights.tensors())
        if self._weights is not None:
            self._weights.policy_version = policy_version


if __name__ == "__main__":
    main()
