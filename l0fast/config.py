"""Every knob of a run. Imports nothing heavy: `--help` and a typo answer before torch is loaded.

Flags win over the recipe's TOML, which wins over the defaults here. A rule that spans fields is a validator named as
the sentence it guards.
"""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskConfig(Config):
    kind: Literal["geography", "invented"] = "geography"
    """Where the questions come from."""
    world_seed: NonNegativeInt = 0
    """Makes the invented world; the real one has no seed."""
    two_hop_share: float = Field(default=0.7, ge=0, le=1)
    """Share of questions that need two look-ups."""
    variant_share: float = Field(default=0.5, ge=0, le=1)
    """Share of training questions asked in variants of the world, so that knowing its facts by heart does not pay: training names spelled anew, and invented ones."""
    num_variants: PositiveInt = 4
    """Variants made for that [worlds]."""
    search_results: PositiveInt = 3
    """Sentences a search returns."""


class ModelConfig(Config):
    path: str = "geography"
    """A model folder in Hugging Face form (with its tokenizer), or the name of one that ships: geography."""


class AgentConfig(Config):
    prompt: Literal["compact", "full"] = "compact"
    """System prompt: "compact" for the small policies that ship, "full" tells a general model all about the session."""
    context_tokens: PositiveInt = 640
    """Longest prompt plus response [tokens]."""
    max_new_tokens: PositiveInt = 72
    """Longest response of a turn [tokens]."""
    output_chars: PositiveInt = 600
    """What a cell printed is cut in its middle to this length before it is shown [characters]."""
    traceback: Literal["full", "last_line"] = "last_line"
    """How much of an exception's traceback is shown."""
    trim: Literal["hard", "soft", "none"] = "soft"
    """When the next prompt would not fit: keep system prompt, task and notepad ("hard"), drop oldest turns ("soft"), or end ("none")."""
    cell_timeout_s: PositiveFloat = 5.0
    """Wall clock one cell may take [s]."""


class RolloutConfig(Config):
    group_size: PositiveInt = 8
    """Episodes per task, the group its rewards are compared in [episodes]."""
    groups_per_step: PositiveInt = 16
    """Groups an optimizer step learns from [groups]."""
    max_open_groups: PositiveInt = 16
    """Groups admitted and not yet learned from; the backpressure of the whole run [groups]."""
    max_turns: PositiveInt = 5
    """Turns before an episode is truncated [turns]."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature in training."""
    episode_timeout_s: PositiveFloat = 120.0
    """Wall clock of one episode [s]."""
    drop_rate: float = Field(default=0.0, ge=0, le=1)
    """Dynamic sampling: probability that a group whose exact matches are all equal is dropped and replaced. L0: 0.5."""
    max_drop_rounds: PositiveInt = 3
    """A step drops at most this many times `groups_per_step` groups."""
    max_refills: NonNegativeInt = 3
    """Times one place in a group is played again after a failure before the run gives up."""


class SandboxConfig(Config):
    kind: Literal["auto", "docker", "bwrap", "process"] = "auto"
    """"auto" takes the strongest that works: docker, bwrap, then process if seccomp and Landlock are both active."""
    image: str = "auto"
    """Of docker's containers, with a Python >= 3.9. "auto": l0fast-sandbox where `python -m l0fast.sandbox.image build` has made it, else python:3.12-slim, pulled when missing."""
    runtime: str = ""
    """Docker's runtime for them, e.g. "runsc"; empty for the daemon's own choice."""
    pull_timeout_s: PositiveFloat = 300.0
    """Time the pull of a missing image may take [s]."""
    sessions_per_shard: PositiveInt = 128
    """Sessions that share one zygote, and so one container; 1 gives each agent a new one [sessions]."""
    preload: tuple[str, ...] = ()
    """Modules imported once, before sessions are forked."""
    start_timeout_s: PositiveFloat = 20.0
    """Time a shard or a session has to start [s]."""
    memory_mb: PositiveInt = 1024
    """Address space of a session [MiB]."""


class ToolsConfig(Config):
    cache_file: str = ""
    """File that keeps the tools' answers over runs; empty for memory alone."""
    cache_mode: Literal["use", "record", "replay"] = "use"
    """"use" reads and adds, "record" calls every tool anew, "replay" calls none: what the file hasn't got is an error."""
    timeout_s: PositiveFloat = 20.0
    """Time one try of a call may take [s]."""
    attempts: PositiveInt = 3
    """Tries of a call that fails in passing."""
    max_concurrent: PositiveInt = 64
    """Calls of one tool that run at once [calls]."""


