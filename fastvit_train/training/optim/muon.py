"""Muon that orthogonalises all matrices of one shape together, in float32.

timm's and torch's Muon orthogonalise in bfloat16, whose rounding makes runs with one rank and with two diverge within a
few steps. Sources: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); the scale of the update, Liu et
al. 2025 (https://arxiv.org/abs/2502.16982).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastvit_train.distributed.parallelize import gather_shards, local_tensor, shard_like
from fastvit_train.models import MuonStep, can_update, update_matrices

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
    _step_supports_amp_scaling = True  # torch's scaler then sets grad_scale and found_inf, and does not wait for them

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
            fits = [local_tensor(p) is p and can_update(p, group["merged"]) for p in matrices]
            self._update_together([p for p, fit in zip(matrices, fits, strict=True) if fit], group)
            others = [p for p, fit in zip(matrices, fits, strict=True) if not fit]
            for shape in {(p.shape, p.dtype, p.device): None for p in others}:
                self._muon_step([p for p in others if (p.shape, p.dtype, p.device) == shape], group)
            self._adamw_step([p for p in trained if p.ndim < 2 or group["use_fallback"]], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch's optimizers do, also what was saved before groups had the key "fused"."""
        groups = [{"fused": True, **group} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def compile_kernels(self) -> None:
        """Take a step with copies of the parameters, so that the first real one has no kernel to compile."""
        groups = []
        for group in self.param_groups:
            copies = [torch.zeros_like(p) for p in group["params"]]
            for p in copies:
                p.grad = torch.zeros_like(p)
            groups.append({**group, "params": copies})
        Muon(groups).step()

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what a scaler has set for this step: the scale of the gradients, and whether one is NaN or inf."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _momenta(self, params: list[Tensor]) -> list[Tensor]:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        return [local_tensor(self.state[p]["momentum"]) for p in params]

    def _update_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices that our kernels support."""
        if not params:
            return
        grad_scale, found_inf = self._scaling()
        step = MuonStep(
            group["lr"],
            group["merged"],
            group["weight_decay"],
            group["momentum"],
            group["nesterov"],
            QUINTIC,
            group["ns_steps"],
            grad_scale,
            found_inf,
        )
        update_matrices(params, _local_gradients(params), self._momenta(params), step)

    def _muon_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        grad_scale, found_inf = self._scaling()
        averages = self._momenta(params)
        weights = [local_tensor(p) for p in params]
        gradients = _local_gradients(params)
        if grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, grad_scale))
        with _unchanged_if(found_inf, [*averages, *weights]):
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
            matrices = torch.stack([gather_shards(a, p).flatten(1) for a, p in zip(ahead, params, strict=True)])
            batch, rows, columns = matrices.shape
            matrices = matrices.view(batch * group["merged"], rows // group["merged"], columns)
            updates = orthogonalize(matrices, group["ns_steps"]).reshape(batch, *params[0].shape)
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            own = [shard_like(update, p) for update, p in zip(updates, params, strict=True)]
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
        grad_scale, found_inf = self._scaling()
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
            grad_scale=grad_scale,
            found_inf=found_inf,
        )


def _local_gradients(params: list[Tensor]) -> list[Tensor]:
    return [local_tensor(p.grad) for p in params if p.grad is not None]


@contextmanager
def _unchanged_if(found_inf: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """Undo what changes in `tensors` inside the context if `found_inf` is not 0, without waiting for the device."""
    before = None if found_inf is None else [tensor.clone() for tensor in tensors]
    yield
    if found_inf is not None and before is not None:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(found_inf.bool(), value, tensor))


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
