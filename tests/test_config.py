"""The command line: what wins, what is refused and with which sentence, and that asking costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from l0fast.cli import SMOKE, parse, render_plan, shipped_recipes
from l0fast.config import RunConfig
from l0fast.errors import UsageError


@pytest.fixture(autouse=True)
def _somewhere_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def sentence(argv: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        parse(argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- what wins -------------------------------------------------------------------------------------------------------


def test_without_words_it_is_the_geography_recipe():
    invocation = parse([])
    assert invocation.config == parse(["geography"]).config
    changed = {
        name for name in RunConfig.model_fields if getattr(invocation.config, name) != getattr(RunConfig(), name)
    }
    assert changed == {"learner"}
    assert invocation.recipe == "geography"
    assert invocation.run_dir.parent == Path("runs")
    assert invocation.run_dir.name.startswith("geography-")


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults():
    Path("mine.toml").write_text("num_steps = 7\n[rollout]\ngroup_size = 4\nmax_turns = 9\n")
    config = parse(["mine.toml", "--rollout.group-size", "2"]).config
    assert (config.num_steps, config.rollout.group_size, config.rollout.max_turns) == (7, 2, 9)
    assert config.rollout.groups_per_step == RunConfig().rollout.groups_per_step


def test_a_flag_may_rescue_a_combination_the_recipe_alone_would_not_allow():
    Path("mine.toml").write_text("[rollout]\ngroups_per_step = 64\n")
    assert parse(["mine.toml", "--rollout.max-open-groups", "64"]).config.rollout.groups_per_step == 64


def test_flags_win_over_smoke():
    config = parse(["--smoke", "--num-steps", "3"]).config
    assert (config.num_steps, config.eval.questions) == (3, SMOKE["eval"]["questions"])


def test_smoke_is_two_steps_of_the_same_run():
    whole, short = parse(["invented", "--seed", "5"]).config, parse(["invented", "--smoke", "--seed", "5"]).config
    assert (short.num_steps, short.eval.every) == (2, 0)
    assert (short.seed, short.task, short.learner) == (5, whole.task, whole.learner)
    same = {"num_steps": whole.num_steps, "rollout": whole.rollout, "eval": whole.eval}
    assert short.model_copy(update=same) == whole


def test_dashes_and_underscores_are_the_same():
    assert parse(["--rollout.max_open_groups", "32"]).config == parse(["--rollout.max-open-groups", "32"]).config
    assert parse(["--run_dir", "x"]).run_dir == parse(["--run-dir=x"]).run_dir == Path("x")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learner.permute-advantages"], True),
        (["--learner.permute-advantages=false"], False),
        (["--learner.no-permute-advantages"], False),
        (["--learner.permute-advantages", "--learner.no_permute_advantages"], False),
    ],
)
def test_a_switch_takes_no_value(words: list[str], expected: bool):
    assert parse(words).config.learner.permute_advantages is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], False), (["--trace"], True), (["--trace=false"], False), (["--trace", "--no-trace"], False)],
)
def test_a_section_with_a_switch_is_switched_by_its_name(words: list[str], expected: bool):
    assert parse(words).config.trace.on is expected


def test_a_profile_is_part_of_a_trace():
    assert parse(["--trace", "--trace.torch-step", "2"]).config.trace.torch_step == 2
    with pytest.raises(UsageError, match=r"trace\.torch_step = 2 has no trace to be part of: add --trace"):
        parse(["--trace.torch-step", "2"])


def test_a_flag_of_two_values_and_one_that_repeats():
    config = parse(["--learner.betas", "0.8", "0.9", "--sandbox.preload", "json", "--sandbox.preload", "re"]).config
    assert config.learner.betas == (0.8, 0.9)
    assert config.sandbox.preload == ("json", "re")


FLAGS = [
    (["--smoke"], {}),
    (["--dry-run"], {}),
    (["--learner.permute-advantages"], {"learner.permute_advantages": True}),
    (["--learner.no_permute_advantages"], {"learner.permute_advantages": False}),
    (["--seed", "3"], {"seed": 3}),
    (["--seed=4"], {"seed": 4}),
    (["--run-dir", "there"], {}),
    (["--learner.betas", "0.5", "0.6"], {"learner.betas": (0.5, 0.6)}),
    (["--sandbox.preload", "json"], {"sandbox.preload": ("json",)}),
    (["--rollout.temperature", "0.7"], {"rollout.temperature": 0.7}),
    (["--model.path", "geography"], {"model.path": "geography"}),
]


@settings(deadline=None)
@given(flags=st.lists(st.sampled_from(FLAGS), unique_by=lambda f: f[0][0].partition("=")[0]), data=st.data())
def test_the_recipe_may_stand_anywhere_among_the_flags(flags: list[tuple[list[str], dict]], data: st.DataObject):
    at = data.draw(st.integers(0, len(flags)))
    words = [words for words, _ in flags]
    invocation = parse(sum([*words[:at], ["invented"], *words[at:]], []))
    assert invocation.recipe == "invented"
    assert invocation.config.task.kind == "invented"
    assert invocation.smoke == (["--smoke"] in words)
    assert invocation.dry_run == (["--dry-run"] in words)
    expected = {path: value for _, values in flags for path, value in values.items()}
    for path, value in expected.items():
        assert _at(invocation.config, path) == value


def _at(config: BaseModel, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name: str):
    assert parse([name]).config.task.kind == ("questions" if name.startswith("l0") else name)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--rollout.group-sise", "3"], ["--rollout.group-sise", "did you mean --rollout.group-size"]),
        (["--lr", "3"], ["--lr", "--learner.lr"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["-x"], ["-x", "--help"]),
        (["--rollout", "3"], ["section", "--rollout.group-size"]),
        (["--num-steps", "many"], ["--num-steps many", "integer", "--num-steps 24"]),
        (["--num-steps", "-3"], ["--num-steps -3", "greater than 0"]),
        (["--num-steps", "2.5"], ["--num-steps 2.5", "integer"]),
        (["--seed", "9" * 23], [f"--seed {'9' * 23}", "less than or equal to 9223372036854775807", "--seed 0"]),
        (["--num-steps", "9" * 23], [f"--num-steps {'9' * 23}", "less than or equal to 9223372036854775807"]),
        (["--learner.lr", "nan"], ["--learner.lr nan", "finite"]),
        (["--learner.betas", "0.9", "1.5"], ["--learner.betas 0.9 1.5", "less than 1"]),
        (["--learner.betas", "0.9"], ["--learner.betas needs 2 values", "--learner.betas 0.9 0.95"]),
        (["--num-steps"], ["--num-steps needs 1 value", "the line ends"]),
        (["--run-dir", "--smoke"], ["--run-dir needs 1 value", "--smoke follows"]),
        (["--task.kind", "zoo"], ["--task.kind zoo", "'geography', 'invented' or 'questions'"]),
        # more than a search answers
        (["--task.search-results", "51"], ["--task.search-results 51", "less than or equal to 50"]),
        (["--smoke=maybe"], ["--smoke maybe", "boolean"]),
        (["--recipe", "invented"], ["--recipe is not a flag"]),
        (["zoo"], ["'zoo'", *shipped_recipes(), ".toml"]),
        (["geography", "invented"], ["2 recipes", "geography, invented"]),
        (["missing.toml"], ["missing.toml", "No such file", *shipped_recipes()]),
        (["--resume", "runs/x"], ["runs/x/config.toml", "No such file", "the folder of a run"]),
        (["--rollout.max-open-groups", "2"], ["rollout.max_open_groups = 2", "--rollout.max-open-groups to 16"]),
        (
            ["--rollout.mode", "one_step_off", "--rollout.max-open-groups", "20"],
            ["'one_step_off' plays groups while a step of 16", "= 20", "--rollout.max-open-groups to 32"],
        ),
        (
            ["--rollout.mode", "carry_over", "--rollout.max-open-groups", "16"],
            ["'carry_over' plays groups while", "--rollout.max-open-groups to 32"],
        ),
        (
            ["--rollout.mode", "carry_over", "--rollout.max-staleness", "0"],
            ["rollout.max_staleness = 0", "--rollout.max-staleness to 1 or more"],
        ),
        (
            ["--rollout.mode", "carry_over", "--learner.tis-cap", "0"],
            ["tokens of older weights", "learner.tis_cap = 0", "set --learner.tis-cap to 2"],
        ),
        (["--agent.max-new-tokens", "640"], ["agent.max_new_tokens = 640", "agent.context_tokens = 640"]),
        (
            ["--learner.advantage", "rloo", "--rollout.group-size", "1"],
            ["learner.advantage = 'rloo'", "rollout.group_size = 1", "--rollout.group-size to 2"],
        ),
        (["--learner.advantage", "gae"], ["learner.critic = 'none'", "--learner.critic to head or copy"]),
        (["--learner.critic", "head"], ["'reinforce_pp' has no use for it", "set --learner.advantage gae"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else None,
)
def test_bad_flags_get_one_sentence(words: list[str], parts: list[str]):
    text = sentence(words)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("[rollout]\ngroup_sise = 3", ["rollout.group_sise = 3", "did you mean rollout.group_size"]),
        ("kl_coef = 0.1", ["kl_coef = 0.1", "learner.kl_coef"]),
        ("[kitchen]\nsink = 1", ["kitchen = {'sink': 1}", "--help"]),
        ("rollout = 3", ["rollout = 3", "section", "[rollout]"]),
        ("num_steps = '60'", ["num_steps = '60'", "integer", "60"]),
        ("num_steps = true", ["num_steps = True", "integer"]),
        ("num_steps = 0", ["num_steps = 0", "greater than 0"]),
        (f"seed = {'9' * 23}", [f"seed = {'9' * 23}", "less than or equal to 9223372036854775807"]),
        ("[learner]\nlr = inf", ["learner.lr = inf", "number"]),
        ("[learner]\nbetas = [0.9]", ["learner.betas = [0.9]", "too few values"]),
        ("[task]\nkind = 'zoo'", ["task.kind = 'zoo'", "'geography', 'invented' or 'questions'"]),
        ("seed = 1\nnum_steps = \n", ["not TOML", "line 2"]),
        ("[rollout]\ngroups_per_step = 20", ["rollout.groups_per_step = 20", "--rollout.max-open-groups to 20"]),
    ],
)
def test_a_bad_recipe_gets_one_sentence(toml: str, parts: list[str]):
    Path("mine.toml").write_text(toml)
    text = sentence(["mine.toml"])
    for part in parts:
        assert part in text


def test_a_recipe_that_is_not_text_is_refused():
    Path("mine.toml").write_bytes(b"seed = 1 # \xff")
    assert "mine.toml is not UTF-8" in sentence(["mine.toml"])
    # as some editors begin UTF-8
    Path("mine.toml").write_bytes(b"\xef\xbb\xbfseed = 7\n")
    assert parse(["mine.toml"]).config.seed == 7


def test_a_folder_as_recipe_is_refused():
    Path("folder.toml").mkdir()
    assert "folder.toml can't be read (Is a directory)" in sentence(["folder.toml"])


def test_a_run_folder_that_holds_something_is_refused_even_for_a_dry_run():
    Path("used").mkdir()
    assert parse(["--run-dir", "used"]).run_dir == Path("used")
    Path("used/metrics.jsonl").touch()
    for words in ([], ["--dry-run"]):
        assert "used holds files" in sentence(["--run-dir", "used", *words])
    assert "metrics.jsonl is a file" in sentence(["--run-dir", "used/metrics.jsonl"])
    assert "metrics.jsonl" in sentence(["--run-dir", "used/metrics.jsonl/below"])


# --- what asking costs -----------------------------------------------------------------------------------------------


def test_a_dry_run_tells_the_plan_and_writes_nothing():
    words = ["invented", "--dry-run", "--seed", "9", "--num-steps", "3", "--eval.every", "2", "--eval.questions", "100"]
    words += ["--eval.transfer-questions", "10"]
    plan = render_plan(parse(words))
    for part in (
        "invented",
        "runs/invented-",
        "3 steps x 16 groups x 8 episodes = 384 episodes",
        "520 episodes",
        "seed",
    ):
        assert part in plan
    assert "control" not in plan
    assert "control" in render_plan(parse(["--learner.permute-advantages"]))
    assert list(Path().iterdir()) == []


def test_help_names_every_setting_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom l0fast.cli import parse\n"
        "try: parse(['invented', '--help'])\n"
        "except SystemExit as e: status = e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'aiodocker'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    before = os.times()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "Optimizer steps to take [steps]" in done.stdout
    for flag in ("--run-dir DIR", "--dry-run", "--smoke", "--resume DIR", "RECIPE", *_flags(RunConfig)):
        assert flag in done.stdout
    # its own time, under a second on quiet cores, whatever else the machine does
    own_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert own_s < 5


def test_the_command_loads_next_to_nothing_before_it_hears_ctrl_c():
    code = "import sys, l0fast.run; sys.exit(str({'asyncio', 'pydantic', 'l0fast.cli'} & set(sys.modules) or 0))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stderr.strip() == "0"


def test_the_command_answers_bad_input_with_one_line_and_exit_code_2():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "l0fast.run", "--rollout.group-sise", "3"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "did you mean --rollout.group-size?" in done.stderr
    assert list(Path().iterdir()) == []


def _flags(model: type[BaseModel], prefix: str = "--") -> list[str]:
    flags = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            flags += _flags(section, f"{prefix}{name}.")
        else:
            flags.append(prefix + name.replace("_", "-"))
    return flags


def test_every_setting_is_explained_where_it_stands():
    import ast
    import inspect

    import l0fast.config

    for node in ast.parse(inspect.getsource(l0fast.config)).body:
        if not isinstance(node, ast.ClassDef) or node.name == "Config":
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).endswith("Config"):
                continue
            explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert explained, f"{node.name}.{ast.unparse(field.target)} has no string under it"
