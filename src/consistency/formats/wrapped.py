"""State dicts as programs wrap them: sets of weights are found by the names that a network has, wherever they stand.

A checkpoint may hold its weights below other keys (`{"state_dict": ...}`, `{"model": ..., "ema": ...}`), and their names
may have prefixes (`module.` of DDP, `_orig_mod.` of torch.compile, `model.` of Lightning, `inner_model.` of k-diffusion).
Whatever stands before the names of one network is the place of one set. An average may also be kept without names: a
list in the order of the parameters (`shadow_params`), or names without their dots (LitEma).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from consistency.errors import require
from consistency.formats.pickles import Object, told

MOST_PARTS, MOST_LEVELS, MOST_LISTED = 50_000, 8, 16

NEUTRAL = {"", "_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module"}
"""What wraps a network without saying anything about its weights."""

WRAPPER = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What wraps a part of a network, inside its names."""

OTHER_STATE = re.compile(
    r"(alphas?|betas|sigmas|log|sqrt|posterior|logvar|num|lvlb)(_\w+)?|log_sigmas|steps?|epochs?|initted|decay"
    r"|n_averaged|global_step|iterations?|device_indicator|total_ops|total_params|ema_decay|timesteps"
)
"""Last parts of names of buffers that samplers, averages and profilers keep beside weights."""

NO_WEIGHTS = re.compile(r"optim|scheduler|scaler|loops|grads?$|rng|opt_state|hyper_parameters")
"""Keys below which no weights of a network stand, though the names of its parameters may."""

AVERAGE = re.compile(
    r"(^|[._])(ema|average[ds]?|avg|shadow|swa|polyak)|(ema|shadow|avg|averaged)($|[._\d])"
)
KINDS = {"online": "online", "student": "online", "target": "target", "teacher": "teacher"}
NO_AVERAGE = re.compile(r"no(n|t|t_in)?_?ema")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One set of weights in a file: where it stands, and its tensors under the network's own names.

    left: tensors beside it that belong to no set; without: why an average that stands there cannot be used, else empty.
    """

    parts: tuple[str, ...]
    weights: dict[str, Tensor]
    left: tuple[str, ...] = ()
    without: str = ""

    @property
    def label(self) -> str:
        """The place as a person would write it; empty for weights that stand in the open."""
        return ".".join(self.parts)

    @property
    def kind(self) -> str | None:
        """Which weights the place says that they are, by its innermost word for it; None if it says nothing."""
        told_by = [part.lower() for part in self.parts if part not in NEUTRAL]
        for part in told_by[::-1]:
            if AVERAGE.search(part) and not NO_AVERAGE.search(part):
                return "ema"
            for word, kind in KINDS.items():
                if word in part:
                    return kind
        return "online" if told_by else None

    def note(self, places: dict[str, "Place"]) -> str:
        """What a person should know of the choice among `places`; empty for weights that stand in the open, alone."""
        said = [f"takes the weights below {self.label[:80]}"] if self.label else []
        others = [name for name, place in places.items() if place is not self]
        if others:
            said.append(f"holds weights={' and weights='.join(others)} as well")
        if self.left:
            said.append(f"leaves out {len(self.left)} other tensors, such as {self.left[0][:80]}")
        return ", ".join(said)


def find(content: object, anchors: Sequence[str]) -> dict[str, Place]:
    """All sets of weights by the names that `weights=` takes.

    anchors: parameters that every network of the format has; what stands before all of them is a prefix.
    """
    places: list[Place] = []
    dotless: list[tuple[tuple[str, ...], dict[str, Tensor]]] = []
    for parts, state in _states(content):
        found = _split(parts, state, anchors)
        places += found[0]
        dotless += found[1]
    if not places:
        return {}
    first = next((p for p in places if p.kind in ("online", None)), places[0])
    places += [_dotted(parts, state, first) for parts, state in dotless]
    places += [_ordered(parts, listed, first) for parts, listed in _lists(content)]
    return _named(places)


def first_names(content: object, count: int = 4) -> str:
    """What a file holds, for a message: the first names of its first tensors, or else its keys."""
    for parts, state in _states(content):
        names = ", ".join(told(name).strip("'") for name in list(state)[:count])
        below = f" below {told('.'.join(parts))}" if parts else ""
        return f"{len(state)} tensors{below} named {names}{' ...' if len(state) > count else ''}"
    if isinstance(content, dict):
        keys = [told(key).strip("'") for key in list(content)[:count]]
        return f"the keys {', '.join(keys)}{' ...' if len(content) > count else ''}"
    return f"a {type(content).__name__}"


def _tensor(value: object) -> Tensor | None:
    """A tensor, or the tensor that an array of numpy is."""
    if isinstance(value, Object) and value.kind == "numpy.ndarray":
        value = value.state
    return value if isinstance(value, Tensor) else None


def _dictionaries(content: object) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """All dictionaries of a file with their places, the outer ones first; what holds others is walked once."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    for parts, value in waiting:  # grows while it is walked
        if isinstance(value, list | tuple) and 0 < len(value) <= MOST_LISTED:
            value = dict(enumerate(value))
        if not isinstance(value, dict) or id(value) in seen:
            continue
        if any(isinstance(inner, dict | list | tuple) for inner in value.values()):
            seen.add(id(value))
        yield parts, value
        if len(parts) < MOST_LEVELS and len(waiting) < MOST_PARTS:
            waiting += [
                ((*parts, str(key)[:80]), inner)
                for key, inner in value.items()
                if isinstance(inner, dict | list | tuple)
                and not NO_WEIGHTS.search(str(key).lower())
            ]


