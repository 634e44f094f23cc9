"""Chunks of two kinds for one picture, and a test whether two sets of chunks come from one distribution."""

import torch

SHAPES = torch.tensor([[[0.8, 0.0], [0.8, 0.4], [0.8, 0.8]], [[-0.4, 0.6], [0.0, 0.6], [0.4, 0.6]]])
SHARES = torch.tensor([0.5, 0.8])
"""How often a chunk is its shape, and not the opposite, for each of the two features."""


def draw(n, generator):
    """Hidden states (n, 2, 4), chunks (n, 3, 2) and which feature it was (n,)."""
    side = torch.randint(0, 2, (n,), generator=generator)
    hidden = torch.stack([side * 2.0 - 1, 1 - side * 2.0], dim=-1)[:, None].repeat(1, 2, 2)
    sign = (torch.rand(n, generator=generator) < SHARES[side]) * 2.0 - 1
    noise = 0.1 * torch.randn(n, 3, 2, generator=generator)
    return hidden, sign[:, None, None] * SHAPES[side] + noise, side


def energy_pvalue(first, second, n_permutations=200):
    """Share of random splits with an energy distance of at least that of two sets of chunks."""
    n = len(first)
    both = torch.cat([first, second]).flatten(1).double()
    distances = torch.cdist(both, both)
    generator = torch.Generator().manual_seed(0)
    splits = torch.full((n_permutations + 1, len(both)), -1.0 / len(second), dtype=torch.float64)
    splits[0, :n] = 1.0 / n
    for row in splits[1:]:
        row[torch.randperm(len(both), generator=generator)[:n]] = 1.0 / n
    energies = -((splits @ distances) * splits).sum(dim=1)
    return (energies >= energies[0] - 1e-12).double().mean().item()


def fit(parameters, loss, n_steps, lr):
    """Train with a learning rate that rises and falls; `loss()` draws its own batch."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_steps)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
