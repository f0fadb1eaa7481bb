"""What a training step must not do: wait for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.bincount.default,
    torch.ops.aten._unique2.default,
)
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result's value or shape the host would wait for on CUDA."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):  # these do not come past the dispatcher for a tensor on the CPU
            self.patch.setattr(torch.Tensor, name, self.refuse)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    @staticmethod
    def refuse(*_):
        raise AssertionError("copying to the host makes it wait for the device")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if function in WAITS or by_mask:
            raise AssertionError(f"{function} makes the host wait for the device")
        return function(*args, **kwargs or {})
