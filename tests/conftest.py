"""What all tests share: a policy folder of the shipped kind (real tokenizer recipe, small random model), and who runs them."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# where there is no GPU, kernels run in Triton's interpreter; Triton looks when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# a script's `pytest &` has SIGINT ignored and nohup's SIGHUP, and so would the commands have that tests end by them
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)

# a busy machine is no failure
# how fast examples come says something of who else computes here
settings.register_profile("l0fast", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("l0fast")

MAX_WORKERS = 4
"""Processes that share the suite with `-n auto`: each imports torch, and its tests have children of their own."""
LONGEST = ("test_resume.py", "test_run.py", "learner/test_rank.py", "learner/test_client.py")
"""Files that come first: whoever began one of them last would be waited for."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`. None beside the tests that kill whole runs, which look at every process of the machine."""
    return 0 if os.environ.get("L0FAST_TEST_SANDBOXES") else min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not str(item.path).endswith(LONGEST))


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
