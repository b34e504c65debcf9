"""What tests do with an adapted model: move it away from where it started, and ask what it makes of some tokens."""

import torch


@torch.no_grad()
def move(model, amount=0.1, *, share=None, seed=None):
    """The model, once all that it trains is moved by random numbers: torch's own next ones, or those of a seed.

    Args:
        share: Magnitudes are moved by this share of themselves instead.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            by = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(by * (amount if share is None or "magnitude" not in name else share * p))
    return model


def ids(rows=4):
    """Tokens that every tiny model knows; each time the same."""
    return torch.randint(3, 50, (rows, 9), generator=torch.Generator().manual_seed(2))


def logits(model):
    """Of those tokens, outside the graph."""
    with torch.no_grad():
        return model(ids()).logits
