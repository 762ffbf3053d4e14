"""The MAGVIT-v2 image tokenizer: pixels <-> integer codes, and its quantiser losses (spec §10).

The defaults of `MAGVITv2Config` are the published tokenizer (16x downsampling, 13 bits, 95.4 M parameters); a small
tokenizer is the same class with other sizes. Parameter names are the published ones.

Shapes: B images, H x W pixels, h x w tokens (h = H / factor), N = h * w, C channels, K bits per code.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from models.checkpoint_io import CheckpointMixin
from models.config_fields import MAGVIT_FIELDS, check_fields


class MAGVITv2Config(PretrainedConfig):
    """Sizes of an image tokenizer.

    Args:
        ch: base width; a level has `ch` times its multiplier channels.
        encoder_ch_mult, decoder_ch_mult: one multiplier per resolution, finest first; encoder and decoder must have
            the same number.
        encoder_num_res_blocks, decoder_num_res_blocks: residual blocks per resolution, finest first.
        code_bits: bits per code; the codebook has `2 ** code_bits` entries.
        num_groups: groups of every GroupNorm; must divide every width.
        stem_patch_size: k > 1 moves k x k pixels into channels before the first convolution and back after the last
            one, so that a small tokenizer computes nothing at full resolution.
        local_encoder: each code is computed from its own patch alone, by kernels of 1 and norms of single positions, so
            that a thing has the same codes wherever it stands and whatever is around it: a language model has less to
            learn. The decoder sees the surroundings as ever. Not published.
        encoder_mid, decoder_mid: whether to have the block-attention-block at the coarsest resolution. Both are
            published; a small tokenizer may spend these parameters elsewhere.

    Raises:
        ValueError: the sizes are inconsistent.
    """

    model_type = "magvitv2"

    def __init__(
        self,
        ch: int = 128,
        encoder_ch_mult: tuple[int, ...] = (1, 2, 2, 4, 4),
        decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        encoder_num_res_blocks: tuple[int, ...] = (4, 3, 4, 3, 4),
        decoder_num_res_blocks: tuple[int, ...] = (4, 4, 3, 4, 3),
        code_bits: int = 13,
        num_groups: int = 32,
        stem_patch_size: int = 1,
        local_encoder: bool = False,
        encoder_mid: bool = True,
        decoder_mid: bool = True,
        **kwargs,
    ):
        check_fields({**locals(), **kwargs}, MAGVIT_FIELDS)
        self.ch = ch
        self.encoder_ch_mult = list(encoder_ch_mult)
        self.decoder_ch_mult = list(decoder_ch_mult)
        self.encoder_num_res_blocks = list(encoder_num_res_blocks)
        self.decoder_num_res_blocks = list(decoder_num_res_blocks)
        self.code_bits = code_bits
        self.num_groups = num_groups
        self.stem_patch_size = stem_patch_size
        self.local_encoder = local_encoder
        self.encoder_mid = encoder_mid
        self.decoder_mid = decoder_mid
        per_level = (encoder_ch_mult, decoder_ch_mult, encoder_num_res_blocks, decoder_num_res_blocks)
        if len({len(values) for values in per_level}) != 1:
            raise ValueError(
                "encoder_ch_mult, decoder_ch_mult, encoder_num_res_blocks and decoder_num_res_blocks must be equally "
                f"long, got lengths {[len(values) for values in per_level]}"
            )
        widths = {ch * mult for mult in self.encoder_ch_mult + self.decoder_ch_mult}
        if bad := sorted(width for width in widths if width % num_groups):
            raise ValueError(f"num_groups={num_groups} must divide every width, but does not divide {bad}")
        if local_encoder and (len(self.encoder_ch_mult) > 1 or encoder_mid):
            raise ValueError(
                "local_encoder needs one level and encoder_mid=False; set stem_patch_size to the pixels of a token"
            )
        super().__init__(**kwargs)

    @property
    def downsampling_factor(self) -> int:
        """Pixels per token along one side (16 as published)."""
        return self.stem_patch_size * 2 ** (len(self.encoder_ch_mult) - 1)

    @property
    def codebook_size(self) -> int:
        return 2**self.code_bits


@dataclass
class MAGVITv2Output(ModelOutput):
    """Result of `MAGVITv2.forward`.

    Attributes:
        reconstruction: (B, 3, H, W) pixels, about [-1, 1], not clamped.
        latents: (B, K, h, w) before quantisation.
        codes: (B, N) int64 in [0, 2^K).
        loss_commit, loss_entropy: scalars, the published quantiser losses with their published weights.
    """

    reconstruction: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    loss_commit: torch.Tensor | None = None
    loss_entropy: torch.Tensor | None = None


def bit_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of bits with P(1) = sigmoid(logits), elementwise; written so that no gradient is infinite."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


def distribution_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """-p log p, elementwise. The gradient is infinite at 0, so probabilities that underflowed are raised to 1e-12."""
    return torch.special.entr(probabilities.clamp_min(1e-12))


class LookupFreeQuantizer(nn.Module):
    """One bit per channel: its sign. The codebook is all corners of a hypercube, so nothing is looked up or learned.

    `embedding` and `power_vals` follow from `code_bits`; they are buffers because published checkpoints contain them.
    """

    def __init__(self, code_bits: int):
        super().__init__()
        self.code_bits = code_bits
        self.register_buffer("embedding", torch.empty(2**code_bits, code_bits))  # (2^K, K) rows of +-1
        self.register_buffer("power_vals", torch.empty(code_bits, dtype=torch.int64))  # (K,) 2^(K-1) ... 1
        self.reset_buffers()

    def reset_buffers(self):
        shifts = torch.arange(self.code_bits - 1, -1, -1, device=self.power_vals.device)
        all_codes = torch.arange(2**self.code_bits, device=self.power_vals.device)
        init.copy_(self.power_vals, 2**shifts)
        init.copy_(self.embedding, (((all_codes[:, None] >> shifts) & 1) * 2 - 1).to(self.embedding.dtype))

    def codes_of(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, K, h, w) -> (B, N) int64: code = sum over channels c of 2^(K-1-c) * [latent_c > 0]."""
        return ((latents > 0).flatten(2) * self.power_vals[:, None]).sum(1)  # (B, N)

    def latents_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Integer codes of any shape (...) -> (..., K) of +-1 in the dtype of the model."""
        bits = (codes[..., None] & self.power_vals) != 0
        return bits.to(self.embedding.dtype) * 2 - 1

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Signs of (B, K, h, w) latents as +-1, same shape; the gradient is the identity's (straight-through)."""
        return latents + (torch.where(latents > 0, 1.0, -1.0).to(latents.dtype) - latents).detach()

    def losses(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Published commitment and entropy losses of (B, K, h, w) latents: two scalars, computed in float32.

        Faithful: since it goes through the straight-through output, the gradient of the second commitment term points
        *away* from the corner and cancels a quarter of the first term's (pinned by
        tests/models/test_modeling_magvitv2.py).
        """
        latents = latents.float()
        quantized = self(latents)
        to_quantized = F.mse_loss(latents, quantized.detach())
        to_latents = F.mse_loss(quantized, latents.detach())
        commit = 0.1 * (to_quantized + 0.25 * to_latents)

        logits = 4 * latents  # the two logits of a bit, -(z-1)^2 and -(z+1)^2, differ by 4z
        per_token = bit_entropy(logits).mean()
        mean_bits = torch.stack([torch.sigmoid(logits), torch.sigmoid(-logits)]).mean((1, 3, 4))  # (2, K)
        of_the_mean = distribution_entropy(mean_bits).sum(0).mean()
        return commit, 0.1 * (per_token - of_the_mean)


def conv(in_channels: int, out_channels: int, local: bool = False) -> nn.Conv2d:
    """3x3, or 1x1 if it is local."""
    return nn.Conv2d(in_channels, out_channels, 1 if local else 3, padding=0 if local else 1)


def norm(channels: int, num_groups: int, local: bool = False) -> nn.GroupNorm:
    """Over groups of channels of the whole image, or all channels of each position by itself if it is local."""
    return PositionNorm(1, channels, eps=1e-6) if local else nn.GroupNorm(num_groups, channels, eps=1e-6)


class PositionNorm(nn.GroupNorm):
    """A norm of each position by itself; (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = x.movedim(1, -1)  # (B, h, w, C)
        return super().forward(positions.flatten(0, 2)).view(positions.shape).movedim(-1, 1)


class ResnetBlock(nn.Module):
    """Norm, swish, 3x3, twice, with a residual connection; (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, local: bool = False):
        super().__init__()
        self.norm1 = norm(in_channels, num_groups, local)
        self.conv1 = conv(in_channels, out_channels, local)
        self.norm2 = norm(out_channels, num_groups, local)
        self.conv2 = conv(out_channels, out_channels, local)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all h*w positions."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, N, C)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, N, C)
        return x + self.proj_out(attended.mT.unflatten(2, x.shape[2:]))


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules one after another, under the names that published parameters have."""
    return nn.Sequential(OrderedDict(modules))


def middle(channels: int, num_groups: int) -> nn.Sequential:
    """The block-attention-block at the coarsest resolution."""
    blocks = (ResnetBlock(channels, channels, num_groups) for _ in range(2))
    return named(block_1=next(blocks), attn_1=AttnBlock(channels, num_groups), block_2=next(blocks))


def downsample(channels: int) -> nn.Sequential:
    # Faithful: pads right and bottom only (pinned by the goldens)
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def upsample(channels: int) -> nn.Sequential:
    return named(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))


