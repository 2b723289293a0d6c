"""Whose stream a call runs on: CuPy's current one, or torch's where tensors come in.

DLPack says on which stream a consumer will read, not on which the producer writes. Between two streams an event has to
order the work, and a call cannot join a capture that torch has begun on its own. So a call with tensors runs on torch's
current stream, where nothing has to be waited for. For JAX, whose streams are not to be had, CuPy's current stream
waits.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _Handle:
    """A stream of another library in the words of the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def on_producers_stream(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function run on torch's current stream if one of its arguments is a tensor on a GPU."""

    @wraps(function)
    def on_that_stream(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "torch" not in sys.modules:
            return function(*args, **kwargs)
        with _stream_of_torch((*args, *kwargs.values())):
            return function(*args, **kwargs)

    return on_that_stream


def _stream_of_torch(arguments: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return a context in which CuPy's current device and stream are those of the first tensor on a GPU, if any."""
    torch, cupy = sys.modules["torch"], sys.modules.get("cupy")
    tensors = (a for a in arguments if type(a).__module__.startswith("torch") and getattr(a, "is_cuda", False))
    tensor = next(tensors, None)
    if tensor is None or cupy is None:
        return nullcontext()
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    stack = ExitStack()
    stack.enter_context(cupy.cuda.Device(tensor.device.index))
    if stream != cupy.cuda.get_current_stream().ptr:
        stack.enter_context(cupy.cuda.Stream.from_external(_Handle(stream)) if stream else cupy.cuda.Stream.null)
    return stack


def wait_for(stream: int, cupy: Any) -> None:
    """Let CuPy's current stream wait for all that is on another one now; the host does not wait.

    `stream` is a handle as ``__cuda_array_interface__`` gives it: 1 is the legacy default stream.
    """
    current = cupy.cuda.get_current_stream()
    if stream in (current.ptr, 1 if current.ptr == 0 else current.ptr):
        return
    event = cupy.cuda.Event(disable_timing=True)
    event.record(cupy.cuda.Stream.null if stream == 1 else cupy.cuda.Stream.from_external(_Handle(stream)))
    current.wait_event(event)
