"""Targets: one TOML file each in ``targets/``, read into `Target`.

A target file says what the machine is (TVM target, host), what it can do (features, limits), how
libraries are written for it, and which kernel families to try, best first.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fairy_compile.config import ActContract, check_choice
from fairy_compile.errors import FairyError, UnsupportedError, nearest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]


DEVICES = ("cpu", "cuda", "metal", "opencl", "vulkan", "webgpu")


@dataclass(frozen=True)
class Limits:
    """What one thread group of a GPU target may use.

    Attributes:
        max_threads: threads of a group.
        shared_bytes: shared (threadgroup, local, workgroup) memory of a group.
        simd_width: threads that run in lockstep and can exchange registers; 1 where that is not
            known when the library is built.
        buffer_bytes: most bytes of one array in device memory; None where memory is the limit.
    """

    max_threads: int
    shared_bytes: int
    simd_width: int = 1
    buffer_bytes: int | None = None


@dataclass(frozen=True)
class Target:
    """A compilation target.

    Attributes:
        name: file stem, what ``--target`` takes.
        description: one line for ``fairy_compile targets``.
        tvm: keys of the TVM target, e.g. ``{"kind": "llvm", "mcpu": "haswell"}``; for a GPU, its
            ``host`` is the CPU target of the code that launches kernels.
        features: what kernels may ask for: instruction sets of CPUs in LLVM's names (``avx2``,
            ``avx512vnni``, ``dotprod``); of GPUs ``float16`` and ``bfloat16``, which activations
            may be, and names their kernel files define.
        kernels: kernel family names in order of preference.
        library: ``so``, ``dylib``, ``dll``, ``wasm`` or ``tar`` (objects to link elsewhere).
        device: TVM device kind the artifact runs on, one of `DEVICES`.
        limits: of a thread group; None for CPUs.
        linkers: commands that link a library for a foreign machine, tried in order; empty where
            the host's own compiler does it.
        detected: True where features were read from this machine.
    """

    name: str
    description: str
    tvm: dict[str, Any]
    features: frozenset[str]
    kernels: tuple[str, ...]
    library: str = "so"
    device: str = "cpu"
    limits: Limits | None = None
    linkers: tuple[str, ...] = ()
    detected: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def has(self, *features: str) -> bool:
        """Tell whether the target has all the named features."""
        return all(f in self.features for f in features)

    @property
    def is_gpu(self) -> bool:
        """Whether kernels run on a device other than the CPU."""
        return self.device != "cpu"

    @property
    def host(self) -> dict[str, Any]:
        """Keys of the TVM target of the CPU code: the target itself, or a GPU's host."""
        return dict(self.tvm.get("host", self.tvm))

    @property
    def triple(self) -> str:
        """LLVM's triple of the CPU code, e.g. ``aarch64-linux-android``."""
        machine = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
        return str(self.host.get("mtriple", f"{machine}-{platform.system().lower()}"))

    def to_tvm(self) -> Any:
        """Return the `tvm.target.Target`, with a CPU host for device targets."""
        import tvm

        keys = dict(self.tvm)
        if self.limits:
            keys |= {
                "max_num_threads": self.limits.max_threads,
                "max_shared_memory_per_block": self.limits.shared_bytes,
                "thread_warp_size": self.limits.simd_width,
            }
            if self.device != "webgpu":
                # TVM's second name for the most threads: upstream kernels read the larger number.
                keys["max_threads_per_block"] = self.limits.max_threads
        if self.device == "vulkan":
            from fairy_compile.codegen import spirv

            spirv.register()
        return tvm.target.Target(keys)

    def runs_here(self) -> bool:
        """Tell whether a library for this target can be executed by this process."""
        if self.is_gpu and not _has_device(self.device):
            return False
        triple = str(self.host.get("mtriple", ""))
        if not triple:
            return not self.is_gpu or self.library != "tar"
        machine = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
        system = {"Linux": "linux", "Darwin": "apple", "Windows": "windows"}[platform.system()]
        return (
            triple.split("-")[0].replace("arm64", "aarch64") == machine
            and system in triple
            and "android" not in triple
            and (self.is_gpu or self.features <= host_features())
        )


def _has_device(kind: str) -> bool:
    """Tell whether this installation of TVM can use a device of this kind here."""
    import tvm

    try:
        return bool(tvm.runtime.device(kind).exist)
    except (ValueError, RuntimeError):
        return False


ACT_DTYPES = ("float16", "float32", "bfloat16")
"""What ``--act-dtype`` takes."""


def activation_dtypes(target: Target) -> tuple[str, ...]:
    """Return the dtypes that activations between a target's kernels can have."""
    return tuple(
        dtype for dtype in ACT_DTYPES if dtype == "float32" or (target.is_gpu and target.has(dtype))
    )


