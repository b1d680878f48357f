"""Every test of the store runs on each device there is: the CPU, the CUDA sources emulated on the CPU, and a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fiited_ray.store import VhpiShard, _extension, backends

DEVICES = ("cpu", "emulated", *(device for device in backends() if device != "cpu"))


class OnGpu(TorchFunctionMode):
    """Tests written for the CPU, on a GPU: what they make goes there, random numbers are drawn as on the CPU, numpy gets copies."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            return function(args[0].cpu(), *args[1:], **kwargs)
        if kwargs.get("generator") is not None:
            return function(*args, **(kwargs | {"device": "cpu"})).cuda()
        return function(*args, **kwargs)


@pytest.fixture(scope="module", params=DEVICES, autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device that operators on the CPU's tensors, or the tests' tensors, belong to for one turn of the module."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if request.param == "emulated":
            patch.setitem(_extension.NAMESPACES, "cpu", "fiited_emulated")
        elif request.param == "cuda":
            patch.setattr(VhpiShard.__init__, "__defaults__", ("cuda",))
            from_numpy = torch.from_numpy  # which no mode sees
            patch.setattr(torch, "from_numpy", lambda array: from_numpy(array).cuda())
            stack.enter_context(torch.device("cuda"))
            stack.enter_context(OnGpu())
        yield request.param
