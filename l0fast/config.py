"""Every knob of a run. Imports nothing heavy: `--help` and a typo answer before torch is loaded.

Flags win over the recipe's TOML, which wins over the defaults here. A rule that spans fields is a validator named as
the sentence it guards.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

# TOML, JSON and generators of random numbers have no larger ones
_LARGEST = 2**63 - 1
PositiveInt = Annotated[int, Field(gt=0, le=_LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_LARGEST)]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskConfig(Config):
    kind: Literal["geography", "invented", "questions"] = "geography"
    """Where the questions come from: a world that ships, or the sources in `train` and `eval`."""
    train: tuple[str, ...] = ()
    """Sources of training questions, each DATA or DATA?name=value&...: a file, a data set with a ready map, or owner/name on the Hugging Face hub; e.g. "nq?weight=2", "mine.jsonl?question=prompt&answers=target"."""
    eval: tuple[str, ...] = ()
    """Sources of held-out questions, written alike."""
    world_seed: NonNegativeInt = 0
    """Makes the invented world; the real one has no seed."""
    two_hop_share: float = Field(default=0.7, ge=0, le=1)
    """Share of questions that need two look-ups."""
    variant_share: float = Field(default=0.5, ge=0, le=1)
    """Share of training questions asked in variants of the world, so that knowing its facts by heart does not pay: training names spelled anew, and invented ones."""
    num_variants: PositiveInt = 4
    """Variants made for that [worlds]."""
    search_results: int = Field(default=3, ge=1, le=50)
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
    mode: Literal["on_policy", "carry_over", "one_step_off"] = "on_policy"
    """"on_policy": every token is sampled by the weights it trains. "carry_over": episodes go on while the learner works and through new weights. "one_step_off": a step is learned while the next one is sampled, by the weights before it."""
    max_staleness: NonNegativeInt = 2
    """carry_over: optimizer steps between the weights that sampled a token and the step that learns from it, at most [policy versions]."""
    group_size: PositiveInt = 8
    """Episodes per task, the group its rewards are compared in [episodes]."""
    groups_per_step: PositiveInt = 16
    """Groups an optimizer step learns from [groups]."""
    max_open_groups: PositiveInt = 16
    """Groups admitted and not yet learned from; the backpressure of the whole run. on_policy plays no more than groups_per_step; in the other modes twice as many unless set, and carry_over gains up to max_staleness + 1 times as many [groups]."""
    admission: Literal["auto", "fixed", "kv"] = "auto"
    """Episodes in flight besides: "fixed" takes all that are open; "kv" holds new ones back while the engine's KV cache has no room for what they will grow to, as learned from those before. "auto" is kv where all share one cache, sglang's."""
    max_turns: PositiveInt = 5
    """Turns before an episode is truncated [turns]."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature in training."""
    episode_timeout_s: PositiveFloat = 120.0
    """Wall clock of one episode; waiting to be admitted to the engine does not count [s]."""
    turn_timeout_s: PositiveFloat = 120.0
    """Wall clock of one turn of it: the response, once it is admitted, and the cell with its session and tools [s]."""
    drop_rate: float = Field(default=0.0, ge=0, le=1)
    """Dynamic sampling: probability that a group whose answers are all right or all wrong is dropped and replaced. L0: 0.5."""
    max_drop_rounds: PositiveInt = 3
    """A step drops at most this many times `groups_per_step` groups."""
    max_refills: NonNegativeInt = 3
    """Times one place in a group is played again after a failure before the run gives up."""
    keep_trajectories: NonNegativeInt = 0
    """Newest steps whose trajectories stay in the run's folder, which they are most of; those of evaluations all do. 0 keeps all [steps]."""

    @model_validator(mode="after")
    def _what_is_played_while_a_step_is_learned_has_room_unless_set(self):
        if self.mode != "on_policy" and "max_open_groups" not in self.model_fields_set:
            # past `frozen`: this is still the making of it
            object.__setattr__(self, "max_open_groups", 2 * self.groups_per_step)
        return self


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


