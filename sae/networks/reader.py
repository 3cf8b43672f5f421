"""Runs a network on a batch, and reads the activations at some places in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae.errors import UsageError
from sae.hooks import Reads, first_tensor, module_named, output_tensor, require_eval


@dataclass(frozen=True)
class Site:
    """A place in a network: what comes out of a module, or what goes into it."""

    module: str
    reads: Reads = "output"

    def __str__(self) -> str:
        return self.module if self.reads == "output" else f"the input of {self.module}"


class _Reached(Exception):
    """The last of the sites was read: the rest of the network need not run."""


class Reader:
    """The activations at some sites of a network, for a batch; the network runs no further than the last of them.

    A batch that is a tensor is the network's argument, a mapping its keyword arguments. In a tuple or a list, such as a
    loader of images and labels gives, the first entry counts; if a module runs several times, the first run counts.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        """Raises:
        UsageError: the network has no such module, or is in training mode.
        """
        require_eval(model)
        self.model, self.sites = model, list(dict.fromkeys(sites))
        self.modules = [module_named(model, site.module) for site in self.sites]
        tensors = [*model.parameters(), *model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")

    @torch.no_grad()
    def __call__(self, batch: Any) -> dict[Site, Tensor]:
        """The activations at each site, as the network has them.

        Raises:
            UsageError: the network did not reach a site, or has no tensor there.
        """
        found: dict[Site, Tensor] = {}
        with self._hooked(found), suppress(_Reached):
            self._run(batch)
        missing = [str(site) for site in self.sites if site not in found]
        if missing:
            raise UsageError(
                f"the network does not run {', '.join(missing)} for such inputs; name a module that it runs"
            )
        return found

    def _run(self, batch: Any) -> None:
        one = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if isinstance(one, Mapping):
            self.model(**{name: self._there(value) for name, value in one.items()})
        else:
            self.model(self._there(one))

    def _there(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    @contextmanager
    def _hooked(self, found: dict[Site, Tensor]) -> Iterator[None]:
        def keep(site: Site, value: Tensor | None) -> None:
            if site in found:
                return
            if value is None:
                raise UsageError(f"{site} holds no tensor; name another module")
            # A copy where the network may go on in place.
            found[site] = value if len(found) + 1 == len(self.sites) else value.clone()
            if len(found) == len(self.sites):
                raise _Reached

        def before(site: Site) -> Any:
            return lambda module, args, kwargs: keep(site, first_tensor((*args, *kwargs.values())))

        def after(site: Site) -> Any:
            return lambda module, args, output: keep(site, output_tensor(output))

        hooks = [
            module.register_forward_hook(after(site))
            if site.reads == "output"
            else module.register_forward_pre_hook(before(site), with_kwargs=True)
            for site, module in zip(self.sites, self.modules, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
