"""Every private name of torch that the package uses, with what takes its place where a version lacks it.

Two kinds of places: what only makes calls faster falls back to the public, slower way ("observed": the operator goes
through torch's dispatcher as any other), and what tells something that no public name tells says that it is not known.
Nothing else in the package reads a private name.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

NAMES: dict[str, bool] = {}
"""Every private name, after "torch.", and whether this torch has it."""


def _private(path: str) -> Any:
    """The object at `torch.<path>`, or None."""
    try:
        found = operator.attrgetter(path)(torch)
    except AttributeError:
        found = None
    NAMES[path] = found is not None
    return found


# What could see a difference between a registered op and its kernel. Public calls do not tell which modes are on.
_dispatch_modes = _private("_C._len_torch_dispatch_stack")
_function_modes = _private("_C._len_torch_function_stack")
_transforms = _private("_C._are_functorch_transforms_active")
_tracing = _private("_C._get_tracing_state")
_below_autograd = _private("_C._AutoDispatchBelowAutograd")
_is_gradtracking = _private("_C._functorch.is_gradtrackingtensor")
_is_legacy_batched = _private("_C._functorch.is_legacy_batchedtensor")
_is_zero = _private("Tensor._is_zerotensor")
_private("autograd.profiler._is_profiler_enabled")  # a flag, read anew at each call

_BYPASS = all(NAMES.values())
"""Whether all that would notice a bypass of the dispatcher can be asked."""
_PLAIN = (Tensor, torch.nn.Parameter)


def is_unobserved(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing could tell a registered op's kernel from the op: then the dispatcher may be left out.

    The op is called under torch.compile, export, a tracer, a transform of torch.func, a dispatch or function mode or
    the profiler, and for subclasses of tensors, meta tensors, those of a batched backward and views that stand for
    negated values or for zeros; and where one of these is not known. Observers that set no state in Python (execution
    traces, Kineto on demand) do not see it.
    """
    if (
        not _BYPASS
        or torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or _tracing()
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if (
            type(tensor) not in _PLAIN
            or tensor.is_meta
            or tensor.is_neg()
            or _is_zero(tensor)
            or _is_legacy_batched(tensor)
        ):
            return False
    return True


below_autograd: Callable[[], AbstractContextManager[object]] = _below_autograd or torch.no_grad
"""Inside, calls of torch record nothing for autograd. To be used only where `is_unobserved`."""


def _unknown(*_asked: object) -> bool:
    return True


may_be_differentiated: Callable[[Tensor], bool] = _is_gradtracking or _unknown
"""Whether a transform of torch.func differentiates the tensor, with gradients off too; True where unknown."""


_private("autograd.forward_ad._current_level")  # a number, read anew at each call


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is under way; True where that is not known."""
    return not NAMES["autograd.forward_ad._current_level"] or torch.autograd.forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether torch.jit.trace records what is called, asked without its wrapper in Python where that goes."""
    return torch.jit.is_tracing() if _tracing is None else _tracing() is not None  # pyright: ignore[reportPrivateImportUsage]


may_autocast: Callable[[], bool] = _private("_C._is_any_autocast_enabled") or _unknown
"""False where autocast is off for every kind of device: one question instead of one for each."""


_ExcludeKeys = _private("_C._ExcludeDispatchKeyGuard")
_KeySet, _key = _private("_C.DispatchKeySet"), _private("_C.DispatchKey.ADInplaceOrView")
without_views: Callable[[], AbstractContextManager[object]] | None = None
"""Inside, a view is none to autograd, which forbids changing in place, as y += 1, what a Function returns as a view."""
if not (_ExcludeKeys is None or _KeySet is None or _key is None):
    without_views = partial(_ExcludeKeys, _KeySet(_key))


# Which backward is under way on this thread. No public name tells it, and gradient checkpointing does not either.
_current_node = _private("_C._current_autograd_node")
_next_number = _private("_C._autograd._get_sequence_nr")
_current_backward = _private("_C._current_graph_task_id")
_python_node = _private("autograd.function.BackwardCFunction.apply")
KNOWS_BACKWARD = None not in (_current_node, _current_backward, _python_node)
"""Whether this torch tells which backward is under way."""


def current_node() -> Any | None:
    """The autograd node that this thread executes; None outside a backward, or where torch does not tell."""
    return None if _current_node is None else _current_node()


def sequence_number() -> int:
    """The number that the next autograd node made on this thread will have; numbers rise as nodes are made."""
    if _next_number is not None:
        return _next_number()
    with torch.enable_grad():
        node: Any = torch.ones((), requires_grad=True).view(()).grad_fn
    return node._sequence_nr() + 1


def node_sequence_number(node: Any) -> int:
    """The number of a node that `current_node` gave."""
    return node._sequence_nr()


def current_backward() -> int:
    """Return a number that only the innermost backward on this thread has; -1 outside a backward, or if unknown."""
    return -1 if _current_backward is None else _current_backward()


def outermost_node(node: Any) -> Any:
    """The node that the outermost backward under way on this thread executes; `node`, the innermost one's, by itself.

    A re-entrant checkpoint starts a backward inside the one that runs it. Every node that is implemented in Python, as
    its node is, is called by one function of torch's, in whose frame it is `self`.
    """
    if _python_node is None:
        return node
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _python_node.__code__:
            node = frame.f_locals["self"]
        frame = frame.f_back
    return node


_module = "nn.modules.module"
_GLOBAL_HOOKS = tuple(
    _private(f"{_module}.{name}")
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
_WATCHERS = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")
"""Modules of torch's trackers, by whose hooks FlopCounterMode and memory trackers know which module is running."""


def has_global_hooks() -> bool:
    """Whether hooks that may change what a call does are registered on all modules of the process.

    Those of torch's own trackers only watch: with them the same path runs as without, and is what they measure. True
    where torch does not tell.
    """
    if None in _GLOBAL_HOOKS:
        return True
    return any(_GLOBAL_HOOKS) and not all(
        _only_watches(hook) for hooks in _GLOBAL_HOOKS for hook in hooks.values()
    )


def _only_watches(hook: object) -> bool:
    """Whether the hook is a method of one of torch's trackers."""
    return any(kind.__module__ in _WATCHERS for kind in type(getattr(hook, "__self__", None)).__mro__)


_end_allocation = _private("_C._cuda_endAllocateToPool") if torch.version.cuda else None


def end_allocation(device: int, pool: Any) -> None:
    """End a CUDA graph's allocations to its pool, which torch does not where ending the capture fails.

    Until then the allocator would take a capture to be under way. Where this version ended them, nothing happens.
    """
    if _end_allocation is not None:
        with suppress(RuntimeError):  # it is not allocating to this pool
            _end_allocation(device, pool)


def dispatch_modes() -> list[Any]:
    """The dispatch modes that are on, such as FlopCounterMode's; none where torch does not tell."""
    try:
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    except ImportError:
        return []
    return _get_current_dispatch_mode_stack()


def graph_breaks() -> dict[str, int]:
    """Reasons for which torch.compile has broken graphs in this process, counted; empty where it does not tell."""
    try:
        from torch._dynamo.utils import counters
    except ImportError:
        return {}
    return dict(counters["graph_break"])


def more_recompilations(limit: int) -> AbstractContextManager[object]:
    """Inside, torch.compile compiles a function up to `limit` times; torch's own limit where it cannot be raised."""
    try:
        import torch._dynamo as dynamo
    except ImportError:
        return nullcontext()
    return dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=16 * limit)