class RewardConfig(Config):
    correct: NonNegativeFloat = 0.72
    """Weight of a right answer, judged as its task says; on the last turn. L0: 0.8 x 0.9, by exact match."""
    has_answer: NonNegativeFloat = 0.08
    """Of any answer at all; on the last turn. L0: 0.8 x 0.1."""
    format: NonNegativeFloat = 0.1
    """Of exactly one <think> and one <code>, both long enough; a turn's share of it each turn. As in L0."""
    code: NonNegativeFloat = 0.1
    """Of code that gave an output and no error; a turn's share of it each turn. As in L0."""
    length: NonNegativeFloat = 0.0
    """Of short turns: 1 - response tokens / agent.max_new_tokens, a turn's share of it each turn. L0 has one, at weight 0."""
    exact_match: NonNegativeFloat = 0.0
    """Of an answer equal to a right one by the SQuAD rules, whatever judges its task."""
    f1: NonNegativeFloat = 0.0
    """Of the words an answer shares with the nearest right one (SQuAD)."""
    numeric: NonNegativeFloat = 0.0
    """Of a number equal to a right one within `numeric_tolerance`."""
    math: NonNegativeFloat = 0.0
    """Of an expression equal to a right one (math-verify: pip install 'l0fast[math]')."""
    regex: NonNegativeFloat = 0.0
    """Of an answer that one of the right ones matches in full, as a regular expression."""
    unit_tests: NonNegativeFloat = 0.0
    """Share of its task's tests that pass after the answer has run as code, in a session of its own."""
    judge: NonNegativeFloat = 0.0
    """Of an answer that a model calls correct; see [judge]."""
    custom: tuple[str, ...] = ()
    """Your own: "module:function=weight". The function takes a Trajectory and gives a number for the episode or one a turn; it may be a coroutine."""
    numeric_tolerance: NonNegativeFloat = 1e-6
    """Largest relative difference of equal numbers."""
    timeout_s: PositiveFloat = 30.0
    """Time a math comparison, a run of unit tests or a custom reward may take [s]."""


class JudgeConfig(Config):
    endpoint: str = ""
    """URL of an OpenAI-compatible API, for example https://api.openai.com/v1."""
    model: str = ""
    """The model's name there."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty takes OPENAI_API_KEY where it is set."""
    votes: PositiveInt = 1
    """Judgements asked for each answer; the commonest counts."""
    max_concurrent: PositiveInt = 32
    """Judgements asked for at once."""
    max_tokens: PositiveInt = 2048
    """Longest judgement, the thinking of a model that reasons included [tokens]."""
    timeout_s: PositiveFloat = 60.0
    """Time one judgement may take, retries included [s]."""
    cache_file: str = ""
    """File that keeps judgements over runs; empty for memory alone."""


class ToolsConfig(Config):
    use: tuple[str, ...] = ()
    """Of task.kind = questions: what agents can call, each web_search, get_webpage_in_markdown, inspect_file, visual_qa, search=FILE, corpus=DIR, or module:function of your own."""
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
    per_minute: NonNegativeFloat = 0.0
    """Calls of one tool that begin in a minute, at most; 0 for no limit. What was cached doesn't count."""


