"""The devices that a stage's workers run on."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.runtime import devices
from stages.runtime.errors import StageError, quote
from support.messages import assert_message


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER", Path("/nowhere/version"))
    monkeypatch.delenv("SPPO_WORKERS", raising=False)


def make_gpus(monkeypatch: pytest.MonkeyPatch, *kinds: tuple[str, int]) -> None:
    """Let torch see GPUs of these names and bytes of memory."""
    gpus = [SimpleNamespace(name=name, total_memory=memory) for name, memory in kinds]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)


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


H100 = ("NVIDIA H100 80GB HBM3", 85_017_755_648)


def test_every_visible_gpu_has_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpus(monkeypatch, H100, (H100[0], H100[1] - 2**20))  # of one kind, although some bytes are reserved
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
    make_gpus(monkeypatch, *[H100] * count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.list_devices() == expected


@pytest.mark.parametrize(("each", "expected"), [(1, ["5", "2", "7", "0"]), (2, ["5,2", "7,0"]), (4, ["5,2,7,0"])])
def test_a_worker_may_have_several_gpus(each: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpus(monkeypatch, *[H100] * 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,7,0")
    assert devices.list_devices(gpus=each) == expected


@pytest.mark.parametrize(("count", "each"), [(0, 2), (3, 2), (2, 4), (6, 4)])
def test_gpus_that_cannot_be_shared_out_are_refused(count: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if count:
        make_gpus(monkeypatch, *[H100] * count)
    with pytest.raises(StageError) as error:
        devices.list_devices(gpus=each)
    parts = [f"engine.tensor_parallel is {each}", f"number of GPUs is {count}", "not a multiple", "CUDA_VISIBLE_DEVICES"]
    assert_message(str(error.value), *parts)


@pytest.mark.parametrize("other", [("NVIDIA T400", H100[1]), (H100[0], 150_000_000_000)])
@pytest.mark.parametrize(("visible", "choices"), [(None, ("0,2", "1")), ("7,GPU-abc,3", ("7,3", "GPU-abc"))])
def test_two_kinds_of_gpus_are_refused_with_the_choice(
    other: tuple[str, int], visible: str | None, choices: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gpus(monkeypatch, H100, other, H100)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(StageError) as error:
        devices.list_devices()
    sets = [f"CUDA_VISIBLE_DEVICES={choice} (" for choice in choices]
    assert_message(str(error.value), "not all of one kind", *sets, f"(2 x {H100[0]}, 79 GiB)", f"(1 x {other[0]}, ")


def install_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, proc: str = "", smi: str = "") -> None:
    """Install a driver: the text of /proc/driver/nvidia/version, and what nvidia-smi prints as its version, if any."""
    if proc:
        (folder / "version").write_text(proc)
        monkeypatch.setattr(devices, "DRIVER", folder / "version")
    if smi:
        (folder / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && echo {smi} && echo {smi}\n')
        (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin")


KERNEL = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: gcc 12.2.0\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: gcc 13.3.0\n"


@pytest.mark.parametrize(
    ("proc", "smi", "cuda", "visible", "parts"),
    [
        (KERNEL, "", "13.0", None, ["driver 535.129.03", "CUDA 13.0", "needs driver 580", "update the driver"]),
        ("", "535.129.03", "13.0", None, ["driver 535.129.03", "needs driver 580", "update the driver"]),
        ("", "550.54", "13.0", "0", ["driver 550.54", "needs driver 580", "update the driver"]),
        (KERNEL, "", "12.8", None, ["driver 535.129.03", "`nvidia-smi`", "container"]),
        (OPEN, "", "13.0", None, ["driver 580.65.06", "`nvidia-smi`", "container"]),
        (OPEN, "", "13.0", "9,0", ["driver 580.65.06", "CUDA_VISIBLE_DEVICES is '9,0'", "correct it or unset it"]),
        ("nothing", "", "13.0", None, ["driver unknown", "`nvidia-smi`"]),
    ],
)
def test_gpus_that_torch_does_not_see_are_no_reason_to_use_the_cpu(
    proc: str, smi: str, cuda: str, visible: str | None, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver(tmp_path, monkeypatch, proc, smi)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(StageError) as error:
        devices.list_devices()
    assert_message(str(error.value), "torch sees no GPU", *parts, "to run on the CPU, set CUDA_VISIBLE_DEVICES=''")


@pytest.mark.parametrize(
    ("smi", "cuda", "visible"),
    [("535.129.03", None, None), ("", "13.0", None), *[("535.129.03", "13.0", hidden) for hidden in ("", "-1", "NoDevFiles")]],
)
def test_the_cpu_is_used_on_purpose(
    smi: str, cuda: str | None, visible: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's build for CPUs, without a driver, or with all GPUs hidden."""
    install_driver(tmp_path, monkeypatch, smi=smi)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.list_devices() == [""]


def test_the_cpu_build_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices, "find_driver", lambda: pytest.fail("a process for nothing"))
    assert devices.list_devices() == [""]


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


@pytest.mark.parametrize(
    ("count", "gpus", "cuda", "driver", "parts"),
    [
        (1, [], None, "", ["gave a process 1 GPU,", "torch sees 0", "make env", "BUILD"]),
        (2, [H100], "13.0", "580.82", ["gave a process 2 GPUs", "torch sees 1", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]),
        (1, [H100, H100], "13.0", "580.82", ["torch sees 2", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]),
        (1, [], "13.0", "535.129", ["torch sees 0", "CUDA 13.0", "580 or newer", "not 535.129"]),
        (
            2,
            [H100, ("NVIDIA A100", 2**36)],
            "13.0",
            "580.82",
            ["two kinds", "NVIDIA A100, 64 GiB; NVIDIA H100", "CUDA_VISIBLE_DEVICES"],
        ),
    ],
)
def test_gpus_that_ray_gave_a_process_and_torch_cannot_use_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    gpus: list[tuple[str, int]],
    cuda: str | None,
    driver: str,
    parts: list[str],
) -> None:
    if gpus:
        make_gpus(monkeypatch, *gpus)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "find_driver", lambda: driver)
    with pytest.raises(StageError) as error:
        devices.check_granted(count)
    assert_message(str(error.value), f"node {os.uname().nodename}", *parts, "restart Ray there")


def test_the_kind_of_the_gpus_that_ray_gave_a_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.check_granted(0) == ""
    make_gpus(monkeypatch, H100, H100)
    assert devices.check_granted(2) == "NVIDIA H100 80GB HBM3, 79 GiB"


def test_most_gpus_at_a_time_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "REMOTE", {})
    for count in (8, 16, 4):
        devices.note_remote("NVIDIA A100, 80GB, 79 GiB", count)
    devices.note_remote("", 32)
    assert devices.REMOTE == {"NVIDIA A100, 80GB": 16}
