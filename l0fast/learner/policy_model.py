"""The policy under training: what one rank does with its packs. One process and plain tensors, or a shard of a GPU's each.

    accumulate   pack -> reference log-probs (frozen start model, no gradient)
                      -> forward to the last hidden state -> rows of the predictors -> policy_head -> backward
                 as groups finish, in any order: gradients of sums add up
    finish_step  gradients / denominator -> clip -> AdamW

A token weighs the same however the batch was cut into packs and dealt to ranks: losses are summed, and the denominator
of the whole batch, on all ranks, divides once, at the step. FSDP2 averages gradients over ranks, so that the step
multiplies them by world / denominator. Ranks gather weights from each other at every layer, so each goes through the
same number of packs; one that has none left takes a small pack that weighs nothing.

With one optimizer step a batch the ratio is 1 and the log-probs of before the step are not computed a second time
(policy_head, `old_logprobs_T=None`). With more (`learner.minibatches`) packs are kept until the step. Each belongs to a part
of the batch (packing.cut), the same on all ranks, and a part gets a step of its own.

What a step reports is the same on all ranks: sums over all tokens of all ranks, the longest time of any.
"""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from l0fast.agent.chat import Chat
from l0fast.config import LearnerConfig
from l0fast.errors import UsageError
from l0fast.files import weights_for_all
from l0fast.learner import lora
from l0fast.learner.algorithms import MAX_LOG_RATIO, gspo_coefficients
from l0fast.learner.attention import PackLayout
from l0fast.learner.loading import Place, load_model, local_part, whole
from l0fast.learner.packing import Pack, filled
from l0fast.learner.progress import Progress
from l0fast.learner.tally import Tally
from l0fast_kernels.policy_head import HeadStats, policy_head, token_logprobs

_UNCHANGED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def learning_rate(step: int, num_steps: int, config: LearnerConfig) -> float:
    """Linear warm-up to the peak, then down to `final_lr_ratio` of it at the last step: linearly, along a half cosine, or
    not at all ("constant").

    Args:
        step: steps taken so far; the peak is at `warmup_steps`, the end at `num_steps - 1` and after.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps))
    match config.schedule:
        case "linear":
            fallen = done
        case "cosine":
            fallen = (1 - math.cos(math.pi * done)) / 2
        case "constant":
            fallen = 0.0
    return config.lr * (1 - fallen * (1 - config.final_lr_ratio))


def not_taken(what: str, number: int, num_parts: int) -> str:
    """Why an optimizer step was not taken, and which of its batch's that was where there are several."""
    if num_parts <= 1:
        return f"{what} is not finite; the weights stay as they were"
    return (
        f"{what} of optimizer step {number} of {num_parts} in this batch is not finite; the weights stay as they were "
        "before it"
    )


class _Held(NamedTuple):
    """A pack that waits for the step, with the log-probs of before it [R]."""

    pack: Pack
    old_logprobs: Tensor


