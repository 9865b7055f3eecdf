"""What SGLang is started with on GPUs. They are a stand-in for nvidia-smi; no SGLang is needed."""

import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from l0fast import rooms
from l0fast.config import EngineConfig, RunConfig
from l0fast.engine import sglang_process as sglang_process_module
from l0fast.engine.sglang_process import _PORTS, _arguments, _next_port, _own_logging, check_sockets, sglang_process
from l0fast.errors import EngineError, UsageError
from l0fast.rooms import check

SMI = """#!/bin/sh
echo '0, GPU-a0, 81559, 78000'
echo '1, GPU-b1, 81559, 58000'
echo '2, GPU-c2, 81559, 60000'
echo '3, GPU-d3, 81559, 20000'
"""
"""MiB in all and free: a learner holds some of GPUs 1 and 2, and much of 3."""


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}')
    return folder


@pytest.fixture
def started(model):
    def started(gpu: int, **settings) -> dict:
        arguments, variables = _arguments(EngineConfig(**settings), model, 100, 8, gpu)
        return arguments | variables

    return started


@pytest.mark.parametrize(
    ("gpu", "settings", "bytes_of"),
    [
        (0, {}, 0.4 * 81559 / 78000),
        (1, {}, 0.4 * 81559 / 58000),
        # of several GPUs SGLang takes the least that any has free for what all have
        (0, {"tensor_parallel": 2}, 0.4 * 81559 / 58000),
        # what is left of it is for graphs and activations
        (3, {}, 0.9),
        (0, {"memory_share": 0.93}, 0.93),
        (0, {"sglang": ("mem_fraction_static=0.5",)}, 0.5),
    ],
)
def test_its_share_is_of_a_gpu_and_not_of_what_a_learner_leaves_free(started, gpu, settings, bytes_of):
    assert started(gpu, **settings)["mem_fraction_static"] == pytest.approx(bytes_of)


@pytest.mark.parametrize("visible", ["2, 1", "GPU-c2,GPU-b", "3,1,0"])
def test_gpus_are_found_by_the_names_they_have_outside(started, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    share = started(1)["mem_fraction_static"]
    assert share == pytest.approx(0.4 * 81559 / 58000)


@pytest.mark.parametrize("visible", ["4", "GPU-e", "MIG-b1"])
def test_a_gpu_that_is_not_there_is_named(started, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(EngineError, match=f"knows no GPU {visible}: choose whole ones by number or uuid"):
        started(0)


def test_a_driver_that_does_not_answer_is_said(started, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(
        EngineError, match=r"nvidia-smi --query-gpu=.* does not say how much memory is free .*exit status 9"
    ):
        started(0)


def test_gpus_of_one_engine_may_have_more_or_less_free(started):
    assert started(0, tensor_parallel=2)["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        ('{"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}', "triton"),
        ('{"hidden_size": 128, "num_attention_heads": 4}', "triton"),
        ('{"text_config": {"hidden_size": 128, "num_attention_heads": 4}}', "triton"),
        ('{"hidden_size": 1024, "num_attention_heads": 16}', None),
    ],
)
def test_a_small_policy_has_an_attention_that_knows_its_heads(started, model, config, backend):
    (model / "config.json").write_text(config)
    assert started(0).get("attention_backend") == backend
    named = started(0, sglang=('attention_backend="fa3"',))
    assert named["attention_backend"] == "fa3"


def test_prompts_are_computed_without_graphs_unless_they_are_asked_for(started):
    assert started(0)["cuda_graph_backend_prefill"] == "disabled"
    asked = started(0, sglang=('cuda_graph_backend_prefill="breakable"',))
    assert asked["cuda_graph_backend_prefill"] == "breakable"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_kept_from_engines_and_nothing_else_is(started, monkeypatch, name):
    """One that sleeps could not give them back."""
    monkeypatch.setenv(name, "max_split_size_mb:512, expandable_segments: true,pinned_use_background_threads:True")
    expected = "max_split_size_mb:512, expandable_segments: False,pinned_use_background_threads:True"
    assert started(0)[name] == expected
    monkeypatch.setenv(name, "expandable_segments:False")
    assert name not in started(0)


def test_no_two_engines_meet_at_one_port_nor_at_one_that_is_taken():
    ports = [_next_port() for _ in range(400)]
    assert len(set(ports)) == 400
    with socket.socket() as other:
        other.bind(("", ports[-1] + 1 if ports[-1] < _PORTS[-1] else _PORTS[0]))
        assert _next_port() != other.getsockname()[1]


def test_an_engine_is_told_its_port(started):
    assert started(0)["nccl_port"] in _PORTS
    assert started(0, sglang=("nccl_port=1234",))["nccl_port"] == 1234


def test_no_script_that_binds_it_to_its_node_is_left_in_tmp(started):
    assert started(0)["SGLANG_NUMA_BIND_V2"] == "0"


def test_sglang_says_nothing_of_the_tokens_that_are_kept_beside_a_whole_context(caplog):
    """Its words are of wrong outputs and CUDA errors; of contexts it goes on to say what else there is to say."""
    models = logging.getLogger("sglang.srt.configs.model_config")
    warning = "Warning: User-specified context_length (646) is greater than the derived context_length (640)."
    with _own_logging():
        models.warning(warning)
        models.warning("Warning: Target model's context_length (646)")
    models.warning(warning)
    assert caplog.messages == ["Warning: Target model's context_length (646)", warning]


def test_a_folder_for_temporary_files_in_whose_names_no_socket_fits_is_refused(monkeypatch, tmp_path):
    """To the character: sglang names its sockets as tempfile does, and the kernel takes 107."""
    length = 107 - len("/tmpxxxxxxxx")
    for folder in ("/" + "s" * (length - 1), "/" + "ß" * (length // 2)):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        check_sockets()
        monkeypatch.setattr(tempfile, "tempdir", folder + "s")
        with pytest.raises(
            UsageError, match=rf"^TMPDIR = {folder}s has .*: set TMPDIR to a shorter one, for example /tmp$"
        ):
            check_sockets()
    with tempfile.NamedTemporaryFile(dir=tmp_path) as file:
        assert len(file.name) == len(f"{tmp_path}/tmpxxxxxxxx")


SGLANG = {
    "__init__.py": "import os; os.environ['TRITON_CACHE_DIR'] = 'its own'",
    "srt/__init__.py": "",
    "srt/entrypoints/__init__.py": "",
    "srt/entrypoints/engine.py": "class Engine: ...\ndef init_tokenizer_manager(): ...",
    "srt/server_args.py": "class PortArgs: ...\nclass ServerArgs:\n    def __init__(self, max_total_tokens=None): ...",
}


def imported_early(tmp_path, settings: tuple[str, ...] = (), **changed: str) -> str:
    """What is said of the SGLang above, with files changed."""
    for name, text in (SGLANG | changed).items():
        (tmp_path / "sglang" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sglang" / name).write_text(text)
    program = (
        "import os\nfrom l0fast.config import EngineConfig\nfrom l0fast.engine.sglang_process import import_sglang\n"
        "from l0fast.errors import UsageError\nbefore = dict(os.environ)\n"
        f"try:\n    import_sglang(EngineConfig(sglang={settings!r}))\nexcept UsageError as e:\n    print(e)\n"
        "assert dict(os.environ) == before"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True).stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), ""),
        (("max_total_tokens=8192",), ""),
        (("max_total_token=8192",), "engine.sglang has max_total_token, .*: is it max_total_tokens\\?\n"),
        (("no_such=1",), "engine.sglang has no_such, .* lists what it knows\n"),
    ],
)
def test_a_setting_that_sglang_does_not_know_is_refused_with_the_one_that_was_meant(tmp_path, settings, said):
    """What importing it puts into the environment is not for the learner, which starts next."""
    assert re.fullmatch(said, imported_early(tmp_path, settings))


