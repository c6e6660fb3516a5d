"""Optimizers and schedules: the seed's to the letter, Muon on the right matrices."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastvit_train.config.recipes import recipe
from fastvit_train.config.schema import OptimConfig
from fastvit_train.training.optim.muon import Muon, orthogonalize
from fastvit_train.training.optim.optimizer import build_optimizer, check_optimizer, has_momentum
from fastvit_train.training.optim.schedule import Schedule
from fastvit_train.utils.errors import UserError


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(images).square().sum().backward()
    optimizer.step()


def test_the_seeds_adamw_is_torchs_over_all_parameters(seed: int) -> None:
    ours = timm.create_model("c_vit_4_4_32")
    theirs = copy.deepcopy(ours)
    images = torch.randn(4, 3, 32, 32)
    our_optimizer = build_optimizer(ours, recipe("upstream-cifar10").optim)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.01, fused=True)
    for _ in range(3):
        step(ours, our_optimizer, images)
        step(theirs, their_optimizer, images)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_muon_trains_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = timm.create_model("mc_vit_4_4_32")
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {
        names[p]
        for group in optimizer.param_groups
        for p in group["params"]
        if not group["use_fallback"] and p.ndim >= 2
    }
    assert by_muon == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert len(by_muon) == 16
    not_decayed = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert not_decayed == {n for n, p in model.named_parameters() if p.ndim == 1 or n in ("pos_embed", "cls_token")}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_muon_agrees_with_torchs(seed: int) -> None:
    """torch.optim.Muon orthogonalises in bfloat16, hence the tolerance; the fallback is compared exactly."""
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((48, 16), (48, 16), (16, 48), (20,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"params": ours[:3]}, {"params": ours[3:], "use_fallback": True}]
    optimizer = Muon(groups, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True)
    muon = torch.optim.Muon(
        theirs[:3], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(theirs[3:], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in theirs]
        optimizer.step()
        muon.step()
        adamw.step()
        for a, b, old in zip(ours[:3], theirs[:3], before, strict=False):
            assert (a - b).norm() < 0.05 * (b - old).norm()
            b.data.copy_(a.data)
        assert torch.allclose(ours[3], theirs[3], atol=1e-7)


def test_merged_projections_are_orthogonalised_one_by_one(seed: int) -> None:
    merged = torch.nn.Parameter(torch.randn(24, 8))
    single = [torch.nn.Parameter(part.detach().clone()) for part in merged.chunk(3)]
    together = Muon([{"params": [merged], "merged": 3}], lr=0.02, weight_decay=0.1)
    apart = Muon([{"params": single}], lr=0.02, weight_decay=0.1)
    for _ in range(3):
        merged.grad = torch.randn_like(merged)
        for part, gradient in zip(single, merged.grad.chunk(3), strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    assert torch.allclose(merged, torch.cat(single), atol=1e-6)
    model = timm.create_model("mc_vit_4_4_32")
    optimizer = build_optimizer(model, OptimConfig(optimizer="nmuon"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    in_three = {names[p] for group in optimizer.param_groups for p in group["params"] if group["merged"] == 3}
    assert in_three == {name for name in names.values() if name.endswith("qkv.weight")} and len(in_three) == 4


def test_muons_learning_rate_may_be_a_tensor(seed: int) -> None:
    """As it is where steps are captured in a CUDA graph."""
    by_float = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((24, 8), (24, 8), (8,))]
    by_tensor = [torch.nn.Parameter(p.detach().clone()) for p in by_float]
    optimizers = [Muon(params, weight_decay=0.1, nesterov=True) for params in (by_float, by_tensor)]
    for rate in (0.02, 0.01):
        gradients = [torch.randn_like(p) for p in by_float]
        for optimizer, lr in zip(optimizers, (rate, torch.tensor(rate)), strict=True):
            group = optimizer.param_groups[0]
            group["lr"] = lr
            for p, gradient in zip(group["params"], gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for one, other in zip(by_float, by_tensor, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_muon_skips_steps_that_overflow_and_unscales_the_others(seed: int) -> None:
    scaled = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((24, 8), (24, 8), (8,))]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in scaled]
    ours, theirs = (Muon(params, lr=0.02, weight_decay=0.1, nesterov=True) for params in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu")
    for overflow in (True, False, True, False):
        inputs = [torch.randn_like(p) for p in scaled]
        factor = torch.inf if overflow else 1.0
        ours.zero_grad()
        scaler.scale(factor * sum((p * x).sum() for p, x in zip(scaled, inputs, strict=True))).backward()
        scaler.step(ours)
        scaler.update()
        if not overflow:
            for p, x in zip(plain, inputs, strict=True):
                p.grad = x
            theirs.step()
        for one, other in zip(scaled, plain, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)
            states = ours.state[one], theirs.state.get(other, {})
            for name, value in states[1].items():
                assert torch.allclose(states[0][name], value, rtol=0, atol=1e-6), name


def test_muon_never_waits_for_a_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its own skipping the scaler would read from the device, in each step, whether there was an overflow."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer, scaler = Muon([weight]), torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("a value was read"))
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("kernel", [False, True], ids=["operators", "kernel"])
def test_muon_updates_shards_as_it_does_whole_matrices(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    """By operators to the bit; the kernel takes whole matrices only and rounds differently."""
    if not kernel:
        monkeypatch.setattr("fastvit_train.training.optim.muon.can_update", lambda *_: False)
    whole = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((24, 8), (24, 8), (8,))]
    ours = Muon(whole, lr=0.02, weight_decay=0.1, nesterov=True)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
        theirs = Muon(sharded, lr=0.02, weight_decay=0.1, nesterov=True)
        for _ in range(2):
            for p, shard in zip(whole, sharded, strict=True):
                p.grad = torch.randn_like(p)
                shard.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
            ours.step()
            theirs.step()
        for p, shard in zip(whole, sharded, strict=True):
            if kernel:
                assert torch.allclose(p, shard.full_tensor(), rtol=0, atol=1e-6)
            else:
                assert torch.equal(p, shard.full_tensor())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("older", [False, True], ids=["now", "saved before groups had the key"])
def test_muons_loaded_state_is_on_the_device_of_its_parameter(older: bool) -> None:
    """Torch leaves `step` on the CPU, where a checkpoint is read to, unless the group says that it must not."""
    saved = Muon([torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))])
    for p in saved.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    saved.step()
    resumed = Muon([torch.nn.Parameter(torch.ones(*shape, device="meta")) for shape in ((4, 4), (4,))])
    state_dict = saved.state_dict()
    if older:
        del state_dict["param_groups"][0]["fused"]
    resumed.load_state_dict(state_dict)
    assert resumed.param_groups[0]["fused"] is True
    loaded = [(name, value.device.type) for state in resumed.state.values() for name, value in state.items()]
    assert loaded == [(name, "meta") for name in ("momentum", "step", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("shape", [(3, 48, 144), (2, 192, 48), (1, 48, 48)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_values(seed: int, shape: tuple[int, ...]) -> None:
    matrices = torch.randn(*shape)
    result = orthogonalize(matrices)
    assert result.shape == shape
    u, values, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    inner = u.mT @ result.double() @ vh.mT
    diagonal = torch.diagonal(inner, dim1=1, dim2=2)
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal[values > 0.05 * values.amax(1, keepdim=True)].sub(1).abs().max() < 0.45


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_schedules(name: str) -> None:
    config = OptimConfig(lr=0.8, schedule=name, warmup=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = Schedule(optimizer, config, epochs=[10], steps_per_epoch=10)
    rates = []
    for i in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(i + 1)
    assert rates[0] == pytest.approx(0.008) and rates[5] == pytest.approx((0.008 + 0.8) / 2)
    expected = {"constant": 0.8, "cosine": 0.4 * (1 + math.cos(0.6 * math.pi)), "linear": 0.8 * 0.4}
    assert rates[60] == pytest.approx(expected[name])


def test_unknown_and_unfit_optimizers_are_refused() -> None:
    with pytest.raises(UserError, match="unknown optimizer 'adamx' .did you mean ada.*; allowed: .*adamw"):
        check_optimizer("adamx")
    with pytest.raises(UserError, match="can't be combined with muon"):
        build_optimizer(timm.create_model("mc_vit_4_4_32"), OptimConfig(optimizer="muon", decay_all=True))
    check_optimizer("lookahead_adamw")


def test_optimizers_that_have_a_momentum() -> None:
    assert [has_momentum(name) for name in ("sgd", "NMuon", "muon", "lookahead_sgd")] == [True] * 4
    assert [has_momentum(name) for name in ("adamw", "lion", "lookahead_AdamW")] == [False] * 3


def test_a_name_in_capitals_is_the_same_optimizer() -> None:
    optimizer = build_optimizer(timm.create_model("mc_vit_4_4_32"), OptimConfig(optimizer="NMuon"))
    assert isinstance(optimizer, Muon) and optimizer.defaults["nesterov"]


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion", "nmuon"])
def test_timms_optimizers_by_name(name: str, seed: int) -> None:
    model = timm.create_model("mc_vit_4_4_32")
    before = model.head.weight.detach().clone()
    step(model, build_optimizer(model, OptimConfig(optimizer=name, lr=0.01, momentum=None)), torch.randn(2, 3, 32, 32))
    assert not torch.equal(before, model.head.weight)
