"""State dicts as programs wrap them: sets of weights are found by the names that a network has, below any keys.

A checkpoint may hold its weights below other keys (`{"state_dict": ...}`, `{"model": ..., "ema": ...}`), and their names
may have prefixes (`module.` of DDP, `_orig_mod.` of torch.compile, `model.` of Lightning, `inner_model.` of k-diffusion).
Keys and prefix together are the location of one set. An average may also lack names: a list in the order of the
parameters (`shadow_params`), or names without their dots (LitEma).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from consistency.checkpoints.contents import Checkpoint, Hints, Object, StateDict, brief, check
from consistency.inference.card import ModelCard

MOST_PARTS, MOST_LEVELS, MOST_LISTED = 50_000, 8, 16

Keys: TypeAlias = tuple[str, ...]
OpenedState: TypeAlias = tuple[ModelCard, list[str], Callable[[StateDict], StateDict]]

NEUTRAL = {"", "_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module"}
"""Wrappers of a network that do not name its weights."""

WRAPPER = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Wrappers of a part of a network, inside its names."""

OTHER_STATE = re.compile(
    r"(alphas?|betas|sigmas|log|sqrt|posterior|logvar|num|lvlb)(_\w+)?|log_sigmas|steps?|epochs?|initted|decay"
    r"|n_averaged|global_step|iterations?|device_indicator|total_ops|total_params|ema_decay|timesteps"
)
"""Last parts of names of buffers that samplers, averages and profilers keep beside weights."""

NO_WEIGHTS = re.compile(r"optim|scheduler|scaler|loops|grads?$|rng|opt_state|hyper_parameters")
"""Keys without weights of a network below them, though with the names of its parameters."""

AVERAGE = re.compile(
    r"(^|[._])(ema|average[ds]?|avg|shadow|swa|polyak)|(ema|shadow|avg|averaged)($|[._\d])"
)
NO_AVERAGE = re.compile(r"no(n|t|t_in)?_?ema")


@dataclass(frozen=True, kw_only=True)
class Location:
    """One set of weights in a file, under the network's own names.

    others: names of tensors beside it that belong to no set.
    fault: why an average cannot be used; empty for a set that can.
    """

    keys: Keys
    weights: dict[str, Tensor]
    others: tuple[str, ...] = ()
    fault: str = ""

    @property
    def kind(self) -> str | None:
        """ema, online, target or teacher, by the innermost key that names one; None without such a key."""
        words = [key.lower() for key in self.keys if key not in NEUTRAL]
        for word in words[::-1]:
            if AVERAGE.search(word) and not NO_AVERAGE.search(word):
                return "ema"
            if kind := re.search("online|student|target|teacher", word):
                return kind[0].replace("student", "online")
        return "online" if words else None


def open_sets(content: object, path: Path, hints: Hints, form: Any) -> Checkpoint | None:
    """Return the sets of weights of a network in a file's content, None without any.

    form: a module with FORMAT, ANCHORS (parameters that every network of the format has) and `open_state`, which takes a
        state dict and hints and returns a card, assumptions, and the renaming of any set of weights into our names.
    """
    sets = find(content, form.ANCHORS)
    if not sets:
        return None
    candidates = (sets.get(hints.weights), *sets.values())
    first = next(location for location in candidates if location and not location.fault)
    card, notes, renamed = form.open_state(first.weights, hints)

    def read(location: Location) -> StateDict:
        label = ".".join(location.keys)
        check(not location.fault, f"{label}: {location.fault}; weights= chooses others")
        state: StateDict = renamed(location.weights)
        return state

    notes = [note for note in (origins(sets), *notes) if note]
    return Checkpoint(path=path, format=form.FORMAT, card=card, sets=sets, read=read, notes=notes)


def origins(locations: dict[str, Location]) -> str:
    """Return a note on the keys of the sets and the tensors left out; empty for one set at the top of the file."""
    labels = {name: ".".join(location.keys)[:80] for name, location in locations.items()}
    sets = [f"weights={n}{f' below {label}' if label else ''}" for n, label in labels.items()]
    parts = [] if [*labels.values()] == [""] else [f"takes {', '.join(sets)}"]
    others = next((location.others for location in locations.values() if location.others), ())
    if others:
        parts.append(f"leaves out {len(others)} other tensors, such as {others[0][:80]}")
    return ", ".join(parts)


def find(content: object, anchors: Sequence[str]) -> dict[str, Location]:
    """Return all sets of weights by the names that `weights=` takes."""
    locations: list[Location] = []
    dotless: list[Location] = []
    lists: list[tuple[Keys, list[Tensor]]] = []
    for keys, value in _dictionaries(content):
        if state := _state(value):
            for location, has_dots in _split(keys, state, anchors):
                (locations if has_dots else dotless).append(location)
        listed = value.get("shadow_params")
        if isinstance(listed, list | tuple):
            named = _state({str(number): tensor for number, tensor in enumerate(listed)})
            lists.append(((*keys, "shadow_params"), [*named.values()]))
    if not locations:
        return {}
    first = next((p for p in locations if p.kind in ("online", None)), locations[0])
    locations += [_dotted(location, first) for location in dotless]
    locations += [_ordered(keys, tensors, first) for keys, tensors in lists]
    return _named(locations)


