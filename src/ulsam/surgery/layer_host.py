"""How an inserted layer hangs in a model: its host, the module that it follows, gets a class of its own.

The class is a subclass of the host's, made for it, whose ``forward`` runs the host's own and then the host's child
``ulsam``. So the layer is a module like any other, no other name changes, and compilers, graph tracers and passes that
fuse, convert or quantize modules by type see a type that is not theirs. `torch.nn.utils.parametrize` attaches
parametrizations the same way.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ulsam.base.errors import UlsamError


class LayerHost(nn.Module):
    """What the class of every host inherits from: a module with an inserted layer behind it."""

    if TYPE_CHECKING:  # TorchScript reads annotations too, and has no such types
        ulsam: nn.Module
        host_class: type[nn.Module]
        host_method: str
        host_forward: Callable[..., Any]

    def __setattr__(self, name: str, value: Any) -> None:
        """Tools that fuse a block make another of its methods its ``forward``: the inserted layer then follows that."""
        if name == "forward":
            _set_forward(self, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the class is made anew where they are read."""
        return _new, (self.host_class, self.host_method), cast(Any, self).__getstate__()


def attach_layer(host: nn.Module, layer: nn.Module) -> None:
    """Put ``layer`` behind ``host``, as its child ``ulsam``.

    A plain `nn.Sequential` runs its children by itself: there the layer is the last one.

    Raises:
        UlsamError: another tool gave the module a ``forward`` that is not its class's, which would bypass the layer.

    >>> import torch
    >>> conv = nn.Conv2d(3, 8, 3)
    >>> attach_layer(conv, nn.ReLU())
    >>> isinstance(conv, nn.Conv2d), list(conv.state_dict()), bool((conv(torch.randn(1, 3, 5, 5)) < 0).any())
    (True, ['weight', 'bias'], False)
    >>> type(detach_layer(conv)), type(conv)
    (<class 'torch.nn.modules.activation.ReLU'>, <class 'torch.nn.modules.conv.Conv2d'>)
    """
    before, kind = vars(host).pop("forward", None), type(host)
    try:
        _change_class(host, lambda base: _class_of(base, "forward"))
        host.add_module("ulsam", layer)
        if before is not None:
            host.forward = before
    except BaseException:
        host._modules.pop("ulsam", None)
        host.__class__ = kind
        if before is not None:
            vars(host)["forward"] = before
        raise


def check_detach_layer(host: nn.Module) -> None:
    """Raise where :func:`detach_layer` would.

    Raises:
        UlsamError: another tool has wrapped the host's ``forward`` since.
    """
    if "forward" in vars(host):
        name = host_class(host).__name__
        raise UlsamError(f"another tool has wrapped the forward of a {name}: take its hook off first")


def detach_layer(host: nn.Module) -> nn.Module:
    """Undo :func:`attach_layer`; the layer that stood behind ``host``.

    Raises:
        UlsamError: another tool has wrapped the host's ``forward`` since.
    """
    check_detach_layer(host)
    layer = host.ulsam
    method = cast(str, host.host_method)
    del host.ulsam
    _change_class(host, lambda base: base.host_class)
    if method != "forward":
        vars(host)["forward"] = getattr(host, method)
    assert isinstance(layer, nn.Module)
    return layer


def host_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, whether a layer was inserted behind it or not.

    >>> host_class(nn.ReLU())
    <class 'torch.nn.modules.activation.ReLU'>
    """
    return cast(Any, module).host_class if isinstance(module, LayerHost) else type(module)


def _change_class(host: nn.Module, change: Callable[[Any], type[nn.Module]]) -> None:
    """Change the host's class; that of a parametrized module is a subclass with properties, which stays the outermost.

    `torch.nn.utils.parametrize.remove_parametrizations` takes the base of that class.
    """
    kind = type(host)
    if is_parametrized(host):
        names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        host.__class__ = type(kind.__name__, (change(kind.__bases__[0]),), names)
    else:
        host.__class__ = change(kind)


def _set_forward(host: "LayerHost", value: Any) -> None:
    """Take what a tool makes the host's ``forward``: another method of its class, or a function around the present one.

    Hugging Face's accelerate wraps ``forward``, and says so by `functools.update_wrapper`.
    """
    present, kind = inspect.unwrap(value, stop=lambda inner: getattr(inner, "__self__", None) is host), type(host)
    function = getattr(present, "__func__", None)
    name = getattr(function, "__name__", "")
    if getattr(present, "__self__", None) is host and function is kind.forward:
        vars(host).pop("forward", None)
        if present is not value:
            vars(host)["forward"] = value
    elif present is value and getattr(value, "__self__", None) is host and _may_run(host.host_class, name, function):
        _change_class(host, lambda base: _class_of(base.host_class, name))
    else:
        raise UlsamError(
            f"the layer inserted behind this {host.host_class.__name__} would no longer run if its forward were "
            "replaced: undo the insertion first, or insert behind another module"
        )


@functools.cache
def _class_of(base: type[nn.Module], method: str) -> type[nn.Module]:
    """The class of a host whose class was ``base``, and whose ``method`` is what it computes itself."""
    made: dict[str, Any] = {"__module__": base.__module__, "host_class": base, "host_method": method}
    if base.forward is not nn.Sequential.forward:
        made["host_forward"] = _renamed(getattr(base, method), "host_forward")
        made["forward"] = _then_layer_of_one if _needs_one(made["host_forward"]) else _then_layer
    if hasattr(base, "fuse"):
        made["fuse"] = _fuse
    return type(f"LayerHost{base.__name__}", (LayerHost, base), made)


def _renamed(function: Any, name: str) -> Any:
    """A function under another name: TorchScript knows a class's methods by the names of their functions."""
    if not isinstance(function, FunctionType):
        return function
    copied = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function, assigned=("__module__", "__doc__", "__annotations__"))


def _may_run(base: type[nn.Module], method: str, function: Any) -> bool:
    """Whether a layer can follow this method of the host's class; one of a Sequential runs the layer as a child."""
    return getattr(base, method, None) is function and base.forward is not nn.Sequential.forward


def _needs_one(function: Callable[..., Any]) -> bool:
    """Whether a method can be called with one argument beside self."""
    _, *parameters = inspect.signature(function).parameters.values()
    needed = [one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return len(needed) == 1 and all(one.kind is not one.VAR_POSITIONAL for one in parameters)


def _then_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.ulsam(getattr(self.host_class, self.host_method)(self, *args, **kwargs))


def _scripted(self: Any, x: Tensor) -> Tensor:
    return self.ulsam(self.host_forward(x))


_then_layer_of_one = _renamed(_then_layer, "_then_layer_of_one")
_then_layer_of_one.__wrapped__ = _scripted  # TorchScript, which takes no *args, reads this one


def _fuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's own ``fuse``, as of timm's `reparameterize_model`: the layer follows the module that it returns."""
    layer = self._modules.pop("ulsam")  # the host's own method may count its children
    try:
        fused = super(LayerHost, self).fuse(*args, **kwargs)
    finally:
        self.add_module("ulsam", layer)
    if isinstance(fused, nn.Module) and fused is not self:
        attach_layer(fused, layer)
    return fused


def _new(base: type[nn.Module], method: str) -> nn.Module:
    made: Any = _class_of(cast(Any, base), method)
    return cast(nn.Module, made.__new__(made))
