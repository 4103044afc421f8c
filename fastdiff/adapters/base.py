"""What every adapter shares: the layers it touches, hooks that come off again, its own file.

An adapter is a module beside the network that holds what is trained. It listens to layers of the
network by forward hooks, and where it trains parameters of the network itself, it keeps what they
were; modules, names and ``state_dict`` of the network stay as they are. What all adapters of a
network have done to it stands in one :class:`Site`, so that they come off in any order.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]
Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
Targets = str | Sequence[str] | None
FORMAT = "fastdiff.adapter"
_KEY = "_fastdiff_adapters"  # where a network keeps its Site
_numbers = itertools.count()  # an id() may come back, a number does not


class Site:
    """What adapters have done to one network.

    Attributes:
        adapters: attached, in their order.
        base: of every parameter that someone has written as a whole, what it was.
        parts: what adapters add to a parameter: ``parts[name][adapter]`` gives it.
        owners: of every parameter that an adapter trains or writes itself.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.adapters: list[Adapter] = []
        self.base: dict[str, Tensor] = {}
        self.parts: dict[str, dict[Adapter, Callable[[Tensor], Tensor]]] = {}
        self.owners: dict[str, Adapter] = {}
        self._grads = {id(p): p.requires_grad for p in network.parameters()}

    def __deepcopy__(self, memo: Any) -> Site:
        raise ValueError(
            "deepcopy: this network has adapters attached, which a copy would share; need detach() "
            "before"
        )

    def freeze(self) -> None:
        """Only what an attached adapter trains gets gradients; with none left, as it was."""
        names = {n for a in self.adapters for n in a.trains}
        trained = {id(self.network.get_parameter(n)) for n in names}
        frozen = any(a.freezes for a in self.adapters)
        for p in self.network.parameters():
            p.requires_grad_(id(p) in trained if frozen else self._grads.get(id(p), True))

    def claim(self, adapter: Adapter, names: Sequence[str]) -> None:
        """``adapter`` is the one to write these parameters."""
        for name in names:
            owner = self.owners.get(name)
            if (owner is not None and owner is not adapter) or self.parts.get(name):
                raise ValueError(
                    f"{adapter.method}: parameter {name} is written by another adapter, need that "
                    "detached or unmerged before"
                )
        self.owners.update(dict.fromkeys(names, adapter))

    def leave(self, adapter: Adapter) -> None:
        self.owners = {n: a for n, a in self.owners.items() if a is not adapter}

    @torch.no_grad()
    def write(self, name: str) -> None:
        """The parameter from its base and what is merged into it; in place, in any order to the
        bit what the same adapters give."""
        p, parts = self.network.get_parameter(name), self.parts.get(name, {})
        if not parts:
            p.copy_(self.base.pop(name))
            self.parts.pop(name, None)
            return
        base = self.base.setdefault(name, p.detach().clone())
        value = base.double() if base.dtype == torch.float64 else base.float()
        for adapter in self.adapters:
            if adapter in parts:
                value = parts[adapter](value)
        p.copy_(value)


Rows = tuple[tuple[Tensor | slice, int], ...]
_rows: ContextVar[Rows] = ContextVar("fastdiff_adapter_rows", default=())


@contextmanager
def samples(rows: Tensor | slice, batch: int) -> Iterator[None]:
    """In the block, layers are called with some samples of a batch of ``batch`` alone."""
    token = _rows.set((*_rows.get(), (rows, batch)))
    try:
        yield
    finally:
        _rows.reset(token)


def rows_in_work() -> Rows:
    """The blocks of :func:`samples` that this call is in, the outermost first."""
    return _rows.get()


def site(network: nn.Module) -> Site:
    """That of ``network``, made where there is none."""
    found = network.__dict__.get(_KEY)
    if found is None:
        found = network.__dict__[_KEY] = Site(network)
    return found


def attached(network: nn.Module) -> list[Adapter]:
    """The adapters of a network, in their order."""
    found = network.__dict__.get(_KEY)
    return [] if found is None else list(found.adapters)


def version(network: nn.Module) -> tuple[Any, ...]:
    """Changes whenever an adapter of ``network``, or anything in one, does."""
    return tuple(a.version for a in attached(network))


def layout(network: nn.Module) -> tuple[Any, ...]:
    """What a captured program has frozen of the adapters of ``network``: which there are, which
    are merged, and where their values lie. Values themselves are read in every replay."""
    return tuple(a.layout for a in attached(network))


