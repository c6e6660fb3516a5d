"""Muon that orthogonalises all matrices of one shape together, in float32.

timm's and torch's Muon orthogonalise in bfloat16, whose rounding makes runs with one rank and with two diverge within a
few steps. Sources: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the scale of the update, Liu et
al. 2025 (https://arxiv.org/abs/2502.16982).
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastvit_train.distributed.parallelize import gather_shards, local_tensor, shard_like

QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Optimizer whose update is the orthogonalised momentum; groups with `use_fallback` are trained by AdamW.

    Args:
        params: parameters or groups. Outside fallback groups each must be a matrix, (out, in), or a convolution's
            kernel, which counts as (out, everything else); AdamW trains all other parameters.
        lr: learning rate, a float or a scalar tensor. The update has the root mean square of AdamW's (0.2), so both use
            the same rate.
        weight_decay: decoupled, as in AdamW.
        merged: number of matrices that are stacked in each parameter, such as 3 for merged query, key and value; each
            is orthogonalised by itself.
        momentum: of the moving average of gradients.
        nesterov: use Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        betas: AdamW's.
        eps: AdamW's.
    """

    shardable = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 6e-3,
        weight_decay: float = 0.0,
        merged: int = 1,
        momentum: float = 0.95,
        nesterov: bool = False,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "merged": merged,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": betas,
            "eps": eps,
            "use_fallback": False,
            "fused": True,  # makes torch load each "step" to the device of its parameter
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one optimizer step; `closure`, if given, is called first and its loss is returned.

        A learning rate is a float, or a scalar tensor on the device of the parameters. With tensors, and once a step
        has created the state, steps can be captured in a CUDA graph.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in trained if p.ndim >= 2 and not group["use_fallback"]]
            for shape in {(p.shape, p.dtype, p.device): None for p in matrices}:
                self._muon_step([p for p in matrices if (p.shape, p.dtype, p.device) == shape], group)
            self._adamw_step([p for p in trained if p.ndim < 2 or group["use_fallback"]], group)
        return loss

    def _muon_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages = [local_tensor(self.state[p]["momentum"]) for p in params]
        gradients = _local_gradients(params)
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
        matrices = torch.stack([gather_shards(a, p).flatten(1) for a, p in zip(ahead, params, strict=True)])
        batch, rows, columns = matrices.shape
        matrices = matrices.view(batch * group["merged"], rows // group["merged"], columns)
        updates = orthogonalize(matrices, group["ns_steps"])
        scale = 0.2 * max(updates.shape[1:]) ** 0.5
        own = [shard_like(update, p) for update, p in zip(updates.reshape(-1, *params[0].shape), params, strict=True)]
        weights = [local_tensor(p) for p in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        _foreach_subtract(weights, own, group["lr"] * scale)

    def _adamw_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if "step" not in self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            [local_tensor(p) for p in params],
            _local_gradients(params),
            [local_tensor(state["exp_avg"]) for state in states],
            [local_tensor(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _local_gradients(params: list[Tensor]) -> list[Tensor]:
    return [local_tensor(p.grad) for p in params if p.grad is not None]


def _foreach_subtract(weights: list[Tensor], updates: list[Tensor], rate: float | Tensor) -> None:
    """Subtract `rate` times `updates`, which may be overwritten, from `weights`."""
    if isinstance(rate, Tensor):  # as `alpha`, it would have to be read by the host
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(weights, updates)
    else:
        torch._foreach_sub_(weights, updates, alpha=rate)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move the singular values of each matrix close to 1 by a quintic Newton-Schulz iteration (Jordan et al. 2024).

    Args:
        matrices: (batch, out, in).
        steps: iterations; after 5, singular values that were not tiny are between about 0.7 and 1.2.

    Returns:
        The same shape and dtype; computed in float32.
    """
    a, b, c = QUINTIC
    x = matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
