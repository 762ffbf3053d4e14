"""Sample images of a run: generated from validation prompts, and predictions at masked positions (spec §15)."""

import torch
from PIL import Image

from models.images import to_pil
from models.vocabulary import IGNORE_ID
from training.batches import BatchBuilder, OmniBatch

GENERATED_PANEL = "Generated images"
PREDICTED_PANEL = "Original images v.s. Reconstructed images v.s. Predicted images"


def sample_codes(model, builder: BatchBuilder, prompts: list[str], **settings) -> torch.Tensor:
    """(B, N) int64 codes of one image per prompt; `settings` of `Showo.t2i_generate`."""
    image_ids = torch.full((len(prompts), model.config.num_vq_tokens), model.vocabulary.mask_token_id)
    ids = builder.prompting((prompts, image_ids), "t2i_gen").input_ids.to(builder.device)
    uncond = builder.prompting(([""] * len(prompts), image_ids), "t2i_gen").input_ids.to(builder.device)
    return model.t2i_generate(ids, uncond, noise_schedule=builder.noise.schedule, **settings)


@torch.no_grad()
def generate_images(
    model, builder: BatchBuilder, prompts: list[str], *, guidance_scale: float, timesteps: int, temperature: float, seed
) -> list[Image.Image]:
    """One image per prompt, with classifier-free guidance, from a separate generator, so training is unaffected."""
    settings = {"guidance_scale": guidance_scale, "timesteps": timesteps, "temperature": temperature}
    generator = torch.Generator(builder.device).manual_seed(seed)
    codes = sample_codes(model, builder, prompts, generator=generator, **settings)
    return to_pil(builder.vq_model.decode_code(codes).float())


@torch.no_grad()
def predict_masked(
    model, builder: BatchBuilder, batch: OmniBatch, limit: int = 8
) -> tuple[list[Image.Image], list[str]]:
    """Original | reconstruction | prediction, side by side; the prediction is the argmax at masked positions only."""
    count = min(limit, batch.rows["t2i"])
    offset, num_codes = model.vocabulary.image_offset, model.vocabulary.codebook_size
    length = builder.row_length  # without the padding to the longest document
    image = slice(length - model.config.num_vq_tokens - 1, length - 1)  # positions of the codes, before <eoi>
    ids, labels = batch.input_ids[:count, :length], batch.labels[:count, image]
    logits = model(ids, batch.attention_mask.select(slice(0, count)).window(0, length)).logits
    predicted = logits[:, image, offset : offset + num_codes].argmax(-1)
    hidden = (labels != IGNORE_ID) & (labels != ids[:, image])  # also positions hidden by random codes
    codes, decode = batch.codes[:count], builder.vq_model.decode_code
    reconstructed = decode(codes).float()
    # Shards of codes have no pixels; their panel repeats the reconstruction.
    original = reconstructed if batch.pixels is None else batch.pixels[:count].to(builder.device)
    panels = [original, reconstructed, decode(torch.where(hidden, predicted, codes)).float()]
    images = to_pil(torch.cat(panels, dim=-1))
    ratios = batch.mask_prob[:count].tolist()
    return images, [f"mask ratio: {ratio:.2f}, {text}" for ratio, text in zip(ratios, batch.texts, strict=False)]
