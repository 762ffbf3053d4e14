"""How tensors get from the host to the device of a model."""

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """To a device; to a GPU from page-locked memory, so that the host goes on while the copy waits for its turn."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
