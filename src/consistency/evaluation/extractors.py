"""Networks whose features measure images: the published Inception, those of torchvision, DINOv2, and a small classifier."""

import hashlib
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchvision.transforms import v2

from consistency.data.download import timeout
from consistency.errors import UserError, require
from consistency.evaluation.classifier import digits_classifier
from consistency.runtime.files import path_of
from consistency.runtime.ranks import gathered, print_once
from consistency.training.lpips import IMAGENET_MEAN, IMAGENET_STD

URL_INCEPTION_V3 = fidelity.URL_INCEPTION_V3
INCEPTION = "inception"
CLASSIFIER = "classifier"
PUBLISHED = {"frechet": "fid", "kernel": "kid", "class_score": "inception_score"}
DINOV2 = ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14")


class Extracted(NamedTuple):
    """The output of an extractor; logits are None for a network without classes."""

    features: Float[Tensor, "b f"]
    logits: Float[Tensor, "b k"] | None


class Extractor(nn.Module):
    """uint8 images (b, 1 or 3, h, w) of any size -> `Extracted`.

    extract: (network, images) -> features and logits.
    name: ends the names of the metrics, except for the published Inception.
    resize: how images are resized, for the protocol.
    trained_on_train_set: whether the network was trained on the training images, so that others must be the reference.
    """

    def __init__(
        self,
        network: nn.Module,
        extract: Callable[[nn.Module, Tensor], Extracted],
        *,
        name: str,
        resize: str,
        trained_on_train_set: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.extract = network.eval().requires_grad_(False), extract
        self.name, self.trained_on_train_set = name, trained_on_train_set
        self.protocol = {
            "extractor": name,
            "weights_sha256": digest(network.state_dict().items()),
            "resize": resize,
        }

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.parameters()).device

    @property
    def summing(self) -> torch.device:
        """The device that sums statistics: the network's, or the CPU if that has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Extracted:
        return self.extract(self.network, images)

    def named(self, metric: str) -> str:
        """Return the full name of a metric: `fid` for Inception, `frechet_<extractor>` for others."""
        if self.name != INCEPTION:
            return f"{metric}_{self.name}"
        for ours, published in PUBLISHED.items():
            metric = metric.replace(ours, published)
        return metric


def colour(images: UInt8[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Return grey images with three equal channels, others as they are."""
    return images.expand(-1, 3, -1, -1)


def digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names and values of weights."""
    sha256 = hashlib.sha256()
    for name, value in sorted(weights):
        sha256.update(name.encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def extractor_of(name: str) -> Extractor:
    """Return the extractor of that name.

    name: inception, classifier, a file of weights of Inception in torch-fidelity's layout, a model of torchvision such as
        resnet50, or a DINOv2 such as dinov2_vitl14.
    """
    if name == CLASSIFIER:
        return small_classifier()
    if name in DINOV2:
        return dinov2(name)
    if name in torchvision.models.list_models(module=torchvision.models):
        return torchvision_model(name)
    path = inception_weights() if name == INCEPTION else path_of(name)
    require(
        path.is_file(),
        f"{INCEPTION}, {CLASSIFIER}, a file of Inception's weights, a classifier of torchvision or one of {', '.join(DINOV2)} "
        "in evaluation.extractor",
        name,
        "check the name or the path; a path is relative to the folder the command runs in",
    )
    return inception(path)


def inception_file() -> Path:
    """Return torch hub's path of the published weights: those of 2015-12-05, behind all published FID."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name


def inception_weights() -> Path:
    """Return the file of the published weights. Downloads it if it is missing."""
    path = inception_file()
    if not path.is_file():
        load = partial(torch.hub.load_state_dict_from_url, check_hash=True, weights_only=True)
        downloaded(
            partial(load, URL_INCEPTION_V3),
            f"Inception's weights, the file {path}",
            URL_INCEPTION_V3,
        )
    return path