def level(
    in_channels: int, out_channels: int, num_blocks: int, num_groups: int, local: bool = False, **change: nn.Module
) -> nn.Sequential:
    """The residual blocks of one resolution, then the change to the next resolution, if any."""
    widths = [in_channels] + [out_channels] * num_blocks
    return named(block=nn.Sequential(*(ResnetBlock(a, b, num_groups, local) for a, b in pairwise(widths))), **change)


class Encoder(nn.Module):
    """(B, 3, H, W) pixels -> (B, K, h, w) latents."""

    def __init__(self, config: MAGVITv2Config):
        super().__init__()
        widths = [config.ch * mult for mult in config.encoder_ch_mult]
        self.patch_size = config.stem_patch_size
        local = config.local_encoder
        self.conv_in = conv(3 * self.patch_size**2, widths[0], local)
        self.down = nn.Sequential()
        for i, (width, num_blocks) in enumerate(zip(widths, config.encoder_num_res_blocks, strict=True)):
            change = {"downsample": downsample(width)} if i < len(widths) - 1 else {}
            self.down.append(level(widths[max(i - 1, 0)], width, num_blocks, config.num_groups, local, **change))
        self.mid = middle(widths[-1], config.num_groups) if config.encoder_mid else nn.Identity()
        self.norm_out = norm(widths[-1], config.num_groups, local)
        self.conv_out = conv(widths[-1], config.code_bits, local)
        self.quant_conv = nn.Conv2d(config.code_bits, config.code_bits, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self.conv_in.weight.dtype)  # DeepSpeed trains bf16 weights and does not cast inputs
        x = self.down(self.conv_in(F.pixel_unshuffle(pixels, self.patch_size)))
        x = F.silu(self.norm_out(self.mid(x)))
        return self.quant_conv(self.conv_out(x))


