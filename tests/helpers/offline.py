"""Triton without a GPU: kernels interpreted on the CPU. To compile them: bench/machine_code."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from contextlib import contextmanager

import pytest
import torch
import triton
import triton.experimental.gluon  # the interpreter imports it: it must not see rebound functions
from helpers import tensor_cores
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from rootfree_fused import kernels
from rootfree_fused.kernels import diag

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
]
needs_cuda = pytest.mark.gpu  # skipped by conftest.py where there is none
needs_compiler = pytest.mark.skipif(
    not isinstance(diag._diag_kernel, JITFunction), reason="TRITON_INTERPRET compiles nothing"
)


@contextmanager
def interpreted():
    """Run the package's kernels in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 does the same for a whole process, which then cannot compile anything. Here
    bfloat16 is also rounded to nearest and multiplied as numbers, as a GPU does, X X^T symmetric;
    the interpreter alone truncates, and multiplies the bit patterns. Three TF32 products are three,
    too.
    """
    changed = [
        (module, name, value, interpreter.InterpretedFunction(value.fn))
        for module in [triton.language, triton.language.standard, *MODULES]
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    bodies = {
        name: body._replace(update=interpreter.InterpretedFunction(body.update.fn))
        for name, body in diag.BODIES.items()
    }
    changed.append((diag, "BODIES", diag.BODIES, bodies))
    convert = interpreter._convert_float
    changed.append((interpreter, convert.__name__, convert, _rounding_to_nearest(convert)))
    dot = interpreter.InterpreterBuilder.create_dot
    changed.append((interpreter.InterpreterBuilder, dot.__name__, dot, _multiplying_as_a_gpu(dot)))
    # Each sum and product of integers is computed anew to ask whether it overflows: a quarter of
    # the time, in cases whose offsets are all far below 2^31.
    builder = interpreter.interpreter_builder
    unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
    changed.append((builder, "options", builder.options, unchecked))
    patch, scopes = interpreter._patch_lang, []
    changed.append((interpreter, patch.__name__, patch, _patching_once(patch, scopes)))
    for module, name, _, replacement in changed:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for scope in reversed(scopes):
            scope.restore()
        for module, name, value, _ in changed:
            setattr(module, name, value)


@contextmanager
def on_its_device(request):
    """For a test that takes `device`: on a GPU as it is, on the CPU interpreted."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if torch.device(parameters.get("device", "cuda")).type == "cpu":
        with interpreted():
            yield
        return
    if any(
        isinstance(v, interpreter.InterpretedFunction) for m in MODULES for v in vars(m).values()
    ):
        pytest.skip("TRITON_INTERPRET keeps kernels off the GPU")
    yield


def _rounding_to_nearest(convert_float):
    def convert(array, source, target, rounding_mode):
        if (source, target) != (triton.language.float32, triton.language.bfloat16):
            return convert_float(array, source, target, rounding_mode)
        rounded = torch.from_numpy(array.copy()).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()

    return convert


def _patching_once(patch_lang, scopes):
    """The interpreter rebinds all of triton.language at every call of a function, half its time."""
    seen = set()

    def patch(fn):
        modules = (triton.language, triton.language.core)
        found = {m.__name__ for m in modules if any(m is v for v in fn.__globals__.values())}
        if not found <= seen:
            seen.update(found)
            scopes.append(patch_lang(fn))
            # Triton 3.6 asks for int() of an array of one element, which NumPy 2.4 refuses.
            triton.language.tensor.__index__ = lambda self: self.handle.data.item()
        return interpreter._LangPatchScope()

    return patch


def _multiplying_as_a_gpu(create_dot):
    def exact(operand):
        data = operand.data
        if operand.dtype.scalar == triton.language.bfloat16:
            data = (data.astype("uint32") << 16).view("float32")
        return data.astype("float64")

    def dot(self, a, b, total, precision, *args):
        if precision.name == "TF32x3":
            block = tensor_cores.product(*(torch.from_numpy(operand.data) for operand in (a, b)))
            return interpreter.TensorHandle(total.data + block.numpy(), total.dtype.scalar)
        if a.dtype.primitive_bitwidth != 16:
            return create_dot(self, a, b, total, precision, *args)
        # Of products in float32 the sums' order may be another on either side of a diagonal.
        block = (exact(a) @ exact(b)).astype(total.data.dtype)
        return interpreter.TensorHandle(total.data + block, total.dtype.scalar)

    return dot
