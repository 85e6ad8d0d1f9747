"""What several test files compare with: a two-sided comparison, and the plainest store of keys and values."""

import torch
from torch import Tensor


def assert_close(a: Tensor, b: Tensor, tol: float = 1e-5) -> None:
    """Equal shapes and a largest absolute difference of at most `tol`; NaN fails."""
    assert a.shape == b.shape
    worst = (a - b).abs().max().item()
    assert worst <= tol, f"largest difference {worst:.2e} is above {tol:.0e}"


class AppendingStore:
    """A `KVStore` that concatenates."""

    def __init__(self):
        self.pos, self.kept = 0, {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            k, v = (torch.cat(both, dim=2) for both in zip(self.kept[layer], (k, v), strict=True))  # (B, nh, S, hs)
        self.kept[layer] = k, v
        return k, v

    def advance(self, idx: Tensor) -> None:
        self.pos += idx.size(1)
