"""The names of a model's own part, or of a model around it: the same modules behind another prefix.

An adapter of a text model fits the multimodal model that has the text model in it, and the other way round; one of
``AutoModel`` fits the class with a head. Then the names differ by what stands before them, such as ``model`` and
``model.language_model``. Every name before which something else stands in the file says which prefixes are possible, and
all names with one prefix must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minipeft.config.patterns import endings
from minipeft.ecosystem.transformers_model import loadable_parts
from minipeft.errors import CheckpointError, printable, told
from minipeft.files.names.places import Places, Reading
from minipeft.files.tensor_file import TensorFile

MAX_PARTS = 64  # of a name in a file
MAX_MODULES = 64  # that end alike: a name that fits more says nothing
# What may stand before a part of a model. Others, such as ``bert``, say which model it is, so they are not exchanged.
TEXT = ("language_backbone", "language_model", "llm", "lm", "text_backbone", "text_encoder", "text_model", "thinker")
SEEN_OR_HEARD = (
    *("image_encoder", "image_tower", "video_tower", "vision_backbone", "vision_encoder", "vision_model"),
    *("vision_tower", "visual", "audio_encoder", "audio_model", "audio_tower"),
)
WHOLE = ("backbone", "base_model", "model", "module", "pretrained_model", "transformer", "vlm")
PREFIXES = frozenset((*TEXT, *SEEN_OR_HEARD, *WHOLE))
# Names that changed inside of a model's layers -> those of transformers 5, to which both the file's names and the model's are
# brought. From ViT and its relatives of transformers 4 (see "ViTModel" in `transformers.conversion_mapping`).
FORMS = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("encoder.layer", "layers"),
)


def one_form(name: str) -> str:
    """A module's name in the form that all its versions share; it may be longer, with what follows it in a key."""
    dotted = f".{name}."
    for old, new in FORMS:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


