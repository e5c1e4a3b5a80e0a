"""Which device and number type to compute with."""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path

import torch

from bitgen_cli.errors import ResourceError, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
KEPT = 2 << 30
"""Bytes of work from which freed memory goes back to the system."""


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA, then MPS, then the CPU.

    Of several GPUs the one that is named becomes the current one: streams, events and graphs are made on that.

    Raises:
        ResourceError: it does not exist on this machine.
        UsageError: not a device name.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"unknown device {name!r}", "use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ResourceError(f"device {name} does not exist: torch sees {count} CUDA devices", "--device cpu works")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("device mps does not exist on this machine", "--device cpu works")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type of that name; `auto` takes bfloat16 where the device computes with it faster.

    Raises:
        UsageError: not a number type.
    """
    if name == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A block whose matrix products and convolutions are computed in that number type; fp32 changes nothing."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # private in torch, and the only place that knows; absent names count as "no"
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return any(bool(check()) for check in (has_bf16, has_amx) if check is not None)
    return False


def hardware(device: torch.device) -> str:
    """What computes, as far as the last bits of a picture go by it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()  # sums over several come in another order
        return f"{torch.backends.cpu.get_cpu_capability()}, {threads} {'thread' if threads == 1 else 'threads'}"
    return platform.machine()


def is_there(kind: str) -> bool:
    """Whether this machine has a device of that type: cpu, cuda or mps."""
    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available())


def give_back(device: torch.device) -> None:
    """Hands memory that nothing refers to any more back to the device, so that others find it free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, and that this process may take; None where nobody tells."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        number = torch.cuda.current_device() if device.index is None else device.index
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)  # not in every torch we run on
        used = torch.cuda.memory_allocated(number)
        return min(int(free) + torch.cuda.memory_reserved(number) - used, int(share(number) * total) - used)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    if available is None or device.type != "cpu":
        return None
    limited = _left_of_group(Path("/sys/fs/cgroup"))
    return int(available) * 1024 if limited is None else min(int(available) * 1024, limited)


def _left_of_group(folder: Path) -> int | None:
    """Bytes that the control group (v2) of a container still allows; None without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if limit == "max" else max(0, int(limit) - used + int(facts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def keep_freed_memory(expected: int = 0) -> None:
    """Lets the allocator keep large freed blocks instead of returning them to the system (glibc only).

    Activations of tens of megabytes are otherwise mapped, zeroed and unmapped by the kernel for every operation, which
    costs more than many of the operations themselves. Work that is expected to take many bytes needs what is freed
    between its large blocks more than it needs this: then nothing is done.
    """
    if expected < KEPT and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
