"""The linear maps that a module computes with its own parameters, seen while it runs.

A feed-forward may call its projections as modules, hand their weights to `F.linear`, multiply with
a transposed parameter, gather the weights of chosen experts and use `bmm`, or give all experts to
`grouped_mm`; it may do so inside an `autograd.Function`. All of these pass through
`__torch_function__`, so one mode sees them. A tensor is known to be (part of) a parameter by its
storage: offset and strides say which rows it holds and whether it is transposed. Copies that hold
whole matrices (the gathered experts, another dtype) are followed too.

What comes out of a map is not done before its bias is added, which some write as an operation of
its own, and must be looked at before somebody works on it in place. So a map *ends* at the first
use of its output that is neither the addition of a parameter nor a change of shape, just before
that use; and it *begins* before it runs, when its input is whole.

Only looked at: every operation is handed on as it came. Cost: a few microseconds an operation
while the module runs. Rejected: `TorchDispatchMode`, below autograd, where the tensors are other
objects and a bias is fused into `addmm`; patching `forward`, which stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode


class Source(NamedTuple):
    """What a map multiplies with: rows of [out, in] of the parameter called `name`."""

    name: str
    first: int
    size: int
    step: int
    transposed: bool = False  # stored as [in, out]
    flat: bool = False  # stored as [n, out / n, in]


@dataclass(eq=False)
class LinearMap:
    """One linear map: its features are the last axis of `input`, and of `output` once it ended."""

    source: Source
    bias: str | None
    module: nn.Module | None
    input: Tensor
    output: Tensor


class _Matrices(NamedTuple):
    """Memory that holds a parameter's values: a batch of [rows, columns], and its strides."""

    name: str
    storage: StorageWeakRef
    offset: int
    extent: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class _Product:
    """The operands of a product; `first` says that the weight, [out, in], stands on the left."""

    input: Tensor
    weight: Tensor
    out_axis: int
    in_axis: int
    bias: Tensor | None = None
    weight_first: bool = False


