"""Arrays from the host to a device, without making the host wait for what the device is doing."""

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
