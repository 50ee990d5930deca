"""Networks of torchvision behind paths: the classifier of top-1 and top-5, and the Inception of FID, KID and IS.

Nothing is downloaded: weights are state dicts on this machine. Images go in one by one, on the CPU, so that a score
does not depend on what else was scored.
"""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines import storage
from pipelines.config import check
from pipelines.perceptual import read_weights

SMALLEST_PX = 64  # of an image that is classified: below it the last features are less than 2x2 px
NUM_FEATURES = 2048
LABELS_FILE = "labels.json"
_INPUT_PX = 299
_FID_CLASSES = 1008  # the 2015 network's; torchvision's own has 1000
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_CLASSIFIER_URL = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
_DECLARED: list[Any] = []
_INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


def labels_of(keys: Sequence[str], *, source_uri: str, num_classes: int | None = None) -> dict[str, int] | None:
    """Return the class index of each image: of `labels.json` in the data set's root, else of its top folder.

    labels.json: {key: class index}. Without it the classes are the sorted names of the folders in the root, as for
    torchvision's ImageFolder, so keys must be those of the whole set. None where no key lies in a folder.
    num_classes: those of the classifier, which as many folders must name, or index 3 would mean another thing to it.
    Raises ValueError for labels that cannot be read, an image without one, and folders that are no classes.
    """
    place = storage.join(source_uri, LABELS_FILE)
    if storage.exists(place):
        labels = _read_labels(place, num_classes)
        missing = [key for key in keys if key not in labels]
        check(not missing, place, f"{len(missing)} of {len(keys)} missing", "must have a class for every image",
              f"add {missing[:1]}")  # fmt: skip
        return {key: labels[key] for key in keys}
    folders = sorted({key.split("/")[0] for key in keys if "/" in key})
    if not folders:
        return None
    bare = [key for key in keys if "/" not in key]
    check(not bare, "dataset", bare[:1], "must lie in a class folder, as other images do", f"write a {LABELS_FILE}")
    check(num_classes in (None, len(folders)), "dataset", f"{len(folders)} class folders", "must have as many as the "
          f"classifier has classes, {num_classes}", f"write a {LABELS_FILE} of class indices")  # fmt: skip
    return {key: folders.index(key.split("/")[0]) for key in keys}


@functools.cache
def torchvision_models() -> Any:
    """Return the module torchvision.models. Raises ValueError where torchvision is not installed, or is not usable.

    Beside another build of torch than its own (the registry's torchvision is made for CUDA's) its compiled operators
    do not load. It means to do without them, and no classifier needs one, but its import stops at the first for which
    it registers a shape function. Those are declared here, without an implementation.
    """
    while True:
        try:
            import torchvision.models

            return torchvision.models
        except ModuleNotFoundError as error:
            raise ValueError("classifier and inception need torchvision; install it with pip install "
                             "diffsr[perceptual], or leave them out") from error  # fmt: skip
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None or hasattr(torch.ops.torchvision, missing[1]):
                raise ValueError(f"torchvision cannot be imported beside torch {torch.__version__}: {error}; install "
                                 "the one that belongs to it") from error  # fmt: skip
            _declare(f"{missing[1]}() -> ()")


class Classifier:
    """torchvision's ResNet-50, as in SR3's classifier experiment, by its weights. Built once a process."""

    def __init__(self, path: str | Path) -> None:
        """Read the weights; as many classes as they have. Raises ValueError where they are not this network's."""
        found = read_weights(Path(path), reader="--classifier (torchvision's resnet50)", url=_CLASSIFIER_URL)
        self.num_classes = _num_classes(found, path)
        with torch.device("meta"):
            network = torchvision_models().resnet50(num_classes=self.num_classes)
        self._network = _filled(network, found, path)

    def rank(self, pixels: NDArray[np.uint8], label: int) -> int:
        """Return how many classes are held for more likely than `label`: 0 is top-1, below 5 is top-5.

        pixels: as for `logits`, at least 64 px each way. A class that is held for as likely counts against the label,
        and so does one without a number. Raises ValueError for another label than 0 .. num_classes - 1.
        """
        check(0 <= label < self.num_classes, "label", label, f"must be from 0 to {self.num_classes - 1}, the classes "
              "of the classifier", "correct the labels, or give the weights of their classes")  # fmt: skip
        logits = self.logits(pixels)
        return int((~(logits < logits[label])).sum()) - 1

    @torch.inference_mode()
    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return float32 (num_classes,) of uint8 (H, W, 1 or 3): the image whole, with ImageNet's normalisation."""
        image = _rgb(pixels) / 255
        image = (image - image.new_tensor(_MEAN)[:, None, None]) / image.new_tensor(_DEVIATION)[:, None, None]
        found: NDArray[np.float32] = self._network(image)[0].numpy()
        return found


