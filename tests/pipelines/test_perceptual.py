"""Laws of LPIPS and of the readers of metric files."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors
from torch import nn

from diffsr_core.pixels import to_model_range
from diffsr_core.validation import ValidationRecipe, validate
from pipelines.perceptual import Lpips, cache_folder, load_lpips, read_features, read_pristine
from tests.core.tiny import RRDB_TWIN, model_of

# Two threads on networks this small wait for one another.
pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def alexnet_features() -> nn.Sequential:
    """The convolutional part of Krizhevsky's network as torchvision numbers it, written down layer by layer."""
    return nn.Sequential(
        *[nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)],
        *[nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)],
        *[nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True)],
        *[nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True)],
        *[nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)],
    )


def vgg16_features() -> nn.Sequential:
    """Configuration D of VGG as torchvision numbers it; an M is a pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, int(width), 3, padding=1), nn.ReLU(inplace=True)]
            channels = int(width)
    return nn.Sequential(*layers)


STACKS = {"alex": alexnet_features, "vgg": vgg16_features}


def random_backbone(net: str) -> nn.Sequential:
    torch.manual_seed(0)
    stack = STACKS[net]()
    for module in stack:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return stack


def write_backbone(path: Path, stack: nn.Sequential) -> None:
    state = {f"features.{key}": value for key, value in stack.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, path)


def write_heads(path: Path, net: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    heads = {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate(WIDTHS[net])}
    torch.save(heads, path)
    return heads


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    a = torch.rand(shape, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_torchmetrics_with_its_published_heads(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    stack = random_backbone(net)
    name = {"alex": "alexnet", "vgg": "vgg16"}[net]
    # torchmetrics asks torchvision for the stack alone; this stands in for it, so no weights are fetched.
    models = types.SimpleNamespace(**{name: lambda weights: types.SimpleNamespace(features=stack)})
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    oracle = theirs._LPIPS(net=net, pnet_rand=True)

    write_backbone(tmp_path / "backbone.pth", stack)
    heads = Path(theirs.__file__).parent / "lpips_models" / f"{net}.pth"
    model = load_lpips(net, backbone=tmp_path / "backbone.pth", heads=heads)
    for shape in ((2, 3, 64, 64), (1, 3, 49, 70)) if net == "alex" else ((1, 3, 32, 43),):
        a, b = pair(*shape)
        with torch.no_grad():
            expected = oracle(a, b).flatten()
        assert expected.min() > 1e-3
        assert model(a, b).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.fixture
def alex(tmp_path: Path) -> Lpips:
    write_backbone(tmp_path / "backbone.pth", random_backbone("alex"))
    write_heads(tmp_path / "heads.pth", "alex")
    return load_lpips("alex", backbone=tmp_path / "backbone.pth", heads=tmp_path / "heads.pth")


def test_the_formula_is_unit_features_squared_difference_heads_mean_and_sum(alex: Lpips, tmp_path: Path) -> None:
    stack, heads = random_backbone("alex"), torch.load(tmp_path / "heads.pth", weights_only=True)
    a, b = pair(1, 3, 63, 79)
    mean, spread = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = 0.0
    with torch.no_grad():
        x, y = ((z[0] - mean[:, None, None]) / spread[:, None, None] for z in (a, b))
        depth = 0
        for module in stack:
            x, y = module(x), module(y)
            if isinstance(module, nn.ReLU):
                first, second = (z.double() / z.double().norm(dim=0).clamp_min(1e-12) for z in (x, y))
                weights = heads[f"lin{depth}.model.1.weight"].flatten().double()
                total += float(torch.einsum("c,chw->hw", weights, (first - second) ** 2).mean())
                depth += 1
    assert depth == 5
    assert float(alex(a, b)) == pytest.approx(total, rel=1e-5)


def test_the_distance_is_zero_for_equals_symmetric_and_each_pair_its_own(alex: Lpips) -> None:
    a, b = pair(3, 3, 40, 48)
    assert alex(a, a).tolist() == [0, 0, 0]
    assert alex(a, b).tolist() == pytest.approx(alex(b, a).tolist(), rel=1e-6)
    alone = [float(alex(a[k : k + 1], b[k : k + 1])) for k in range(3)]
    assert alex(a, b).tolist() == pytest.approx(alone, rel=1e-5)


def test_the_network_is_frozen_and_its_distance_differentiable(alex: Lpips) -> None:
    assert not alex.training and not any(p.requires_grad for p in alex.parameters())
    a, b = pair(1, 3, 33, 33)
    a.requires_grad_()
    alex(a, b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().max() > 0


def test_a_pixel_without_any_feature_has_no_distance_and_a_finite_gradient(alex: Lpips) -> None:
    for weights in alex.features.parameters():
        weights.zero_()
    a, b = pair(1, 3, 33, 33)
    a.requires_grad_()
    distance = alex(a, b)
    distance.sum().backward()
    assert distance.item() == 0.0
    assert a.grad is not None and a.grad.isfinite().all()


@pytest.mark.parametrize(("net", "smallest"), [("alex", 31), ("vgg", 16)])
def test_the_smallest_image_is_as_small_as_the_network_allows(net: str, smallest: int) -> None:
    model = Lpips(net)  # type: ignore[arg-type]
    with torch.no_grad():
        assert model(*pair(1, 3, smallest, smallest + 3)).shape == (1,)
        with pytest.raises(ValueError, match=f"at least {smallest} px"):
            model(*pair(1, 3, smallest - 1, 99))
        with pytest.raises(RuntimeError):
            model.features(torch.zeros(1, 3, smallest - 1, smallest - 1))


def test_loading_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    write_backbone(tmp_path / "backbone.pth", random_backbone("alex"))
    write_heads(tmp_path / "heads.pth", "alex")
    before = torch.get_rng_state()
    load_lpips("alex", backbone=tmp_path / "backbone.pth", heads=tmp_path / "heads.pth")
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_found_in_the_users_cache_and_as_safetensors(
    alex: Lpips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "diffsr" / "lpips"
    cache_folder().mkdir(parents=True)
    write_backbone(cache_folder() / BACKBONES["alex"], random_backbone("alex"))
    heads = write_heads(cache_folder() / "alex.pth", "alex")
    save_tensors(heads, tmp_path / "heads.safetensors")
    a, b = pair(1, 3, 40, 40)
    assert torch.equal(load_lpips()(a, b), alex(a, b))
    assert torch.equal(load_lpips(heads=str(tmp_path / "heads.safetensors"))(a, b), alex(a, b))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "diffsr" / "lpips"


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_missing_weights_are_an_error_that_says_what_where_and_from_where(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load_lpips(net)  # type: ignore[arg-type]
    for part in (str(tmp_path / "diffsr/lpips" / BACKBONES[net]), "nothing is downloaded", "download.pytorch.org"):
        assert part in str(caught.value)
    torch.save({}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=rf"lpips/{net}\.pth, which is not there.*weights/v0\.1/{net}\.pth"):
        load_lpips(net, backbone=tmp_path / "backbone.pth")  # type: ignore[arg-type]


def test_files_that_hold_something_else_are_refused_by_name(tmp_path: Path) -> None:
    backbone, heads = tmp_path / "backbone.pth", tmp_path / "heads.pth"
    write_backbone(backbone, random_backbone("alex"))
    write_heads(heads, "alex")
    with pytest.raises(ValueError, match="net is 'squeeze'"):
        load_lpips("squeeze", backbone=backbone, heads=heads)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backbone: features.0.weight is of shape \(64, 3, 11, 11\)"):
        load_lpips("vgg", backbone=backbone, heads=heads)
    with pytest.raises(ValueError, match="heads: lin0.model.1.weight is missing"):
        load_lpips("alex", backbone=backbone, heads=backbone)
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, reason in (("bad.pth", "could not be read"), ("bad.safetensors", "could not be"), ("list.pth", "a list")):
        with pytest.raises(ValueError, match=reason):
            load_lpips("alex", backbone=tmp_path / name, heads=heads)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="could not be read"):
        load_lpips("alex", backbone=tmp_path / "trap.pth", heads=tmp_path / "trap.pth")
    np.save(tmp_path / "trap.npy", np.array([[Trap()]], dtype=object))
    with pytest.raises(ValueError, match="no features could be read"):
        read_features(tmp_path / "trap.npy")
    np.savez(tmp_path / "trap.npz", mu_pris_param=np.array([[Trap()]], dtype=object))
    with pytest.raises(ValueError, match="niqe_pris_params"):
        read_pristine(tmp_path / "trap.npz")
    assert not (tmp_path / "ran").exists()


def test_features_are_read_from_npy_and_safetensors(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", features)
    save_arrays({"anything": features}, tmp_path / "b.safetensors")
    save_arrays({"features": features, "logits": features + 1}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.safetensors", "c.safetensors"):
        assert np.array_equal(read_features(tmp_path / name), features)


def test_features_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.zeros(4))
    save_arrays({"a": np.zeros((2, 2)), "b": np.zeros((2, 2))}, tmp_path / "two.safetensors")
    (tmp_path / "bad.npy").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds shape \(4,\)"):
        read_features(tmp_path / "flat.npy")
    with pytest.raises(ValueError, match="are read from .npy and .safetensors"):
        read_features(tmp_path / "a.pkl")
    for name in ("two.safetensors", "bad.npy", "bad.safetensors", "none.npy", "none.safetensors"):
        with pytest.raises(ValueError, match=f"{name}.*no features could be read"):
            read_features(tmp_path / name)


def test_niqe_statistics_are_read_by_the_names_of_basicsr(tmp_path: Path) -> None:
    arrays = {
        "mu_pris_param": np.arange(36.0)[None],
        "cov_pris_param": np.eye(36),
        "gaussian_window": np.full((7, 7), 1 / 49),
    }
    np.savez(tmp_path / "good.npz", **arrays)
    found = read_pristine(tmp_path / "good.npz")
    assert (found.mean.shape, found.covariance.shape, found.window.shape) == ((36,), (36, 36), (7, 7))
    assert found.mean[35] == 35
    np.savez(tmp_path / "other.npz", mu=np.zeros(36))
    np.savez(tmp_path / "small.npz", **{**arrays, "cov_pris_param": np.eye(35)})
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    for name in ("other.npz", "small.npz", "array.npy", "bad.npz", "none.npz"):
        with pytest.raises(ValueError, match=name):
            read_pristine(tmp_path / name)


def test_a_validation_takes_lpips_as_it_is() -> None:
    torch.manual_seed(0)
    lpips = Lpips("alex").requires_grad_(False)
    hr, lr = (torch.rand(3, 3, side, side) * 2 - 1 for side in (32, 8))
    recipe = ValidationRecipe()
    metrics, strips = validate(
        model_of(RRDB_TWIN), hr, lr, stage="regression", recipe=recipe, perceptual=lpips, chunk=2
    )
    for index, method in enumerate(("bicubic", "regression")):
        rows = [[to_model_range(panel) for panel in np.split(strip, 3, axis=1)] for strip in strips]
        expected = np.mean([float(lpips(row[index], row[-1])) for row in rows])
        assert expected != 0 and metrics[f"val_lpips_{method}"] == pytest.approx(expected, rel=1e-4)
