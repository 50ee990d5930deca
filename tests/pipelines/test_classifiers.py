"""Laws of the networks behind paths: they are torchvision's and FID's, and a file that is not theirs is refused."""

import builtins
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipelines import classifiers
from pipelines.classifiers import Classifier, Inception, labels_of, torchvision_models

# Two threads on one image wait for one another, and round otherwise.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> Any:
    try:
        return torchvision_models()
    except ValueError as error:
        pytest.skip(str(error))


def random_network(build: Callable[[], nn.Module], *, seed: int = 0) -> nn.Module:
    """Weights of full variance, and running statistics that are not those of a new network."""
    with torch.device("meta"):
        network = build()
    network = network.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.zero_()
        elif value.ndim > 1:
            value.normal_(generator=generator).mul_((2 / value[0].numel()) ** 0.5)
        elif "bias" in key or "mean" in key:
            value.uniform_(-0.3, 0.3, generator=generator)
        else:
            value.uniform_(0.7, 1.3, generator=generator)
    return network


@pytest.fixture(scope="module")
def resnet(models: Any) -> nn.Module:
    return random_network(partial(models.resnet50, num_classes=10))


@pytest.fixture(scope="module")
def folder(models: Any, resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("weights")
    torch.save(resnet.state_dict(), place / "resnet.pth")
    return place


def inception(models: Any, *, num_classes: int, aux_logits: bool = False) -> nn.Module:
    options = {"num_classes": num_classes, "aux_logits": aux_logits, "transform_input": False, "init_weights": False}
    return random_network(partial(models.inception_v3, weights=None, **options))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """A smooth image and noise: not what a network takes for the same whatever is done to it."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, shape[1])[None, :, None] + np.linspace(0, 30, shape[0])[:, None, None]
    return (ramp + rng.integers(0, 25, shape)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 64, 3), (97, 70, 1)])
def test_a_rank_is_that_of_torchvisions_own_preprocessing_and_network(
    resnet: nn.Module, folder: Path, shape: tuple[int, ...]
) -> None:
    from torchvision.transforms.functional import normalize, to_tensor

    image = pixels(*shape)
    whole = to_tensor(np.repeat(image, 3 // shape[2], axis=2))[None]
    with torch.inference_mode():
        logits = resnet(normalize(whole, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))[0].numpy()
    network = Classifier(folder / "resnet.pth")
    assert network.num_classes == 10
    assert network.logits(image) == pytest.approx(logits, rel=1e-5, abs=1e-6)
    order = np.argsort(-logits)
    assert [network.rank(image, int(order[place])) for place in (0, 4, 9)] == [0, 4, 9]


def test_a_label_that_is_no_class_of_the_classifier_is_a_persons_mistake(folder: Path) -> None:
    network = Classifier(folder / "resnet.pth")
    for label in (-1, 10):
        with pytest.raises(ValueError, match=rf"label \({label}\) must be from 0 to 9"):
            network.rank(pixels(64, 64, 3), label)


def test_weights_that_give_no_number_know_no_class_and_equal_ones_are_no_guess(resnet: nn.Module, folder: Path) -> None:
    state = dict(resnet.state_dict())
    for name, bias in (("nan", torch.full((10,), torch.nan)), ("flat", torch.zeros(10))):
        torch.save(state | {"fc.bias": bias, "fc.weight": torch.zeros(10, 2048)}, folder / f"{name}.pth")
        assert Classifier(folder / f"{name}.pth").rank(pixels(64, 64, 3), 0) == 9


def test_safetensors_and_pth_are_the_same_weights(resnet: nn.Module, folder: Path) -> None:
    kept = {key: value for key, value in resnet.state_dict().items() if "num_batches" not in key}  # as older files
    save_file(kept, folder / "resnet.safetensors")
    first, second = (Classifier(folder / f"resnet.{suffix}") for suffix in ("pth", "safetensors"))
    image = pixels(64, 80, 3)
    assert np.array_equal(first.logits(image), second.logits(image))


def test_with_1008_classes_the_network_is_that_of_fid(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.models.inception as blocks

    published = inception(models, num_classes=1008)
    torch.save(published.state_dict(), tmp_path / "fid.pth")
    image = pixels(48, 64, 3)
    found, probabilities = Inception(tmp_path / "fid.pth")(image)
    own = direct(published, image)[0]

    functional = torch.nn.functional

    def pool(x: torch.Tensor, **options: Any) -> torch.Tensor:  # pytorch-fid's, by the only layer of 2048 channels
        if x.shape[1] == 2048:
            return functional.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return functional.avg_pool2d(x, **options, count_include_pad=False)

    class Functional:
        avg_pool2d = staticmethod(pool)
        max_pool2d, relu = functional.max_pool2d, functional.relu

    monkeypatch.setattr(blocks, "F", Functional)
    features, expected = direct(published, image)
    assert (found.shape, found.dtype, probabilities.shape) == ((2048,), np.float32, (1008,))
    assert found == pytest.approx(features, rel=1e-4, abs=1e-5)
    assert probabilities == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert np.abs(found - own).max() > 0.1 * np.abs(own).max()  # torchvision's own pooling gives another result


def direct(network: nn.Module, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's own call: features of its last pooling, and the softmax of what it returns."""
    kept: list[torch.Tensor] = []
    hook = network.avgpool.register_forward_hook(lambda _, __, out: kept.append(out.flatten()))
    x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    x = nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        logits = network(x)[0]
    hook.remove()
    return kept[0].numpy(), logits.softmax(dim=0).numpy()


def test_with_other_classes_it_is_torchvisions_own_and_the_branch_for_training_is_left_out(
    models: Any, tmp_path: Path
) -> None:
    network = inception(models, num_classes=1000, aux_logits=True)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    grey = pixels(64, 48, 1)
    found, probabilities = Inception(tmp_path / "own.pth")(grey)
    features, expected = direct(network, np.repeat(grey, 3, axis=2))
    assert found == pytest.approx(features, rel=1e-4, abs=1e-5)
    assert probabilities == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5) and probabilities.shape == (1000,)