class WebConfig(Config):
    search_provider: Literal["serper", "exa", "firecrawl", "searxng"] = "serper"
    """Who answers web_search. Their keys come from the environment: SERPER_API_KEY, EXA_API_KEY, FIRECRAWL_API_KEY; a SearXNG of your own has none."""
    search_url: str = ""
    """Address of the provider, where it is another one than usual; a SearXNG's is needed."""
    search_results: int = Field(default=5, ge=1, le=50)
    """Results of a search."""
    page_reader: Literal["local", "jina"] = "local"
    """Who turns a page into Markdown: this machine, or Jina's reader (JINA_API_KEY, if you have one)."""
    reader_url: str = ""
    """Address of the reader, where it is another one than Jina's own."""
    page_chars: PositiveInt = 6000
    """Length of one part of a page or file [characters]."""
    max_bytes: PositiveInt = 5_000_000
    """Largest page [bytes]."""
    timeout_s: PositiveFloat = 20.0
    """Time one request may take [s]."""
    user_agent: str = Field(default="", pattern=r"^[ -~]*$")
    """Who pages are told reads them; empty for l0fast and its version. Wikimedia's sites want a way to write to you, and slow down or turn away who gives none: "my-lab/1.0 (me@example.org)"."""
    allow_private: bool = False
    """Let agents read addresses of this machine and its network. Off: an agent could reach whatever listens there."""
    vision_endpoint: str = ""
    """URL of an OpenAI-compatible API with a model that sees, for visual_qa."""
    vision_model: str = ""
    """Its name there."""
    vision_api_key_env: str = ""
    """Environment variable that holds its key; empty takes OPENAI_API_KEY where it is set."""


ENDPOINT_CAN_NOT_TRAIN = (
    "an OpenAI-compatible endpoint can't be trained on: it returns text, and a gradient needs the token ids that were "
    "sampled, each with its log-prob; ask it with python -m l0fast.agent --endpoint URL, and train with --engine.kind "
    "transformers or sglang"
)


def _no_endpoint(kind: Any) -> Any:
    if kind == "openai":
        raise ValueError(ENDPOINT_CAN_NOT_TRAIN)
    return kind


class EngineConfig(Config):
    kind: Annotated[Literal["auto", "transformers", "sglang", "simulated"], BeforeValidator(_no_endpoint)] = "auto"
    """"auto" is sglang where it is installed and there are CUDA GPUs, else transformers."""
    slots: PositiveInt = 128
    """Conversations decoded at once; more wait their turn [conversations]."""
    request_timeout_s: PositiveFloat = 120.0
    """Time one response may take; and before that, time that nobody is let in or done while it waits to be admitted [s]."""
    start_timeout_s: PositiveFloat = 600.0
    """Time the engine has to load the model, and sglang to compile for it; several start one after the other [s]."""
    threads: NonNegativeInt = 0
    """OpenMP threads; 0 takes all cores this process may use, and one while others keep them busy."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the transformers engine computes: fp32 on a CPU, bf16 with fp32 logits on a GPU. "auto" takes the GPU where there is one."""
    memory_share: float = Field(default=0.4, gt=0, lt=1)
    """Share of a GPU's memory that sglang takes for weights and keys and values; the learner lives in the rest."""
    count: NonNegativeInt = 0
    """Engines of sglang; 0 takes one for every `tensor_parallel` GPUs, or a single one on the CPU."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share one sglang engine's model."""
    layout: Literal["resident", "sleep", "split"] = "resident"
    """How sglang and the learner share GPUs. "resident": both stay on all of them. "sleep": while the learner works the engines give theirs back. "split": the first `learner.ranks` GPUs are the learner's, the others the engines'."""
    weights: Literal["auto", "ipc", "host", "disk", "group"] = "auto"
    """How new weights get to sglang: read where they lie on the same GPU, through main memory, from a folder, or by a process group to engines on other GPUs (`layout` "split"). "auto": ipc where the learner is on the engines' GPUs, else host."""
    stall_timeout_s: PositiveFloat = 60.0
    """Time an sglang engine may have requests and say nothing before it is taken for stuck and rebuilt [s]."""
    max_rebuilds: NonNegativeInt = 8
    """Times one sglang engine is rebuilt in a day after it died."""
    sglang: tuple[str, ...] = ()
    """Further arguments of sglang.Engine, each name=value with the value in JSON, e.g. attention_backend="triton"."""


NO_DUAL_CLIP = 1e9
"""A `dual_clip` that never takes hold: no ratio is larger than exp(20)."""

