"""The diagonal methods, each declared once: its state, its settings, its operator's schema.

A method updates every element of a parameter by itself. What runs it, the specification, the
kernels and the optimizers, follows from this declaration; docs/architecture.md has the steps to add
one.
"""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..reference import diag, rootfree_shampoo
from .checks import NUMBERS, SWITCHES

# Fills a state that starts where the setting initial_square_avg says; see optimizer/starts.py.
SECOND_MOMENT: Final = None
# Settings that the operators take in another form than the groups have.
_TAKEN: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "beta1": lambda group: group["betas"][0],
    "beta2": lambda group: group["betas"][1],
    "decoupled": lambda group: group["weight_decay_mode"] == "decoupled",
    "sign_last": lambda group: group["sign"] == "ema",
}
# What the operators take of micro-batches, with what an update makes of it; see optimizer/parts.py.
_WEIGHTS = {
    None: (),
    "squares": ("square_weight", "signal_weight", "floor_weight"),
    "signs": ("part_weight",),
}


@dataclass(frozen=True)
class DiagonalMethod:
    """One diagonal method, the operator `torch.ops.rootfree_fused.<name>`.

    name: ends in `_`, as the operator updates its tensors.
    reference: the update of one parameter: (param, grad, *states, *step, lr=, batch_size=, ...);
        a state that is not there is None, and step is given to a method that `counts`.
    states: what each entry of `optimizer.state[param]` is filled with before the first step, in the
        one order that the schema and every kernel have.
    numbers, switches: the settings beside lr and batch_size, floats and bools.
    counts: whether it may need the number of steps.
    by_tensor: whether an element's update depends on the others of its tensor.
    parts: what it can take of the micro-batches of a gradient, "squares" or "signs": the reference
        then has `parts`, the sum of one parameter's or None, and what `weights` names.
    """

    name: str
    reference: Callable[..., None]
    states: Mapping[str, float | None]
    numbers: tuple[str, ...]
    switches: tuple[str, ...]
    counts: bool = False
    by_tensor: bool = False
    parts: Literal["squares", "signs"] | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def schema(self) -> str:
        """Lists of parameters, gradients and states; lr and batch_size are 0-d tensors."""
        steps = ["Tensor? steps"] if self.counts else []
        return self._schema(self.name, [], [*steps, "Tensor lr", "*"])

    @property
    def lowbit_name(self) -> str:
        """The operator on weights and states in the formats of reference/formats.py."""
        return f"lowbit_{self.name}"

    @property
    def lowbit_schema(self) -> str:
        """As `schema`, with lists of residuals and of each state's scales, and with steps always.

        A list of what the formats of a call do not have is empty. seeds, firsts: one a parameter,
        as `reference.random_bits` takes them. stochastic: how bfloat16 weights without residuals
        are rounded.
        """
        lists = ["param_residuals", *(f"{key}_scales" for key in self.states)]
        counted = ["bool bias_correction"] if self.counts else []
        others = ["Tensor steps", "Tensor lr", "*", "int[] seeds", "int[] firsts"]
        return self._schema(self.lowbit_name, lists, [*others, "bool stochastic", *counted])

    @property
    def weights(self) -> tuple[str, ...]:
        """Floats beside the parts of micro-batches, which are read where there are parts."""
        return _WEIGHTS[self.parts]

    def _schema(self, name: str, written: list[str], others: list[str]) -> str:
        """Of an operator that writes these lists too, with these arguments before the settings."""
        aliases = iter(string.ascii_lowercase)

        def lists(names: Iterable[str]) -> list[str]:
            return [f"Tensor({next(aliases)}!)[] {list_name}" for list_name in names]

        arguments = [
            *lists(["params"]),
            "Tensor[] grads",
            *lists(_lists(self.states)),
            *lists(written),
            *others,
            *(f"float {number}" for number in self.numbers),
            "Tensor batch_size",
            *(f"bool {switch}" for switch in self.switches),
            "Tensor? grad_scale=None",
            "Tensor? found_inf=None",
            *(["Tensor[]? parts=None"] if self.parts else []),
            *(f"float {weight}=1." for weight in self.weights),
        ]
        return f"{name}({', '.join(arguments)}) -> ()"

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group's settings as the operator takes them, but for lr and batch_size."""
        return settings_of(group, (*self.numbers, *self.switches))


