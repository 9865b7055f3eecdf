"""What all tests share: a policy folder of the shipped kind, and how a whole suite is dealt to the cores of a machine.

Tests of one file stay together, in their order: what a file's fixtures start is started once. Files that stay together
are in `TOGETHER`. The longest come first, for whoever gets one of them last would be waited for.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# where there is no GPU, kernels run in Triton's interpreter; Triton looks when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# a busy machine is no failure
settings.register_profile("l0fast", deadline=None, max_examples=40)
settings.load_profile("l0fast")


MAX_WORKERS = 4
"""Processes that share a whole suite; each imports torch, and tests have children of their own."""
TESTS = Path(__file__).parent
TOGETHER = ("sandbox",)
"""Folders whose tests look at what others of them may have left on this machine."""
LONGEST = ("sandbox", "test_resume.py", "test_run.py")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`, which pyproject.toml has: some for a whole suite, none for a part of it."""
    root = TESTS.parent
    whole = all((config.invocation_params.dir / arg).resolve() in (root, TESTS) for arg in config.args)
    return min(MAX_WORKERS, len(os.sched_getaffinity(0))) if whole else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> str:
        path = item.path.relative_to(TESTS)
        return path.parts[0] if path.parts[0] in TOGETHER else str(path)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(place(item)))
    items.sort(key=lambda item: LONGEST.index(place(item)) if place(item) in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from l0fast.tasks.geography import geography
    from l0fast.warm_start.__main__ import tokenizer_texts
    from l0fast.warm_start.tokenizer import save_tokenizer, train_tokenizer
    from l0fast.warm_start.train import new_policy, save_policy

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(tokenizer_texts(geography(), 0), vocab_size=512)
    save_tokenizer(tokenizer, folder, context_tokens=640)
    model = new_policy(tokenizer, context_tokens=640, seed=0)
    save_policy(model, folder)
    return folder