_SETTINGS = ("advantage", "objective", "loss_mean", "clip_low", "clip_high", "dual_clip", "kl_coef")
ALGORITHMS: dict[str, dict[str, Any]] = {
    name: {setting: value for setting, value in zip(_SETTINGS, values, strict=True) if value is not None}
    for name, *values in [
        # algorithm      advantage       objective  loss_mean   clip_low clip_high dual_clip     kl_coef
        ("reinforce_pp", "reinforce_pp", "ppo",     "token",    0.2,     0.25,     3.0,          0.001),
        ("grpo",         "group",        "ppo",     "sequence", 0.2,     0.2,      NO_DUAL_CLIP, 0.04),
        ("dr_grpo",      "dr_grpo",      "ppo",     "constant", 0.2,     0.2,      NO_DUAL_CLIP, 0.0),
        ("rloo",         "rloo",         "ppo",     "constant", None,    None,     NO_DUAL_CLIP, None),
        ("dapo",         "group",        "ppo",     "token",    0.2,     0.28,     NO_DUAL_CLIP, 0.0),
        ("gspo",         "group",        "gspo",    "sequence", 3e-4,    4e-4,     None,         None),
        ("cispo",        "group",        "cispo",   "token",    1.0,     0.28,     None,         0.0),
    ]
}  # fmt: skip
"""What `learner.algorithm` stands for; formulas and papers in learner/algorithms.py. None: the algorithm says nothing of it."""


