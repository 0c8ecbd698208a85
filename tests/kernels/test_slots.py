"""Tables are written and read by the names of kernels/slots.py, and by nothing else."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest

pytest.importorskip("triton")

from helpers.offline import needs_compiler
from triton.runtime.jit import JITFunction

from rootfree_fused.kernels import factors, rootfree_shampoo_slots, slots, tiles
from rootfree_fused.kernels.slots import LAYOUT, Names

FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
TABLES = {
    name: value
    for module in (slots, rootfree_shampoo_slots)
    for name, value in vars(module).items()
    if isinstance(value, Names)
}
ROWS = {name: names for name, names in TABLES.items() if list(names.value) == [*range(len(names))]}
JOBS = (
    *("GATHER", "PRODUCT", "MOMENTA", "FACTORS", "SQUARE", "PARAMS"),
    *("SCALE", "TRANSFORM", "GRAM", "DAMPED", "SYMMETRIC", "ROOT", "DIRECTION", "DESCENT"),
)
# What tables, and rows of them, are called.
TABLE_WORDS = {"table", "row", "rows", "job", "jobs", "member", "members", "tiles", "scalars"}


def is_number(node):
    """An integer, or a multiple of one."""
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return is_number(node.left) or is_number(node.right)
    return isinstance(node, ast.Constant) and type(node.value) is int


def last_word(node):
    name = getattr(node, "id", getattr(node, "attr", ""))
    return name.lower().split("_")[-1]


def is_bare(node):
    """Whether an integer is added to a pointer here, or is the index of a column or of a row."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, (ast.Add, ast.Sub)):
        sides = [side for side in ast.iter_child_nodes(node) if isinstance(side, ast.expr)]
        return any(last_word(n) in {"ptr", "ptrs"} for n in sides) and any(map(is_number, sides))
    if not isinstance(node, ast.Subscript):
        return False
    is_column = isinstance(node.slice, ast.Tuple)
    indices = node.slice.elts if is_column else [node.slice]
    slices = [i for i in indices if isinstance(i, ast.Slice)]
    bounds = [*indices, *(i.lower for i in slices), *(i.upper for i in slices)]
    return (is_column or last_word(node.value) in TABLE_WORDS) and any(map(is_number, bounds))


def bare_numbers(source):
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if is_bare(node)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_bare_number_indexes_a_table(path):
    assert bare_numbers(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        *("tl.load(job_ptr + 3)", "pointer_at(1 + job_ptr, x)", "ptr = tiles_ptr + 4 * index"),
        *("job_ptr += 2", "rows[:, 7]", "table[:, -1]", "launch.rows[0, 6]", "table[:, :4]"),
        *("job[2]", "scalars[1:]"),
    ],
)
def test_a_bare_number_is_found(line):
    assert len(bare_numbers(line)) == 1


def test_every_column_and_every_scalar_is_read_by_its_name():
    """By a kernel, all but the lr of IF-Shampoo and of a method, whose pointer is an argument."""
    trees = [ast.parse(path.read_text()) for path in FILES if not path.stem.endswith("slots")]
    read = {
        (node.value.id, node.attr)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for table, names in TABLES.items():
        missing = {name for name in names.value._fields if (table, name) not in read}
        assert missing <= {"lr"}, table


@pytest.mark.parametrize("table", TABLES)
def test_a_name_hides_nothing(table):
    """`value` and `type` are a constexpr's own; in kernels a name is looked up in the tuple."""
    names = TABLES[table]
    assert not {"value", "type"} & set(names.value._fields)
    assert names.value._asdict() == {name: getattr(names, name) for name in names.value._fields}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_has_room_for_the_index_of_its_matrix(job):
    assert len(ROWS[job]) <= LAYOUT.matrix < LAYOUT.job_columns


def test_names_are_unequal_where_a_number_is():
    """Triton asks this at every launch, of a copy that it made when the kernel was compiled."""
    for names in TABLES.values():
        assert (names != copy.deepcopy(names)) is False
        first = names.value._fields[0]
        assert names != Names(names.value._replace(**{first: -1}))
        assert names != object()


def test_a_row_is_refused_by_the_name_of_its_column():
    row = dict.fromkeys(slots.Momenta._fields, 0)
    with pytest.raises(TypeError, match="norms"):
        slots.Momenta(**{name: 0 for name in row if name != "norms"})
    with pytest.raises(TypeError, match="parking"):
        slots.Momenta(**row, parking=0)


def test_padded_rows_are_as_long_on_the_host_as_on_the_device():
    for size in range(40):
        assert tiles.padded.fn(size) == slots.padded(size)
    assert 2 * LAYOUT.row_multiple == LAYOUT.alignment


@needs_compiler
@pytest.mark.parametrize(
    ("module", "function", "table"),
    [(factors, "_factor_step", "FACTORS"), (tiles, "tile_at", "TILE")],
)
def test_a_changed_column_is_another_kernel_in_the_cache_of_triton(
    module, function, table, monkeypatch
):
    """Which keeps kernels on the disk, from one version of this package to the next."""
    function, names = getattr(module, function).fn, getattr(module, table)
    before = JITFunction(function).cache_key
    assert JITFunction(function).cache_key == before
    monkeypatch.setattr(module, table, Names(names.value._make(reversed(names.value))))
    assert JITFunction(function).cache_key != before
