"""KL-Shampoo and KL-SOAP by eigendecomposition: that they are what their paper says."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from bench.optimizers import kl


def stepped(build, grads, **settings):
    """One parameter, at zero before, after steps along the gradients; in float64."""
    p = Parameter(torch.zeros_like(grads[0]))
    optimizer = build([p], lr=1.0, weight_decay=0.0, **settings)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach(), optimizer.state[p]


def test_the_first_step_is_that_of_the_equations():
    """S by hand; of a diagonal gradient everything stays diagonal and commutes."""
    g = torch.tensor([2.0, 0.5], dtype=torch.float64)
    s = 0.9 * 0.1 + (1 - 0.9) * g.square() / 0.1 / 2
    shampoo, state = stepped(kl.KLShampoo, [g.diag()], betas=(0.8, 0.9))
    for factor in state["factors"]:
        torch.testing.assert_close(factor, s.diag())
    torch.testing.assert_close(shampoo, (-0.2 * g / s).diag())
    soap, _ = stepped(kl.KLSOAP, [g.diag()], betas=(0.8, 0.9))
    torch.testing.assert_close(soap, -torch.eye(2, dtype=torch.float64))  # Adam's: the sign


def test_factors_come_to_the_covariance_that_the_gradients_have():
    """G = A^1/2 N B^1/2 with white N: S_A x S_B tends to A x B, and the update to white N."""
    torch.manual_seed(0)
    m, n = 6, 4
    left = torch.linspace(0.2, 3.0, m, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    a = turn * left @ turn.T
    b = torch.diag(torch.linspace(0.5, 2.0, n, dtype=torch.float64))
    roots = (turn * left.sqrt() @ turn.T, b.sqrt())
    grads = [roots[0] @ torch.randn(m, n, dtype=torch.float64) @ roots[1] for _ in range(6000)]
    _, state = stepped(kl.KLShampoo, grads, betas=(0.0, 0.999))
    found, true = torch.kron(*state["factors"]), torch.kron(a, b)
    # An average over 1 / (1 - beta2) gradients of n or m columns each leaves a few per cent.
    assert (found - true).norm() / true.norm() < 0.1


def test_soap_is_adam_in_the_eigenvectors():
    """Where all gradients are turned by orthogonal matrices, so are its steps."""
    torch.manual_seed(1)
    grads = [torch.randn(5, 3, dtype=torch.float64) for _ in range(4)]
    u, v = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for d in (5, 3))
    for build in (kl.KLSOAP, kl.KLShampoo):
        plain, _ = stepped(build, grads)
        turned, _ = stepped(build, [u @ g @ v for g in grads])
        torch.testing.assert_close(turned, u @ plain @ v)


def test_vectors_take_adam_and_convolutions_are_matrices():
    torch.manual_seed(2)
    grads = [torch.randn(7, dtype=torch.float64) for _ in range(3)]
    moved, _ = stepped(kl.KLSOAP, grads, betas=(0.9, 0.98))
    p = Parameter(torch.zeros(7, dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.98))
    for grad in grads:
        p.grad = grad
        adam.step()
    torch.testing.assert_close(moved, p.detach())
    images = [torch.randn(4, 3, 2, 2, dtype=torch.float64) for _ in range(3)]
    whole, _ = stepped(kl.KLShampoo, images)
    flat, _ = stepped(kl.KLShampoo, [image.flatten(1) for image in images])
    torch.testing.assert_close(whole.flatten(1), flat)