def _lists(keys: Iterable[str]) -> list[str]:
    """What the operators call the lists of these states."""
    return [f"{key}s" for key in keys]


def _check(method: DiagonalMethod) -> None:
    """Raise a ValueError for a declaration that no step could follow, where it is made."""
    name, settings = method.name, (*method.numbers, *method.switches)
    if not (name.isidentifier() and name.endswith("_")):
        raise ValueError(f"the method {name!r} must end in _, as its operator updates its tensors")
    for key, value in method.states.items():
        if not key.isidentifier() or key == "step" or not isinstance(value, (float, type(None))):
            raise ValueError(
                f"{name} has the state {key!r} of {value!r}; name it otherwise than step, and fill "
                "it with a float or SECOND_MOMENT"
            )
    if len({*method.states, *settings}) < len(method.states) + len(settings):
        raise ValueError(f"{name} names one of {(*method.states, *settings)} twice")
    numbers = {*NUMBERS, "beta1", "beta2"} - {"betas"}
    ranges = {"numbers": numbers, "switches": {*SWITCHES, "decoupled", "sign_last"}}
    for kind, known in ranges.items():
        if unknown := [setting for setting in getattr(method, kind) if setting not in known]:
            raise ValueError(f"{name} has {unknown} as {kind}; give them a range in ops/checks.py")
    tensors = ["param", "grad", *method.states, *(["step"] if method.counts else [])]
    named = ("lr", "batch_size", *settings, *(["parts"] if method.parts else []), *method.weights)
    try:
        inspect.signature(method.reference).bind(*tensors, **dict.fromkeys(named))
    except TypeError as error:
        raise ValueError(
            f"the reference of {name} takes other than what it says: {error}"
        ) from None


def settings_of(group: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names as the operators take them."""
    return {name: _TAKEN[name](group) if name in _TAKEN else group[name] for name in names}


RMSPROP = DiagonalMethod(
    "rmsprop_",
    diag.rmsprop_,
    states={"square_avg": SECOND_MOMENT, "momentum_buffer": 0.0},
    numbers=("alpha", "damping", "weight_decay", "momentum"),
    switches=("decoupled", "maximize"),
    parts="squares",
)
ADAMW = DiagonalMethod(
    "adamw_",
    diag.adamw_,
    states={"exp_avg": 0.0, "exp_avg_sq": SECOND_MOMENT},
    numbers=("beta1", "beta2", "damping", "weight_decay"),
    switches=("maximize",),
    counts=True,
    parts="squares",
)


def _of_gradients_as_they_are(update: Callable[..., None]) -> Callable[..., None]:
    """A method that does not ask how many terms a gradient averages."""

    def run(*tensors: Any, batch_size: float, **settings: Any) -> None:
        update(*tensors, **settings)

    return run


SIGN = DiagonalMethod(
    "sign_",
    _of_gradients_as_they_are(diag.sign_),
    states={"exp_avg": 0.0},
    numbers=("beta", "weight_decay"),
    switches=("sign_last", "maximize"),
    parts="signs",
)
# What root-free Shampoo does to vectors and scalars. The second sums over a tensor, so that the
# specification is its one body.
VECTOR_ADAM = DiagonalMethod(
    "vector_adam_",
    _of_gradients_as_they_are(rootfree_shampoo.vector_adam_),
    states={"exp_avg": 0.0, "exp_avg_sq": 0.0},
    numbers=("beta1", "vector_beta2", "weight_decay", "vector_rms"),
    switches=("maximize",),
    counts=True,
)
VECTOR_ROOTFREE = DiagonalMethod(
    "vector_rootfree_",
    _of_gradients_as_they_are(rootfree_shampoo.vector_rootfree_),
    states={"exp_avg": 0.0, "exp_avg_sq": 0.0},
    numbers=("beta1", "vector_beta2", "weight_decay", "update_rms"),
    switches=("maximize",),
    counts=True,
    by_tensor=True,
)
# The methods that have an operator, by its name; see schemas.register.
METHODS: dict[str, DiagonalMethod] = {}


def state_keys() -> set[str]:
    """The keys of all diagonal state."""
    return {key for method in METHODS.values() for key in method.states}


def second_moments() -> list[str]:
    """The keys of state that starts where initial_square_avg says."""
    states = [item for method in METHODS.values() for item in method.states.items()]
    return [key for key, value in states if value is SECOND_MOMENT]
