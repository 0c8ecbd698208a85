"""Triton kernels, imported on first use: Triton takes a while.

For both families slots.py to arithmetic.py; matrix.py and what follows is IF-Shampoo:

    slots.py            names of all that kernels read from tables on the device
    tables.py           tables on the device; plans of a diagonal launch
    arithmetic.py       what kernels of several files compute a number at a time
    diag.py             the diagonal methods: one kernel, a body a method, the launcher

    matrix.py           IF-Shampoo: its launches in order, their tilings, the launcher
    matrix_plan.py      what its launches are planned from, and what a plan says
    matrix_jobs.py      which matrices each launch computes, and where their operands are
    matrix_launches.py  how the launches of a plan are called
    tiles.py            a program's tile of a matrix, and products of tiles
    products.py         kernels: the gather, C^T G K, (C C^T) G, K K^T
    factors.py          kernels: the factor update
    params.py           kernel: P and the descent
"""