class Decoder(nn.Module):
    """Quantised latents (B, K, h, w) of +-1 -> (B, 3, H, W) pixels.

    `up[0]` is the finest level although it runs last, since published parameter names count that way.
    """

    def __init__(self, config: MAGVITv2Config):
        super().__init__()
        widths = [config.ch * mult for mult in config.decoder_ch_mult]
        self.patch_size = config.stem_patch_size
        self.post_quant_conv = nn.Conv2d(config.code_bits, config.code_bits, 1)
        self.conv_in = nn.Conv2d(config.code_bits, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], config.num_groups) if config.decoder_mid else nn.Identity()
        self.up = nn.ModuleList()
        for i, (width, num_blocks) in enumerate(zip(widths, config.decoder_num_res_blocks, strict=True)):
            change = {"upsample": upsample(width)} if i > 0 else {}
            self.up.append(level(widths[min(i + 1, len(widths) - 1)], width, num_blocks, config.num_groups, **change))
        self.norm_out = nn.GroupNorm(config.num_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * self.patch_size**2, 3, padding=1)

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(quantized)))
        for one in reversed(self.up):
            x = one(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch_size)


class MAGVITv2(CheckpointMixin, PreTrainedModel):
    """The image tokenizer.

    Pixels are float (B, 3, H, W) in [-1, 1], where H and W may be any multiples of `downsampling_factor`.
    """

    config_class = MAGVITv2Config
    published_class_name = "MAGVITv2"
    main_input_name = "pixels"

    def __init__(self, config: MAGVITv2Config):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = LookupFreeQuantizer(config.code_bits)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # torch's default initialisation of convolutions: transformers' normal(0, 0.02) would ignore their fan-in.
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LookupFreeQuantizer):
            module.reset_buffers()

    @property
    def downsampling_factor(self) -> int:
        return self.config.downsampling_factor

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, K, h, w), not quantised.

        Raises:
            ValueError: not three channels, or H or W is not a multiple of `downsampling_factor`.
        """
        factor = self.downsampling_factor
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise ValueError(
                f"pixels must be (batch, 3, height, width) with height and width multiples of {factor}, "
                f"got {tuple(pixels.shape)}"
            )
        return self.encoder(pixels)

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Quantised latents (B, K, h, w) of +-1 -> pixels (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(quantized)

    @torch.no_grad()
    def get_code(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> codes (B, N) int64 in [0, 2^K), in raster order."""
        return self.quantize.codes_of(self.encode(pixels))

    @torch.no_grad()
    def decode_code(self, codes: torch.Tensor, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Codes (B, N) -> pixels (B, 3, H, W), about [-1, 1], not clamped.

        Args:
            codes: integers in [0, 2^K), in raster order.
            shape: (h, w) in tokens with h * w = N; default: a square.

        Raises:
            ValueError: N is not h * w (without `shape`: not a square), or a code is out of range.
        """
        side = math.isqrt(codes.shape[1])
        height, width = shape or (side, side)
        if height * width != codes.shape[1]:
            raise ValueError(
                f"{codes.shape[1]} codes do not fill a grid of {height} x {width} tokens; pass shape=(h, w)"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(
                f"codes must lie in [0, {self.config.codebook_size}), got {int(codes.min())} to {int(codes.max())}"
            )
        quantized = self.quantize.latents_of(codes).mT  # (B, K, N)
        return self.decode(quantized.unflatten(2, (height, width)))

    def forward(self, pixels: torch.Tensor) -> MAGVITv2Output:
        """Pixels (B, 3, H, W) -> everything that a training step needs, see `MAGVITv2Output`."""
        latents = self.encode(pixels)
        commit, entropy = self.quantize.losses(latents)
        return MAGVITv2Output(
            reconstruction=self.decode(self.quantize(latents)),
            latents=latents,
            codes=self.quantize.codes_of(latents),
            loss_commit=commit,
            loss_entropy=entropy,
        )


AutoConfig.register(MAGVITv2Config.model_type, MAGVITv2Config, exist_ok=True)
AutoModel.register(MAGVITv2Config, MAGVITv2, exist_ok=True)
