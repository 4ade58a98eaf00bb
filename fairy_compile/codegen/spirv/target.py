"""What a Vulkan target can do: the attributes of a TVM target, read once and checked by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairy_compile.codegen.spirv.dtypes import DType, Kind
from fairy_compile.codegen.spirv.enums import (
    SPIRV_1_0,
    SPIRV_1_3,
    SPIRV_1_6,
    Capability,
    SubgroupFeature,
)
from fairy_compile.errors import UnsupportedError

# The Vulkan specification guarantees this much (table "Required Limits"). The guarantees of
# threads and buffers are far below what any driver has, so those are checked only where a target
# states them; TVM fills in 256 threads itself.
_GUARANTEED = {"max_shared_memory_per_block": 16384}

_ARITHMETIC = {
    (Kind.INT, 8): (Capability.Int8, "supports_int8"),
    (Kind.UINT, 8): (Capability.Int8, "supports_int8"),
    (Kind.INT, 16): (Capability.Int16, "supports_int16"),
    (Kind.UINT, 16): (Capability.Int16, "supports_int16"),
    (Kind.INT, 64): (Capability.Int64, "supports_int64"),
    (Kind.UINT, 64): (Capability.Int64, "supports_int64"),
    (Kind.FLOAT, 16): (Capability.Float16, "supports_float16"),
    (Kind.FLOAT, 64): (Capability.Float64, "supports_float64"),
}

_STORAGE = {
    8: (Capability.StorageBuffer8BitAccess, "supports_8bit_buffer"),
    16: (Capability.StorageBuffer16BitAccess, "supports_16bit_buffer"),
}


@dataclass(frozen=True)
class KernelError:
    """Makes errors that name the kernel.

    Attributes:
        kernel: name of the function being compiled.
    """

    kernel: str

    def unsupported(self, what: str, attribute: str | None = None) -> UnsupportedError:
        """Return the error for something the target, or Vulkan as a whole, cannot do.

        Args:
            what: the node, as a noun phrase with the node's text.
            attribute: target attribute that would allow it, or None if none would.
        """
        remedy = (
            f"it needs target attribute {attribute}"
            if attribute
            else "no target attribute enables it"
        )
        return UnsupportedError(f"Vulkan kernel {self.kernel}: {what} is not supported; {remedy}")


class VulkanTarget:
    """The attributes of a TVM target of kind ``vulkan`` that code generation asks for."""

    def __init__(self, target: Any):
        self._attrs = dict(target.attrs) if target is not None else {}
        version = int(self._attrs.get("max_spirv_version", SPIRV_1_0))
        self.spirv_version = max(SPIRV_1_0, min(version, SPIRV_1_6))

    def has(self, attribute: str) -> bool:
        """Tell whether a boolean attribute is set."""
        return bool(self._attrs.get(attribute, False))

    def limit(self, attribute: str) -> int | None:
        """Return a limit, or None where neither target nor specification states one."""
        seen = self._attrs.get(attribute, _GUARANTEED.get(attribute))
        return None if seen is None else int(seen)

    def arithmetic(self, dtype: DType, error: KernelError) -> Capability | None:
        """Return the capability that computing with ``dtype`` needs, or None for 32-bit types.

        Raises:
            UnsupportedError: the target lacks it.
        """
        if (dtype.kind, dtype.bits) not in _ARITHMETIC:
            return None
        capability, attribute = _ARITHMETIC[dtype.kind, dtype.bits]
        if not self.has(attribute):
            raise error.unsupported(f"arithmetic on {dtype.scalar}", attribute)
        return capability

    def storage(self, dtype: DType, error: KernelError) -> Capability | None:
        """Return the capability that storage buffers of ``dtype`` need, or None.

        Raises:
            UnsupportedError: the target lacks it.
        """
        if dtype.bits not in _STORAGE:
            return None
        capability, attribute = _STORAGE[dtype.bits]
        if not self.has(attribute):
            raise error.unsupported(f"a storage buffer of {dtype.scalar}", attribute)
        return capability

    def subgroup(self, feature: SubgroupFeature, what: str, error: KernelError) -> None:
        """Check that the target has subgroup operations of a kind.

        Raises:
            UnsupportedError: it lacks them, or its SPIR-V is older than 1.3.
        """
        if self.spirv_version < SPIRV_1_3:
            raise error.unsupported(what, "max_spirv_version of at least 0x10300 (66304)")
        if not int(self._attrs.get("supported_subgroup_operations", 0)) & feature:
            raise error.unsupported(
                what, f"supported_subgroup_operations with bit {feature:#x} ({feature.name})"
            )

    def dot_product(self, what: str, error: KernelError) -> None:
        """Check that the target has integer dot products.

        Raises:
            UnsupportedError: it lacks them.
        """
        if not self.has("supports_integer_dot_product"):
            raise error.unsupported(what, "supports_integer_dot_product")

    def cooperative_matrix(self, what: str, error: KernelError) -> None:
        """Check that the target has cooperative matrices.

        Raises:
            UnsupportedError: it lacks them, or its SPIR-V is older than 1.6, which Vulkan asks for.
        """
        if not self.has("supports_cooperative_matrix"):
            raise error.unsupported(what, "supports_cooperative_matrix")
        if self.spirv_version < SPIRV_1_6:
            raise error.unsupported(what, "max_spirv_version of at least 0x10600 (67072)")

    def check_sizes(
        self, local_size: tuple[int, int, int], shared_bytes: int, buffers: int, error: KernelError
    ) -> None:
        """Check a finished kernel against the target's limits.

        Raises:
            UnsupportedError: it needs more threads, shared memory or buffers than there are.
        """
        x, y, z = local_size
        used = {
            "max_threads_per_block": (x * y * z, "threads a block"),
            "max_block_size_x": (x, "threads along x"),
            "max_block_size_y": (y, "threads along y"),
            "max_block_size_z": (z, "threads along z"),
            "max_shared_memory_per_block": (shared_bytes, "bytes of shared memory"),
            "max_per_stage_descriptor_storage_buffer": (buffers, "storage buffers"),
        }
        for attribute, (amount, unit) in used.items():
            limit = self.limit(attribute)
            if limit is not None and amount > limit:
                raise error.unsupported(
                    f"a kernel of {amount} {unit} on a target with {limit}",
                    f"{attribute} of at least {amount}, if the device has that much",
                )
