"""Copies of tensors from the host to a device."""

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a tensor to `device`; to a GPU asynchronously, from pinned memory, so that the host does not wait."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