@dataclass
class _Group:
    """The keys whose names have one prefix in the file."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)  # key -> prefix in the model -> module
    tails: dict[str, str] = field(default_factory=dict)  # key -> what follows the module's name


class OtherClass:
    """Finds names of a file that end as modules of one model do."""

    def __init__(self, places: Places, file: TensorFile) -> None:
        self._places, self._file = places, file
        self._depth, self._by_ending = 0, dict[str, list[str]]()
        for name in places.modules:
            form = one_form(name)
            self._depth = max(self._depth, form.count(".") + 1)
            for ending in endings(form):
                self._by_ending.setdefault(ending, []).append(name)
        self._last = {ending for ending in self._by_ending if "." not in ending}
        parts = {id(part) for part in loadable_parts(places.model)}
        own = [getattr(part, "base_model_prefix", "") for part in loadable_parts(places.model)]
        self._words = PREFIXES.union(*(prefix.split(".") for prefix in own if isinstance(prefix, str)))
        self._parts = {"", *(one_form(name) for name, module in places.modules.items() if id(module) in parts)}

    def reading(self, names: Mapping[str, str], *, partial: bool = False) -> Reading | None:
        """Where the names without a place belong if they have other prefixes here; None if they do not fit.

        `partial`: names that do not fit may stay as they are.

        Raises:
            CheckpointError: they fit behind several prefixes.
        """
        groups: dict[str, _Group] = {}
        for key, name in names.items():
            if self._places.place(name) is None and not self._sort(groups, key, name) and not partial:
                return None
        likely = {prefix: self._likely(prefix, group) for prefix, group in groups.items()}
        if not all(likely.values()) and not partial:
            return None
        chosen: dict[str, str] = {}
        for prefix, group in groups.items():
            if len(likely[prefix]) > 1:
                raise CheckpointError(self._ambiguous(names, prefix, group, likely[prefix]))
            for possible in likely[prefix]:
                chosen |= {key: f"{modules[possible]}.{group.tails[key]}" for key, modules in group.modules.items()}
        rules = [f"{told(prefix)} became {told(possible[0])}" for prefix, possible in likely.items() if possible]
        more = f" and {len(rules) - 3} more" if len(rules) > 3 else ""
        return Reading({key: chosen.get(key, name) for key, name in names.items()}, ", ".join(rules[:3]) + more)

    def _sort(self, groups: dict[str, _Group], key: str, name: str) -> bool:
        """Put a key into the group of its prefix; False if the model has no module that ends as its name does."""
        parts = one_form(name).split(".", MAX_PARTS)
        found = self._longest(parts) if len(parts) <= MAX_PARTS else None
        if found is None:
            return False
        start, end, modules = found
        prefix, tail = ".".join(parts[:start]), name.split(".")[end - len(parts) :]
        here: dict[str, str] = {}
        for module in modules:
            form = one_form(module).split(".")
            before = form[: len(form) - (end - start)]
            place = self._places.place(f"{module}.{'.'.join(tail)}")
            if place is not None and place.module == module and self._exchangeable(parts[:start], before):
                here.setdefault(".".join(before), module)
        if not here:
            return False
        group = groups.setdefault(prefix, _Group())
        group.modules[key], group.tails[key] = here, ".".join(tail)
        return True

    def _longest(self, parts: Sequence[str]) -> tuple[int, int, list[str]] | None:
        """(start, end, modules) of the longest run of parts with which the names of modules end."""
        best = None
        for end in range(len(parts) - 1, 0, -1):
            if parts[end - 1] not in self._last:
                continue
            for start in range(max(0, end - self._depth), end):
                if best is not None and end - start <= best[1] - best[0]:
                    break
                modules = self._by_ending.get(".".join(parts[start:end]), ())
                if modules:
                    best = (start, end, modules) if len(modules) <= MAX_MODULES else best
                    break
        return best

    def _exchangeable(self, there: Sequence[str], here: Sequence[str]) -> bool:
        """Whether one prefix may stand for the other: both only say which part of a model this is, with the same numbers."""
        if [part for part in there if part.isdecimal()] != [part for part in here if part.isdecimal()]:
            return False
        new = [part for part in here if part not in there]
        gone = [part for part in there if part not in here]
        return all(part in self._words for part in (*new, *gone))

    def _likely(self, prefix: str, group: _Group) -> list[str]:
        """The possible prefixes: of several those whose shapes fit, then those most alike, then whole parts of the model."""
        every = list(group.modules.values())
        possible = [other for other in every[0] if all(other in modules for modules in every)]
        if len(possible) > 1:
            possible = [other for other in possible if self._shapes_fit(group, other)] or possible
        words = set(prefix.split("."))
        alike = {other: len(words.intersection(other.split("."))) for other in possible}
        possible = [other for other in possible if alike[other] == max(alike.values())]
        return [other for other in possible if other in self._parts] or possible

    def _shapes_fit(self, group: _Group, prefix: str) -> bool:
        """Whether each tensor has a dimension in common with the weight of its module; compared in full later."""
        for key, modules in group.modules.items():
            weight = getattr(self._places.modules[modules[prefix]], "weight", None)
            if weight is not None and weight.shape and set(weight.shape).isdisjoint(self._file.shapes[key]):
                return False
        return True

    def _ambiguous(self, names: Mapping[str, str], prefix: str, group: _Group, possible: Sequence[str]) -> str:
        key, modules = next(iter(group.modules.items()))
        readings = " or ".join(told(modules[other], 200) for other in possible[:2])
        more = f" (or {len(possible) - 2} others)" if len(possible) > 2 else ""
        pattern = f"^{prefix}" if prefix else "^"
        new = possible[0] if prefix else f"{possible[0]}."
        return printable(
            f"{self._file.path.parent}: {told(names[key], 200)} may be {readings}{more} in "
            f"{type(self._places.model).__name__}, and all its tensors fit either. Say which by key_mapping, such as "
            f"{{{pattern!r}: {new!r}}}."
        )
