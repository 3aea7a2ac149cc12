"""One forward pass of a copy of a model: what flows through every module of it, and what that costs.

Surgery finds channels and shapes here, `ulsam.surgery.cost` its counts. The copy is on the meta device, where nothing
is computed and no weight is copied. A model that looks at values (a detector at its boxes) runs for real, on the CPU.
"""

import copy
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ulsam.base.errors import UlsamError, first_line

ModelT = TypeVar("ModelT", bound=nn.Module)
Shape = tuple[int, ...]


def in_place_changes(tensor: Tensor | None) -> int:
    """How often a tensor was changed in place; unknown, 0, where the model's own code enters inference mode.

    >>> in_place_changes(torch.zeros(2).add_(1).relu_())
    2
    """
    return 0 if tensor is None or tensor.is_inference() else tensor._version


@dataclass
class ModuleTrace:
    """What one module did in the pass of one image.

    ``macs`` are its multiply-accumulates in convolutions and matrix products (PyTorch's FLOP formulas, halved), with
    those of the modules inside it; ``own_macs`` are without them. ``own_activations`` is the number of elements that
    the latter output.
    """

    calls: int = 0
    input_shape: Shape | None = None  # None: not exactly one tensor in, in exactly one call
    output_shape: Shape | None = None  # None: not exactly one tensor out, in exactly one call
    macs: int = 0
    own_macs: int = 0
    own_activations: int = 0
    norm_behind: str | None = None  # of a convolution: the BatchNorm that takes its output

    @property
    def is_four_dimensional(self) -> bool:
        """Whether it outputs one tensor of four dimensions: a feature map, or [1, H, W, C]."""
        return self.output_shape is not None and len(self.output_shape) == 4


def is_feature_map(shape: Sequence[int], image: Sequence[int]) -> bool:
    """Whether an output is a feature map [B, C, H, W]: the last two of four dimensions have the image's proportions.

    Of [B, H, W, C] the two before the last have them.

    Args:
        shape: of the output.
        image: shape of the model's input, [B, C, H, W].

    >>> image = (1, 3, 224, 224)
    >>> [is_feature_map(shape, image) for shape in ((1, 768, 7, 7), (1, 7, 7, 768), (1, 49, 768))]
    [True, False, False]
    """
    if len(shape) != 4:
        return False
    _, _, height, width = image
    before, last = (abs(shape[n] / height - shape[n + 1] / width) for n in (1, 2))
    return last <= before


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """C, H, W of one image for ``model``: what timm says of it, else 224 x 224 with its first convolution's channels.

    >>> default_input_size(nn.Sequential(nn.Conv2d(1, 8, 3)))
    (1, 224, 224)
    """
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    known = getattr(model, "in_chans", None)  # timm's; a stem may rearrange the pixels in front of its convolution
    config = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size") or (3, 224, 224)
    return known if type(known) is int else first, height, width


