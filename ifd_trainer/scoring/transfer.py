"""Arrays to a device and back, without waiting for it.

A GPU works off a queue of what it was told, while the program on the host goes on. A copy that is made the plain way
stops the host until the queue is empty. Here each copy takes its turn in the queue: neither way waits for what is
launched later.
"""

from __future__ import annotations

import numpy as np
import torch


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; for a CPU it shares the array's memory.

    A copy to CUDA from ordinary memory would begin when all that was launched before has ended, and the host would
    wait for it; from pinned memory it takes its turn.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor that is on its way to the host.

    On CUDA the copy is launched now, behind what computes the tensor: one that is asked for later would stand behind
    all that was launched until then.

    >>> HostCopy(torch.tensor([1.0, 2.0])).array().tolist()
    [1.0, 2.0]
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = tensor.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def array(self) -> np.ndarray:
        """Its values; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu().numpy()
