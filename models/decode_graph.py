"""A decode step as one CUDA graph: a small batch leaves a GPU waiting for the CPU to start its kernels (SPEC §8)."""

import torch
import torch.nn.functional as F

from models.incremental import PlainPhi

# R rows, H hidden size

WARM_UP = 3  # runs before capture, in which libraries choose their kernels and take their workspaces


class StaticStep:
    """One position of every row, always of the same shapes: it looks at all slots of the cache and masks the free ones.

    Args:
        transformer: has read the prompts.
    """

    def __init__(self, transformer: PlainPhi):
        self.transformer = transformer
        for layer in transformer.layers:  # 0 times what memory happened to hold may be NaN
            layer.keys[:, transformer.length :] = layer.values[:, transformer.length :] = 0
        mask = transformer.mask
        self.token = torch.zeros(mask.shape[0], 1, dtype=torch.long, device=mask.device)  # (R, 1)
        self.slot = torch.full((1,), transformer.length, device=mask.device)
        self.desk = transformer.desk(transformer.embed_tokens(self.token))

    def run(self) -> torch.Tensor:
        """Final hidden states (R, 1, H) of `self.token` in `self.slot`, without a word from the CPU in between."""
        transformer, slot = self.transformer, self.slot
        hidden = transformer.embed_tokens(self.token)
        visible = (transformer.mask.visible_from <= slot) & (slot < transformer.mask.visible_until)  # (R, room)
        bias = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill(~visible, -torch.inf)[:, None, None]
        rotation = transformer.cos.index_select(1, slot), transformer.sin.index_select(1, slot)
        hidden = self.desk.run(hidden, slot, rotation, bias)
        return F.layer_norm(hidden, *transformer.final_norm)

    def extend(self, token: torch.Tensor) -> torch.Tensor:
        """As `PlainPhi.extend` of ids (R, 1)."""
        self.token.copy_(token)
        self.slot.fill_(self.transformer.length)
        self.transformer.length += 1
        return self.run()


class DecodeGraph(StaticStep):
    """The same, captured once and replayed; what `extend` returns is overwritten by the next call."""

    def __init__(self, transformer: PlainPhi):
        super().__init__(transformer)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # they write into the slot that the first real step overwrites
                super().run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = super().run()

    def run(self) -> torch.Tensor:
        self.graph.replay()
        return self.hidden
