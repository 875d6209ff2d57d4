"""Networks whose features measure images: Inception as published, any of torchvision, DINOv2, and a small one that is
always there.
"""

import hashlib
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torchvision.transforms import v2

from consistency.data.download import PATIENCE
from consistency.errors import UserError, require
from consistency.evaluation.classifier import digits_classifier
from consistency.paths import path_of
from consistency.runtime.ranks import gathered, print_once

INCEPTION = "inception"
CLASSIFIER = "classifier"
PUBLISHED = {"frechet": "fid", "kernel": "kid", "class_score": "inception_score"}
DINOV2 = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Seen(NamedTuple):
    """What an extractor makes of images: features, and class scores where it has classes."""

    features: Float[Tensor, "b f"]
    logits: Float[Tensor, "b k"] | None


class Extractor(nn.Module):
    """uint8 images (b, 1 or 3, h, w) of any size -> `Seen`.

    name: what stands behind the measures' names, none for the published Inception; protocol: what a number measured with
    it depends on: the network, the SHA-256 of its weights, how it resizes; unseen: whether the network was trained on the
    training images, so that other ones have to be the reference.
    """

    def __init__(
        self,
        network: nn.Module,
        see: Callable[[nn.Module, Tensor], Seen],
        *,
        name: str,
        resize: str,
        unseen: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.see = network.eval().requires_grad_(False), see
        self.name, self.unseen = name, unseen
        self.protocol = {
            "extractor": name,
            "weights_sha256": digest(network.state_dict().items()),
            "resize": resize,
        }

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device

    @property
    def summing(self) -> torch.device:
        """Where statistics are summed: on the device, unless that has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def train(self, mode: bool = True) -> "Extractor":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Seen:
        return self.see(self.network, images)

    def named(self, measure: str) -> str:
        """The full name of a measure: `fid` is for Inception alone, any other says whose features they are."""
        if self.name == INCEPTION:
            for ours, published in PUBLISHED.items():
                measure = measure.replace(ours, published)
            return measure
        return f"{measure}_{self.name}"


def colour(images: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Grey images with three equal channels; others as they are."""
    return images.expand(-1, 3, -1, -1)


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and values of weights."""
    found = hashlib.sha256()
    for name, value in sorted(weights):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def extractor_of(name: str) -> Extractor:
    """The extractor of that name: inception, classifier, a path to weights of Inception in torch-fidelity's layout, a model
    of torchvision such as resnet50, or a DINOv2 such as dinov2_vitl14.

    Raises `UserError` where there is none, or its weights are neither there nor to be had.
    """
    if name == INCEPTION:
        return inception(inception_weights())
    if name == CLASSIFIER:
        return small_classifier()
    if name in DINOV2:
        return dinov2(name)
    if name in torchvision.models.list_models(module=torchvision.models):
        return torchvision_model(name)
    path = path_of(name)
    require(
        path.is_file(),
        f"{INCEPTION}, {CLASSIFIER}, a file of Inception's weights, a classifier of torchvision or one of {', '.join(DINOV2)} "
        "in evaluation.extractor",
        name,
        "check the name or the path; a path is taken relative to the folder the command runs in",
    )
    return inception(path)


# ------------------------------------------------------------------------ Inception


def inception_file() -> Path:
    """Where torch hub keeps the published weights: those of 2015-12-05, which all published FID are measured with."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name


def inception_weights() -> Path:
    """The published weights, fetched if they are not there; `UserError` where they cannot be had."""
    path = inception_file()
    if not path.is_file():
        fetched(lambda: torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True),
                f"Inception's weights, the file {path}", URL_INCEPTION_V3)  # fmt: skip
    return path


def inception(path: Path) -> Extractor:
    """The network of the published FID, with weights from a file in torch-fidelity's layout."""
    try:
        torch.load(
            path, map_location="cpu", weights_only=True
        )  # torch-fidelity itself unpickles anything
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], str(path)
        )
    except Exception as error:  # damaged and foreign files fail in any way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"expected weights of Inception in torch-fidelity's layout at {path}\n  got: {reason[:200]}\n"
            f"  do: fetch {URL_INCEPTION_V3}, or name another evaluation.extractor"
        ) from error

    def see(network: nn.Module, images: Tensor) -> Seen:
        return Seen(*network(colour(images)))

    resize = "299x299, bilinear as TensorFlow 1 did it, inside the network"
    return Extractor(network, see, name=INCEPTION, resize=resize)


# ------------------------------------------------------------------------ others


def small_classifier() -> Extractor:
    """The small classifier of the default data set, on images made grey and small."""
    print_once("Training the small classifier whose features measure the samples ...")
    trained, size = digits_classifier()
    network = deepcopy(trained)
    # Rounding may differ between machines and numbers of threads: what rank 0 trained is what counts.
    network.load_state_dict(gathered(network.state_dict())[0])

    def see(network: nn.Module, images: Tensor) -> Seen:
        grey = images.float().mean(1, keepdim=True).round().to(torch.uint8)
        if grey.shape[-2:] != (size, size):
            grey = v2.functional.resize(grey, [size, size], antialias=True)
        features, logits = network.features_and_logits(grey)  # type: ignore[operator]
        return Seen(features, logits)

    resize = f"mean of the channels, {size}x{size} where images are not, bilinear with antialiasing"
    return Extractor(network, see, name=CLASSIFIER, resize=resize, unseen=True)


def torchvision_model(name: str) -> Extractor:
    """A classifier of torchvision: the input of its last linear layer are the features."""
    choice: Any = torchvision.models.get_model_weights(name).DEFAULT
    network = fetched(lambda: torchvision.models.get_model(name, weights=choice),
                      f"the weights of torchvision's {name} in {Path(torch.hub.get_dir()) / 'checkpoints'}", choice.url)  # fmt: skip
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    require(bool(linear), "a model with a last linear layer", name, "choose another")
    preprocess, taken = choice.transforms(), []
    linear[-1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))

    def see(network: nn.Module, images: Tensor) -> Seen:
        logits = network(preprocess(colour(images)))
        return Seen(taken.pop().float(), logits.float())

    return Extractor(network, see, name=name, resize=" ".join(str(preprocess).split()))


def dinov2(name: str) -> Extractor:
    """A DINOv2 [Oquab et al. 2023, arXiv:2304.07193] of torch hub; FD-DINOv2 of Stein et al. 2023, arXiv:2306.04675, is
    the Fréchet distance in the features of dinov2_vitl14.
    """
    repository = "facebookresearch/dinov2"
    with redirect_stdout(sys.stderr):
        network = fetched(lambda: torch.hub.load(repository, name, trust_repo=True, verbose=False),
                          f"{name} in torch hub's folder {torch.hub.get_dir()}", f"github.com/{repository}")  # fmt: skip
    preprocess = v2.Compose(
        [
            v2.Resize([224, 224], v2.InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def see(network: nn.Module, images: Tensor) -> Seen:
        return Seen(network(preprocess(colour(images))), None)

    return Extractor(network, see, name=name, resize="224x224, bicubic with antialiasing")


def fetched(fetch: Callable[[], Any], needed: str, source: str) -> Any:
    """What `fetch` returns; a server that does not answer is given up after a while."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        return fetch()
    except (URLError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"expected {needed}\n  got: no such file, and the download failed ({str(error)[:200]})\n"
            f"  do: on a machine with a network fetch {source} and put it there (TORCH_HOME moves the folder)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