class EngineConfig(Config):
    kind: Literal["auto", "transformers", "simulated"] = "auto"
    """"auto" is transformers here."""
    slots: PositiveInt = 128
    """Conversations decoded at once; more wait their turn [conversations]."""
    request_timeout_s: PositiveFloat = 120.0
    """Time one response may take, waiting included [s]."""
    start_timeout_s: PositiveFloat = 120.0
    """Time the engine has to load the model [s]."""
    threads: NonNegativeInt = 0
    """OpenMP threads; 0 takes all cores this process may use."""


class LearnerConfig(Config):
    advantage: Literal["reinforce_pp", "group", "rloo"] = "reinforce_pp"
    """REINFORCE++ over turns (L0), group-relative (GRPO) or leave-one-out (RLOO)."""
    whiten: Literal["batch", "none"] = "batch"
    """"batch": (A - mean) / (std + 1e-8) over all turns of the step, one vote a turn. Of reinforce_pp; the others compare within a group."""
    gamma: float = Field(default=0.95, ge=0, le=1)
    """Discount from turn to turn."""
    lr: PositiveFloat = 7e-4
    """AdamW's peak learning rate."""
    warmup_steps: NonNegativeInt = 3
    """Linear warm-up [steps]."""
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The learning rate decays linearly to this share of its peak by the last step."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay, on matrices only."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    clip_low: PositiveFloat = 0.2
    """Ratios below 1 - this gain nothing."""
    clip_high: PositiveFloat = 0.25
    """Ratios above 1 + this gain nothing."""
    dual_clip: float = Field(default=3.0, gt=1)
    """Bound of the loss of a token with a negative advantage, in units of it."""
    kl_coef: NonNegativeFloat = 0.001
    """Weight of KL(policy || start model), k3 form; 0 loads no reference."""
    pack_tokens: PositiveInt = 8192
    """Tokens of one pack, the unit of a forward and backward pass [tokens]."""
    permute_advantages: bool = False
    """Control: shuffle advantages over trajectories, so that there is nothing to learn."""
    threads: NonNegativeInt = 0
    """OpenMP threads; 0 takes all cores this process may use."""
    step_timeout_s: PositiveFloat = 600.0
    """Time one optimizer step may take [s]."""


class EvalConfig(Config):
    questions: PositiveInt = 600
    """Fixed held-out questions asked before and after training [questions]."""
    every: NonNegativeInt = 8
    """Steps between sampled evaluations for the curve; 0 for none [steps]."""
    curve_questions: PositiveInt = 200
    """Held-out questions of those in-between evaluations; the first of the fixed ones, all where there are fewer [questions]."""
    transfer_questions: PositiveInt = 100
    """Held-out questions of the chains that are never trained on, asked after training [questions]."""


class RunConfig(Config):
    num_steps: PositiveInt = 24
    """Optimizer steps to take [steps]."""
    seed: NonNegativeInt = 0
    """Of questions, sampling and initialisation."""
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    agent: AgentConfig = AgentConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    tools: ToolsConfig = ToolsConfig()
    engine: EngineConfig = EngineConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _a_step_fits_among_the_open_groups(self):
        if self.rollout.max_open_groups < self.rollout.groups_per_step:
            raise ValueError(
                f"rollout.max_open_groups = {self.rollout.max_open_groups} is less than rollout.groups_per_step = "
                f"{self.rollout.groups_per_step}, so no step could ever fill: raise --rollout.max-open-groups to "
                f"{self.rollout.groups_per_step} or more"
            )
        return self

    @model_validator(mode="after")
    def _a_recording_has_a_file(self):
        if self.tools.cache_mode != "use" and not self.tools.cache_file:
            raise ValueError(
                f"tools.cache_mode = {self.tools.cache_mode!r} has no file to work with: name one with --tools.cache-file"
            )
        return self

    @model_validator(mode="after")
    def _a_response_fits_in_the_context(self):
        if self.agent.max_new_tokens >= self.agent.context_tokens:
            raise ValueError(
                f"agent.max_new_tokens = {self.agent.max_new_tokens} leaves no room for a prompt in "
                f"agent.context_tokens = {self.agent.context_tokens}: lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _a_relative_advantage_has_someone_to_compare_with(self):
        if self.learner.advantage != "reinforce_pp" and self.rollout.group_size < 2:
            raise ValueError(
                f"learner.advantage = {self.learner.advantage!r} compares the episodes of a group, but "
                f"rollout.group_size = {self.rollout.group_size}: raise --rollout.group-size to 2 or more"
            )
        return self
