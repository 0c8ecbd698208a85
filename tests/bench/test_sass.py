"""`python -m bench sass`: what it counts in machine code, what fits a multiprocessor, its rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers.offline import needs_compiler

from bench import matrix
from bench.__main__ import main
from bench.machine_code import launches, sass
from bench.machine_code.control_flow import ControlFlow
from bench.machine_code.instructions import (
    CONVERSION,
    WIDE_ADDRESS,
    access_bytes,
    count,
    tensor_cores,
    widths,
)
from bench.machine_code.occupancy import resident_programs
from bench.workloads import lowbit
from rootfree_fused.kernels import matrix as matrix_kernels

# Residency, by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "num_warps", "tensor_columns", "expected"),
    [
        (90, 16, 0, 2, 0, 32),  # slots
        (90, 32, 0, 4, 0, 16),  # 64 warps
        (90, 64, 0, 4, 0, 8),  # 65536 / (64 * 128)
        (90, 65, 0, 4, 0, 7),  # 72 registers are allocated: 7.1
        (90, 128, 0, 8, 0, 2),
        (90, 129, 0, 8, 0, 1),
        (90, 168, 0, 2, 0, 3),  # 4 partitions of 3 warps; two warps take as much room as four
        (90, 32, 98304, 8, 0, 2),  # 97 KB each with what is reserved, of 228
        (90, 32, 114 << 10, 8, 0, 1),  # 228 / 114, but for what is reserved
        (80, 32, 98304, 8, 0, 1),  # of 164
        (80, 32, 163 << 10, 8, 0, 1),
        (80, 32, (163 << 10) + 1, 8, 0, 0),
        (90, 32, 227 << 10, 8, 0, 1),
        (90, 32, 228 << 10, 8, 0, 0),
        (100, 32, 0, 4, 128, 4),  # 512 columns of tensor memory
        (90, 32, 0, 4, 128, 0),  # which this chip does not have
    ],
)
def test_residency_by_hand(
    architecture, registers, shared_bytes, num_warps, tensor_columns, expected
):
    found = resident_programs(architecture, registers, shared_bytes, num_warps, tensor_columns)
    assert found == expected


# Counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("LDG.E R0, [R2.64] ;", 4),
        ("@!P0 LDG.E.U16 R0, desc[UR4][R2.64+0x4] ;", 2),
        ("LDG.E.64.CONSTANT R30, [R68.64+0x50] ;", 8),
        ("STG.E.128 desc[UR4][R2.64], R4 ;", 16),
        ("LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;", 32),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64], P0 ;", 16),
        ("LDGSTS.E.LTC128B [R1], [R2.64] ;", 4),
        ("UTMALDG.2D [UR8], [UR4] ;", 16),
        ("LDS.128 R0, [R2] ;", None),
        ("LDGDEPBAR ;", None),
    ],
)
def test_widths_of_accesses(line, expected):
    assert access_bytes(line) == expected


def test_counts_of_a_snippet():
    code = [
        "IMAD.WIDE R2, R0, 0x4, R4 ;",
        "IADD3 R6, P0, R2, R8, RZ ;",
        "IADD3.X R7, R3, RZ, RZ, P0, !PT ;",
        "LEA.HI.X.SX32 R9, R1, R5, 0x1, P1 ;",
        "UIADD3.X UR5, URZ, UR5, URZ, UP0, !UPT ;",
        "IMAD.WIDE.U32 R2, R0, 0x4, R4 ;",
        "F2FP.BF16.F32.PACK_AB R0, R1, R2 ;",
        "@P0 HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;",
        "LDG.E.128 R4, [R2.64] ;",
        "STG.E [R2.64], R4 ;",
    ]
    assert count(code, WIDE_ADDRESS) == 5
    assert count(code, CONVERSION) == 1
    assert tensor_cores(code) == ["HGMMA"]
    assert tensor_cores(["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;"]) == ["UTCHMMA"]
    assert widths(code, "LDG") == {16: 1}
    assert widths(code, "STG") == {4: 1}


# A table is read, then a loop of products, then one of two epilogues: with a loop of narrow stores
# where rows are ragged. R3 is the only thing that comes from the thread.
SNIPPET = """
S2R R0, SR_TID.X ;
LDC.64 R8, c[0x0][0x210] ;
LDG.E R10, desc[UR4][R8.64] ;
IMAD.WIDE R2, R0, 0x10, R8 ;
.L_x_0:
LDGSTS.E.BYPASS.128 [R20], desc[UR4][R2.64], P1 ;
IADD3 R2, P0, R2, R10, RZ ;
IADD3.X R3, R3, RZ, RZ, P0, !PT ;
HMMA.16816.F32.BF16 R24, R12, R16, R24 ;
@P2 CALL.REL.NOINC `(.L_x_1) ;
BRA `(.L_x_0) ;
.L_x_1:
@P3 BRA `(.L_x_2) ;
STG.E.128 desc[UR4][R2.64], R24 ;
@!P4 LDG.E R5, desc[UR4][R2.64+0x8] ;
STG.E desc[UR4][R8.64], R10 ;
EXIT ;
.L_x_2:
STG.E.128 desc[UR4][R2.64], R24 ;
.L_x_3:
STG.E.U16 desc[UR4][R2.64], R24 ;
@P4 BRA `(.L_x_3) ;
EXIT ;
.L_x_4:
BRA `(.L_x_4);
""".strip().splitlines()


def test_the_main_path_of_a_snippet():
    flow = ControlFlow(SNIPPET)
    first = SNIPPET.index(".L_x_0:")
    second = SNIPPET.index(".L_x_1:")
    assert flow.main_loop == SNIPPET[first + 1 : second]
    main = SNIPPET[: SNIPPET.index(".L_x_2:")]
    assert flow.main_path == [line for line in main if not line.endswith(":")]
    # The copy and the wide store, of these and the narrow load; the table's addresses are uniform.
    assert flow.wide_share == 2 / 3


def test_a_path_of_full_chunks_may_end_in_the_midst():
    """Where the branch is short, every instruction of it has a guard."""
    full = ["S2R R3, SR_TID.X ;", "@!P0 STG.E.128 [R3.64], R4 ;", "@!P0 EXIT ;"]
    flow = ControlFlow([*full, "@P1 LDG.E R4, [R3.64] ;", "STG.E [R3.64], R4 ;", "EXIT ;"])
    assert flow.main_path == full
    assert flow.wide_share == 1
    more = ["STG.E.128 [R3.64+0x800], R4 ;", "EXIT ;"]
    assert ControlFlow([*full, *more]).main_path == [*full, *more]


def test_an_address_is_of_elements_until_it_is_overwritten():
    uniform = "LDC.64 R2, c[0x0][0x210] ;"
    flow = ControlFlow(
        ["S2R R3, SR_TID.X ;", "STG.E [R2.64], R4 ;", uniform, "STG.E.128 [R2.64], R4 ;", "EXIT ;"]
    )
    assert flow.wide_share == 0
    guarded = [line.replace("LDC", "@P0 LDC") for line in flow.blocks[0]]
    assert ControlFlow(guarded).wide_share == 1 / 2


# Rows -----------------------------------------------------------------------------------------


SCALE = "shampoo scale"
ALONE = ("diag", "gather", SCALE)  # without a product


@needs_compiler
def test_quick_end_to_end(capsys):
    assert main(["sass", "--quick"]) == 0
    rows = [entry.row() for entry in sass.entries(90, quick=True)]
    assert [row["kernel"] for row in rows] == ["diag", *launches.MATRIX_KERNELS, SCALE]
    for row in rows:
        assert tuple(row) == (*sass.COLUMNS,)
        assert row["tensor_core"] == ("none" if row["kernel"] in ALONE else "HGMMA")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-len(rows) :] == [sass.line(row) for row in rows]
    assert "| diag | rmsprop, float32 | sm_90 |" in shown[-len(rows)]
    assert shown[0].startswith("compiled, not run; triton ")


@needs_compiler
def test_a_kernel_that_does_not_compile_is_a_row_and_a_failure(monkeypatch, capsys):
    compile_call = launches.compile_call

    def broken(kernel, call, architecture):
        if kernel is matrix_kernels._factors_kernel:
            raise RuntimeError("ptxas fatal | Unresolved\nmore")
        return compile_call(kernel, call, architecture)

    launches.matrix_program.cache_clear()
    monkeypatch.setattr(launches, "compile_call", broken)
    assert main(["sass", "--quick"]) == 1
    shown = capsys.readouterr().out.splitlines()[-2 - len(launches.MATRIX_KERNELS) :]
    launches.matrix_program.cache_clear()
    failed = [line for line in shown if "Unresolved" in line]
    assert len(shown) == 2 + len(launches.MATRIX_KERNELS)
    assert [line.split(" | ")[3] for line in failed] == [
        "**RuntimeError: ptxas fatal / Unresolved**"
    ]


def test_every_configuration_has_one_row_an_architecture():
    for architecture in launches.ARCHITECTURES:
        names = [entry[:2] for entry in sass.entries(architecture)]
        assert len(set(names)) == len(names)
        shampoo = {f"shampoo {name}" for name in launches.SHAMPOO_KERNELS}
        of_matrices = {*launches.MATRIX_KERNELS, *shampoo}
        assert {kernel for kernel, _ in names} == {
            "diag",
            "accumulate",
            "lowbit",
            *launches.PACKING,
            *of_matrices,
        }
        assert sum(kernel == "diag" for kernel, _ in names) == len(launches.DIAG_LAUNCHES)
        assert sum(kernel == "accumulate" for kernel, _ in names) == len(launches.SUMS)
        of_few_bytes = len(lowbit.CASES) * len(launches.LOWBIT_METHODS)
        assert sum(kernel == "lowbit" for kernel, _ in names) == of_few_bytes
        for packing in launches.PACKING:
            assert sum(kernel == packing for kernel, _ in names) == len(lowbit.PACKED)
        stacked = {kernel for kernel, name in names if name.startswith("stacked")}
        of_stacks = {f"shampoo {name}" for name in launches.SHAMPOO_STACKED}
        of_stacks.update(launches.matrix_kernels("stacked"))
        assert stacked == (of_stacks if architecture == 90 else set())


@pytest.mark.parametrize("architecture", launches.ARCHITECTURES)
def test_the_tilings_are_those_that_the_launcher_chooses(architecture, monkeypatch):
    monkeypatch.setattr(matrix_kernels, "_is_hopper", lambda device: architecture == 90)
    cuda, nothing = torch.device("cuda"), [[]] * 4
    square, both = (1024, 1024), (True, True)

    def bucket(count, sizes=square, dense=both):
        return matrix_kernels.MatrixBucket(
            sizes, dense, sizes, (False, False), (0,) * count, (), (), *nothing
        )

    few, many = bucket(2), bucket(3)
    cases = [(launches.BF16, [many]), (launches.BF16, [few]), (launches.F32, [many])]
    chosen = [matrix_kernels.tiling_of(cuda, *case) for case in cases]
    expected = [name for name in launches.tilings(architecture) if name != "stacked"]
    assert chosen == [launches.TILINGS[name] for name in expected]

    buckets = [many, few, bucket(3, (1024, 1028)), bucket(3, dense=(True, False))]
    tiling = matrix_kernels.tiling_of(cuda, launches.BF16, buckets)
    stacked = [matrix_kernels.suits_stacks(bucket, (), tiling) for bucket in buckets]
    assert stacked == [architecture == 90, False, False, False]


def test_the_modelled_flops_are_those_of_an_update_step():
    total = sum(launches.FLOPS.values()) + launches.FLOPS["product right"]  # T = C^T G, T K, and V
    assert total * 7**3 == matrix.step_flops([(7, 7)])