def _states(content: object) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """All dictionaries of named tensors, whatever else they hold."""
    for parts, value in _dictionaries(content):
        found = {k: _tensor(v) for k, v in value.items() if isinstance(k, str)}
        state = {name: tensor for name, tensor in found.items() if tensor is not None}
        if state:
            yield parts, state


def _split(
    parts: tuple[str, ...], state: dict[str, Tensor], anchors: Sequence[str]
) -> tuple[list[Place], list[tuple[tuple[str, ...], dict[str, Tensor]]]]:
    """The sets of weights in one dictionary: those with the network's names, and those whose names have lost their dots."""
    whole = _prefixes(state, anchors)
    if not whole:  # parts of a network may be wrapped one by one
        state = {WRAPPER.sub("", name): tensor for name, tensor in state.items()}
        whole = _prefixes(state, anchors)
    flat = _flat(anchors[0])
    tails = {n.removesuffix(flat) for n in state if n.endswith(flat) and "." in n}
    prefixes = whole | {f"{prefix.rpartition('.')[0]}." for prefix in tails}
    if not prefixes:
        return [], []
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    left = []
    longest = sorted(prefixes, key=len, reverse=True)
    for name, tensor in state.items():
        if OTHER_STATE.fullmatch(name.rpartition(".")[2]):
            continue
        prefix = next((prefix for prefix in longest if name.startswith(prefix)), None)
        if prefix is None:
            left.append(name)
        else:
            groups[prefix][WRAPPER.sub("", name.removeprefix(prefix))] = tensor

    def place(prefix: str) -> tuple[str, ...]:
        return (*parts, *prefix.removesuffix(".").split(".")) if prefix else parts

    found = [
        Place(parts=place(prefix), weights=group, left=tuple(left))
        for prefix, group in groups.items()
        if prefix in whole
    ]
    dotless = [(place(prefix), group) for prefix, group in groups.items() if prefix not in whole]
    return found, dotless


def _prefixes(state: dict[str, Tensor], anchors: Sequence[str]) -> set[str]:
    """What stands before all anchors of a network."""
    return {
        prefix
        for prefix in (n.removesuffix(anchors[0]) for n in state if n.endswith(anchors[0]))
        if prefix[-1:] in ("", ".") and all(f"{prefix}{anchor}" in state for anchor in anchors)
    }


def _flat(name: str) -> str:
    return name.replace(".", "")


def _dotted(parts: tuple[str, ...], state: dict[str, Tensor], first: Place) -> Place:
    """An average whose names have lost their dots, under the names of the weights in training."""
    names = {_flat(name): name for name in first.weights}
    anchor = next(name for name in state if name.endswith(tuple(names)))
    prefix = min((anchor.removesuffix(n) for n in names if anchor.endswith(n)), key=len)
    found = {
        names[tail]: tensor
        for tail, tensor in ((name.removeprefix(prefix), t) for name, t in state.items())
        if tail in names
    }
    whole = len(names) == len(first.weights) == len(found) == len(state)
    return Place(
        parts=parts,
        weights=found,
        without="" if whole else f"{len(state)} names without dots, not those of its network",
    )


def _lists(content: object) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
    """All averages that are kept as a list."""
    for parts, value in _dictionaries(content):
        listed = value.get("shadow_params")
        if isinstance(listed, list | tuple):
            tensors = [_tensor(t) for t in listed]
            yield (*parts, "shadow_params"), [t for t in tensors if t is not None]


def _ordered(parts: tuple[str, ...], listed: list[Tensor], first: Place) -> Place:
    """An average without names, under those of the weights in training, if number and shapes agree in their order."""
    names = [n for n in first.weights if not n.endswith(("resample_filter", "map_noise.freqs"))]
    same = [first.weights[n].shape for n in names] == [t.shape for t in listed]
    found = {**first.weights, **dict(zip(names, listed, strict=True))} if same else {}
    lacks = f"{len(listed)} tensors without names, whose order is not that of its network"
    return Place(parts=parts, weights=found, without="" if same else lacks)


def _named(places: list[Place]) -> dict[str, Place]:
    """Places by the name that `weights=` takes: what they are, and where several are the same, with what tells them apart."""
    once = {
        (p.kind, *((t.data_ptr(), t.shape) for t in p.weights.values())): p for p in places[::-1]
    }
    places = list(once.values())[::-1]
    alone = "ema" if len(places) == 1 else "online"
    found: dict[str, Place] = {}
    for kind in dict.fromkeys(place.kind or alone for place in places):
        same = [place for place in places if (place.kind or alone) == kind]
        if len(same) == 1 or kind == "ema":
            found[kind] = same[0]
        if len(same) > 1:
            steps = zip(*(place.parts for place in same), strict=False)
            shared = len(list(takewhile(lambda step: len(set(step)) == 1, steps)))
            found |= {f"{kind}:{'.'.join(place.parts[shared:])}": place for place in same}
    return found


def usable(place: Place, weights: str) -> Place:
    """The place, unless its tensors cannot be told apart."""
    require(
        not place.without,
        f"weights={weights} with names, or in the order of the network's parameters",
        f"{place.label}: {place.without}",
        "choose other weights= of this checkpoint",
    )
    return place