def check_initialized(model: nn.Module) -> None:
    """Raise UlsamError where lazy modules wait for a first batch to make their parameters.

    >>> check_initialized(nn.LazyConv2d(8, 3))
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: this LazyConv2d has parameters without a shape yet (weight): run it on a batch first
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            what = f"this {type(model).__name__} has parameters without a shape yet ({name})"
            raise UlsamError(f"{what}: run it on a batch first")


def cannot_run(model: nn.Module, size: Sequence[int], failure: Exception, *, given: bool) -> UlsamError:
    """What to raise where a forward pass on an image of this size (C, H, W) fails; ``given``: by the caller."""
    hint = "; pass input_size, or wrap a model that takes anything but one image" * (not given)
    return UlsamError(
        f"{type(model).__name__} does not run on one image of {list(size)} (C, H, W): {first_line(failure)}{hint}"
    )


def trace(model: nn.Module, input_size: Sequence[int] | None = None) -> dict[str, ModuleTrace]:
    """Send one image through a copy of ``model`` in eval mode; the flow of every module by name ("" = the model).

    Args:
        model: any module that takes one tensor [B, C, H, W]; it is not changed.
        input_size: C, H, W; by default :func:`default_input_size`.

    Raises:
        UlsamError: the size is not three whole numbers, the model cannot be copied, or its forward pass fails at this
            size.

    >>> flow = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (3, 12, 12))
    >>> flow["0"].input_shape, flow["0"].output_shape, flow["0"].macs
    ((1, 3, 12, 12), (1, 8, 10, 10), 21600)
    """
    check_initialized(model)
    size = default_input_size(model) if input_size is None else input_size
    if not isinstance(size, Sequence) or len(size) != 3 or not all(type(n) is int and n > 0 for n in size):
        raise UlsamError(f"input_size is C, H, W of one image, three whole numbers, not {size!r}")
    ways: list[tuple[str, AbstractContextManager[Any]]] = [
        ("meta", nullcontext()),
        ("meta", torch.device("meta")),  # for models whose forward makes tensors of its own
        ("cpu", torch.device("cpu")),  # for models whose forward looks at values
    ]
    if any(parameter.is_meta for parameter in model.parameters()):
        del ways[2]  # there are no values
    for device, where in ways:
        try:
            with where, torch.random.fork_rng(devices=[]):
                return _pass(_copy(model, device), _image(model, size, device))
        except Exception as error:  # whatever the model's own code raises at this size
            failure = error
    raise cannot_run(model, size, failure, given=input_size is not None) from failure


def _pass(shadow: nn.Module, image: Tensor) -> dict[str, ModuleTrace]:
    """What flows through every module of a model, by name, when it runs on the image."""
    recorder = _Recorder(shadow)
    with torch.no_grad(), recorder:
        shadow(image)
    for conv, number in recorder.readers.items():
        if number > 1:  # the two are not one: others take the output without the norm
            recorder.flows[conv].norm_behind = None
    return {name: recorder.flows[module] for name, module in shadow.named_modules(remove_duplicate=False)}


class _Recorder(TorchDispatchMode):
    """Within it the calls of a model's modules, and the operators that they run, are noted.

    Attributes:
        flows: of each module.
        readers: how many operators take a convolution's output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flows = {module: ModuleTrace() for module in model.modules()}
        self.readers: Counter[nn.Module] = Counter()
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []  # outermost first
        self._convolved: dict[int, tuple[nn.Module, weakref.ref[Tensor]]] = {}  # what made a map, by its id
        for module in self.flows:
            module.register_forward_pre_hook(self._enter, prepend=True)
            module.register_forward_hook(self._leave, with_kwargs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in args:
            if (conv := self._source(value)) is not None:
                self.readers[conv] += 1
        out = _output_of(func, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = int(formula(*args, **kwargs, out_val=out))
            self._book(flops // 2, (out if isinstance(out, Tensor) else out[0]).numel())
        return out

    def _source(self, value: object) -> nn.Module | None:
        """The convolution that made this very tensor, and not an earlier one with its id."""
        conv, output = self._convolved.get(id(value), (None, None))
        return conv if output is not None and output() is value else None

    def _book(self, macs: int, elements: int) -> None:
        """Count what an operator did for the modules that are running."""
        for module in set(self._running):
            self.flows[module].macs += macs
        self.flows[self._running[-1]].own_macs += macs
        self.flows[self._running[-1]].own_activations += elements

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, _BatchNorm) and args and (conv := self._source(args[0])) is not None:
            self.flows[conv].norm_behind = self._names[module]
        self._running.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._running.pop()
        if isinstance(module, nn.Conv2d):
            self._convolved[id(output)] = module, weakref.ref(output)
        flow = self.flows[module]
        flow.calls += 1
        one_in = flow.calls == 1 and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        one_out = flow.calls == 1 and isinstance(output, Tensor)
        flow.input_shape = tuple(args[0].shape) if one_in else None
        flow.output_shape = tuple(output.shape) if one_out else None


def _output_of(func: OpOverload[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``func(*args, **kwargs)``, without the 2 ms that PyTorch takes to find what two kinds output on the meta device.

    These are BatchNorm in eval mode, and operators that change one map of floats in place, value by value. What a model
    computes on tensors of its own, which have memory, is computed.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if all(tensor.is_meta and tensor.is_floating_point() for tensor in tensors):
        if func is torch.ops.aten.native_batch_norm.default and not args[5]:
            return torch.empty_like(tensors[0]), tensors[0].new_empty(0), tensors[0].new_empty(0)
        if torch.Tag.pointwise in func.tags and len(tensors) == 1 and _in_place(func):
            return tensors[0]
    return func(*args, **kwargs)


def _in_place(func: OpOverload[Any, Any]) -> bool:
    first = func._schema.arguments[0].alias_info
    return first is not None and first.is_write


def _image(model: nn.Module, size: Sequence[int], device: str) -> Tensor:
    """Always the same noise, in the model's dtype; it seeds PyTorch's generator on the CPU."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    torch.default_generator.manual_seed(0)
    return torch.rand(1, *size, device=device).to(dtype)


def _copy(model: ModelT, device: str) -> ModelT:
    """A copy of ``model`` in eval mode, its tensors on another device or with memory of their own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if "replaced_module" in vars(module):  # what an edit put aside stays behind
            memo[id(module.replaced_module)] = ()
        for held in vars(module).values():
            if type(held) in (dict, OrderedDict) and not held:  # as most of a module's hooks: half the time of a copy
                memo[id(held)] = type(held)()
                continue
            for value in tree_leaves(held):  # parameters, buffers, and tensors in plain attributes
                if isinstance(value, Tensor):
                    moved = value.detach().to(device, copy=True)
                    is_parameter = isinstance(value, nn.Parameter)
                    memo[id(value)] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved
    shadow = copy.deepcopy(model, memo).eval()
    for name, module in shadow.named_modules():
        functions = {key: value for key, value in vars(module).items() if isinstance(value, FunctionType)}
        for key, function in functions.items():  # which copies share
            compiled = getattr(function, "_torchdynamo_orig_callable", None)
            if compiled is not None:
                vars(module)[key] = copy.deepcopy(compiled, memo)
            elif (key == "forward" or device != "meta") and _runs_a_module(function):
                raise UlsamError(
                    f"{name}.{key}".lstrip(".") + " is a function that would run the model itself in a copy"
                )
    return shadow


def _runs_a_module(function: FunctionType) -> bool:
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return any(isinstance(getattr(value, "__self__", value), nn.Module) for value in held)
