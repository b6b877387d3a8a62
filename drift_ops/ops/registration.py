"""How a step of the operator reaches a backend, and what autograd, ``torch.compile`` and autocast see of it.

Each is a ``torch.library`` custom op with a fake implementation (shapes only), whose schema is made from its spec. In
eager mode the backend is called as it is: the dispatcher would take longer than a small problem. Either way the values
are the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..backends import implementation
from ..spec import AffinitySpec, LossSpec, PairSpec

_Spec = TypeVar("_Spec", AffinitySpec, LossSpec, PairSpec)


def is_plain(tensor: Tensor) -> bool:
    """Whether a backend may look at the memory of ``tensor``: nobody traces, and no transform of torch.func is on."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_dispatch_mode(_FAKE) is None
        and torch._C._get_dispatch_mode(_PROXY) is None
    )


_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def define(tensors: str, spec: type[_Spec], results: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a custom op of a function of tensors, a spec and a backend; see :func:`given`."""

    def define(function: Callable[..., Any]) -> Any:
        schema = f"({tensors}, {spec.schema()}, str backend) -> {results}"
        name = f"drift_ops::{function.__name__.removeprefix('_')}"
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)

    return define


def given(spec: type[_Spec], arguments: Sequence[Any]) -> tuple[_Spec, Any]:
    """The spec and the module of the backend that the last arguments of an op stand for."""
    *values, backend = arguments
    return spec.of(values), implementation(backend)


class Step(torch.autograd.Function):
    """A step of the operator: it ``compute``s a result and ``keep``s what its backward needs."""

    compute: Callable[..., Any]
    keep: Callable[..., None]
    of_transforms: Any  # the same as torch.func wants it, its context set up apart, which takes longer

    def __init_subclass__(cls) -> None:
        if "of_transforms" in cls.__dict__:
            return

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = cls.compute(*inputs)
            cls.keep(ctx, inputs, output)
            return output

        apart = {"forward": staticmethod(cls.compute), "setup_context": staticmethod(cls.keep)}
        cls.of_transforms = type(cls.__name__, (cls,), apart | {"generate_vmap_rule": True, "of_transforms": None})
        cls.forward = staticmethod(forward)  # type: ignore[method-assign]


def apply_step(step: Any, *inputs: Any) -> Any:
    return (step.of_transforms if torch._C._are_functorch_transforms_active() else step).apply(*inputs)


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("drift_ops: there is no double backward; use backend='reference' for second derivatives")


class Once(Step):
    """The results of an op of a backward under torch.func, which takes no op that autograd is registered for."""

    @staticmethod
    def compute(op: Any, layout: Any, *leaves: Any) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(op(*tree_unflatten(leaves, layout))))

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(no_double_backward)


def once(op: Any, *arguments: Any) -> Any:
    """All results of an op of a backward, which has no derivative of its own."""
    if not torch._C._are_functorch_transforms_active():
        return tree_leaves(op(*arguments))
    leaves, layout = tree_flatten(arguments)
    return Once.of_transforms.apply(op, layout, *leaves)


def rows(t: Any) -> Any:
    """Points, or lists of them, whose last dimension is contiguous; the others' strides are the backend's business."""
    if isinstance(t, Tensor):
        return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return [rows(each) for each in t]


def _entry(argument: Any, dim: Any, n: int) -> Any:
    """Entry n of an argument of an op, or of each tensor in it, that has a batch at ``dim``; None: it has none."""
    if isinstance(dim, (list, tuple)):
        return [_entry(each, of_each, n) for each, of_each in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, n)


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """An op under torch.func.vmap: its calls one after the other. Leading dimensions are faster."""
    calls = ([_entry(*of_one, n) for of_one in zip(arguments, in_dims, strict=True)] for n in range(info.batch_size))
    results = [op(*call) for call in calls]
    return tree_map(lambda *entries: torch.stack(entries), *results), tree_map(lambda _: 0, results[0])


def finish(op: Any, of_backward: bool = False) -> None:
    """What every op has beside its function and its fake; one of a backward has no derivative."""
    op.register_vmap(functools.partial(_one_by_one, op))
    if of_backward:
        op.register_autograd(no_double_backward)
