"""What the pages speak of is there: settings and their values, commands and their flags, modules, files, extras, headings."""

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
import tomllib
from operator import attrgetter
from pathlib import Path

import pytest
from pydantic import BaseModel

from l0fast.cli import parse
from l0fast.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for room in ("bench", "l0fast", "tests") for page in (ROOT / room).rglob("*.md")),
]
DEFAULTS = RunConfig()
SECTIONS = [name for name, value in DEFAULTS if isinstance(value, BaseModel)]
SETTING = rf"\b((?:{'|'.join(SECTIONS)})\.[a-z][a-z_0-9-]*)"
FILES = ("log", "json", "jsonl", "py", "toml")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def quoted(page: Path) -> list[str]:
    """What stands in backticks within a line, and the lines of shell blocks."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = itertools.chain(*(block.replace("\\\n", " ").splitlines() for block in blocks(page, "sh")))
    return [*(text.replace(r"\|", "|") for text in re.findall("`([^`\n]+)`", prose)), *lines]


def source_of(module: str) -> str:
    """Of what `python -m module` runs."""
    folder = ROOT / module.replace(".", "/")
    file = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
    assert file.exists(), f"there is no module {module}"
    return file.read_text(encoding="utf-8")


@every_page
def test_settings_exist(page: Path):
    for text in quoted(page):
        for path in re.findall(rf"{SETTING}(?![\w(/])", text):
            section, name = path.replace("-", "_").split(".")
            if name not in FILES:
                assert hasattr(getattr(DEFAULTS, section), name), f"{path} in {text!r} is no setting"


@every_page
def test_settings_that_are_given_with_seconds_have_them_by_default(page: Path):
    for path, seconds in re.findall(rf"`{SETTING}`, ([0-9.]+) s\b", page.read_text(encoding="utf-8")):
        assert attrgetter(path)(DEFAULTS) == float(seconds), path


@every_page
def test_flags_take_the_values_that_are_offered(page: Path):
    for text in quoted(page):
        if re.match(rf"--{SETTING} ", text):
            for words in itertools.product(*(word.split("|") for word in shlex.split(text))):
                parse(["--trace", *("1" if word == "N" else word for word in words)])


@every_page
def test_toml_is_a_recipe(page: Path):
    for block in blocks(page, "toml"):
        RunConfig.model_validate(tomllib.loads(block))


@every_page
def test_commands_exist_with_their_flags(page: Path):
    for text in quoted(page):
        if found := re.search(r"python3? -m ((?:l0fast|bench)[\w.]*)([^#]*)", text):
            module, rest = found.groups()
            source = source_of(module)
            if module in ("l0fast.run", "l0fast.agent"):
                source += source_of({"l0fast.run": "l0fast.cli", "l0fast.agent": "l0fast.ask"}[module])
            for flag in re.findall(r"--([a-z][a-z0-9-]*)(?![\w.-])", rest):
                field = flag.replace("-", "_")
                assert f"--{flag}" in source or f"{field}:" in source or hasattr(DEFAULTS, field), (
                    f"--{flag} of {text!r}"
                )


@every_page
def test_names_of_modules_and_what_is_imported_exist(page: Path):
    for text in quoted(page):
        for name in re.findall(r"(?<![\w./])((?:l0fast|bench)(?:\.[a-z_]\w*)+)", text):
            if importlib.util.find_spec(name.rpartition(".")[0]) is None or not _is_module(name):
                module, _, what = name.rpartition(".")
                assert hasattr(importlib.import_module(module), what), f"{name} in {text!r}"
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module or ""), alias.name), (
                        f"{alias.name} of {node.module}"
                    )


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


@every_page
def test_links_and_files_are_there(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link
    for name in re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|json|md|png))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "l0fast")), name


@pytest.mark.parametrize(
    "path", [*PAGES, *sorted((ROOT / "l0fast").rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_extras_are_those_of_the_package(path: Path):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for names in re.findall(r"(?:l0fast|'\.)\[([a-z,]+)\]", path.read_text(encoding="utf-8")):
        assert set(names.split(",")) <= set(extras)


def test_the_snippet_of_simulated_agents_runs(capsys: pytest.CaptureFixture[str]):
    (block,) = blocks(ROOT / "l0fast" / "engine" / "README.md", "python")
    assert "clock.move_to(600.0)" in block
    exec(compile(block.replace("600.0", "20.0"), "engine/README.md", "exec"), {})
    assert re.match(r"[1-9]\d* episodes in ten minutes; EngineLoad\(running=", capsys.readouterr().out)
