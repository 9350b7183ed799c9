"""A module whose weights come from a checkpoint on disk while they are needed, and go again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from minipeft.layers.offloaded import HOOK

Read = Callable[[], Tensor]


class Presence:
    """Stands where accelerate keeps its hook, and does for `minipeft.layers.offloaded.present` what that does.

    Between two uses a weight is on the meta device, always the same parameter, so tied ones are known by that.

    Args:
        sources: name of a parameter of the module -> what reads it.
    """

    offload = True
    keeps_ties = True
    execution_device = None

    def __init__(self, sources: Mapping[str, Read]) -> None:
        self.sources = dict(sources)
        self.absent: dict[str, nn.Parameter] = {}

    def pre_forward(self, module: nn.Module, *args: Any) -> None:
        """Bring the weights."""
        for name, read in self.sources.items():
            own = module._parameters.get(name)
            if own is not None and own.is_meta:
                self.absent[name] = own
                module._parameters[name] = nn.Parameter(read(), requires_grad=False)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take them away again."""
        for name, own in self.absent.items():
            module._parameters[name] = own
        self.absent = {}
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Presence:
        """A copy of the module has its weights for good."""
        twin = Presence({})
        twin.offload = False
        return twin


def bring(module: nn.Module, name: str, read: Read) -> None:
    """Have a parameter of a module read by this function whenever it is needed."""
    hook = vars(module).get(HOOK)
    if hook is None:
        hook = Presence({})
        setattr(module, HOOK, hook)
    hook.sources[name] = read
