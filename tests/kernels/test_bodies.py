"""The Triton bodies of the diagonal methods; optimizer/test_new_method.py adds one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers.operators import ADAMW, RMSPROP

from rootfree_fused.kernels import diag


@pytest.mark.parametrize(("name", "settings"), [("rmsprop_", RMSPROP), ("adamw_", ADAMW)])
def test_a_setting_that_is_missing_or_unknown_is_refused_by_its_name(name, settings):
    plan = diag.prepare([[torch.ones(3)] for _ in range(4)])
    incomplete = {key: value for key, value in settings.items() if key != "damping"}
    with pytest.raises(TypeError, match="damping"):
        diag.launch(name, plan, None, 0.1, **incomplete)
    with pytest.raises(TypeError, match="eps"):
        diag.launch(name, plan, None, 0.1, **settings, eps=1e-8)
