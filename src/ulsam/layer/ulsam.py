"""The layer: ultra-lightweight subspace attention (Saini et al., WACV 2020, arXiv 2006.15102, section 3)."""

import copy
import re
from collections.abc import Mapping
from typing import Any, Literal, SupportsIndex, cast, get_args

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ulsam.base.errors import UlsamError
from ulsam.layer.ops import infer, is_captured, subspace_attention
from ulsam.layer.ops.reference import accumulation, attention_maps, softmax_over_maps

Form = Literal["equations", "released", "folded"]
MOMENTUM = 0.1  # PyTorch's own default


def divisors(n: int) -> list[int]:
    """The numbers of groups that divide ``n`` channels.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]


class ULSAM(nn.Module):
    """Subspace attention: each group of channels gets its own spatial map, is multiplied by it and added back.

    With the input split along channels into ``groups`` subspaces F_n of G = channels / groups channels::

        A_n = softmax over H*W of pointwise_n(maxpool3x3(depthwise(F_n)))     one map [B, 1, H, W] a subspace
        y_n = A_n * F_n + F_n

    All subspaces are computed at once by one operator, `ulsam.layer.ops.subspace_attention`; ``depthwise`` and
    ``pointwise`` are the grouped 1x1 convolutions whose weights it takes.

    Forms, each exact:

    - ``"equations"``: the paper's equations; 2 * channels parameters, no bias, no normalization.
    - ``"released"``: the authors' released module: both convolutions have a bias and are followed by BatchNorm and ReLU
      (also before the softmax); 5 * channels + 3 * groups parameters. The released BatchNorm momentum of 0.9 (PyTorch's
      sense: the running statistics are nearly the last batch's) makes evaluation depend on that one batch, so the
      default here is PyTorch's 0.1; ``momentum=0.9`` gives the released behavior.
    - ``"folded"``: what :meth:`fold` makes of the released form for inference; biases and ReLU, no BatchNorm.

    Args:
        channels: C of the input [B, C, H, W]; H and W are free, and may differ from call to call.
        groups: number of subspaces g; divides ``channels``.
        form: see above.
        momentum: BatchNorm momentum of the released form; the other forms have none.

    Raises:
        UlsamError: ``channels`` or ``groups`` is no whole number, ``groups`` does not divide ``channels``, the form is
            unknown, or an input is no [B, channels, H, W].

    >>> layer = ULSAM(32, groups=4)
    >>> x = torch.randn(2, 32, 7, 5)
    >>> layer(x).shape, layer.attention(x).shape
    (torch.Size([2, 32, 7, 5]), torch.Size([2, 4, 7, 5]))
    >>> sum(p.numel() for p in layer.parameters())
    64
    """

    def __init__(
        self,
        channels: int,
        groups: int = 4,
        *,
        form: Form = "equations",
        momentum: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not all(isinstance(n, SupportsIndex) and not isinstance(n, bool) for n in (channels, groups)):
            raise UlsamError(f"channels and groups are whole numbers, not {channels!r} and {groups!r}")
        if channels < 1:
            raise UlsamError(f"channels must be 1 or more, not {channels}")
        if groups < 1 or channels % groups:
            raise UlsamError(f"groups={groups} does not divide {channels} channels; valid: {divisors(channels)}")
        if form not in get_args(Form):
            raise UlsamError(f"unknown form {form!r}; valid: {', '.join(get_args(Form))}")
        if momentum is not None and not (form == "released" and 0 <= momentum <= 1):
            raise UlsamError(f"momentum is BatchNorm's, 0 to 1, in the form released alone: not {momentum} in {form}")
        self.channels = channels
        self.groups = groups
        self.form: Form = form
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels, bias=form != "equations", **made)
        self.pointwise = nn.Conv2d(channels, groups, 1, groups=groups, bias=form != "equations", **made)
        if form == "released":
            made["momentum"] = MOMENTUM if momentum is None else momentum
            self.depthwise_norm = nn.BatchNorm2d(channels, **made)
            self.pointwise_norm = nn.BatchNorm2d(groups, **made)

    def attention(self, x: Tensor) -> Tensor:
        """The attention maps of ``x`` [B, C, H, W]: [B, groups, H, W], each summing to 1 over H*W.

        float64 inputs give float64 maps, all others float32. In training mode the released form's maps are those of the
        batch's statistics, but the running ones do not change.
        """
        self._check(x)
        if not self.is_standard():
            parts: list[Any] = [part for part in self.modules() if part.training]
            tracking = [part for part in parts if getattr(part, "track_running_stats", False)]
            for part in tracking:
                part.track_running_stats = False
            try:
                return self._maps(x).to(accumulation(x.dtype))
            finally:
                for part in tracking:
                    part.track_running_stats = True
        scale, shift, weight, bias, norms, eps = self._operands()
        return attention_maps(x, scale, shift, weight, bias, norms, self.groups, self.form != "equations", eps)[0]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape, dtype and memory layout."""
        if is_scripting():
            return self._by_parts(x)
        else:  # which TorchScript leaves out
            y = None if self.form == "released" else self._infer(x)
            return self._forward(x) if y is None else y

    def _forward(self, x: Tensor) -> Tensor:
        """By one operator, where nothing has to see the convolutions; otherwise by these."""
        if isinstance(x, torch.fx.Proxy):  # one node of a traced graph: what the layer does depends on its mode
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        self._check(x)
        if is_captured() or not self.is_standard():
            return self._by_parts(x)
        relu, count = self.form != "equations", x.numel() // self.channels
        scale, shift, weight, bias, norms, eps = self._operands()
        if norms and count < 2:
            raise ValueError("Expected more than 1 value per channel when training")  # as nn.BatchNorm2d says it
        y, moments = subspace_attention(
            x, scale, weight, self.groups, shift=shift, bias=bias, norms=norms, relu=relu, eps=eps
        )
        if norms:
            self._track(moments, count)
        return y

    def _infer(self, x: Tensor) -> Tensor | None:
        """The short way of inference; None where it cannot be taken."""
        # past nn.Module's __getattr__: six of its lookups take as long as the kernels of a small map
        parts: Any = self._modules
        conv, conv2 = parts["depthwise"], parts["pointwise"]
        if (
            type(conv) is not nn.Conv2d
            or type(conv2) is not nn.Conv2d
            or (conv._forward_hooks or conv._forward_pre_hooks or conv2._forward_hooks or conv2._forward_pre_hooks)
            or (
                _global_forward_hooks
                or _global_forward_pre_hooks
                or "forward" in vars(conv)
                or "forward" in vars(conv2)
            )
        ):
            return None  # see is_standard
        first: Any = conv._parameters
        second: Any = conv2._parameters
        if not ("weight" in first and "bias" in first and "weight" in second and "bias" in second):
            return None
        return infer(
            x, first["weight"], first["bias"], second["weight"], second["bias"], self.groups, self.form != "equations"
        )

    def is_standard(self) -> bool:
        """Whether the operator computes what the parts would: nothing hangs on them, and none is of another kind.

        Pruning, weight normalization, quantization observers and counters of operations hang on modules; BatchNorm may
        be converted or frozen.
        """
        if not (_is_plain(self._modules["depthwise"]) and _is_plain(self._modules["pointwise"])):
            return False
        if self.form != "released":
            return True
        first, second = self.depthwise_norm, self.pointwise_norm
        return (
            _is_plain(first, nn.BatchNorm2d)
            and _is_plain(second, nn.BatchNorm2d)
            and (first.training, first.eps) == (second.training, second.eps)
            and all(norm.affine and norm.track_running_stats for norm in (first, second))
        )

    def _by_parts(self, x: Tensor) -> Tensor:
        """What the layer is, part by part: for exporters, compilers to other formats, and whatever hangs on a part.

        Nothing in it depends on the size: it is exported as it stands, whatever sizes are left open, as 11 operations
        of ONNX, or 13 with the ReLUs.
        """
        size = self.channels // self.groups
        subspace = torch.arange(self.groups, device=x.device).unsqueeze(1).expand(-1, size).flatten()  # of each channel
        return x + x * self._maps(x).to(x.dtype).index_select(1, subspace)

    def _maps(self, x: Tensor) -> Tensor:
        """The attention maps [B, groups, H, W], by the parts."""
        h = self.depthwise(x)
        if hasattr(self, "depthwise_norm"):
            h = self.depthwise_norm(h)
        if self.form != "equations":
            h = F.relu(h)
        logits = self.pointwise(F.max_pool2d(h, 3, stride=1, padding=1))
        if hasattr(self, "pointwise_norm"):
            logits = self.pointwise_norm(logits)
        if self.form != "equations":
            logits = F.relu(logits)
        if logits.dtype == torch.float16 or logits.dtype == torch.bfloat16:
            logits = logits.float()
        return softmax_over_maps(logits)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            tokens = ", which looks like tokens [B, N, C]" if x.ndim == 3 else ""
            raise UlsamError(f"ULSAM takes a feature map [B, {self.channels}, H, W], not {list(x.shape)}{tokens}")

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, list[Tensor], float]:
        """The operator's scale, shift, weight, bias, norms and eps; BatchNorm of running statistics is folded."""
        depthwise, pointwise = self.depthwise, self.pointwise
        # as they are, since autograd takes longer for a view of a parameter than for the gradient of a small map
        scale, shift = depthwise.weight, depthwise.bias
        weight, bias = pointwise.weight, pointwise.bias
        if self.form != "released":
            return scale, shift, weight, bias, [], 0.0
        first, second = self.depthwise_norm, self.pointwise_norm
        if first.training:
            return scale, shift, weight, bias, [first.weight, first.bias, second.weight, second.bias], first.eps
        scale, shift = _folded(first, scale.flatten(), cast(Tensor, shift))
        factor, bias = _folded(second, torch.ones_like(second.weight), cast(Tensor, bias))
        return scale, shift, weight.flatten() * factor.repeat_interleave(self.channels // self.groups), bias, [], 0.0

    @torch.no_grad()
    def _track(self, moments: Tensor, count: int) -> None:
        """Move the running statistics towards those of a batch of ``count`` values a channel."""
        mean, variance, mean2, variance2 = moments.split([self.channels, self.channels, self.groups, self.groups])
        parts: Any = self._modules  # see _infer
        conv, conv2 = parts["depthwise"], parts["pointwise"]
        scale, unbiased = conv.weight.flatten(), count / (count - 1)
        _move(parts["depthwise_norm"], scale * mean + conv.bias, scale.square().mul_(variance).mul_(unbiased))
        _move(parts["pointwise_norm"], mean2 + conv2.bias, variance2 * unbiased)

    @torch.no_grad()
    def fold(self) -> "ULSAM":
        """The inference form, a new layer in eval mode: BatchNorm folded into the convolutions, same outputs to 1e-5.

        The other forms have no BatchNorm: their fold is a copy.

        Raises:
            UlsamError: a hook computes the weights, as of `torch.nn.utils.prune`.
        """
        try:
            folded = copy.deepcopy(self).eval()
        except RuntimeError as error:  # PyTorch does not copy weights that a hook computes
            raise UlsamError("a hook computes this layer's weights: take it off first, as by prune.remove") from error
        if self.form == "released":
            folded.form = "folded"
            folded.depthwise = fuse_conv_bn_eval(folded.depthwise, folded.depthwise_norm)
            folded.pointwise = fuse_conv_bn_eval(folded.pointwise, folded.pointwise_norm)
            del folded.depthwise_norm, folded.pointwise_norm
        return folded

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, form={self.form!r}"


def _is_plain(part: nn.Module | None, kind: type[nn.Module] = nn.Conv2d) -> bool:
    """Whether a part is of this very class, and nothing has to see it run."""
    return (
        type(part) is kind
        and "forward" not in vars(part)
        and not (part._forward_hooks or part._forward_pre_hooks or _global_forward_hooks or _global_forward_pre_hooks)
        and not (part._backward_hooks or part._backward_pre_hooks)
    )


def _folded(norm: nn.BatchNorm2d, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that are ``norm``, with its running statistics, of ``scale * x + shift``."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    factor = norm.weight * (variance + norm.eps).rsqrt()
    return scale * factor, (shift - mean) * factor + norm.bias


def _move(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move running statistics by the momentum, as `nn.BatchNorm2d` does, to a mean and an unbiased variance."""
    running: Any = norm._buffers
    batches = running["num_batches_tracked"]
    batches += 1
    momentum = 1.0 / float(batches) if norm.momentum is None else norm.momentum
    for name, value in (("running_mean", mean), ("running_var", variance)):
        running[name].lerp_(value.to(running[name].dtype), momentum)


_RELEASED = {
    "conv_dws": "depthwise",
    "bn_dws": "depthwise_norm",
    "conv_point": "pointwise",
    "bn_point": "pointwise_norm",
}
_RELEASED_KEY = re.compile(r"^(.*?)subspaces\.(\d+)\.(conv_dws|bn_dws|conv_point|bn_point)\.(\w+)$")


def convert_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dict of the authors' released module to the keys of ``ULSAM(..., form="released")``.

    ``subspaces.N.{conv_dws,bn_dws,conv_point,bn_point}.*`` of all N are joined along their first dimension. A prefix
    before ``subspaces`` is kept, so a whole model's state dict can be passed; other keys go through untouched.

    Raises:
        UlsamError: no key of the released module in ``state``, or a subspace missing in the numbering.

    >>> state = {f"subspaces.{n}.conv_point.weight": torch.full((1, 8, 1, 1), float(n)) for n in range(4)}
    >>> convert_released(state)["pointwise.weight"].shape
    torch.Size([4, 8, 1, 1])
    """
    parts: dict[str, dict[int, Tensor]] = {}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := _RELEASED_KEY.match(key):
            prefix, index, layer, leaf = match.groups()
            parts.setdefault(f"{prefix}{_RELEASED[layer]}.{leaf}", {})[int(index)] = value
        else:
            out[key] = value
    if not parts:
        raise UlsamError("no key subspaces.N.{conv_dws,bn_dws,conv_point,bn_point}.* in this state dict")
    for key, found in parts.items():
        if sorted(found) != list(range(len(found))):
            raise UlsamError(f"{key}: subspaces {sorted(found)} found, expected 0..{max(found)} without a gap")
        ordered = [found[n] for n in range(len(found))]
        out[key] = ordered[0] if ordered[0].ndim == 0 else torch.cat(ordered)
    return out
