"""A text-to-image script as users of the published code have them: its imports, its call forms, nothing of ours."""

import numpy as np
import torch
import wandb
from PIL import Image
from transformers import AutoTokenizer

from models import MAGVITv2, Showo, get_mask_chedule
from training.prompting_utils import UniversalPrompting, create_attention_mask_predict_next
from training.utils import flatten_omega_conf, get_config, image_transform

SPECIAL = ("<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")

if __name__ == "__main__":
    config = get_config()
    run_id = config.wandb.get("run_id", None)
    if run_id is None:
        run_id = wandb.util.generate_id()
        config.wandb.run_id = run_id
    wandb.init(project="demo", name=config.experiment.name, config=dict(flatten_omega_conf(config, resolve=True)))
    config.training.batch_size = config.batch_size

    device = torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(config.model.showo.llm_model_path, padding_side="left")
    uni_prompting = UniversalPrompting(
        tokenizer,
        max_text_len=config.dataset.preprocessing.max_seq_length,
        special_tokens=SPECIAL,
        ignore_id=-100,
        cond_dropout_prob=config.training.cond_dropout_prob,
    )
    vq_model = MAGVITv2.from_pretrained(config.model.vq_model.vq_model_name).to(device)
    vq_model.requires_grad_(False)
    vq_model.eval()
    model = Showo.from_pretrained(config.model.showo.pretrained_model_path).to(device)
    model.eval()
    mask_token_id = model.config.mask_token_id
    schedule = get_mask_chedule(config.training.get("mask_schedule", "cosine"))

    with open(config.validation_prompts_file) as file:
        every_prompt = file.read().splitlines()
    known = None
    if config.get("image_path", None) is not None:  # the left half of an image is kept
        pixels = image_transform(
            Image.open(config.image_path).convert("RGB"), resolution=config.dataset.params.resolution
        )
        known = vq_model.get_code(pixels.unsqueeze(0).to(device)) + len(uni_prompting.text_tokenizer)

    torch.manual_seed(config.training.seed)
    pictures, tokens = [], []
    for start in range(0, len(every_prompt), config.training.batch_size):
        prompts = every_prompt[start : start + config.training.batch_size]
        size = (len(prompts), config.model.showo.num_vq_tokens)
        image_tokens = torch.ones(size, dtype=torch.long, device=device) * mask_token_id
        if known is not None:
            side = int(size[1] ** 0.5)
            left = torch.arange(size[1]) % side < side // 2
            image_tokens[:, left] = known[:, left]
        input_ids, _ = uni_prompting((prompts, image_tokens), "t2i_gen")
        rows, uncond_input_ids = input_ids, None
        if config.guidance_scale > 0:
            uncond_input_ids, _ = uni_prompting(([""] * len(prompts), image_tokens), "t2i_gen")
            rows = torch.cat([input_ids, uncond_input_ids], dim=0)
        attention_mask = create_attention_mask_predict_next(
            rows,
            pad_id=int(uni_prompting.sptids_dict["<|pad|>"]),
            soi_id=int(uni_prompting.sptids_dict["<|soi|>"]),
            eoi_id=int(uni_prompting.sptids_dict["<|eoi|>"]),
            rm_pad_in_image=True,
        )
        with torch.no_grad():
            gen_token_ids = model.t2i_generate(
                input_ids=input_ids,
                uncond_input_ids=uncond_input_ids,
                attention_mask=attention_mask,
                guidance_scale=config.guidance_scale,
                temperature=config.training.get("generation_temperature", 1.0),
                timesteps=config.generation_timesteps,
                noise_schedule=schedule,
                noise_type=config.training.get("noise_type", "mask"),
                seq_len=config.model.showo.num_vq_tokens,
                uni_prompting=uni_prompting,
                config=config,
            )
        gen_token_ids = torch.clamp(gen_token_ids, max=config.model.showo.codebook_size - 1, min=0)
        images = torch.clamp((vq_model.decode_code(gen_token_ids) + 1.0) / 2.0, min=0.0, max=1.0) * 255.0
        pictures += [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)]
        tokens.append(gen_token_ids)

    wandb.log({"generated_images": [wandb.Image(picture) for picture in pictures]}, step=0)
    codes = torch.cat(tokens)