@pytest.mark.parametrize("broken", ["raise AttributeError('of another torch')", "import nothing_of_that_name"])
def test_an_sglang_that_is_broken_in_any_way_is_said_to_be(tmp_path, broken):
    said = imported_early(tmp_path, **{"srt/entrypoints/engine.py": broken})
    assert re.fullmatch(
        r"engine.kind = 'sglang', but it can't be imported \((Attr|Mod).*Error: .*\): pip install .*\n", said
    )


def test_what_sglang_says_of_settings_that_it_can_not_have_is_an_engine_error(monkeypatch, model):
    class Engine:
        def __init__(self, **arguments):
            raise TypeError("'<' not supported between instances of 'str' and 'int'")

        def shutdown(self): ...

        _launch_subprocesses = None

    async def main():
        config = EngineConfig(sglang=('max_total_tokens="many"',))
        with pytest.raises(EngineError, match="^sglang did not start: TypeError: '<' not supported between"):
            async with sglang_process(config, model, max_tokens=100, slots=8):
                raise AssertionError("it started")

    monkeypatch.setattr(sglang_process_module, "_imported", lambda: (Engine, None, None))
    asyncio.run(main())


def test_a_run_without_sglang_or_with_a_layout_that_can_not_be_is_refused_before_a_model_is_downloaded(monkeypatch):
    def download(name: str) -> None:
        raise AssertionError("it may take an hour")

    monkeypatch.setattr(rooms, "download_model", download)
    monkeypatch.setattr(rooms, "find_spec", lambda name: None)
    run = {"engine": {"kind": "sglang"}, "model": {"path": "nobody/nothing"}}
    with pytest.raises(UsageError, match="^engine.kind = 'sglang', which is not installed: pip install 'l0fast.gpu.'"):
        check(RunConfig.model_validate(run))
    run["engine"] = {"kind": "sglang", "layout": "split"}
    with pytest.raises(UsageError, match="^engine.layout = 'split'"):
        check(RunConfig.model_validate(run))
    run["engine"] = {"kind": "sglang", "sglang": ["max_total_tokens=many"]}
    with pytest.raises(UsageError, match="write name=value with the value in JSON"):
        check(RunConfig.model_validate(run))


def test_a_run_is_refused_for_it_before_it_loads_anything(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/{'s' * 107}")
    with pytest.raises(UsageError, match="^TMPDIR = "):
        check(RunConfig.model_validate({"engine": {"kind": "sglang"}}))