class LearnerConfig(Config):
    algorithm: Literal["none", "reinforce_pp", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"] = "none"
    """A published algorithm by name, short for the advantage, objective, loss_mean, clips and kl_coef it consists of; those that are set besides, in the recipe too, stay as they are set."""
    advantage: Literal["reinforce_pp", "group", "dr_grpo", "rloo", "running_mean", "gae"] = "reinforce_pp"
    """REINFORCE++ over turns (L0), group-relative (GRPO), that without the division by the spread (Dr. GRPO), leave-one-out (RLOO), against a running mean of earlier steps' rewards, or GAE over turns, which needs a critic."""
    whiten: Literal["batch", "none"] = "batch"
    """"batch": (A - mean) / (std + 1e-8) over all turns of the step, one vote a turn. Of reinforce_pp and gae; the others compare episodes."""
    gamma: float = Field(default=0.95, ge=0, le=1)
    """Discount from turn to turn."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the critic, 1 the rewards."""
    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    """What is done with the ratio of new to old policy: clipped token by token (PPO, GRPO), one ratio a sequence (GSPO), or a clipped weight that leaves every token its gradient (CISPO). All the same while a batch gets one optimizer step."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """What the summed loss of tokens is divided by: the number of tokens (L0, DAPO), each trajectory's own and then the number of trajectories (GRPO), or the most tokens that many trajectories could have sampled, rollout.max_turns x agent.max_new_tokens each (Dr. GRPO)."""
    lr: PositiveFloat = 7e-4
    """AdamW's peak learning rate."""
    warmup_steps: NonNegativeInt = 3
    """Linear warm-up [steps]."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up, if it does."""
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of its peak that the learning rate has come down to by the last step."""
    minibatches: PositiveInt = 1
    """Optimizer steps a batch is cut into, by groups in their order, or by rows where there are fewer groups; more than 1 needs a pass for the log-probs before the first of them, and the whole batch before it."""
    tis_cap: NonNegativeFloat = 2.0
    """Truncated importance sampling: a token counts as often more as the learner finds it likelier than the engine did, at most this; 0 trusts the engine."""
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
    critic: Literal["none", "head", "copy"] = "none"
    """Estimates what a turn will earn, for advantage = gae. "head": a linear layer on the policy's hidden states; "copy": on those of a second model, which starts as the policy does."""
    critic_lr: PositiveFloat = 1e-3
    """AdamW's learning rate for the critic. A copy wants a smaller one."""
    value_clip: PositiveFloat = 0.5
    """A value that moved further than this from where it was at the start of the step gains nothing by it; of more than one minibatch [rewards]."""
    mismatch_warn: NonNegativeFloat = 1e-3
    """Warn when the learner and the engine disagree this much about the sampled tokens (mismatch_k3); 0 for never. Of rollout.mode = on_policy: in the others they speak of different weights [nats]."""
    mismatch_stop: NonNegativeFloat = 1e-2
    """End the run when they disagree this much; 0 for never [nats]."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Train on groups as they finish, while others are still played; for advantages that look at one group only, and one optimizer step a batch. The same gradient up to rounding. "auto": where the learner has a GPU, for on a CPU it takes the cores that play."""
    permute_advantages: bool = False
    """Control: shuffle advantages over trajectories, so that there is nothing to learn."""
    ranks: NonNegativeInt = 0
    """Processes that share the model and the batch, one a GPU; 0 takes all GPUs there are, or one process on the CPU."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only the inputs of layers and compute them again in the backward pass: less memory for a third more compute. "auto": on a GPU."""
    offload: Literal["none", "cpu"] = "none"
    """"cpu" keeps weights, gradients and optimizer state in main memory, where the optimizer then runs; layers come to the GPU as they are needed."""
    lora_rank: NonNegativeInt = 0
    """Train low-rank additions to the linear layers instead of the weights (needs peft); 0 trains the weights."""
    lora_alpha: PositiveInt = 32
    """The additions are scaled by this over their rank."""
    threads: NonNegativeInt = 0
    """OpenMP threads; 0 shares out all cores this process may use among the ranks."""
    start_timeout_s: PositiveFloat = 600.0
    """Time the ranks have to import torch and to find each other [s]."""
    stall_timeout_s: PositiveFloat = 10.0
    """Time a rank may work without a sign of progress, of which each layer gives some, before it is taken for stuck [s]."""
    slow_timeout_s: PositiveFloat = 60.0
    """The same for what takes longer: an optimizer step, and all of the first one, when kernels are compiled [s]."""
    io_timeout_s: PositiveFloat = 600.0
    """Time the ranks may take to read or write a model or a checkpoint [s]."""

    @model_validator(mode="after")
    def _an_algorithm_stands_for_its_settings(self):
        for name, value in ALGORITHMS.get(self.algorithm, {}).items():
            if name not in self.model_fields_set:
                # past `frozen`: this is still the making of it
                object.__setattr__(self, name, value)
        return self


class EvalConfig(Config):
    questions: PositiveInt = 600
    """Fixed held-out questions asked before and after training [questions]."""
    every: NonNegativeInt = 8
    """Steps between sampled evaluations for the curve; 0 for none [steps]."""
    curve_questions: PositiveInt = 200
    """Held-out questions of those in-between evaluations; the first of the fixed ones, all where there are fewer [questions]."""
    share: float = Field(default=0.125, gt=0, le=1)
    """Share of the engine's slots that an in-between evaluation takes, where it is asked beside training: in every rollout.mode but on_policy."""
    transfer_questions: PositiveInt = 100
    """Held-out questions of the chains that are never trained on, asked after training [questions]."""


class CheckpointConfig(Config):
    every: NonNegativeInt = 8
    """Steps between checkpoints, from which --resume goes on; there is one after the last step and one on Ctrl-C, too. 0 for none at all [steps]."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""


class WatchdogConfig(Config):
    quiet_s: NonNegativeFloat = 600.0
    """Time in which nothing may finish, no response, cell or step, before the run ends with a diagnosis; 0 for ever [s]."""
    blocked_s: NonNegativeFloat = 60.0
    """Time that one call may hold the event loop before the run ends and says which; 0 for ever, as a debugger needs. A process that is stopped (SIGSTOP) ten times as long ends when it goes on [s]."""


class TraceConfig(Config):
    on: bool = False
    """Write trace.json into the run's folder: what every agent did when, to look at in https://ui.perfetto.dev. --trace is short for it."""
    torch_step: NonNegativeInt = 0
    """Optimizer step of which torch.profiler's view from inside of the learner's ranks is added to the trace; 0 for none."""


class MetricsConfig(Config):
    sinks: tuple[Literal["wandb", "tensorboard", "prometheus"], ...] = ()
    """Where metrics go besides metrics.jsonl: Weights & Biases, event files in the run's folder, an endpoint on loopback. Each needs its extra: pip install 'l0fast[wandb]'."""
    prometheus_port: NonNegativeInt = 9464
    """Of the endpoint, http://127.0.0.1:PORT/metrics; 0 for any that is free."""
    wandb_project: str = "l0fast"
    """Project of Weights & Biases; account and mode as WANDB_API_KEY and WANDB_MODE say."""


class PlanConfig(Config):
    gpus: PositiveInt = 8
    """GPUs that --dry-run plans for where this machine has none."""
    gpu_memory_gb: PositiveFloat = 80.0
    """Memory of each of them [GB]."""


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
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    tools: ToolsConfig = ToolsConfig()
    web: WebConfig = WebConfig()
    engine: EngineConfig = EngineConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    plan: PlanConfig = PlanConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    trace: TraceConfig = TraceConfig()
    metrics: MetricsConfig = MetricsConfig()

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
    def _groups_have_room_beside_the_step_that_is_learned(self):
        rollout = self.rollout
        needed = {
            "on_policy": rollout.groups_per_step,
            "carry_over": rollout.groups_per_step + 1,
            "one_step_off": 2 * rollout.groups_per_step,
        }[rollout.mode]
        if rollout.max_open_groups < needed:
            raise ValueError(
                f"rollout.mode = {rollout.mode!r} plays groups while a step of {rollout.groups_per_step} is learned, but "
                f"rollout.max_open_groups = {rollout.max_open_groups}: raise --rollout.max-open-groups to "
                f"{2 * rollout.groups_per_step}"
            )
        if rollout.mode == "carry_over" and not rollout.max_staleness:
            raise ValueError(
                "rollout.max_staleness = 0 leaves rollout.mode = 'carry_over' nothing to carry over: raise "
                "--rollout.max-staleness to 1 or more, or take --rollout.mode on_policy"
            )
        return self

    @model_validator(mode="after")
    def _tokens_of_older_weights_are_weighed(self):
        if self.rollout.mode != "on_policy" and not self.learner.tis_cap:
            raise ValueError(
                f"rollout.mode = {self.rollout.mode!r} trains on tokens of older weights, but learner.tis_cap = 0 weighs "
                "them as if they were new: set --learner.tis-cap to 2, or take --rollout.mode on_policy"
            )
        return self

    @model_validator(mode="after")
    def _a_profile_is_part_of_a_trace(self):
        if self.trace.torch_step and not self.trace.on:
            raise ValueError(f"trace.torch_step = {self.trace.torch_step} has no trace to be part of: add --trace")
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
    def _gae_and_a_critic_come_together(self):
        if self.learner.advantage == "gae" and self.learner.critic == "none":
            raise ValueError(
                "learner.advantage = 'gae' needs to know what a turn is expected to earn, but learner.critic = 'none': "
                "set --learner.critic to head or copy"
            )
        if self.learner.advantage != "gae" and self.learner.critic != "none":
            raise ValueError(
                f"learner.critic = {self.learner.critic!r} would be trained and never asked, for learner.advantage = "
                f"{self.learner.advantage!r} has no use for it: set --learner.advantage gae, or leave the critic out"
            )
        return self

    @model_validator(mode="after")
    def _a_relative_advantage_has_someone_to_compare_with(self):
        if self.learner.advantage in ("group", "dr_grpo", "rloo") and self.rollout.group_size < 2:
            raise ValueError(
                f"learner.advantage = {self.learner.advantage!r} compares the episodes of a group, but "
                f"rollout.group_size = {self.rollout.group_size}: raise --rollout.group-size to 2 or more"
            )
        return self
