"""Triton kernels, imported on first use: Triton takes a while.

For all families slots.py to arithmetic.py; then the diagonal methods, what the matrix methods
share, IF-Shampoo and root-free Shampoo:

    slots.py            names of all that kernels read from tables on the device
    tables.py           tables on the device; plans of a diagonal launch
    calls.py            calls of kernels, which Triton compiled before
    arithmetic.py       what kernels of several files compute a number at a time
    diag.py             the diagonal methods: one kernel, the launcher
    diag_bodies.py      what each of them does to an element
    lowbit.py           the diagonal methods on weights and state in fewer bytes
    packing.py          such weights and state as float32 tensors, and back
    formats.py          which those are, on registers

    matrix_plan.py      what launches are planned from, and what a plan says
    matrix_launches.py  how the launches of a plan are called
    tiles.py            a program's tile of a matrix, and products of tiles

    matrix.py           IF-Shampoo: its launches in order, their tilings, the launcher
    matrix_jobs.py      which matrices each launch computes, and where their operands are
    products.py         kernels: the gather, C^T G K, (C C^T) G, K K^T
    factors.py          kernels: the factor update
    params.py           kernel: P and the descent

    rootfree_shampoo.py         root-free Shampoo: its launches in order, the launcher
    rootfree_shampoo_jobs.py    which matrices each launch computes, and where
    rootfree_shampoo_slots.py   names of what they read from tables
    gradients.py                kernels: the gradient's scale, Y and Z, the momentum
    roots.py                    kernels: S, K and K K^T
    directions.py               kernels: P, and the descent
"""