_MATMULS = {"matmul", "mm", "bmm", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_ADDS = {"add", "add_"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"}
_RESHAPES |= {"masked_fill"}  # of rows that belong to no expert, which the kernel left unwritten
_COPIES = {"__getitem__", "index_select", "to", "float", "bfloat16", "half", "double", "type"}
_COPIES |= {"type_as", "contiguous", "clone", "reshape"}
_QUESTIONS = {"__get__", "size", "dim", "numel", "stride", "is_contiguous", "data_ptr", "__len__"}
_QUESTIONS |= {"is_floating_point", "element_size", "get_device", "requires_grad_"}


def features_last(tensor: Tensor, width: int) -> Tensor | None:
    """A view of `tensor` whose last axis is the `width` features; None if it has no such axis."""
    shape = tensor.shape
    if shape and shape[-1] == width:
        return tensor
    if len(shape) >= 2 and shape[-1] == 1 and shape[-2] == width:
        return tensor.squeeze(-1)
    if len(shape) >= 2 and shape[-1] * shape[-2] == width:
        return tensor.flatten(-2)
    return None


class Trace(TorchFunctionMode):
    """Tells `begins` and `ends` about every linear map of `parameters` while it is entered."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        begins: Callable[[LinearMap], None],
        ends: Callable[[LinearMap], None],
    ) -> None:
        super().__init__()
        self._begins, self._ends = begins, ends
        self._known: dict[int, list[_Matrices]] = {}
        self._open: list[LinearMap] = []
        self._inside: list[LinearMap | None] = []
        for name, parameter in parameters.items():
            self._learn(name, parameter)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._inside or name in _QUESTIONS:
            return func(*args, **kwargs)
        product = self._product(name, args, kwargs)
        started = None if product is None else self._start(product)
        used = self._used_by(args, kwargs) if self._open else []
        if started is None and used and self._continues(name, args, used[0]):
            output = func(*args, **kwargs)
            used[0].output = output
            return output
        for done in used:
            self._end(done)
        if started is not None:
            self._begins(started)
        output = func(*args, **kwargs)
        if started is not None:
            started.output = output
            self._open.append(started)
        elif name in _COPIES and args and isinstance(output, Tensor):
            self._follow(args[0], output)
        return output

    def enter_module(self, source: Source, bias: str | None, module: nn.Module, input: Any) -> None:
        """`module` is called for a map; what it does inside is its own business."""
        known = None
        if isinstance(input, Tensor) and not self._inside:
            for done in self._used_by((input,), {}):
                self._end(done)
            known = LinearMap(source, bias, module, input, input)
            self._begins(known)
        self._inside.append(known)

    def leave_module(self, result: Any) -> None:
        """The module that was entered last has returned `result`, None if it raised."""
        known, output = self._inside.pop() if self._inside else None, output_of(result)
        if known is not None and output is not None:
            known.output = output
            self._ends(known)

    def finish(self) -> None:
        """The forward is over: what nobody used has ended too."""
        for done in list(self._open):
            self._end(done)

    def _end(self, done: LinearMap) -> None:
        self._open.remove(done)
        output = features_last(done.output, done.source.size)
        if output is not None:
            done.output = output
            self._ends(done)

    def _used_by(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[LinearMap]:
        flat: set[int] = set()
        for value in (*args, *kwargs.values()):
            if isinstance(value, list | tuple):
                flat.update(map(id, value))
            else:
                flat.add(id(value))
        return [known for known in self._open if id(known.output) in flat]

    def _continues(self, name: str, args: tuple[Any, ...], known: LinearMap) -> bool:
        if name in _RESHAPES:
            return bool(args) and args[0] is known.output
        if name not in _ADDS or len(args) != 2:
            return False
        other = args[1] if args[0] is known.output else args[0]
        bias = self._matrices_of(other) if isinstance(other, Tensor) else None
        if bias is None or known.bias is not None:
            return False
        known.bias = bias.name
        return True

    def _product(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> _Product | None:
        """The call as the product of an input and a parameter, if it is one."""
        if name == "linear":
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
            return _Product(given["input"], given["weight"], -2, -1, given.get("bias"))
        if name == "einsum" and len(args) == 3 and isinstance(args[0], str):
            return _einsum(*args)
        bias = None
        if name in ("addmm", "baddbmm") and len(args) == 3 and not kwargs:
            bias, *args = args  # type: ignore[assignment]
        elif name not in _MATMULS:
            return None
        named = (kwargs.get("input"), kwargs.get("other", kwargs.get("mat2")))
        left, right = (*args, *named[len(args) :])[:2]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        if self._matrices_of(right) is not None or self._matrices_of(left) is None:
            return _Product(left, right, -1, -2, bias)
        return _Product(right, left, -2, -1, bias, weight_first=True)

    def _start(self, product: _Product) -> LinearMap | None:
        source = self._source(product)
        bias = None if product.bias is None else self._matrices_of(product.bias)
        if source is None or (product.bias is not None and bias is None):
            return None
        input = product.input
        if product.weight_first and input.dim() > 1:
            input = input.transpose(-2, -1)
        if product.weight.dim() == 3 and input.dim() == 3 and input.shape[-2] == 1:
            input = input.squeeze(-2)  # each token has a matrix of its own
        return LinearMap(source, None if bias is None else bias.name, None, input, input)

    def _source(self, product: _Product) -> Source | None:
        weight, known = product.weight, self._matrices_of(product.weight)
        if known is None or weight.dim() < 2 or len(known.shape) < 2:
            return None
        (rows, columns), (row, column) = known.shape[-2:], known.strides[-2:]
        count, out = weight.shape[product.out_axis], weight.stride(product.out_axis)
        inner = weight.shape[product.in_axis], weight.stride(product.in_axis)
        transposed = inner != (columns, column)
        if transposed and inner != (rows, row):
            return None
        size, stride = (columns, column) if transposed else (rows, row)
        start = (weight.storage_offset() - known.offset) % max(1, rows * columns)
        flat = len(known.shape) == 3 and count == known.shape[0] * rows > rows and not transposed
        if not stride or start % stride or out % stride or (count > size and not flat):
            return None
        return Source(known.name, start // stride, count, max(1, out // stride), transposed, flat)

    def _learn(self, name: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            known = _Matrices(
                name,
                StorageWeakRef(storage),  # type: ignore[no-untyped-call]
                int(tensor.storage_offset()),
                1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)),
                tuple(tensor.shape),
                tensor.stride(),
            )
            self._known.setdefault(storage.data_ptr(), []).append(known)

    def _matrices_of(self, tensor: Tensor) -> _Matrices | None:
        """What a tensor is a view of."""
        if not self._known or type(tensor) not in (Tensor, nn.Parameter):
            return None
        for known in reversed(self._known.get(tensor.untyped_storage().data_ptr(), [])):
            # Memory that was given back may hold an activation by now.
            inside = 0 <= tensor.storage_offset() - known.offset < known.extent
            if inside and not known.storage.expired():  # type: ignore[no-untyped-call]
                return known
        return None

    def _follow(self, original: Any, copy: Tensor) -> None:
        """A copy of a parameter's whole matrices is as good as the parameter."""
        if not isinstance(original, Tensor) or self._matrices_of(copy) is not None:
            return
        known = self._matrices_of(original)
        if known is None:
            return
        rank = min(2, original.dim())
        if original.dim() < 2 or copy.shape[-2:] != original.shape[-2:] or len(known.shape) < 2:
            rank = 1
        strides = original.stride()[-2:]
        if rank == 1:  # can only be a bias
            self._learn(known.name, copy.reshape(-1))
        elif (original.shape[-2:], strides) == (known.shape[-2:], known.strides[-2:]):
            self._learn(known.name, copy)
        elif (original.shape[-2:], strides) == (known.shape[:-3:-1], known.strides[:-3:-1]):
            self._learn(known.name, copy.transpose(-2, -1))


def _einsum(equation: str, input: Tensor, weight: Tensor) -> _Product | None:
    """`...i,oi->...o` and its like: of what is last, the input's is summed over and the output's is
    the weight's alone."""
    terms, arrow, out = equation.replace(" ", "").replace("...", "").partition("->")
    left, comma, right = terms.partition(",")
    if not arrow or not comma or weight.dim() != len(right):
        return None
    inner, outer = left[-1:], out[-1:]
    summed = inner in right and inner not in out
    if not inner or not outer or not summed or outer not in right or outer in left:
        return None
    return _Product(input, weight, right.index(outer), right.index(inner))


def output_of(result: Any) -> Tensor | None:
    """The tensor that a projection returned: of (output, bias), which Megatron's linear layers
    return where the bias is still to be added, their sum. None if there is none."""
    if isinstance(result, tuple | list) and result and isinstance(result[0], Tensor):
        output: Tensor = result[0]
        bias = result[1] if len(result) > 1 else None
        if isinstance(bias, Tensor) and bias.shape == output.shape[-1:]:
            return output + bias
        return output
    return result if isinstance(result, Tensor) else None
