"""An answering script as users of the published code have them: its imports, its call forms, nothing of ours."""

import os

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from llava.llava import conversation as conversation_lib
from models import CLIPVisionTower, MAGVITv2, Showo
from training.prompting_utils import (
    UniversalPrompting,
    create_attention_mask_for_mmu,
    create_attention_mask_for_mmu_vit,
)
from training.utils import get_config, image_transform

conversation_lib.default_conversation = conversation_lib.conv_templates["phi1.5"]
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

if __name__ == "__main__":
    config = get_config()
    device = torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(config.model.showo.llm_model_path, padding_side="left")
    uni_prompting = UniversalPrompting(tokenizer, max_text_len=config.dataset.preprocessing.max_seq_length)
    sptids = uni_prompting.sptids_dict
    vq_model = MAGVITv2.from_pretrained(config.model.vq_model.vq_model_name).to(device).eval()
    model = Showo.from_pretrained(config.model.showo.pretrained_model_path).to(device).eval()
    if config.model.showo.w_clip_vit:
        vision_tower = CLIPVisionTower(config.model.clip_vit_name).to(device)
        clip_image_processor = CLIPImageProcessor.from_pretrained(config.model.clip_vit_name)

    def column(name, count=1):
        return (torch.ones(count, 1) * sptids[name]).to(device)

    config.question = config.question.split(" *** ")
    answers = {}
    for file_name in sorted(os.listdir(config.mmu_image_root)):
        image_ori = Image.open(os.path.join(config.mmu_image_root, file_name)).convert("RGB")
        image = image_transform(image_ori, resolution=config.dataset.preprocessing.resolution).to(device)
        image_tokens = vq_model.get_code(image.unsqueeze(0)) + len(uni_prompting.text_tokenizer)
        for question in config.question:
            if config.model.showo.w_clip_vit:
                conv = conversation_lib.default_conversation.copy()
                conv.append_message(conv.roles[0], question)
                conv.append_message(conv.roles[1], None)
                system, text = (
                    uni_prompting.text_tokenizer(one, return_tensors="pt", padding="longest").input_ids
                    for one in (SYSTEM_PROMPT, conv.get_prompt().strip())
                )
                ids = torch.cat([column("<|mmu|>"), system, column("<|soi|>"), column("<|eoi|>"), text], dim=1).long()
                pixel_values = clip_image_processor.preprocess(image_ori, return_tensors="pt")["pixel_values"]
                images_embeddings = model.mm_projector(vision_tower(pixel_values))
                text_embeddings = model.showo.model.embed_tokens(ids)
                cut = 2 + system.shape[1]
                embeddings = torch.cat((text_embeddings[:, :cut], images_embeddings, text_embeddings[:, cut:]), dim=1)
                mask = create_attention_mask_for_mmu_vit(embeddings, system_prompt_len=system.shape[1])
                cont_toks_list = model.mmu_generate(
                    input_embeddings=embeddings,
                    attention_mask=mask[0].unsqueeze(0),
                    max_new_tokens=config.max_new_tokens,
                    top_k=1,
                    eot_token=tokenizer.eos_token_id,
                )
            else:
                ids = uni_prompting.text_tokenizer(["USER: \n" + question + " ASSISTANT:"])["input_ids"]
                ids = torch.tensor(ids).to(device)
                parts = [column("<|mmu|>"), column("<|soi|>"), image_tokens, column("<|eoi|>"), column("<|sot|>"), ids]
                input_ids = torch.cat(parts, dim=1).long()
                attention_mask = create_attention_mask_for_mmu(input_ids, eoi_id=int(sptids["<|eoi|>"]))
                cont_toks_list = model.mmu_generate(
                    input_ids,
                    attention_mask=attention_mask,
                    max_new_tokens=config.max_new_tokens,
                    top_k=1,
                    eot_token=sptids["<|eot|>"],
                )
            cont_toks_list = torch.stack(cont_toks_list).squeeze()[None]
            text = uni_prompting.text_tokenizer.batch_decode(cont_toks_list, skip_special_tokens=True)
            answers[file_name, question] = text[0]
