"""The devices that a stage's workers run on."""

import os

import pytest
import torch

from stages.runtime import devices
from stages.runtime.errors import StageError, quote
from support.messages import assert_message


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SPPO_WORKERS", raising=False)


def test_a_cpu_has_one_worker_or_one_per_core() -> None:
    assert devices.list_devices() == [""]
    assert devices.list_devices(cores=True) == [""] * len(os.sched_getaffinity(0))


def test_the_environment_sets_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_WORKERS", "3")
    assert devices.list_devices() == devices.list_devices(cores=True) == [""] * 3


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5", "1000", "٣", "9" * 5000, " 1", "1\n"])
def test_an_invalid_number_of_workers_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_WORKERS", value)
    with pytest.raises(StageError) as error:
        devices.list_devices()
    assert_message(str(error.value), "SPPO_WORKERS", quote(value), "1 to 999", "correct it or unset it")


def test_every_visible_gpu_has_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.list_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert devices.list_devices() == ["3", "GPU-abc"]


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [("0,1,2", 1, ["0"]), ("0,-1,1", 1, ["0"]), ("3,9", 2, ["3", "9"]), ("GPU-abc,GPU-none", 1, ["GPU-abc"])],
)
def test_an_entry_that_is_no_gpu_has_no_worker(
    visible: str, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.list_devices() == expected


def test_running_out_of_gpu_memory_names_the_parameter_to_lower() -> None:
    with pytest.raises(StageError) as error, devices.explain_out_of_memory("lower train.device_batch"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert_message(str(error.value), "out of GPU memory", "lower train.device_batch")


def test_the_first_process_of_a_group_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert devices.is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not devices.is_main_process()


LAUNCHED = dict.fromkeys(devices.LAUNCHER, "1")


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, False),  # a pod of Kubeflow's PyTorchJob
        (LAUNCHED, True),
        (LAUNCHED | {"DVC_STAGE": "train"}, False),  # DVC started this process, and a launcher DVC
        ({"LOCAL_RANK": "1", "DVC_STAGE": "train", devices.LAUNCH_FOLDER: "/tmp/x"}, True),
        ({devices.LAUNCH_FOLDER: "/tmp/x"}, False),
    ],
)
def test_a_stray_variable_makes_no_worker(environment: dict[str, str], launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_OFFLOAD_PARAMS": "true", "TORCHELASTIC_RUN_ID": "x", "RANKING": "1"}
    monkeypatch.setattr(os, "environ", environment | others)
    assert devices.is_launched() == launched
    devices.forget_launchers()
    kept = {"DVC_STAGE", devices.LAUNCH_FOLDER, *(LAUNCHED if launched else ())} & environment.keys()
    assert os.environ.keys() == kept | {"RANKING"} | ({"TORCHELASTIC_RUN_ID"} if launched else set())
    assert devices.is_launched() == launched
    assert launched or devices.is_main_process()


@pytest.mark.parametrize(
    "name",
    [
        "USE_TF",
        "USE_TORCH",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "NVIDIA_TF32_OVERRIDE",
        "DS_ACCELERATOR",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
        "VLLM_USE_MODELSCOPE",
        "VLLM_DP_SIZE",
        "VLLM_RAY_BUNDLE_INDICES",
    ],
)
def test_a_variable_for_other_programs_does_not_change_a_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"CUDA_VISIBLE_DEVICES": "0", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_HOME": "/x"}
    monkeypatch.setattr(os, "environ", kept | {name: "1"})
    devices.forget_overrides()
    assert os.environ == kept
