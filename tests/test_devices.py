"""minigpt_lib.devices: the device and its description, number format, seeds."""

import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minigpt_lib import devices
from minigpt_lib.devices import DeviceInfo, describe_device, pick_device, pick_dtype, prepare_device, seed_everything


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    monkeypatch.delenv("MINIGPT_DEVICE", raising=False)


@pytest.fixture(autouse=True)
def cudnn(monkeypatch) -> list[bool]:
    """What PyTorch's switch for attention by cuDNN is set to, in order; the real one stays as it is."""
    calls: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    return calls


@pytest.fixture
def machine(monkeypatch):
    """Make this process believe in `cuda` GPUs and an Apple GPU."""

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (8, True, "cuda")]
)
def test_the_best_device_is_the_default(machine, cuda, mps, expected):
    machine(cuda, mps)
    assert pick_device() == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")


def test_an_argument_beats_the_environment_which_beats_the_default(machine, monkeypatch):
    machine(cuda=2, mps=True)
    monkeypatch.setenv("MINIGPT_DEVICE", "mps")
    assert pick_device().type == "mps"
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("MINIGPT_DEVICE", "")
    assert pick_device().type == "cuda"


@pytest.mark.parametrize("asked", [None, "cuda", "cuda:1", "environment"])
def test_attention_by_cudnn_is_off_where_a_cuda_device_is_chosen(machine, monkeypatch, cudnn, asked):
    """It plans anew for every length: 56 ms a token instead of 3 on an H200."""
    machine(cuda=2)
    if asked == "environment":
        monkeypatch.setenv("MINIGPT_DEVICE", "cuda:1")
        asked = None
    assert pick_device(asked).type == "cuda" and cudnn == [False]
    assert prepare_device(torch.device("cuda", 1)) == torch.device("cuda:1") and cudnn == [False, False]


def test_other_devices_and_refusals_leave_that_switch_alone(machine, cudnn):
    machine(cuda=0, mps=True)
    assert pick_device().type == "mps" and pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="not available"):
        pick_device("cuda")
    assert cudnn == []


def test_importing_the_library_leaves_that_switch_alone():
    code = """
import torch
torch.backends.cuda.enable_cudnn_sdp(True)
import minigpt_lib.devices, minigpt_lib.generation, minigpt_lib.weights
print(torch.backends.cuda.cudnn_sdp_enabled())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("name", ["tpu", "cuda:2", "cuda:x", "cuda:-1", "cpu:1", "gpu", "mps", "CUDA"])
def test_a_device_that_is_not_there_is_refused_by_name(machine, monkeypatch, name):
    machine(cuda=2)
    with pytest.raises(ValueError, match=rf"device '{name}' is not available.*cuda:0 to cuda:1, cpu"):
        pick_device(name)
    monkeypatch.setenv("MINIGPT_DEVICE", name)
    with pytest.raises(ValueError, match=f"device '{name}' is not available"):
        pick_device()


def test_bf16_only_where_a_cuda_device_has_units_for_it(monkeypatch):
    for units in (True, False):

        def supported(including_emulation: bool = True, units: bool = units) -> bool:
            return units or including_emulation  # an old GPU says yes to emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert pick_dtype(torch.device("cuda")) == pick_dtype("cuda:0") == (torch.bfloat16 if units else torch.float32)
        assert pick_dtype("cpu") == pick_dtype(torch.device("mps")) == torch.float32


def test_the_cpu_is_described_as_torch_and_the_system_see_it():
    info = describe_device("cpu")
    assert (info.device, info.threads, info.dtype) == ("cpu", torch.get_num_threads(), torch.float32)
    assert info.name.strip() and isinstance(info.bf16, bool)
    assert info.memory is None or info.memory > 2**28
    with pytest.raises(AttributeError):
        info.name = "other"  # frozen


def test_default_of_describe_device_follows_pick_device(monkeypatch):
    monkeypatch.setenv("MINIGPT_DEVICE", "cpu")
    assert describe_device() == describe_device("cpu")


def test_the_table_shows_every_field():
    lines = str(DeviceInfo("cuda:1", "Some GPU", 80 * 2**30, 16, True, torch.bfloat16)).splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] == ["device", "name", "memory", "CPU", "bf16", "default"]
    text = " ".join(lines)
    for value in ("cuda:1", "Some GPU", "80.0 GiB", "16", "yes", "bfloat16"):
        assert value in text
    unknown = str(DeviceInfo("cpu", "x", None, 1, False, torch.float32))
    assert "unknown" in unknown and "no" in unknown.split() and "None" not in unknown


def test_gpus_are_described_by_their_own_properties(machine, monkeypatch):
    machine(cuda=1, mps=True)
    properties = SimpleNamespace(name="Some GPU", total_memory=123 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    info = describe_device()
    assert (info.device, info.name, info.memory, info.bf16) == ("cuda", "Some GPU", 123 * 2**30, True)
    assert info.dtype == torch.bfloat16
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major <= 14)
    info = describe_device("mps")
    assert (info.device, info.memory, info.bf16, info.dtype) == ("mps", 12 * 2**30, True, torch.float32)
    assert info.name.startswith("Apple GPU")


def test_what_the_system_does_not_say_is_unknown(monkeypatch):
    def nothing(*_args, **_kwargs):
        raise OSError("no such file")

    monkeypatch.setattr(devices.os, "sysconf", nothing, raising=False)
    monkeypatch.setattr(devices.Path, "read_text", nothing)
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "")
    info = describe_device("cpu")
    assert info.memory is None and info.name == "unknown"
    monkeypatch.delattr(devices.os, "sysconf", raising=False)  # as on Windows
    assert describe_device("cpu").memory is None


def test_a_seed_repeats_every_generator(seed):
    def draw() -> tuple:
        generator = seed_everything(seed)
        own = torch.randn(3, generator=generator).tolist()
        return random.random(), float(np.random.rand()), torch.rand(3).tolist(), own

    first, again = draw(), draw()
    assert first == again, f"seed {seed}"
    seed_everything(seed + 1)
    other = random.random(), float(np.random.rand()), torch.rand(3).tolist()
    assert all(a != b for a, b in zip(first, other, strict=False)), f"seed {seed}"


def test_the_returned_generator_is_independent_of_the_global_one(seed):
    expected = torch.rand(5, generator=torch.Generator().manual_seed(seed))
    generator = seed_everything(seed)
    torch.rand(100)
    assert torch.equal(torch.rand(5, generator=generator), expected), f"seed {seed}"
    seed_everything(seed)
    assert torch.equal(torch.rand(5), expected), f"seed {seed}: global generator"