class PolicyModel:
    """The model, its frozen start, its optimizer and its schedule, or this rank's shards of them.

    Args:
        model_path: a model folder in Hugging Face form.
        num_steps: the schedule's end [steps].
        temperature: that of the sampler.
        max_row: longest row that will come, if that is known [tokens].
        device: "cpu", or "cuda" for the current GPU.
        rank, world: of the default process group, which must exist where world > 1 or the device is a GPU.

    Raises:
        UsageError: a folder that can't be loaded.
    """

    def __init__(
        self,
        model_path: Path,
        config: LearnerConfig,
        *,
        num_steps: int,
        temperature: float,
        max_row: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ):
        self.model_path, self.config, self.num_steps, self.temperature = model_path, config, num_steps, temperature
        self.place = Place.of(device, rank, world)
        self.step_index = 0
        """Steps taken, skipped ones included."""
        self.root = load_model(model_path, config, self.place, max_row=max_row)
        # with LoRA it is the model itself, without its additions
        needs_reference = config.kl_coef > 0 and not config.lora_rank
        self.reference = load_model(model_path, config, self.place, frozen=True) if needs_reference else None
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.trained.values() if p.ndim >= 2]
        vectors = [p for p in self.trained.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )
        for p in self.trained.values():
            # as AdamW itself would make it at its first step: a checkpoint from before that is like any other
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        self.progress = Progress()
        self.progress.watch(self.root, "policy")
        if self.reference is not None:
            self.progress.watch(self.reference, "reference")
        self._held: defaultdict[int, list[_Held]] = defaultdict(list)
        """By part of the batch."""
        self._tally = Tally()
        self._part_loss = 0.0
        """Summed since the last optimizer step: the tally's goes on to the end of the batch."""

    @property
    def model(self):
        """The causal language model; its parameters are sharded between forwards."""
        return self.root.model

    def step(self, packs: Sequence[Pack], denominator: float | None = None) -> dict[str, Any]:
        """`accumulate` and `finish_step`."""
        self.accumulate(packs)
        return self.finish_step(denominator)

    def accumulate(self, packs: Sequence[Pack], num_packs: int | None = None, part: int = 0) -> None:
        """Add the gradients of these packs, or keep them for the step if a batch gets several.

        Args:
            packs: this rank's; with several optimizer steps a batch they are copied.
            num_packs: the most that any rank has; weightless ones fill up to it.
            part: which of several optimizer steps they are for; every rank goes through the same parts.
        """
        self._tally.count(packs)
        for pack in self.progress.packs(filled(packs, num_packs or len(packs))):
            if self.config.minibatches > 1:
                with self._tally.clock("old_logprobs_s"):
                    self._held[part].append(_Held(_copy(pack), self.logprobs(pack)))
            else:
                self._forward_backward(pack, None)

    def finish_step(self, denominator: float | None = None) -> dict[str, Any]:
        """One optimizer step, or `learner.minibatches`, on what was accumulated.

        Args:
            denominator: what the sum of all losses is divided by; None: the number of tokens with a weight > 0.

        Returns:
            loss; means over the tokens with a weight (entropy, kl, clip_fraction, mismatch_*), grad_norm before clipping,
            lr, tokens, sampled_tokens, packs, optimizer_steps that were taken, skipped (why one was not taken, else None),
            and the seconds of each part. Of several steps grad_norm is the largest, not finite where one of them is not. The
            same on all ranks.

        Raises:
            ValueError: no sampled token in the batch.
        """
        parts = [self._held[part] for part in sorted(self._held)]
        norms, skipped = [], []
        for number, part in enumerate(parts or [()], 1):
            for held in self.progress.packs(part):
                self._forward_backward(*held)
            norm, what = self._optimize(denominator, max(1, len(parts)))
            norms.append(norm)
            skipped += [not_taken(what, number, len(parts))] if what else []
        lr = learning_rate(self.step_index, self.num_steps, self.config)
        self.step_index += 1
        tally = self._tally.reduced(self.place)
        self.progress.step_taken()
        self._held.clear()
        self._tally = Tally()
        return {
            **tally.metrics(denominator),
            # max() would pass over nan
            "grad_norm": float(np.max(norms)),
            "lr": lr,
            "optimizer_steps": len(norms) - len(skipped),
            "skipped": "; ".join(skipped) or None,
        }

    def discard(self) -> None:
        """Forget what was accumulated."""
        self.optimizer.zero_grad(set_to_none=True)
        self._held.clear()
        self._tally, self._part_loss = Tally(), 0.0

    def _forward_backward(self, pack: Pack, old_logprobs: Tensor | None) -> None:
        with self._tally.clock("reference_s"):
            ref_logprobs = self.reference_logprobs(pack)
        with self._tally.clock("forward_backward_s"):
            loss_sum, stats = self.forward(pack, ref_logprobs, old_logprobs)
            loss_sum.backward()
            loss = loss_sum.item()
            self._part_loss += loss
            self._tally.add(pack, loss, stats, old_logprobs)

    @torch.no_grad()
    def _optimize(self, denominator: float | None, num_parts: int) -> tuple[float, str | None]:
        """Scale, clip, step. The gradient norm [of the mean], and what was not finite if the step was not taken."""
        self.progress.optimizer_step()
        with self._tally.clock("optimizer_s"):
            grads = [local_part(p.grad) for p in self.trained.values() if p.grad is not None]
            squares = torch.stack(torch._foreach_norm(grads)).double().square().sum().item() if grads else 0.0
            num_sampled, loss = self._tally.sums["sampled_tokens"], self._part_loss
            self._part_loss = 0.0
            loss, num_sampled, squares = self.place.summed([loss, num_sampled, squares])
            if num_sampled == 0:
                self.optimizer.zero_grad(set_to_none=True)
                raise ValueError("the batch has no sampled token, so there is nothing to learn from")
            # FSDP averaged over the ranks
            scale = self.place.world / (num_sampled if denominator is None else denominator) * num_parts
            norm = math.sqrt(squares) * scale if squares >= 0 else math.nan
            skipped = None
            if math.isfinite(loss) and math.isfinite(norm):
                torch._foreach_mul_(grads, scale * min(1.0, self.config.grad_clip / (norm + 1e-6)))
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step_index, self.num_steps, self.config)
                self.optimizer.step()
            else:
                skipped = f"loss {loss:g} with gradient norm {norm:g}"
            self.optimizer.zero_grad(set_to_none=True)
        return norm, skipped

    def forward(
        self, pack: Pack, ref_logprobs: Tensor | None = None, old_logprobs: Tensor | None = None
    ) -> tuple[Tensor, HeadStats]:
        """Loss of one pack, summed over its sampled tokens, and what was seen of each [R]."""
        config = self.config
        advantages, clipped, tis_cap = pack.advantages, None, config.tis_cap
        loss_weights = pack.loss_weights
        if config.objective == "gspo" and old_logprobs is not None:
            # the ratio of a sequence is known when all its tokens were seen
            old = old_logprobs.cpu().numpy()
            advantages, clipped = gspo_coefficients(
                self.logprobs(pack).cpu().numpy(),
                old,
                pack.advantages,
                pack.loss_weights,
                pack.sequences,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
            )
            if tis_cap:
                # as the head would weigh it, the KL term too, if it knew of `old`
                gap = np.clip(old - pack.sampler_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
                loss_weights = loss_weights * np.minimum(np.exp(gap), np.float32(tis_cap))
            # the head is to make no ratio of its own
            old_logprobs, tis_cap = None, 0.0
        head = partial(
            policy_head,
            target_ids_T=self._tensor(pack.target_ids),
            advantages_T=self._tensor(advantages),
            loss_weights_T=self._tensor(loss_weights),
            old_logprobs_T=old_logprobs,
            ref_logprobs_T=ref_logprobs,
            sampler_logprobs_T=self._tensor(pack.sampler_logprobs) if tis_cap else None,
            objective="cispo" if config.objective == "cispo" else "ppo",
            temperature=self.temperature,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            kl_coef=config.kl_coef,
            tis_cap=tis_cap,
        )
        loss_sum, stats = self.run(self.root, pack, head)
        return loss_sum, stats if clipped is None else stats._replace(clipped=self._tensor(clipped))

    @torch.no_grad()
    def logprobs(self, pack: Pack) -> Tensor:
        """[R] log-probs under the policy as it is."""
        logprobs = self.run(self.root, pack, self._logprobs_head(pack))
        self.root.reshard()
        return logprobs

    @torch.no_grad()
    def reference_logprobs(self, pack: Pack) -> Tensor | None:
        """[R] log-probs under the start model; None when there is no KL term."""
        if self.config.kl_coef == 0:
            return None
        root = self.reference or self.root
        with lora.without_adapters(self.model) if self.reference is None else nullcontext():
            logprobs = self.run(root, pack, self._logprobs_head(pack))
        root.reshard()
        return logprobs

    def _logprobs_head(self, pack: Pack):
        return partial(token_logprobs, ids_T=self._tensor(pack.target_ids), temperature=self.temperature)

    def run(self, root: torch.nn.Module, pack: Pack, head: Any) -> Any:
        """`Root.forward` of a pack, by any model that lies where the policy does."""
        return root(
            self._tensor(pack.token_ids),
            self._tensor(pack.position_ids),
            PackLayout.of(pack, self.place.device),
            self._tensor(pack.predictors),
            head,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.place.device, non_blocking=True)

    # --- weights out

    def weights(
        self, dtype: torch.dtype | None = None, *, limit_s: float | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Names of the model folder and whole tensors, in the order of named_parameters; tied ones once, LoRA merged.

        A collective: every rank goes through all of it.

        Args:
            dtype: None is the master weights' own, fp32.
            limit_s: time that a rank may do something else between two of them; None: no longer than a layer takes [s].
        """
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if lora.is_adapter(name):
                continue
            self.progress.say(f"weights out, {name}", limit_s)
            if (adapters := lora.adapters_of(name)) is None:
                # a bias lies beside the layer's additions, too
                yield lora.base_name(name), whole(parameter, dtype)
            else:
                a, b = (whole(parameters[adapter]) for adapter in adapters)
                sum_ = lora.merged(whole(parameter), a, b, self.config)
                yield lora.base_name(name), sum_ if dtype is None else sum_.to(dtype)

    def buckets(
        self, bucket_bytes: int, dtype: torch.dtype, *, limit_s: float | None = None
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """`weights` in lists of at most `bucket_bytes`, or of one tensor that is larger. A collective."""
        return _in_buckets(self.weights(dtype, limit_s=limit_s), bucket_bytes)

    def bucket_shapes(self, bucket_bytes: int, dtype: torch.dtype) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Names and shapes of what `buckets` will give. No collective."""
        empty = (
            (lora.base_name(name), torch.empty(p.shape, dtype=dtype, device="meta"))
            for name, p in self.model.named_parameters()
            if not lora.is_adapter(name)
        )
        return [[(name, tuple(t.shape)) for name, t in bucket] for bucket in _in_buckets(empty, bucket_bytes)]

    def publish(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Copy the weights into tensors of the same names and shapes. A collective; only rank 0 has tensors.

        Raises:
            ValueError: names that are not the model's.
        """
        names = {lora.base_name(name) for name, _ in self.model.named_parameters() if not lora.is_adapter(name)}
        if tensors is not None and names != tensors.keys():
            raise ValueError(f"the model and the shared weights differ in {sorted(names ^ tensors.keys())}")
        for name, weight in self.weights():
            if tensors is not None:
                tensors[name].copy_(weight)

    def save(self, path: Path) -> None:
        """Write a model folder in Hugging Face form: configuration, safetensors in fp32, the tokenizer it came with.

        A collective; rank 0 writes.
        """
        weights = {}
        for name, weight in self.weights():
            if self.place.rank == 0:
                # gathered there is room behind it, and no part of something larger is written
                weights[name] = weight.to("cpu", copy=True)
        self.progress.say("writing a model folder", self.config.io_timeout_s)
        if self.place.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            with torch.device("meta"):
                shell = AutoModelForCausalLM.from_config(self.model.config, dtype=torch.float32)
            write_model(shell, weights, self.model_path, path, torch.float32)


def _in_buckets(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    bucket, size = [], 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _copy(pack: Pack) -> Pack:
    return Pack(**{name: getattr(pack, name).copy() for name in Pack.__slots__})


def write_model(
    shell: PreTrainedModel, weights: dict[str, Tensor], start: Path, folder: Path, dtype: torch.dtype
) -> None:
    """Fill a model folder in Hugging Face form; the tokenizer and the settings are those of `start`.

    Not by save_pretrained: that asks accelerate what the model is wrapped in, which imports DeepSpeed where it is installed,
    and an older one than torch, or one without a CUDA toolkit, can't be imported.

    Args:
        shell: the model, on the meta device.
        weights: by the names of the files, tied ones once.
        dtype: of the weights.
    """
    shell.config.architectures = [type(shell).__name__]
    shell.config.save_pretrained(folder)
    if shell.generation_config is not None:
        shell.generation_config.save_pretrained(folder)
    save_torch_state_dict(weights, folder, max_shard_size="50GB")
    weights_for_all(folder)
    keep_unchanged(start, folder, dtype)


def keep_unchanged(start: Path, folder: Path, dtype: torch.dtype) -> None:
    """Put into a model folder that transformers has written what training does not change, as `start` has it.

    The settings, too, in the words of whoever wrote them: this transformers has words of its own for the angles (rope_parameters),
    and one before 5 that reads them takes its defaults, for other log-probs than were trained. A base model's settings know of no
    turns, and who loads the folder would go on after the end of an answer: they get the tokens that ended one in training.

    Args:
        dtype: of the weights written.
    """
    for file in unchanged_files(start):
        shutil.copyfile(file, folder / file.name)
    path = folder / "config.json"
    written, settings = json.loads(path.read_bytes()), json.loads((start / "config.json").read_bytes())
    # names files of code, which are not copied
    settings.pop("auto_map", None)
    named = [name for name in ("dtype", "torch_dtype") if name in settings] or ["dtype"]
    settings |= dict.fromkeys(named, str(dtype).removeprefix("torch."))
    path.write_text(json.dumps({"architectures": written["architectures"]} | settings, indent=2) + "\n")
    # not of a model whose form of chat no agent here knows
    with suppress(UsageError):
        _end_turns(folder, Chat(start).stop_token_ids)


def _end_turns(folder: Path, stop_ids: Sequence[int]) -> None:
    """Name in a model folder what ends a turn, where it doesn't yet."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    ends = settings.get("eos_token_id")
    if not set(stop_ids) <= {*(ends if isinstance(ends, list) else [ends])}:
        path.write_text(json.dumps(settings | {"eos_token_id": list(stop_ids)}, indent=2) + "\n")


def unchanged_files(folder: Path) -> set[Path]:
    """Files of a model folder that training does not change."""
    return {file for pattern in _UNCHANGED for file in folder.glob(pattern) if file.is_file()}
