"""Which tensors belong to which layer: names below ``model.layers.3.``, whatever stands in front of it."""

import re
from collections.abc import Sequence

from cumoe.checkpoint.files import Files, Tensor
from cumoe.door.checks import one_of, refuse

LAYER = re.compile(r"((?:.+?\.)?(?:layers|blocks))\.(\d+)\.(.+)")

QUANTISED = re.compile(r".*(_blocks|_scales?|_scale_inv|\.qweight|\.qzeros|\.weight_packed|\.weight_scale)")
"""Tensors beside quantised weights, which stand there also where config.json does not tell."""

NOT_THE_LANGUAGE_MODEL = re.compile(r"\b(mtp|nextn|draft|talker|vision|visual|audio|encoder)")
"""Stacks of layers beside those that config.json counts: prediction heads, towers of other modalities."""


class Names:
    """The tensors of one layer, by what follows its number.

    A template may begin with ``../`` to leave the block of the experts for the layer, and hold ``{e}`` for an expert.
    """

    def __init__(self, files: Files, prefix: str, names: dict[str, str], block: str) -> None:
        self.files, self._prefix, self._names, self.block = files, prefix, names, block

    def has(self, template: str, expert: int = 0) -> bool:
        """Whether the layer has such a tensor."""
        return self._below_layer(template, expert) in self._names

    def tensor(self, template: str, expert: int = 0) -> Tensor:
        """Return where a tensor lies; raise as `Files.tensor` does."""
        below = self._below_layer(template, expert)
        return self.files.tensor(self._names.get(below, self._prefix + below))

    def first(self, templates: Sequence[str]) -> str:
        """Return the first template whose tensor exists; raise ValueError if there is none."""
        for template in templates:
            if self.has(template):
                return template
        wanted = one_of([self._prefix + self._below_layer(template, 0) for template in templates])
        raise ValueError(refuse("checkpoint", f"a tensor {wanted} in {self.files.folder}", "none"))

    def quantised(self) -> str:
        """Return a tensor of the block that only quantised weights have, or ""."""
        below = f"{self.block}." if self.block else ""
        found = (full for name, full in self._names.items() if name.startswith(f"{below}experts."))
        return next(filter(QUANTISED.fullmatch, found), "")

    def _below_layer(self, template: str, expert: int) -> str:
        name = template.replace("{e}", str(expert))
        if name.startswith("../"):
            return name[3:]
        return f"{self.block}.{name}" if self.block else name


def moe_layers(files: Files, blocks: Sequence[str], marks: Sequence[str], num_layers: int | None) -> dict[int, Names]:
    """Return the layers that have one of `marks`, tensors that only experts have, below one of `blocks`.

    Raises
    ------
    ValueError
        If two stacks of layers have experts, so that a layer's number does not say which is meant.
    """
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in files.names:
        match = LAYER.fullmatch(name)
        if match and not NOT_THE_LANGUAGE_MODEL.search(match[1]):
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
    found: dict[str, dict[int, Names]] = {}
    for stack, layers in stacks.items():
        for number in sorted(layers):
            for block in blocks:
                names = Names(files, f"{stack}.{number}.", layers[number], block)
                if any(map(names.has, marks)) and (num_layers is None or number < num_layers):
                    found.setdefault(stack, {})[number] = names
                    break
    if len(found) > 1:
        raise ValueError(refuse("checkpoint", "one stack of layers with experts", one_of(sorted(found))))
    return next(iter(found.values()), {})


def layer_numbers(numbers: Sequence[int]) -> str:
    """Return ``1, 3 to 26`` for a sorted sequence."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
