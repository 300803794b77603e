"""Parameters whose data is still in another dtype than they have: a view of their file, until something reads them."""

import sys
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_DTYPE = "_moreh_target_dtype"
_Tensor: Any = torch.Tensor  # whose attributes are descriptors
_GET_DTYPE, _GET_BYTES, _SET_DATA = _Tensor.dtype.__get__, _Tensor.nbytes.__get__, _Tensor.data.__set__
_GET_BYTES_OF_AN_ELEMENT = (_Tensor.element_size, _Tensor.itemsize.__get__)
_METHODS_WITHOUT_DATA = (
    *("__hash__", "__len__", "dim", "is_complex", "is_contiguous", "is_floating_point", "nelement", "ndimension"),
    *("numel", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "size", "stride"),
)
_ATTRIBUTES_WITHOUT_DATA = (
    *(
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_version",
        "device",
        "grad",
        "grad_fn",
        "is_cpu",
        "is_cuda",
        "is_leaf",
        "is_meta",
        "is_mps",
    ),
    *("is_quantized", "is_sparse", "is_xpu", "layout", "ndim", "output_nr", "requires_grad", "retains_grad", "shape"),
)
# Functions that read no element and whose result does not depend on the dtype.
_WITHOUT_DATA = {
    *(torch.is_floating_point, torch.is_complex, torch.numel),
    *(_Tensor.requires_grad.__set__, _Tensor.grad.__delete__),
    *(getattr(_Tensor, name) for name in _METHODS_WITHOUT_DATA),
    *(getattr(_Tensor, name).__get__ for name in _ATTRIBUTES_WITHOUT_DATA),
}


class LazyParameter(nn.Parameter):
    """A parameter that is converted to its dtype when the first function reads its data, and is an ordinary one then.

    Its dtype, shape, device and gradient can be asked for without.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function == _GET_DTYPE:
                return args[0].__dict__[_DTYPE]
            if function in _GET_BYTES_OF_AN_ELEMENT:
                return args[0].__dict__[_DTYPE].itemsize
            if function == _GET_BYTES:
                return args[0].__dict__[_DTYPE].itemsize * args[0].numel()
            if function == _SET_DATA:
                make_ordinary(args[0])
            if function not in _WITHOUT_DATA:
                for leaf in tree_leaves((args, kwargs)):
                    convert(leaf)
            result = function(*args, **kwargs)
            if function is torch.Tensor.detach and sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
                # `nn.Parameter(parameter)` expects the class that the parameter has now.
                return nn.Parameter(result, requires_grad=False)
            return result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A lazy copy: the data is copied as it is."""
        if id(self) not in memo:
            copied = nn.Parameter(file_data(self).clone(memory_format=torch.preserve_format), self.requires_grad)
            memo[id(self)] = as_lazy(copied, self.__dict__[_DTYPE])
        result: nn.Parameter = memo[id(self)]
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        convert(self)
        return self.__reduce_ex__(protocol)  # of its class from now on


def as_lazy(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Let a parameter have another dtype, to which its data is converted when it is read. Returns the parameter.

    Data of a lazy parameter whose present dtype rounds is converted first, as by the cast that gave it that dtype.
    Parameters of other classes are converted at once.
    """
    if parameter.dtype == dtype:
        return parameter
    stored = file_data(parameter).dtype
    if isinstance(parameter, LazyParameter) and torch.promote_types(stored, parameter.dtype) != parameter.dtype:
        convert(parameter)
        stored = parameter.dtype
    if type(parameter) not in (nn.Parameter, LazyParameter):
        parameter.data = parameter.data.to(dtype)
    elif stored == dtype:
        make_ordinary(parameter)
    else:
        parameter.__dict__[_DTYPE] = dtype
        parameter.__class__ = LazyParameter
    return parameter


def convert(value: Any) -> None:
    """Give a lazy parameter its data in its dtype. Anything else stays as it is."""
    if isinstance(value, LazyParameter):
        dtype = value.__dict__[_DTYPE]
        make_ordinary(value)
        value.data = value.data.to(dtype)


def make_ordinary(parameter: nn.Parameter) -> None:
    """Make a lazy parameter an ordinary one, in the dtype of its data."""
    if type(parameter) is LazyParameter:
        del parameter.__dict__[_DTYPE]
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def file_data(parameter: nn.Parameter) -> torch.Tensor:
    """The data of a parameter as it is stored, which a lazy one has in another dtype than its own."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.data
