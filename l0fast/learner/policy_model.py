"""The policy under training: one process, one model, one optimizer step a batch.

    packs -> for each: reference log-probs (frozen start model, no gradient)
                       forward to the last hidden state -> rows of the predictors -> policy_head -> backward
          -> gradients, divided once by the number of sampled tokens of the whole batch -> clip -> AdamW

A token weighs the same however the batch was cut into packs. There is one step a batch, so the ratio is 1 and the log-probs
of before the step are not computed a second time (policy_head, `old_logprobs_T=None`).

What a step reports on the way, with d = policy - sampler, the log-probs of the same tokens under the same weights from two
programs: mismatch_k1 = mean(-d) and mismatch_k3 = mean(exp(d) - d - 1) both estimate KL(sampler || policy),
mismatch_max = max |d|. Well above 1e-3 the engine and the learner do not compute the same policy.
"""

import copy
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from l0fast.config import LearnerConfig
from l0fast.errors import UsageError
from l0fast.learner import attention
from l0fast.learner.packing import Pack
from l0fast_kernels.policy_head import HeadStats, policy_head, token_logprobs

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
"""Files of a model folder that belong to its tokenizer."""


def learning_rate(step: int, num_steps: int, config: LearnerConfig) -> float:
    """Linear warm-up to the peak, then linear decay to `final_lr_ratio` of it at the last step.

    Args:
        step: steps taken so far; the peak is at `warmup_steps`, the end at `num_steps - 1` and after.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps))
    return config.lr * (1 - done * (1 - config.final_lr_ratio))


class PolicyModel:
    """The model, its frozen start, its optimizer and its schedule.

    Args:
        model_path: a model folder in Hugging Face form; loaded in fp32.
        num_steps: the schedule's end [steps].
        temperature: that of the sampler.

    Raises:
        UsageError: a folder that transformers can't load.
    """

    def __init__(self, model_path: Path, config: LearnerConfig, *, num_steps: int, temperature: float):
        self.model_path, self.config, self.num_steps, self.temperature = model_path, config, num_steps, temperature
        self.step_index = 0
        """Steps taken, skipped ones included."""
        self.model = load_model(model_path)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if config.kl_coef > 0 else None
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )

    def step(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """One optimizer step on the packs of a batch.

        Returns:
            Means over the sampled tokens (loss, entropy, kl, clip_fraction, mismatch_*), grad_norm before clipping, lr,
            tokens, sampled_tokens, skipped (why this step was not taken, else None), and the seconds of each part.

        Raises:
            ValueError: no sampled token in the batch.
        """
        num_sampled = sum(int((pack.loss_weights > 0).sum()) for pack in packs)
        if num_sampled == 0:
            raise ValueError(f"a batch of {len(packs)} packs has no sampled token, so there is nothing to learn from")
        clock = _Clock()
        self.optimizer.zero_grad(set_to_none=True)
        loss, sums = 0.0, _Sums()
        for pack in packs:
            with clock("reference_s"):
                ref_logprobs = self.reference_logprobs(pack)
            with clock("forward_backward_s"):
                loss_sum, stats = self.forward(pack, ref_logprobs)
                (loss_sum / num_sampled).backward()
                loss += loss_sum.item() / num_sampled
            sums.add(pack, stats)
        with clock("optimizer_s"):
            lr = learning_rate(self.step_index, self.num_steps, self.config)
            grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip).item()
            skipped = None
            if math.isfinite(loss) and math.isfinite(grad_norm):
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                self.optimizer.step()
            else:
                skipped = f"loss {loss:g} with gradient norm {grad_norm:g} is not finite; the weights stay as they were"
            self.step_index += 1
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "skipped": skipped,
            "tokens": sum(pack.num_tokens for pack in packs),
            "sampled_tokens": num_sampled,
            "packs": len(packs),
            **sums.means(num_sampled),
            **clock.seconds,
        }

    def forward(self, pack: Pack, ref_logprobs: Tensor | None) -> tuple[Tensor, HeadStats]:
        """Loss of one pack, summed over its sampled tokens, and what was seen of each [R]."""
        return policy_head(
            predictor_states(self.model, pack),
            self.model.lm_head.weight,
            torch.from_numpy(pack.target_ids),
            advantages_T=torch.from_numpy(pack.advantages),
            loss_weights_T=torch.from_numpy(pack.loss_weights),
            ref_logprobs_T=ref_logprobs,
            temperature=self.temperature,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            dual_clip=self.config.dual_clip,
            kl_coef=self.config.kl_coef,
        )

    @torch.no_grad()
    def reference_logprobs(self, pack: Pack) -> Tensor | None:
        """[R] log-probs under the start model; None when there is no KL term."""
        if self.reference is None:
            return None
        hidden = predictor_states(self.reference, pack)
        return token_logprobs(
            hidden, self.reference.lm_head.weight, torch.from_numpy(pack.target_ids), self.temperature
        )

    def publish(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the weights into tensors of the same names and shapes. Tied weights are there once.

        Raises:
            ValueError: names that are not the model's.
        """
        weights = dict(self.model.named_parameters())
        if weights.keys() != tensors.keys():
            raise ValueError(f"the model and the shared weights differ in {sorted(weights.keys() ^ tensors.keys())}")
        with torch.no_grad():
            for name, weight in weights.items():
                tensors[name].copy_(weight)

    def save(self, path: Path) -> None:
        """Write a model folder in Hugging Face form: configuration, safetensors in fp32, the tokenizer it came with."""
        path.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(path)
        for file in _matching(self.model_path, TOKENIZER_PATTERNS):
            shutil.copyfile(file, path / file.name)


def load_model(model_path: Path) -> PreTrainedModel:
    """A causal language model in fp32 with packed attention, in evaluation mode: dropout would be a mismatch with the sampler."""
    attention.register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation=attention.NAME, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise UsageError(
            f"{model_path} can't be loaded as a model ({e}); give a folder written by save_pretrained()"
        ) from e
    return model.eval()


def predictor_states(model: PreTrainedModel, pack: Pack) -> Tensor:
    """[R, D]: last hidden states of a pack at the tokens that predict sampled ones."""
    hidden = model.model(
        input_ids=torch.from_numpy(pack.token_ids)[None],
        position_ids=torch.from_numpy(pack.position_ids)[None],
        cu_seqlens=torch.from_numpy(pack.cu_seqlens),
        donors=torch.from_numpy(pack.donors),
        shared=torch.from_numpy(pack.shared),
        use_cache=False,
    ).last_hidden_state
    return hidden[0].index_select(0, torch.from_numpy(pack.predictors))


def _matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


class _Clock:
    """Wall-clock seconds by part, summed over the packs of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str):
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


class _Sums:
    """Statistics of the tokens that count, added up over packs."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.mismatch_max = 0.0

    def add(self, pack: Pack, stats: HeadStats) -> None:
        counts = torch.from_numpy(pack.loss_weights > 0)
        d = (stats.logprobs - torch.from_numpy(pack.sampler_logprobs))[counts]
        values = {
            "entropy": stats.entropy[counts],
            "kl": stats.kl[counts],
            "clip_fraction": stats.clipped[counts],
            "mismatch_k1": -d,
            "mismatch_k3": torch.exp(d) - d - 1,
        }
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double().sum().item()
        if len(d):
            self.mismatch_max = max(self.mismatch_max, d.abs().max().item())

    def means(self, num_tokens: int) -> dict[str, float]:
        return {name: total / num_tokens for name, total in self.sums.items()} | {"mismatch_max": self.mismatch_max}
