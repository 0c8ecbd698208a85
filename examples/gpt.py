"""A small GPT on the source text of Python's standard library: the place to start.

Groups of parameters, autocast, warm-up and cosine, and a checkpoint from which a run that was
killed goes on, on a CPU to the bit. About three minutes on two cores.

python examples/gpt.py
python examples/gpt.py --optimizer AdamW
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import rootfree_fused

CONTEXT, SEQUENCES = 128, 16  # characters that are seen, sequences a batch
WIDTH, LAYERS, HEADS = 128, 4, 4
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # all others are one more
VOCABULARY = len(CHARACTERS) + 1
LEARNING_RATES = {
    "RootFreeShampoo": 5e-3,
    "RootFreeAdamW": 1e-2,
    "RootFreeRMSprop": 1e-3,
    "IFShampoo": 1.2e-2,
    "AdamW": 2e-3,
    "SGD": 0.1,
    "Muon": 2e-2,
}


def load_text(folder: Path) -> tuple[Tensor, Tensor]:
    """Characters to train on, and those of every tenth module, which are held out."""
    paths = sorted(folder.glob("*.py"))
    if len(paths) < 10:
        raise SystemExit(f"{len(paths)} modules lie in {folder}; pass a folder of ten to --text")
    table = torch.full((256,), len(CHARACTERS))
    table[list(CHARACTERS.encode())] = torch.arange(len(CHARACTERS))
    modules = [table[list(path.read_bytes())] for path in paths]
    held_out = modules[9::10]
    return torch.cat([m for i, m in enumerate(modules) if i % 10 < 9]), torch.cat(held_out)


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    """(count, CONTEXT + 1) characters from places that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


class Block(nn.Module):
    """Attention and an MLP of four widths, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3 * HEADS, -1))
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(seen.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Pre-norm decoder with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def loss(self, batch: Tensor) -> Tensor:
        """Cross-entropy of every next character, in nat, the mean over them."""
        with torch.autocast(batch.device.type, torch.bfloat16):  # the parameters stay float32
            x = self.token(batch[:, :-1]) + self.position.weight
            logits = self.head(self.norm(self.blocks(x)))
            return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def build_optimizers(name: str, model: GPT, lr: float) -> list[Optimizer]:
    """One optimizer; for Muon, which takes hidden matrices alone, AdamW beside it."""
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases and gains
    decay = 5e-4 / lr  # which is per unit of lr: so it is the same for all
    # Beyond some thousand words give RootFreeShampoo's tables merge_axes=((0, 1),): no factors.
    still = [{"params": tables, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    groups: list[dict[str, Any]] = [{"params": linear, "weight_decay": decay}, *still]
    if name == "Muon":
        hidden = [weight for weight in linear if weight is not model.head.weight]
        others = [{"params": [model.head.weight], "weight_decay": 0.1}, *still]
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=decay)
        return [muon, torch.optim.AdamW(others, lr=LEARNING_RATES["AdamW"])]
    if name in ("AdamW", "SGD"):
        more: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
        return [getattr(torch.optim, name)(groups, lr=lr, **more)]
    # RootFreeShampoo needs no batch size; the others that of the terms which the loss averages.
    more = {} if name == "RootFreeShampoo" else {"batch_size": SEQUENCES * CONTEXT}
    return [getattr(rootfree_fused, name)(groups, lr=lr, **more)]


def save(state: Any, path: Path) -> None:
    """Replace a checkpoint as a whole or not at all, as examples/checkpoint.py explains."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def plot(curves: dict[str, list[list[float]]], path: Path, title: str) -> None:
    """Losses against steps."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(title=title, xlabel="step", ylabel="loss in nat a character")
    axes.legend()
    axes.figure.savefig(path, dpi=150)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Train a small GPT on Python's standard library.")
    parser.add_argument("--optimizer", choices=LEARNING_RATES, default="RootFreeShampoo")
    parser.add_argument("--lr", type=float, help="the largest, after the warm-up")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="of checkpoint and plot: gpt-OPTIMIZER")
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")))
    args = parser.parse_args(argv)
    args.lr = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
    args.folder = args.folder or Path(f"gpt-{args.optimizer}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr is {args.lr}; pass a number above 0")
    if args.folder.is_file():
        parser.error(f"--folder is a file, {args.folder}; pass a folder")
    if args.steps < 1 or args.save_every < 1:
        parser.error("--steps and --save-every are at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[list[float]]]:
    """Train; return [step, loss] of the batches, and of the held-out text at each checkpoint."""
    args = arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, held_out = load_text(args.text)
    validation = windows(held_out, 128, seed=0).to(device)
    torch.manual_seed(0)
    model = GPT().to(device)
    optimizers = build_optimizers(args.optimizer, model, args.lr)
    warm_up = max(1, args.steps // 10)

    def factor(step: int) -> float:
        rest = (step - warm_up) / max(1, args.steps - warm_up)
        return (step + 1) / warm_up if step < warm_up else (1 + math.cos(math.pi * rest)) / 2

    schedules = [LambdaLR(optimizer, factor) for optimizer in optimizers]
    curves: dict[str, list[list[float]]] = {"training": [], "validation": []}
    run = {key: getattr(args, key) for key in ("optimizer", "lr", "steps")}

    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = args.folder / "checkpoint.pt"
    parts = [model, *optimizers, *schedules]
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["run"] != run:
            raise SystemExit(f"{checkpoint} is of {state['run']}; pass another --folder")
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        curves = state["curves"]
    start = len(curves["training"])
    print(f"{args.optimizer} on {device}, from step {start} of {args.steps}")

    steps: Any = range(start, args.steps)
    write: Any = print
    if find_spec("tqdm"):
        from tqdm import tqdm

        steps, write = tqdm(steps, initial=start, total=args.steps), tqdm.write
    for step in steps:
        batch = windows(text, SEQUENCES, seed=step + 1).to(device)  # the seed is all to resume by
        loss = model.loss(batch)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        curves["training"].append([step + 1, loss.item()])
        if write is print and (step + 1) % 20 == 0:
            print(f"step {step + 1}: training loss {loss.item():.3f} nat")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            with torch.no_grad():
                curves["validation"].append([step + 1, model.loss(validation).item()])
            state_dicts = [part.state_dict() for part in parts]
            save({"run": run, "parts": state_dicts, "curves": curves}, checkpoint)
            write(f"step {step + 1}: validation loss {curves['validation'][-1][1]:.3f} nat")
    if find_spec("matplotlib"):
        plot(curves, args.folder / "loss.png", args.optimizer)
        print(f"the losses are drawn in {args.folder / 'loss.png'}")
    return curves


if __name__ == "__main__":
    main()