def first_names(content: object, count: int = 4) -> str:
    """Return the first names of a file's first tensors, or else its keys, for a message."""
    states = ((keys, _state(value)) for keys, value in _dictionaries(content))
    keys, names = next(((keys, state) for keys, state in states if state), ((), content))
    if not isinstance(names, dict):
        return f"a {type(content).__name__}"
    first = ", ".join(brief(name).strip("'") for name in list(names)[:count])
    below = f" below {brief('.'.join(keys))}" if keys else ""
    start = "the keys" if names is content else f"{len(names)} tensors{below} named"
    return f"{start} {first}{' ...' if len(names) > count else ''}"


def _dictionaries(content: object) -> Iterator[tuple[Keys, dict[Any, Any]]]:
    """Yield all dictionaries of a file with their keys, the outer ones first; each with dictionaries inside once."""
    seen: set[int] = set()
    waiting: list[tuple[Keys, Any]] = [((), content)]
    for keys, container in waiting:  # grows while it is walked
        listed = isinstance(container, list | tuple) and 0 < len(container) <= MOST_LISTED
        value = dict(enumerate(container)) if listed else container
        if not isinstance(value, dict) or id(container) in seen:
            continue
        inside = {k: v for k, v in value.items() if isinstance(v, dict | list | tuple)}
        if inside:
            seen.add(id(container))
        yield keys, value
        if len(keys) < MOST_LEVELS and len(waiting) < MOST_PARTS:
            waiting += [
                ((*keys, str(key)[:80]), inner)
                for key, inner in inside.items()
                if not NO_WEIGHTS.search(str(key).lower())
            ]


def _state(value: dict[Any, Any]) -> dict[str, Tensor]:
    """Return the named tensors in a dictionary, arrays of numpy among them."""
    named = {k: v.state if isinstance(v, Object) else v for k, v in value.items()}
    return {k: v for k, v in named.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _split(
    keys: Keys, state: dict[str, Tensor], anchors: Sequence[str]
) -> Iterator[tuple[Location, bool]]:
    """Yield the sets of weights in one dictionary, and whether their names have dots, as the network's have."""
    dotted = _prefixes(state, anchors)
    if not dotted:  # parts of a network may be wrapped one by one
        state = {WRAPPER.sub("", name): tensor for name, tensor in state.items()}
        dotted = _prefixes(state, anchors)
    flat = anchors[0].replace(".", "")
    tails = {n.removesuffix(flat) for n in state if n.endswith(flat) and "." in n}
    prefixes = dotted | {f"{prefix.rpartition('.')[0]}." for prefix in tails}
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    others = []
    longest = sorted(prefixes, key=len, reverse=True)
    for name, tensor in state.items():
        if OTHER_STATE.fullmatch(name.rpartition(".")[2]):
            continue
        prefix = next((prefix for prefix in longest if name.startswith(prefix)), None)
        if prefix is None:
            others.append(name)
        else:
            groups[prefix][WRAPPER.sub("", name.removeprefix(prefix))] = tensor
    for prefix, group in groups.items():
        below = (*keys, *prefix.removesuffix(".").split(".")) if prefix else keys
        yield Location(keys=below, weights=group, others=tuple(others)), prefix in dotted


def _prefixes(state: dict[str, Tensor], anchors: Sequence[str]) -> set[str]:
    """Return the prefixes that stand before all anchors of a network."""
    return {
        prefix
        for prefix in (n.removesuffix(anchors[0]) for n in state if n.endswith(anchors[0]))
        if prefix[-1:] in ("", ".") and all(f"{prefix}{anchor}" in state for anchor in anchors)
    }


def _dotted(average: Location, first: Location) -> Location:
    """Return an average whose names have no dots, under the names of the weights in training."""
    state = average.weights
    names = {name.replace(".", ""): name for name in first.weights}
    anchor = next(name for name in state if name.endswith(tuple(names)))
    prefix = min((anchor.removesuffix(n) for n in names if anchor.endswith(n)), key=len)
    flat = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    weights = {names[name]: tensor for name, tensor in flat.items() if name in names}
    complete = len(names) == len(first.weights) == len(weights) == len(state)
    fault = f"{len(state)} names without dots, not those of its network"
    return Location(keys=average.keys, weights=weights, fault="" if complete else fault)


def _ordered(keys: Keys, tensors: list[Tensor], first: Location) -> Location:
    """Return an average without names under those of the weights in training, if all shapes agree in their order."""
    names = [n for n in first.weights if not n.endswith(("resample_filter", "map_noise.freqs"))]
    if [first.weights[n].shape for n in names] != [t.shape for t in tensors]:
        fault = f"{len(tensors)} tensors without names, whose order is not that of its network"
        return Location(keys=keys, weights={}, fault=fault)
    return Location(keys=keys, weights=first.weights | dict(zip(names, tensors, strict=True)))


def _named(locations: list[Location]) -> dict[str, Location]:
    """Name the sets by their kind; several of one kind also by the keys in which they differ."""
    once = {
        (p.kind, *((t.data_ptr(), t.shape) for t in p.weights.values())): p for p in locations[::-1]
    }
    default = "ema" if len(once) == 1 else "online"
    by_kind: dict[str, list[Location]] = {}
    for location in reversed(once.values()):
        by_kind.setdefault(location.kind or default, []).append(location)
    sets: dict[str, Location] = {}
    for kind, same in by_kind.items():
        if len(same) == 1 or kind == "ema":
            sets[kind] = same[0]
        if len(same) > 1:
            steps = zip(*(location.keys for location in same), strict=False)
            shared = len(list(takewhile(lambda step: len(set(step)) == 1, steps)))
            sets |= {f"{kind}:{'.'.join(location.keys[shared:])}": location for location in same}
    return sets