class Inception:
    """The network of FID, KID and the inception score, by its weights. Built once a process.

    With the 1008 classes of pytorch-fid's file it is the network of the published numbers: average poolings that leave
    the padding out, and a maximum pooling in the last block. Else torchvision's own inception_v3.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the weights. Raises ValueError where they are not this network's."""
        found = read_weights(Path(path), reader="--inception (the network of FID)", url=_INCEPTION_URL)
        found = {key: value for key, value in found.items() if not key.startswith("AuxLogits.")}  # for training alone
        num_classes = _num_classes(found, path)
        options = {"weights": None, "aux_logits": False, "transform_input": False, "init_weights": False}
        with torch.device("meta"):
            network = torchvision_models().inception_v3(num_classes=num_classes, **options)
        _filled(network, found, path)
        if num_classes == _FID_CLASSES:
            mean = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
                _pool_with(network, f"Mixed_{name}", mean)
            _pool_with(network, "Mixed_7c", nn.MaxPool2d(3, stride=1, padding=1))
        self._head: nn.Linear = network.fc
        network.fc = nn.Identity()
        self._body = network.eval()

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the features (2048,) of the last pooling, and the probabilities of the classes, of a whole image.

        pixels: uint8 (H, W, 1 or 3) of any size; resized to 299x299 px, bilinear as pytorch-fid does, in [-1, 1].
        """
        image = nn.functional.interpolate(
            _rgb(pixels) / 255, size=(_INPUT_PX, _INPUT_PX), mode="bilinear", align_corners=False
        )
        features = self._body(2 * image - 1)
        return features[0].numpy(), self._head(features).softmax(dim=1)[0].numpy()


class _Pooled(nn.Module):
    """A block of torchvision's Inception whose last branch, the pooling, pools in another way."""

    def __init__(self, block: Any, pool: nn.Module) -> None:
        super().__init__()
        self.block: Any = block
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        *others, _ = self.block._forward(x)  # the pooling branch is a small part of the block, and made twice
        return torch.cat([*others, self.block.branch_pool(self.pool(x))], dim=1)


def _pool_with(network: nn.Module, name: str, pool: nn.Module) -> None:
    setattr(network, name, _Pooled(getattr(network, name), pool))


def _declare(operator: str) -> None:
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(operator)
    _DECLARED.append(library)  # what it declares goes when it goes


def _rgb(pixels: NDArray[np.uint8]) -> Tensor:
    """Return float32 (1, 3, H, W) in 0..255; grey is repeated."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float().expand(1, 3, -1, -1)


def _num_classes(found: dict[str, Tensor], path: str | Path) -> int:
    bias = found.get("fc.bias")
    if bias is None or bias.ndim != 1 or not len(bias):
        raise ValueError(f"{path} has no fc.bias, one number a class; give torchvision's state dict as published")
    return len(bias)


def _filled(network: nn.Module, found: dict[str, Tensor], path: str | Path) -> nn.Module:
    """Return the network with these weights, in evaluation mode. Raises ValueError unless they are just its own."""
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    kept = {key: value.float() for key, value in found.items() if not key.endswith("num_batches_tracked")}
    for key in sorted(wanted.keys() | kept.keys()):
        held, own = (tuple(x[key].shape) if key in x else None for x in (kept, wanted))
        if held != own:
            raise ValueError(f"{path}: {key} has shape {held}, must have {own} (None: no such weight) for "
                             f"torchvision's {type(network).__name__}; give the file of this network")  # fmt: skip
    network.load_state_dict(kept, assign=True)
    return network.eval().requires_grad_(False)


def _read_labels(place: str, num_classes: int | None) -> dict[str, int]:
    try:
        labels: dict[str, int] = json.loads(storage.read_bytes(place))
    except ValueError as error:
        raise ValueError(f"{place} could not be read: {error}; write one object, image key to class index") from error
    check(isinstance(labels, dict), place, type(labels).__name__, "must be one object", "write image key: class index")
    for key, label in labels.items():
        known = type(label) is int and label >= 0 and (num_classes is None or label < num_classes)
        among = f" among {num_classes}" if num_classes else ""
        check(known, f"{place}, {key}", label, f"must be a class index{among}, an integer", "count from 0")
    return labels
