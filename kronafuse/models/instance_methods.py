"""Methods put on one module object, in the place of its class's, until the adapters are removed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from .host import Host

Method = TypeVar("Method", bound="InstanceMethod")


class InstanceMethod:
    """A method of one module object; a copy or a pickle of the module has its own, which acts on the copy.

    module: whose it is
    name:   what it replaces
    own:    what the object had under that name, or nothing
    hosts:  those that need it; it goes with the last of them
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        self.name = name
        self.hosts: list[Host] = []
        self.own = {key: value for key, value in module.__dict__.items() if key == name}

    @classmethod
    def install(cls: type[Method], host: Host, module: nn.Module, name: str) -> Method:
        """Put one on a module, or share the one that is there."""
        found = module.__dict__.get(name)
        if not isinstance(found, cls):
            found = cls(module, name)
            module.__dict__[name] = found
        if not any(each is host for each in found.hosts):
            found.hosts.append(host)
        return found

    def uninstall(self, host: Host) -> None:
        """Give up one host's need; after the last, the module has what it had before.

        If something else has taken the method's place since, that stays.
        """
        self.hosts = [each for each in self.hosts if each is not host]
        if not self.hosts and self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]
            self.module.__dict__.update(self.own)

    def original(self, module: nn.Module | None = None) -> Callable[..., Any]:
        """Return the method as it was, bound to its module or to another one like it.

        Raises RuntimeError if it was itself one that was put on the module and cannot be bound to another.
        """
        if not self.own:
            return MethodType(
                getattr(type(self.module), self.name), self.module if module is None else module
            )
        own = self.own[self.name]
        if module is None:
            return own
        if isinstance(own, MethodType) and own.__self__ is self.module:
            return MethodType(own.__func__, module)
        raise RuntimeError(
            f"{self.label}: this object has a {self.name} of its own, not its class's, which would write the"
            " adapted layers' names; remove() the adapters first"
        )

    @property
    def label(self) -> str:
        """Class and method, for messages."""
        return f"{type(self.module).__name__}.{self.name}"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method in its new form."""
        raise NotImplementedError


def methods_of(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    """(module, name) of every module below that has one of these methods."""
    for module in model.modules():
        for name in names:
            if callable(getattr(module, name, None)):
                yield module, name
