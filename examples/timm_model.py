"""timm: a small vision transformer, with an optimizer by its name in timm's factory.

python examples/timm_model.py    (docs/trainers.md says how to install timm)
"""

from __future__ import annotations

import timm.optim
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from rootfree_fused.integrations.timm import register

STEPS = 30


def main() -> list[float]:
    """Train on made-up images for thirty steps; the loss of each."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=2
    )
    register()
    # Biases, norms and what the model names (positions, the class token) have no decay.
    optimizer = timm.optim.create_optimizer_v2(model, "rootfreeshampoo", lr=5e-3, weight_decay=0.1)
    losses = []
    for _ in range(STEPS):
        images = torch.randn(32, 3, 16, 16)
        labels = (images.mean((1, 2, 3)) > 0).long()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print("losses:", *(f"{loss:.3f}" for loss in main()))
