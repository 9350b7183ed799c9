"""The base's own state while it is adapted: running statistics, which are held still, and other buffers that change.

A file holds the adapter, and its reader has the base from elsewhere. So what training changes in the base is lost on save,
and `disable_adapter()` and `unload()` no longer give the base. PEFT lets the running statistics of a frozen BatchNorm
move in training, so that the model computes something else after a reload. Here they are held still: the norm runs as in
evaluation, in training too, so the adapter also learns with the statistics that it will meet. A norm that is to follow
the new data goes into `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from minipeft.injection.modules_to_save import SavedModule
from minipeft.injection.wrapper import innermost
from minipeft.kernels.functional import agree

SAMPLES = 64  # elements of each buffer by which a change is noticed


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base by the names that they have without adapters; each once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    _collect(model, "", found)
    return dict(found.values())


def _collect(module: nn.Module, name: str, found: dict[int, tuple[str, nn.Module]]) -> None:
    base = innermost(module)
    if id(base) not in found:
        found[id(base)] = (name, base)
        for attribute, child in base._modules.items():
            if child is not None:
                _collect(child, f"{name}.{attribute}" if name else attribute, found)


def hold_still(
    modules: Mapping[str, nn.Module], saved: Iterable[tuple[str, SavedModule]], trainable: Collection[str]
) -> set[str]:
    """Put the norms whose running statistics no file will hold into evaluation mode.

    These are the frozen norms among a model's `base_modules`, and those in trained copies, which are in the wrappers
    `saved`, of adapters that do not train.

    Returns:
        The names of those that were in training mode, as they are without adapters.
    """
    found = [(name, module) for name, module in modules.items() if has_statistics(module)]
    norms = [(name, norm) for name, norm in found if not any(p.requires_grad for p in norm.parameters(recurse=False))]
    for path, copy in _idle_copies(saved, trainable):
        norms += [(f"{path}.{name}".rstrip("."), m) for name, m in copy.named_modules() if has_statistics(m)]
    held = [(name, norm) for name, norm in norms if norm.training]
    for _, norm in held:
        norm.training = False
    return {name for name, _ in held}


def let_go(model: nn.Module, held: Collection[str]) -> None:
    """Put the modules with these names back into training mode, in a model without adapters."""
    for name, module in model.named_modules() if held else ():
        if name in held:
            module.training = True


def has_statistics(module: nn.Module) -> bool:
    """Whether it is a norm that keeps running statistics: torch's kinds, and those of others that name them alike."""
    names, buffers = ("running_mean", "running_var"), module._buffers  # which has no get() in a scripted module
    return bool(buffers) and any(name in buffers and buffers[name] is not None for name in names)


def _idle_copies(
    saved: Iterable[tuple[str, SavedModule]], trainable: Collection[str]
) -> Iterator[tuple[str, nn.Module]]:
    """(name, trained copy) of those whose statistics do not train."""
    for path, wrapper in saved:
        for name, copy in wrapper.adapters.items():
            if name not in trainable or wrapper.only is not None:
                yield path, copy


@torch.no_grad()
def buffer_samples(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A few elements, on the CPU, of every buffer of these `base_modules` that belongs to their state, by the buffer's name.

    A buffer that is not in the ``state_dict`` is made anew where the model is built, so it may change.
    """
    return {
        f"{name}.{key}" if name else key: _sample(buffer)
        for name, module in modules.items()
        for key, buffer in module._buffers.items()
        if buffer is not None and _is_dense(buffer) and key not in module._non_persistent_buffers_set
    }


def _is_dense(buffer: Tensor) -> bool:
    """Whether it has elements that can be picked: not those of a graph's sparse matrix."""
    return type(buffer) is Tensor and buffer.layout is torch.strided and not buffer.is_meta


def _sample(buffer: Tensor) -> Tensor:
    places = torch.linspace(
        0, max(buffer.numel() - 1, 0), min(buffer.numel(), SAMPLES), dtype=torch.float64, device="cpu"
    )
    return buffer.detach().reshape(-1)[places.long().to(buffer.device)].cpu()


def changed_buffers(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Names of the buffers whose samples differ by more than a conversion of the model to another dtype."""
    return [name for name, old in before.items() if name in now and not _alike(old, now[name])]


def _alike(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape:
        return True  # a resized vocabulary, whose new rows a file does hold
    return bool(agree(old, new).all())
