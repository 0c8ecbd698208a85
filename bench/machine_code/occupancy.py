"""How many programs a multiprocessor holds at a time.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; granules:
cuda_occupancy.h of the CUDA toolkit; tensor memory: PTX ISA, "Tensor Memory".
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """A multiprocessor: shared memory in bytes, as a whole and for one program at most."""

    shared_bytes: int
    shared_bytes_a_program: int
    tensor_columns: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32


CHIPS = {
    80: Chip(164 << 10, 163 << 10, 0),
    90: Chip(228 << 10, 227 << 10, 0),
    100: Chip(228 << 10, 227 << 10, 512),
}
PARTITIONS = 4  # of the register file; a warp lives in one of them
WARP_REGISTERS = 256  # are allocated at a time
SHARED_RESERVED = 1024  # bytes of every program, for the system
SHARED_GRANULE = 128


def _rounded_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def resident_programs(
    architecture: int, registers: int, shared_bytes: int, num_warps: int, tensor_columns: int = 0
) -> int:
    """By registers, shared memory, tensor memory, warps and slots; 0 where one does not fit."""
    chip = CHIPS[architecture]
    if shared_bytes > chip.shared_bytes_a_program or tensor_columns > chip.tensor_columns:
        return 0
    warps = _rounded_up(num_warps, PARTITIONS)
    a_warp = _rounded_up(32 * registers, WARP_REGISTERS)
    warps_by_registers = PARTITIONS * (chip.registers // PARTITIONS // a_warp)
    shared = _rounded_up(shared_bytes + SHARED_RESERVED, SHARED_GRANULE)
    limits = [chip.programs, chip.warps // num_warps, warps_by_registers // warps]
    limits.append(chip.shared_bytes // shared)
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)