def select(
    who: str,
    network: nn.Module,
    targets: Targets = None,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> dict[str, nn.Module]:
    """The layers an adapter is for, by name; one that PEFT has wrapped is known by its own.

    Args:
        who: for errors.
        network: any module, also one of diffusers or with layers of PEFT.
        targets: None: every layer of ``kinds``; a regular expression that is searched in names; or
            endings of names, such as ``["to_q", "to_v"]``, each of which must fit a layer.
        kinds: classes; subclasses count.

    Raises:
        ValueError: nothing fits; names what there is.
    """
    if not isinstance(network, nn.Module):
        raise ValueError(f"{who}: network is {type(network).__name__}, need an nn.Module")
    every = {
        plain_name(name): m
        for name, m in network.named_modules()
        if isinstance(m, kinds) and not re.search(r"(^|\.)lora_", name)
    }
    if targets is None:
        found = every
    elif isinstance(targets, str):
        try:
            found = {n: m for n, m in every.items() if re.search(targets, n)}
        except re.error as error:
            raise ValueError(f"{who}: targets is {targets!r}, {error}") from error
    else:
        found = {n: m for n, m in every.items() if any(_ends(n, t) for t in targets)}
        for t in targets:
            if not any(_ends(n, t) for n in every):
                raise ValueError(f"{who}: targets has {t!r}, which no layer's name ends in")
    if not found:
        kind = " or ".join(k.__name__ for k in kinds)
        some = ", ".join(list(every)[:4]) or "none"
        raise ValueError(
            f"{who}: targets is {targets!r}, which fits no {kind} of the network; its layers are "
            f"{some}, ..."
        )
    return found


def _ends(name: str, tail: str) -> bool:
    return name == tail or name.endswith("." + tail)


def plain_name(name: str) -> str:
    """A layer's name before PEFT wrapped it. Its weight goes by that name too, as
    ``get_parameter`` finds it through the wrapper."""
    return name.replace(".base_layer", "")


def key_of(name: str) -> str:
    """A module's name as that of a parameter's holder: dots mean submodules to torch."""
    return name.replace(".", "/")


def name_of(key: str) -> str:
    return key.replace("/", ".")


class Adapter(nn.Module):
    """Something small that is trained in the place of a network; attached once it is made.

    Args:
        network: any module; where its first call reaches none of the layers that the adapter
            listens to, that is an error. Its parameters stop asking for gradients while an adapter
            is attached, but for those that the adapter trains itself.
        settings: what, beside the network and the trained values, makes it again; JSON.

    Attributes:
        method: its name in a file.
        freezes: the network's parameters stop asking for gradients; False: it is trained on beside
            the adapter, and what it was before is not kept.
        trains: names of the network's own parameters that it trains.
        merged: it is in the network's weights, and its hooks are silent.
    """

    method: ClassVar[str] = ""
    freezes: ClassVar[bool] = True

    def __init__(self, network: nn.Module, **settings: Any) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"{self.method}: network is {type(network).__name__}, need an nn.Module"
            )
        self._site = [network]  # in a list: no submodule
        self.settings = settings
        self.trains: list[str] = []
        self.merged = False
        self._handles: list[Any] = []
        self._values: dict[
            str, Tensor
        ] = {}  # of `trains`: the trained while off, the base while on
        self._turns = 0
        self._number = next(_numbers)
        self._listening = 0  # with hooks
        self._heard = False  # one of them has been called

    # ---- what a method says ----

    def hooks(self) -> Iterator[tuple[nn.Module, Hook]]:
        """``hook(module, args, kwargs, output)``, which gives the output to go on with."""
        yield from ()

    def before(self) -> Iterator[tuple[nn.Module, Before]]:
        """``hook(module, args, kwargs)``, which sees what a module is called with, and gives None
        or the ``(args, kwargs)`` to go on with."""
        yield from ()

    def parts(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Of each parameter that merging changes: its name, and what makes the merged value of it,
        in float32.

        Raises:
            ValueError: the method cannot be merged; says why.
        """
        if any(True for _ in (*self.hooks(), *self.before())):
            raise ValueError(
                f"{self.method}: what it adds is no change of weights, nothing to merge"
            )
        yield from ()

    def comes_first(self, places: Iterable[nn.Module]) -> None:
        """Before a merge that multiplies the weights of ``places``.

        Raises:
            ValueError: an adapter that was attached before adds to one of them at run time, where
                what it adds is multiplied too.
        """
        mine = set(places)
        for other in attached(self.network):
            if other is self:
                return
            if not other.merged and any(m in mine for m, _ in other.hooks()):
                raise ValueError(
                    f"{self.method}: it scales what {other.method}, attached before, adds to the "
                    "same layers, need that merged before merge()"
                )

    def tensors(self) -> dict[str, Tensor]:
        """What its file holds."""
        own = {f"adapter.{n}": t for n, t in self.state_dict().items()}
        return own | {f"network.{n}": self.value(n) for n in self.trains}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take the values of a file, in place: names and shapes have been compared."""
        with torch.no_grad():
            for n, t in self.state_dict().items():
                t.copy_(tensors[f"adapter.{n}"])
            for n in self.trains:
                self.value(n).copy_(tensors[f"network.{n}"])

    @classmethod
    def of_file(
        cls, network: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> Adapter:
        """Attached as a file's settings say; its values come after."""
        return cls(network, **settings)

    # ---- on and off ----

    @property
    def network(self) -> nn.Module:
        return self._site[0]

    @property
    def on(self) -> bool:
        """It is attached."""
        return self in attached(self.network)

    @property
    def version(self) -> tuple[Any, ...]:
        """Changes whenever a value in it, or what it is attached to, does. (Tensors made in
        inference mode keep no count of writes: those through our own methods are seen.)"""
        values = (*self.parameters(), *self.buffers())
        # Apart: a value that another one has taken the place of counts from 0 again.
        return self._number, self._turns, sum(t._version for t in values if not t.is_inference())

    @property
    def layout(self) -> tuple[Any, ...]:
        """See :func:`layout`."""
        values = (*self.parameters(), *self.buffers())
        return self._number, self.merged, self.training, *((t.data_ptr(), t.shape) for t in values)

    def state(self) -> str:
        """One line for a summary."""
        if not self.on:
            return f"adapter {self.method}: not attached"
        layers = len({module for module, _ in (*self.hooks(), *self.before())})
        where = "merged into the weights" if self.merged else f"at run time on {layers} layers"
        return f"adapter {self.method}: {where}"

    def trainable(self) -> list[nn.Parameter]:
        """What an optimiser takes: its own parameters and those of the network that it trains."""
        own = [p for p in self.parameters() if p.requires_grad]
        return own + [self.network.get_parameter(n) for n in self.trains]

    def value(self, name: str) -> Tensor:
        """The trained value of a parameter of the network, attached or not, merged or not."""
        if not self.on:
            return self._values[name]
        base = site(self.network).base.get(name)
        return self.network.get_parameter(name).detach() if base is None else base

    def attach(self) -> Adapter:
        """Listen to the network; values that are trained in the network come back.

        Raises:
            ValueError: it is attached, or another adapter writes a parameter that it trains.
        """
        if self.on:
            raise ValueError(f"{self.method}: it is attached already, need detach() before")
        place = site(self.network)
        place.claim(self, self.trains)
        self._swap()
        place.adapters.append(self)
        place.freeze()
        self._hear()
        self._turns += 1
        return self

    def detach(self) -> nn.Module:
        """Take every change back, to the bit; gives the network. It can be attached again.

        Raises:
            ValueError: it is not attached.
        """
        if not self.on:
            raise ValueError(f"{self.method}: it is not attached")
        if self.merged:
            self.unmerge()
        place = site(self.network)
        for handle in self._handles:
            handle.remove()
        self._handles, self._listening = [], 0
        self._swap()
        place.adapters.remove(self)
        place.leave(self)
        place.freeze()
        if not place.adapters:
            del self.network.__dict__[_KEY]
        self._turns += 1
        return self.network

    def _hear(self) -> None:
        """Set the hooks, in the place of those that are set."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._listening = [], 0
        for module, seen in self.before():
            quiet = self._quiet(seen)
            self._handles.append(module.register_forward_pre_hook(quiet, with_kwargs=True))
            self._listening += 1
        for module, hook in self.hooks():
            self._handles.append(module.register_forward_hook(self._quiet(hook), with_kwargs=True))
            self._listening += 1
        if self._listening:
            self._handles.append(self.network.register_forward_hook(self._listen))

    def _quiet(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, *about: Any) -> Any:
            if not self._heard:
                self._heard = True
            return None if self.merged else hook(module, *about)

        call.adapter = self  # type: ignore[attr-defined]  # whom a reader of weights may ask
        return call

    def _listen(self, network: Any, *_: Any) -> None:
        """An adapter without effect is an error, not a network that learns nothing."""
        if not self._heard and not self.merged:
            raise ValueError(
                f"{self.method}: a call of {type(network).__name__} has called none of the layers "
                "it listens to, need a network that calls them or merge()"
            )

    @torch.no_grad()
    def _swap(self) -> None:
        """The network's values of what it trains against those kept here."""
        for n in self.trains:
            p = self.network.get_parameter(n)
            was = p.detach().clone()
            if n in self._values:
                p.copy_(self._values[n])
            self._values[n] = was

    def merge(self) -> None:
        """Write it into the network's weights, in place (captured programs go on); the base is
        kept beside them.

        Raises:
            ValueError: it is merged or not attached, or the method cannot be merged.
        """
        if not self.on or self.merged:
            state = "merged already" if self.merged else "not attached"
            raise ValueError(f"{self.method}: it is {state}, need it attached and not merged")
        place, parts = site(self.network), list(self.parts())
        for name, _ in parts:
            owner = place.owners.get(name)
            if owner is not None and owner is not self:
                raise ValueError(
                    f"{self.method}: parameter {name} is written by another adapter, need that "
                    "detached before merge()"
                )
        for name, make in parts:
            place.parts.setdefault(name, {})[self] = make
            place.write(name)
        self.merged = True
        self._turns += 1

    def unmerge(self) -> None:
        """The weights as they were, to the bit.

        Raises:
            ValueError: it is not merged.
        """
        if not self.merged:
            raise ValueError(f"{self.method}: it is not merged")
        place = site(self.network)
        for name in [n for n, parts in place.parts.items() if self in parts]:
            del place.parts[name][self]
            place.write(name)
        self.merged = False
        self._turns += 1

    # ---- its file ----

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write a safetensors file of the adapter alone, in one step.

        Args:
            path: of the file.
            dtype: of what is saved; None: as it is.
        """
        path = Path(path)
        facts = {"format": FORMAT, "method": self.method, "settings": json.dumps(self.settings)}
        state = {
            n: (t if dtype is None or not t.is_floating_point() else t.to(dtype)).cpu().contiguous()
            for n, t in self.tensors().items()
        }
        partial = path.with_name(path.name + ".tmp")
        save_file(state, str(partial), metadata=facts)
        os.replace(partial, path)
        return path

    def load(self, path: str | Path) -> None:
        """Take the values of another file of the same method and shapes, in place: a captured
        program goes on with them.

        Raises:
            ValueError: the file is another method's, or a tensor is missing, unknown or of
                another shape; nothing has changed then.
        """
        facts, tensors = read(path)
        if facts["method"] != self.method:
            raise ValueError(f"{path}: its method is {facts['method']}, need {self.method}")
        compare(path, tensors, self.tensors())
        if self.merged:
            raise ValueError(f"{self.method}: it is merged, need unmerge() before load")
        self.fill(tensors)
        self._turns += 1


def read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Facts and tensors of an adapter's file.

    Raises:
        ValueError: it is not readable, or no file of an adapter of fastdiff.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    if facts.get("format") != FORMAT:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"{path}: no adapter of fastdiff; its tensors are {some}, ...")
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: tensor {bad[0]} has values that are not finite")
    return facts, tensors


def compare(path: str | Path, found: dict[str, Tensor], need: dict[str, Tensor]) -> None:
    """Raises a ValueError where names or shapes differ."""
    for n in sorted(found.keys() | need.keys()):
        if n not in need:
            raise ValueError(f"{path}: tensor {n} is not part of this adapter")
        if n not in found:
            raise ValueError(f"{path}: tensor {n} is missing")
        if found[n].shape != need[n].shape:
            raise ValueError(
                f"{path}: tensor {n} has shape {list(found[n].shape)}, need {list(need[n].shape)}"
            )


@torch.inference_mode(False)
def kept(t: Tensor) -> Tensor:
    """A copy to keep and write to later, in inference mode and outside of it."""
    return t.detach().clone()


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer's call."""
    out: Tensor = args[0] if args else next(iter(kwargs.values()))
    return out