def inception(path: Path) -> Extractor:
    """Return the network of the published FID, with weights from a file in torch-fidelity's layout."""
    try:
        # torch-fidelity would unpickle anything.
        torch.load(path, map_location="cpu", weights_only=True)
        outputs = ["2048", "logits_unbiased"]
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", outputs, str(path))
    except Exception as error:  # damaged and foreign files fail in any way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"weights of Inception in torch-fidelity's layout at {path}",
            reason[:200],
            f"download {URL_INCEPTION_V3}, or name another evaluation.extractor",
        ) from error

    def extract(network: nn.Module, images: Tensor) -> Extracted:
        return Extracted(*network(colour(images)))

    resize = "299x299, bilinear as TensorFlow 1 did it, inside the network"
    return Extractor(network, extract, name=INCEPTION, resize=resize)


def small_classifier() -> Extractor:
    """Return the small classifier of the default data set; it takes images as grey and small."""
    print_once("Training the small classifier whose features measure the samples ...")
    trained, size = digits_classifier()
    network = deepcopy(trained)
    # Roundings differ between machines and numbers of threads, so all ranks take the weights of rank 0.
    network.load_state_dict(gathered(network.state_dict())[0])

    def extract(network: nn.Module, images: Tensor) -> Extracted:
        grey = images.float().mean(1, keepdim=True).round().to(torch.uint8)
        if grey.shape[-2:] != (size, size):
            grey = v2.functional.resize(grey, [size, size], antialias=True)
        features = network(grey)
        return Extracted(features, network.logits(features))  # type: ignore[operator]

    resize = f"mean of the channels, {size}x{size} where images are not, bilinear with antialiasing"
    return Extractor(network, extract, name=CLASSIFIER, resize=resize, trained_on_train_set=True)


def torchvision_model(name: str) -> Extractor:
    """Return a classifier of torchvision; its features are the input of its last linear layer."""
    choice: Any = torchvision.models.get_model_weights(name).DEFAULT
    get, folder = partial(torchvision.models.get_model, weights=choice), inception_file().parent
    weights = f"the weights of torchvision's {name} in {folder}"
    network = downloaded(partial(get, name), weights, choice.url)
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)]
    require(bool(linear), "a model with a last linear layer", name, "choose another")
    preprocess, taken = choice.transforms(), []
    linear[-1].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))

    def extract(network: nn.Module, images: Tensor) -> Extracted:
        logits = network(preprocess(colour(images)))
        return Extracted(taken.pop().float(), logits.float())

    return Extractor(network, extract, name=name, resize=" ".join(str(preprocess).split()))


def dinov2(name: str) -> Extractor:
    """Return a DINOv2 [Oquab et al. 2023, arXiv:2304.07193] of torch hub.

    FD-DINOv2 of Stein et al. 2023, arXiv:2306.04675, is the Fréchet distance in the features of dinov2_vitl14.
    """
    repository, needed = "facebookresearch/dinov2", f"{name} in torch hub's {torch.hub.get_dir()}"
    fetch = partial(torch.hub.load, repository, name, trust_repo=True, verbose=False)
    with redirect_stdout(sys.stderr):
        network = downloaded(fetch, needed, f"github.com/{repository}")
    resize = v2.Resize([224, 224], v2.InterpolationMode.BICUBIC, antialias=True)
    scale = v2.ToDtype(torch.float32, scale=True)
    preprocess = v2.Compose([resize, scale, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def extract(network: nn.Module, images: Tensor) -> Extracted:
        return Extracted(network(preprocess(colour(images))), None)

    return Extractor(network, extract, name=name, resize="224x224, bicubic with antialiasing")


def downloaded(fetch: Callable[[], Any], needed: str, source: str) -> Any:
    """Call `fetch`, which downloads `needed` from `source`, with a timeout."""
    try:
        with timeout():
            return fetch()
    except (URLError, OSError, RuntimeError, ValueError) as error:
        got = f"no such file, and the download failed ({str(error)[:200]})"
        remedy = f"on a machine with a network download {source} and put it there (TORCH_HOME moves the folder)"
        raise UserError(needed, got, remedy) from error
