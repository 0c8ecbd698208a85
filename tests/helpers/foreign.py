"""What sirfshampoo and the released code keep, in their layouts, where an optimizer of ours is."""

from __future__ import annotations

import math

import torch

from rootfree_fused.optimizer.joint import unit_of


class Matrix:
    """A Kronecker factor as singd's structured matrices give it out."""

    def __init__(self, dense):
        self.dense = dense

    def to_dense(self):
        return self.dense


class Released(torch.optim.Optimizer):
    """A released optimizer: its groups and state, and its attributes by name."""

    def __init__(self, groups, state, **attributes):
        super().__init__(groups, {})
        self.state.update(state)
        vars(self).update(attributes)


def matrices_of(optimizer, param, key="factor"):
    """The factors of a parameter, or what has this key, as the matrices that they represent."""
    group, state = optimizer.param_groups[0], optimizer.state[param]
    layout = unit_of(param, group).layout
    found = []
    for axis, (structure, size) in enumerate(zip(layout.structures, layout.sizes, strict=True)):
        factor = state[f"{key}_{axis}"]
        eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
        found.append(structure.left(factor, eye))
    return found


def as_sirfshampoo(optimizer):
    """The state_dict() of a SIRFShampoo that is where a float64 IFShampoo is."""
    (group,) = optimizer.param_groups
    structure = group["structures"]
    states = [optimizer.state[p] for p in group["params"]]
    axes = [sum(key.startswith("factor_momentum") for key in state) for state in states]
    theirs = {
        "lr": group["lr"],
        "beta2": group["factor_lr"],
        "alpha1": group["momentum"],
        "alpha2": group["factor_momentum"],
        "lam": group["damping"],
        "kappa": group["weight_decay"],
        "T": group["update_interval"],
    }
    groups = [
        {
            **theirs,
            "structures": (structure,) * n if isinstance(structure, str) else structure,
            "preconditioner_dtypes": (torch.float64,) * n,
            "params": [i],
        }
        for i, n in enumerate(axes)
    ]
    factors, momenta = (
        [[Matrix(matrix) for matrix in matrices_of(optimizer, p, key)] for p in group["params"]]
        for key in ("factor", "factor_momentum")
    )
    if not group["factor_momentum"]:  # versions after 0.0.1 then keep none
        momenta = [[None] * n for n in axes]
    buffers = {
        i: {"momentum_buffer": state["momentum_buffer"]}
        for i, state in enumerate(states)
        if group["momentum"]
    }
    return {
        "state": buffers,
        "param_groups": groups,
        "global_step": int(states[0]["step"]),
        "batch_size": group["batch_size"],
        "batch_size_valid": "always",
        "preconditioner": factors,
        "preconditioner_momenta": momenta,
    }


def as_released_diagonal(optimizer):
    """The state_dict() of a MyRmsProp or MyAdamW that is where one of ours is."""
    (group,) = optimizer.param_groups
    keys = {"damping": "eps", **{k: k for k in ("lr", "alpha", "betas", "weight_decay")}}
    theirs = {keys[key]: value for key, value in group.items() if key in keys}
    if "momentum" in group:
        theirs["momentum"] = group["momentum"]
    states = {}
    for i, p in enumerate(group["params"]):
        states[i] = {**optimizer.state[p], "step": int(optimizer.state[p]["step"])}
        for key in ("square_avg", "exp_avg_sq"):
            if key in states[i]:
                states[i][key] = states[i][key] / group["batch_size"]
    return {"state": states, "param_groups": [{**theirs, "params": list(states)}]}


def as_released_shampoo(optimizer, names=None, **changes):
    """A LocalOptimizer_GGT on the same parameters, where a float64 IFShampoo is."""
    (group,) = optimizer.param_groups
    params, step = group["params"], int(optimizer.state[group["params"][0]]["step"])
    names = names or [f"w{i}" for i in range(len(params))]
    interval, next_step = group["update_interval"], 0
    while next_step < step:
        next_step += min(max(int(math.log(next_step + 1, 4)), 1), interval)
    blocks = {"factor": {}, "factor_momentum": {}}
    for name, p in zip(names, params, strict=True):
        axes = p.squeeze().dim()
        for axis in range(axes if step else 0):  # built at the first step
            for key, found in blocks.items():
                found[f"{name}_dim-{axes - axis}"] = optimizer.state[p][f"{key}_{axis}"]
    attributes = {
        "params_list": {name: [p] for name, p in zip(names, params, strict=True)},
        "damping": group["damping"],
        "lr_cov": group["factor_lr"],
        "beta2": group["factor_momentum"],
        "T": interval,
        "steps": step,
        "next_step": next_step,
        "batch_averaged": True,
        "batch_size": group["batch_size"],
        "precond_B_blocks": blocks["factor"],
        "precond_m_B_blocks": blocks["factor_momentum"],
    }
    theirs = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
    buffers = {
        p: {"momentum_buffer": optimizer.state[p]["momentum_buffer"]}
        for p in params
        if group["momentum"] and step
    }
    return Released([{**theirs, "params": params}], buffers, **{**attributes, **changes})
