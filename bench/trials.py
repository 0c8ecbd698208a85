"""The trials of a search: an Optuna database that several processes take them from.

Trial n of a stage is drawn by a sampler with a seed of its own, so that a search that was stopped
goes on as if it had not been. A process holds a lock on each trial that it runs, which the system
takes from it when it ends: a trial that is running and that nobody holds is run again.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measuring.common import optional
from .optimizers.spaces import Point, Space, narrowed

SEED_STRIDE = 100_003  # as many trials of a stage have seeds of their own
WIDE_STAGE, NARROW_STAGE, FINAL = 1, 2, 3
WAIT = 0.2  # seconds until a process that has nothing to run looks again
Key = tuple[str, int]  # a method and a stage


@dataclass(frozen=True)
class Ended:
    """A trial that ended; its value is None where it diverged."""

    number: int
    point: Point
    value: float | None
    kept: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A trial that this process runs."""

    method: str
    stage: int
    number: int
    point: Point
    trial: Any


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


class Trials:
    """Those of a search, `runs` a stage and `finals` at the best of both, by method.

    `about` is what all of a search have in common: a database of anything else is refused.
    """

    def __init__(
        self,
        path: Path,
        spaces: Mapping[str, Space],
        about: Mapping[str, Any],
        *,
        seed: int,
        runs: int,
        stages: tuple[int, ...],
        finals: int,
    ) -> None:
        self._optuna = optional("optuna")
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self.path, self._seed, self._about = path, seed, {**about, "seed": seed}
        self._spaces, self._runs, self._finals = spaces, runs, finals
        self.keys = [(method, stage) for stage in stages for method in spaces]
        self._studies: dict[Key, Any] = {}
        self._whole: dict[Key, list[Ended]] = {}
        if path.exists() and _start(path) not in (b"", b"SQLite format 3\0"):
            raise SystemExit(f"{path} is no database; move it, or choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._locks = path.with_suffix(".lock").open("ab")
        with self.alone():
            waits = {"connect_args": {"timeout": 100}}
            self._storage = self._optuna.storages.RDBStorage(
                f"sqlite:///{path}", engine_kwargs=waits
            )
        for method in spaces:
            self._refuse_other_stage_1(method)
            self._study((method, WIDE_STAGE))

    # Studies ----------------------------------------------------------------------------------

    def space(self, key: Key) -> Space | None:
        """What a stage draws from, of stage 2 once stage 1 is whole; none where all diverged."""
        method, stage = key
        if stage == WIDE_STAGE:
            return self._spaces[method]
        if len(self.ended((method, WIDE_STAGE))) < self._runs or self.diverged(method):
            return None
        if stage == NARROW_STAGE:
            first = self.ended((method, WIDE_STAGE))
            return narrowed(self._spaces[method], [(run.point, run.value) for run in first])
        return {} if len(self.ended((method, NARROW_STAGE))) == self._runs else None

    def diverged(self, method: str) -> bool:
        """Whether every run of a whole stage 1 did."""
        first = self.ended((method, WIDE_STAGE))
        return len(first) >= self._runs and all(run.value is None for run in first)

    def best(self, method: str) -> Ended | None:
        """The trial of both stages with the lowest value."""
        both = [run for stage in (WIDE_STAGE, NARROW_STAGE) for run in self.ended((method, stage))]
        finite = [run for run in both if run.value is not None]
        return min(finite, key=lambda run: run.value or 0.0, default=None)

    def size(self, key: Key) -> int:
        """How many trials a stage has when it is whole."""
        if key[1] != WIDE_STAGE and self.diverged(key[0]):
            return 0
        return self._most(key)

    def _most(self, key: Key) -> int:
        return self._finals if key[1] == FINAL else self._runs

    def ended(self, key: Key) -> list[Ended]:
        """The trials of a stage that ended, in their order."""
        if key in self._whole:
            return self._whole[key]
        study = self._studies.get(key) or self._stored(key)
        trials = study.get_trials(deepcopy=False) if study else []
        found = [
            Ended(trial.number, trial.params, trial.value, trial.user_attrs.get("kept", {}))
            for trial in trials
            if trial.state.is_finished() and trial.number < self._most(key)
        ]
        if len(found) == self._most(key):
            self._whole[key] = found
        return found

    def _study(self, key: Key) -> Any:
        """The study of a stage whose space is known; a SystemExit where it is another's."""
        if key in self._studies:
            return self._studies[key]
        space = self.space(key) or {}
        about = {**self._about, "space": {name: ends.written() for name, ends in space.items()}}
        if key[1] != WIDE_STAGE:
            about["runs of stage 1"] = self._runs
        if key[1] == FINAL and (best := self.best(key[0])):
            about["point"] = best.point
        about = json.loads(json.dumps(about))
        with self.alone():
            study = self._stored(key)
            if study is None:
                study = self._optuna.create_study(study_name=_name(key), storage=self._storage)
                study.set_user_attr("about", about)
        self._refuse_other(key, study.user_attrs["about"], about)
        self._studies[key] = study
        return study

    def _stored(self, key: Key) -> Any:
        try:
            return self._optuna.load_study(study_name=_name(key), storage=self._storage)
        except KeyError:
            return None

    def _refuse_other(self, key: Key, stored: dict[str, Any], about: dict[str, Any]) -> None:
        names = [n for n in {**stored, **about} if stored.get(n) != about.get(n)]
        if names:
            lines = [f"{n}: stored {stored.get(n)}; asked for {about.get(n)}" for n in names]
            raise SystemExit(
                f"{self.path} has another search of {_name(key)}, and one of both would be none:\n"
                + "".join(f"    {line}\n" for line in lines)
                + "choose another --out, or give the command that it was begun with"
            )

    def _refuse_other_stage_1(self, method: str) -> None:
        """Stop before trials are added to a stage 1 that a stage 2 has been narrowed by."""
        narrow = self._stored((method, NARROW_STAGE))
        if narrow and (runs := narrow.user_attrs["about"]["runs of stage 1"]) != self._runs:
            raise SystemExit(
                f"{self.path} has a stage 2 of {method} by {runs} runs of stage 1, not "
                f"{self._runs}; pass --runs {runs}, or choose another --out"
            )

    # Claims -----------------------------------------------------------------------------------

    def claims(self) -> Iterator[Claim]:
        """Trials that nobody else runs, one after the other, until all of the search ended."""
        while any(len(self.ended(key)) < self.size(key) for key in self.keys):
            found = next(filter(None, map(self._claim, self.keys)), None)
            if found:
                yield found
            else:
                time.sleep(WAIT)

    def _claim(self, key: Key) -> Claim | None:
        """A trial of a stage that was abandoned, or the next; none where all are taken."""
        space = self.space(key)
        if space is None or len(self.ended(key)) >= self.size(key):
            return None
        study = self._study(key)
        sampler = self._optuna.samplers.RandomSampler
        with self.alone():
            trials = study.get_trials(deepcopy=False)
            running = [
                trial for trial in trials[: self._most(key)] if not trial.state.is_finished()
            ]
            trial = next(
                (
                    self._optuna.trial.Trial(study, found._trial_id)
                    for found in running
                    if self._hold(found._trial_id)
                ),
                None,
            )
            if trial is None:
                if len(trials) >= self.size(key):
                    return None
                trial = study.ask()
                self._hold(trial._trial_id)
            stage_seed = (self._seed + key[1] - WIDE_STAGE) * SEED_STRIDE
            study.sampler = sampler(seed=stage_seed + trial.number)
            for name, ends in space.items():
                trial.suggest_float(name, ends.low, ends.high, log=ends.log)
        return Claim(*key, trial.number, dict(trial.params), trial)

    def end(self, claim: Claim, value: float, **kept: Any) -> None:
        """Store what a trial ended at; what is not finite has diverged."""
        study, states = self._study((claim.method, claim.stage)), self._optuna.trial.TrialState
        with self.alone():  # or another would find it running, and free
            claim.trial.set_user_attr("kept", kept)
            if math.isfinite(value):
                study.tell(claim.trial, value)
            else:
                study.tell(claim.trial, state=states.FAIL)
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, claim.trial._trial_id)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts no other process of the search is here; not twice in one."""
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, 0)

    def _hold(self, trial_id: int) -> bool:
        """Hold the byte of a trial; False where another process does."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, trial_id)
        except OSError:
            return False
        return True


def _name(key: Key) -> str:
    method, stage = key
    return f"{method}, final" if stage == FINAL else f"{method}, stage {stage}"
