"""The optimizers that the benchmarks compare: that each is held to what it should be."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.bench import CPU

from bench.matrix import owned
from bench.measuring import common
from bench.optimizers import peers

SHAPES = [(24, 16), (16, 16), (16, 40)]
HERE = [name for name, peer in peers.PEERS.items() if not peer.why_absent()]


def tensors(scale, seed):
    return common.random_tensors(SHAPES, scale=scale, dtype=torch.float32, device=CPU, seed=seed)


def stepped(peer, interval, build=None):
    values, grads = tensors(0.05, 0), tensors(0.1, 1)
    params = owned(values, grads)
    optimizer = (build or peer.build)(params, interval)
    for _ in range(peer.steps):
        optimizer.step()
    return peers.judge(peer, values, grads, params, interval)


@pytest.mark.parametrize("interval", [1, peers.NEVER])
@pytest.mark.parametrize("name", HERE)
def test_every_peer_that_is_here_is_right(name, interval):
    verdict = stepped(peers.PEERS[name], interval)
    assert verdict.right, verdict


@pytest.mark.parametrize("name", [n for n in HERE if peers.PEERS[n].displacement is not None])
def test_a_learning_rate_that_is_a_fifth_off_is_wrong(name):
    peer = peers.PEERS[name]

    def off(params, interval):
        optimizer = peer.build(params, interval)
        for group in optimizer.param_groups:
            group["lr"] *= 1.2
        return optimizer

    assert not stepped(peer, 1, off).right


def test_an_ascent_and_a_value_that_is_not_finite_are_wrong():
    peer = peers.Peer(lambda params, interval: torch.optim.SGD(params, lr=0.1))
    assert stepped(peer, 1).right
    assert not stepped(peer, 1, lambda params, _: torch.optim.SGD(params, 0.1, maximize=True)).right
    values, grads = tensors(0.05, 0), tensors(0.1, 1)
    assert not peers.judge(peer, values, grads, [v * torch.nan for v in values], 1).right


@pytest.mark.parametrize("name", [n for n in HERE if peers.PEERS[n].renews])
def test_an_interval_decides_how_often_a_preconditioner_is_renewed(name):
    peer = peers.PEERS[name]
    found = []
    for interval in (1, peers.NEVER):
        params = owned(tensors(0.05, 0), tensors(0.1, 1))
        torch.manual_seed(0)
        optimizer = peer.build(params, interval)
        for _ in range(4):
            optimizer.step()
        found.append(params[2].detach())  # ScalableShampoo sees the others as vectors
    assert not torch.equal(*found)


def test_blocks_stand_in_for_an_axis_that_is_too_long():
    value, grad = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    dense, blocks = (peers.specified(value, grad, 1, limit=limit) for limit in (5, 4))
    assert not torch.allclose(dense, blocks)
    p = torch.nn.Parameter(value.clone())
    p.grad = grad
    settings = {"factor_lr": peers.FACTOR_LR, "factor_momentum": peers.FACTOR_MOMENTUM}
    settings["initial_square_avg"] = 1.0
    build = partial(peers.IFShampoo, lr=peers.LR, momentum=peers.MOMENTUM, batch_size=peers.BATCH)
    optimizer = build([p], damping=peers.DAMPING, max_dense_dim=4, **settings)
    for _ in range(peers.CHECK_STEPS):
        optimizer.step()
    assert (p.detach() - value - blocks).abs().max() < 1e-12
