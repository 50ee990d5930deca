"""Muon: momentum, orthogonalised, for the weights of convolutions and linear layers; Adam for all that is no matrix.

Source: Jordan et al. 2024 (Muon), its public code: the quintic Newton-Schulz iteration and its coefficients; updates
sized like Adam's, after Liu et al. 2025, arXiv:2502.16982, eq. 4. In float32, so that CPUs agree with themselves.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_MOMENTUM = 0.95
_RMS = 0.2  # of Adam's updates


class Muon(torch.optim.Optimizer):
    """State of a matrix: momentum; of another tensor: Adam's. betas and eps are Adam's. The decay is decoupled."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do one step with the gradients as they are."""
        assert closure is None, "the loss is computed before"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._momentum if parameter.ndim > 1 else self._adam
                parameter.sub_(update(parameter, group), alpha=group["lr"])

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Any:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        matrix = gradient.lerp(momentum, _MOMENTUM).flatten(1)  # Nesterov's
        size = _RMS * max(matrix.shape) ** 0.5
        return orthogonalised(matrix).view(parameter.shape) * size

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> Any:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        count = float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1 - first) / (1 - first**count)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - second) / (1 - second**count)
        return mean / (square.sqrt() + group["eps"])


def orthogonalised(matrix: Tensor, *, num_iterations: int = 5) -> Any:
    """Return about U V^T of matrix (m, n) = U S V^T, float32: its singular values lie within 0.7 and 1.2, not at 1."""
    a, b, c = _COEFFICIENTS
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
