"""State whose first value depends on the first gradient: the base's part."""

from __future__ import annotations

import torch
from _optimizers import parameters

from rootfree_fused import RootFreeRMSprop
from rootfree_fused._stepping import Work


class FromGradient(RootFreeRMSprop):
    """s starts at B times the mean of the first gradient's squares."""

    def _begins_with_gradient(self, group):
        return True

    def _begin(self, index: int, work: Work, places: list[int]) -> None:
        batch_size = self.param_groups[index]["batch_size"]
        for i in places:
            work.states[i]["square_avg"].fill_(batch_size * work.grads[i].square().mean())


def test_state_may_start_from_the_first_gradient():
    """Once for each parameter, in place, whatever was read before, and not at a skipped step."""
    params = parameters((4,), (4,))
    optimizer = FromGradient(params, lr=0.0, alpha=1.0, batch_size=8)
    held = [optimizer.state[p]["square_avg"] for p in params]
    params[0].grad = torch.full((4,), 0.5)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(held[0], torch.ones(4))
    del optimizer.found_inf
    for gradient in (0.5, 3.0, 3.0):
        params[0].grad.fill_(gradient)
        optimizer.step()
        assert torch.equal(held[0], torch.full((4,), 2.0))
    params[1].grad = torch.full((4,), 0.25)
    optimizer.step()
    assert torch.equal(held[0], torch.full((4,), 2.0))
    assert torch.equal(held[1], torch.full((4,), 0.5))
    for p, value in zip(params, held, strict=True):
        assert optimizer.state[p]["square_avg"] is value
