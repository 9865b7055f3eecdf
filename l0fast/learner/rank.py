"""The learner's child process: `spawn_worker("l0fast.learner.rank", ...)`. Blocking code, one request at a time.

    step(policy_version), packs as payload   one optimizer step, then the weights into shared memory under that version
    save(path)                               a model folder in Hugging Face form

When it says it is ready, the start weights are published as version 0. A request that fails is answered with the error;
anything that is not an answer to a request (an import that fails, a kill) ends the process, and the driver reports its
last words.
"""

import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l0fast.ipc import Channel, Message, SharedWeights

if TYPE_CHECKING:
    from l0fast.learner.policy_model import PolicyModel


def main() -> None:
    channel, args = Channel.open()
    # idle OpenMP threads sleep: by default they spin, which starves engine and sandboxes on a small box.
    # libgomp reads this once, when torch loads it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers.utils import logging

    from l0fast.config import LearnerConfig
    from l0fast.learner.policy_model import PolicyModel

    logging.disable_progress_bar()
    config = LearnerConfig.model_validate(args["config"])
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(args["seed"])
    policy = PolicyModel(Path(args["model_path"]), config, num_steps=args["num_steps"], temperature=args["temperature"])
    weights = SharedWeights.attach(args["weights"])
    publish(policy, weights, 0)
    channel.ready(parameters=sum(p.numel() for p in policy.model.parameters()), threads=torch.get_num_threads())
    while True:
        try:
            message = channel.recv()
        except EOFError:
            return
        assert message is not None, "a blocking recv returns a message or raises"
        try:
            channel.reply(message, **answer(policy, weights, message))
        except Exception as e:  # noqa: BLE001 - goes to the driver, which raises it as LearnerError
            channel.fail(message, e, traceback.format_exc())


def answer(policy: "PolicyModel", weights: SharedWeights, message: Message) -> dict[str, Any]:
    from l0fast.learner.packing import from_bytes

    match message.header["op"]:
        case "step":
            # a bytearray, because torch wants memory it may write to
            metrics = policy.step(from_bytes(bytearray(message.payload)))
            publish(policy, weights, message.header["policy_version"])
            return {"metrics": metrics}
        case "save":
            policy.save(Path(message.header["path"]))
            return {}
        case op:
            raise ValueError(f"the learner knows step and save, not {op!r}")


def publish(policy: "PolicyModel", weights: SharedWeights, policy_version: int) -> None:
    """The tensors first, then the version that names them."""
    policy.publish(weights.tensors())
    weights.policy_version = policy_version


if __name__ == "__main__":
    main()