def test_weights_of_another_network_are_refused_by_the_first_that_differs(resnet: nn.Module, folder: Path) -> None:
    state = dict(resnet.state_dict())
    cases = {
        "deeper": (state | {"layer3.6.conv1.weight": torch.zeros(2)}, r"layer3.6.conv1.weight has shape \(2,\)"),
        "narrow": (state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, r"conv1.weight has shape \(64, 1, 7, 7\), must"),
        "short": ({key: value for key, value in state.items() if key != "bn1.bias"}, "bn1.bias has shape None"),
        "headless": ({"conv1.weight": state["conv1.weight"]}, "has no fc.bias"),
        "list": ([torch.zeros(2)], "holds a list"),
    }
    for name, (content, said) in cases.items():
        torch.save(content, folder / f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name}.pth.*{said}"):
            Classifier(folder / f"{name}.pth")
    with pytest.raises(ValueError, match=r"resnet.pth: .* for torchvision's Inception3"):
        Inception(folder / "resnet.pth")


def test_a_missing_file_is_an_error_that_names_the_flag_and_where_the_file_is_published(tmp_path: Path) -> None:
    for build, flag, name in ((Classifier, "--classifier", "resnet50-"), (Inception, "--inception", "pt_inception-")):
        with pytest.raises(ValueError, match=rf"{flag}.*none.pth, which is not there; nothing is downloaded.*{name}"):
            build(tmp_path / "none.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"fc.bias": Trap()}, tmp_path / "trap.pth")
    for build in (Classifier, Inception):
        with pytest.raises(ValueError, match="could not be read as weights"):
            build(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def another_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a package of that name, with this text, before the real one."""

    def install(text: str) -> None:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision/__init__.py").write_text(text)
        (tmp_path / "torchvision/models.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        torchvision_models.cache_clear()

    yield install
    for name in ("torchvision", "torchvision.models"):
        sys.modules.pop(name, None)
    torchvision_models.cache_clear()


def test_a_torchvision_whose_operators_belong_to_another_torch_is_used_without_them(
    another_torchvision: Callable[[str], None], tmp_path: Path
) -> None:
    names = ("absent_in_a_test", "also_absent_in_a_test")
    shape = "import torch\n" + "".join(
        f"@torch.library.register_fake('torchvision::{name}')\ndef {name}(): pass\n" for name in names
    )
    another_torchvision(shape)
    assert Path(torchvision_models().__file__).parent == tmp_path / "torchvision"
    assert all(hasattr(torch.ops.torchvision, name) for name in names)


def test_a_torchvision_that_cannot_be_used_or_is_not_there_is_an_error_with_a_remedy(
    another_torchvision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    another_torchvision("raise RuntimeError('operator of another kind')")
    with pytest.raises(ValueError, match="of another kind; install the one that belongs to it"):
        torchvision_models()

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("torchvision"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install diffsr\[perceptual\]"):
        torchvision_models()


def test_importing_the_module_imports_no_torchvision() -> None:
    text = Path(classifiers.__file__).read_text()
    assert "\nimport torchvision" not in text and "\nfrom torchvision" not in text


def test_labels_are_the_places_of_the_sorted_class_folders(tmp_path: Path) -> None:
    keys = ["n02/b.png", "n01/a.png", "n10/deep/c.png", "n02/a.png"]
    expected = {"n02/b.png": 1, "n01/a.png": 0, "n10/deep/c.png": 2, "n02/a.png": 1}
    assert labels_of(keys, source_uri=str(tmp_path)) == expected
    assert labels_of(keys, source_uri=str(tmp_path), num_classes=3) == expected
    with pytest.raises(ValueError, match=r"3 class folders.*must have as many as the classifier has classes, 1000"):
        labels_of(keys, source_uri=str(tmp_path), num_classes=1000)
    with pytest.raises(ValueError, match="bare.png.*must lie in a class folder"):
        labels_of([*keys, "bare.png"], source_uri=str(tmp_path))
    assert labels_of(["a.png", "b.png"], source_uri=str(tmp_path)) is None


def test_a_file_of_labels_comes_before_folders(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"x/a.png": 7, "b.png": 0, "unused.png": 3}))
    assert labels_of(["x/a.png", "b.png"], source_uri=str(tmp_path), num_classes=8) == {"x/a.png": 7, "b.png": 0}
    with pytest.raises(ValueError, match=r"1 of 2 missing.*must have a class for every image; add \['c.png'\]"):
        labels_of(["b.png", "c.png"], source_uri=str(tmp_path))
    with pytest.raises(ValueError, match=r"x/a.png \(7\) must be a class index among 7"):
        labels_of(["b.png"], source_uri=str(tmp_path), num_classes=7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "could not be read"),
        ("\xff", "could not be read"),
        ("[1]", "must be one object"),
        ('{"a.png": -1}', "must be a class index"),
        ('{"a.png": true}', "must be a class index"),
        ('{"a.png": 1.0}', "must be a class index"),
        ('{"a.png": "cat"}', "must be a class index"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"labels.json.*{said}"):
        labels_of(["a.png"], source_uri=str(tmp_path))
