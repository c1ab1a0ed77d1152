"""The devices that a stage's workers run on."""

import os

import pytest
import torch

from stages.runtime import devices
from stages.runtime.errors import StageError
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


@pytest.mark.parametrize("value", ["0", "-1", "two", "", "1.5"])
def test_an_invalid_number_of_workers_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPPO_WORKERS", value)
    with pytest.raises(StageError) as error:
        devices.list_devices()
    assert_message(str(error.value), "SPPO_WORKERS", repr(value), "correct it or unset it")


def test_every_visible_gpu_has_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.list_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert devices.list_devices() == ["3", "GPU-abc"]


def test_running_out_of_gpu_memory_names_the_parameter_to_lower() -> None:
    with pytest.raises(StageError) as error, devices.explain_out_of_memory("lower train.device_batch"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert_message(str(error.value), "out of GPU memory", "lower train.device_batch")


def test_the_first_process_of_a_group_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert devices.is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not devices.is_main_process()