def activation_dtype(target: Target, act: ActContract, asked: str | None = None) -> str:
    """Return the dtype of activations between kernels.

    CPUs keep them in float32. GPUs that compute in float16 keep them in float16 unless another
    dtype is ``asked`` for, except under the contract ``float``, which asks for exact activations;
    sums are float32 either way.

    Raises:
        FairyError: ``asked`` is no dtype of activations.
        UnsupportedError: the target has no kernels for it.
    """
    if asked is None:
        half = target.is_gpu and target.has("float16") and act != "float"
        return "float16" if half else "float32"
    check_choice("--act-dtype", asked, ACT_DTYPES)
    allowed = activation_dtypes(target)
    if asked not in allowed:
        lack = f"has no kernels for {asked} activations" if target.is_gpu else "computes in float32"
        raise UnsupportedError(
            f"--act-dtype {asked}: target {target.name} {lack}; allowed: {', '.join(allowed)}. "
            f"Build with --act-dtype {allowed[-1]}, or leave it out"
        )
    return asked


def targets_directory() -> Path:
    """Return the folder of target files: beside the package in a clone, inside it in a wheel."""
    return data_directory("targets")


def schedules_directory() -> Path:
    """Return the folder of tuned knobs."""
    return data_directory("schedules")


def data_directory(name: str, source: str | None = None) -> Path:
    """Return a folder of files that are not code: inside a wheel, or beside the package.

    Args:
        name: of the folder in a wheel.
        source: its path in the repository; default ``name``.
    """
    inside = Path(__file__).parent / "_data" / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / (source or name)


def target_names() -> list[str]:
    """Return the names `load_target` takes, sorted."""
    return sorted(p.stem for p in targets_directory().glob("*.toml"))


def load_target(name: str) -> Target:
    """Return the target called ``name``; ``cpu`` is this machine's CPU, features detected.

    Raises:
        FairyError: no such target (naming the nearest), or its file is malformed.
    """
    known = target_names()
    if name not in known:
        raise FairyError(
            f"unknown target {name!r}; allowed: {', '.join(known)}.{nearest(str(name), known)}"
        )
    path = targets_directory() / f"{name}.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
        features = frozenset(data.pop("features", []))
        kernels = tuple(data.pop("kernels"))
        target = Target(
            name=name,
            description=data.pop("description"),
            tvm=data.pop("tvm"),
            features=features,
            kernels=kernels,
            library=data.pop("library", "so"),
            device=_device(data),
            limits=Limits(**data.pop("limits")) if "limits" in data else None,
            linkers=tuple(data.pop("linkers", [])),
            extra=data,
        )
    except (KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise FairyError(f"target file {path} is malformed: {error}") from error
    if target.is_gpu and target.limits is None:
        raise FairyError(f"target file {path} is malformed: a GPU needs a table [limits]")
    return _detect_host(target) if target.tvm.get("mcpu") == "native" else target


def _device(data: dict[str, Any]) -> str:
    device = data.pop("device", "cpu")
    check_choice("device", device, DEVICES)
    return device


def _detect_host(target: Target) -> Target:
    """Fill in this machine's CPU name and features."""
    tvm_target = dict(target.tvm) | {
        "mcpu": host_cpu(),
        "mattr": sorted(f"+{name}" for name in host_features()),
    }
    found = replace(target, tvm=tvm_target, features=host_features(), detected=True)
    if platform.system() != "Windows":
        return found
    # As for Windows from anywhere: LLVM's own choice there wants Microsoft's linker.
    like = load_target("windows-x86-64-v3")
    triple = {"mtriple": like.tvm["mtriple"]}
    return replace(found, tvm=found.tvm | triple, library=like.library, linkers=like.linkers)


@cache
def host_cpu() -> str:
    """Return LLVM's name of this machine's CPU."""
    import tvm

    return str(tvm.get_global_func("target.llvm_get_system_cpu")())


@cache
def host_features() -> frozenset[str]:
    """Return the features this machine's CPU reports, in LLVM's names.

    Read from the processor, not derived from the CPU's name: virtual machines often present a
    name that is older or newer than what they let through.
    """
    import tvm

    found = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    features = {str(name) for name, present in found.items() if bool(present)}
    if platform.machine().lower() in ("aarch64", "arm64"):
        features |= _arm_features()
    return frozenset(features)


# Linux's names of 64-bit ARM features that LLVM's own detection leaves out -> LLVM's names.
_LINUX_ARM_FEATURES = {
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}


def _arm_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the features of a 64-bit ARM machine that LLVM's detection leaves out."""
    if cpuinfo.is_file():
        lines = cpuinfo.read_text("utf-8").splitlines()
        words = {
            word
            for line in lines
            if line.startswith("Features")
            for word in line.split(":")[1].split()
        }
        return {name for linux, name in _LINUX_ARM_FEATURES.items() if linux in words}
    import tvm

    # Without a list from the system (macOS), the CPU's name tells.
    host = tvm.target.Target({"kind": "llvm", "mcpu": host_cpu()})
    return {str(name) for name in tvm.get_global_func("target.llvm_get_cpu_features")(host)}
