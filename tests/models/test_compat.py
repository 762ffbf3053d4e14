"""The doors for published-style scripts (docs/migrating.md): such scripts run as they are and give our tokens."""

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import wandb
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from common.config import InferenceConfig, load_config
from models import OmniMask, ShowoPipeline, compat, get_mask_chedule, get_mask_schedule
from tests.parity.goldens import PHI, facts, prompting, tensors, tiny_showo
from tests.tiny import clip_showo, write_checkpoints
from training.utils import flatten_omega_conf, get_config

SCRIPTS = Path(__file__).parent / "published_style"
DEMO = "config=configs/showo_tiny_demo.yaml"
PROMPTS = ["cherries in fluent 3d style", "taxi", "dog face in noto style"]
IMAGES, QUESTIONS = "mmu_validation/emoji", ["What is this?", "Describe the picture."]


@pytest.fixture
def run(repository, monkeypatch):
    """Runs a published-style script in the repository; its variables at the end."""

    def call(name: str, *arguments: str) -> dict:
        monkeypatch.chdir(repository)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        # By argument: wandb keeps the environment of its first use in a process, which other tests have changed.
        monkeypatch.setattr(wandb, "init", partial(wandb.init, mode="disabled"))
        return runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    return call


@pytest.fixture(scope="module")
def pipeline():
    root = Path(__file__).parents[2]
    return ShowoPipeline.from_pretrained(root / "checkpoints/showo-tiny", max_seq_length=24, cpu_kernels=False)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [0.75, 0])
def test_a_script_that_generates_images(run, pipeline, tmp_path, guidance_scale):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [f"validation_prompts_file={tmp_path}/prompts.txt", "batch_size=2", "training.seed=7"]
    names = run("t2i.py", DEMO, *arguments, f"guidance_scale={guidance_scale}", "generation_timesteps=4")
    settings = {"guidance_scale": guidance_scale, "timesteps": 4, "generator": pipeline.generator(7)}
    expected = pipeline.text_to_image(PROMPTS, batch_size=2, **settings)
    assert [image.tobytes() for image in names["pictures"]] == [image.tobytes() for image in expected]
    assert names["codes"].shape == (3, 64)


def test_a_script_that_keeps_a_part_of_an_image(run, pipeline, tmp_path, repository):
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    picture = repository / "inpainting_validation/emoji/picture.png"
    settings = [f"validation_prompts_file={tmp_path}/prompts.txt", "batch_size=1", "guidance_scale=0.75"]
    names = run("t2i.py", DEMO, *settings, "generation_timesteps=4", f"image_path={picture}")
    known = pipeline.encode([picture]).view(8, 8)[:, :4]
    assert torch.equal(names["codes"].view(8, 8)[:, :4], known)


@pytest.mark.slow
def test_a_script_that_answers(run, pipeline, repository):
    question = " *** ".join(QUESTIONS)
    answers = run("mmu.py", DEMO, f"mmu_image_root={IMAGES}", f"question='{question}'", "max_new_tokens=12")["answers"]
    files = sorted((repository / IMAGES).iterdir())
    expected = pipeline.answer(files, QUESTIONS, max_new_tokens=12)
    assert [[answers[file.name, q].strip() for q in QUESTIONS] for file in files] == expected


@pytest.mark.slow
def test_a_script_that_answers_from_clip_features(run, tmp_path, repository):
    """The published mask takes 576 features for granted, so this tower has as many."""
    config = f"config={write_checkpoints(tmp_path, patch_size=2, image_size=48)['demo_clip']}"
    clip_showo().save_pretrained(tmp_path / "showo_clip")  # so that its own config names the tiny language model
    questions = facts()["mmu_texts"][:2]
    arguments = [f"question='{' *** '.join(questions)}'", f"mmu_image_root={IMAGES}", "max_new_tokens=6"]
    answers = run("mmu.py", config, *arguments)["answers"]
    pipeline = ShowoPipeline.from_config(load_config([config], InferenceConfig))
    files = sorted((repository / IMAGES).iterdir())
    expected = pipeline.answer(files, questions, max_new_tokens=6)
    assert [[answers[file.name, question].strip() for question in questions] for file in files] == expected


@pytest.mark.slow
def test_embeddings_in_place_of_ids():
    """As scripts with CLIP-ViT features call `mmu_generate`; the answer is the published one."""
    llm = {"model_type": "phi", "hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 32}
    model = tiny_showo(llm_config=llm | {"intermediate_size": 64}, w_clip_vit=True)
    generator = torch.Generator().manual_seed(12)
    features = torch.randn(2, 576, 1024, generator=generator)[:1]
    system, text = (torch.randint(0, 117, (2, n), generator=generator)[:1] for n in (28, 7))
    parts = [torch.tensor([[124]]), system, torch.tensor([[119]]), torch.tensor([[120]]), text]
    embeds, cut = model.showo.model.embed_tokens(torch.cat(parts, 1)), 2 + 28
    embeds = torch.cat([embeds[:, :cut], model.mm_projector(features), embeds[:, cut:]], 1)
    mask = compat.create_attention_mask_for_mmu_vit(embeds, system_prompt_len=28)
    settings = {"max_new_tokens": 12, "top_k": 1, "eot_token": 117}
    new_ids = model.mmu_generate(input_embeddings=embeds, attention_mask=mask, **settings)
    assert torch.equal(torch.stack(new_ids).squeeze(), tensors("clip")["tuning.new_ids"])


def published_prompting() -> compat.UniversalPrompting:
    tokenizer = AutoTokenizer.from_pretrained(PHI, padding_side="left")
    return compat.UniversalPrompting(tokenizer, max_text_len=facts()["max_text_len"], cond_dropout_prob=0.0)


def test_published_rows():
    build, golden, texts = published_prompting(), tensors(), facts()
    images, labels = golden["prompt.t2i_image_ids"], golden["prompt.t2i_image_labels"]
    inputs = {
        "t2i": (texts["t2i_texts"], images, labels),
        "t2i_gen": (texts["t2i_texts"], images),
        "lm": (texts["lm_texts"], 31),
        "mmu": (golden["prompt.mmu_image_ids"], texts["mmu_texts"]),
    }
    for task, given in inputs.items():
        ids, visible, *rest = build(given, task)
        expected = prompting()(given, task)
        assert torch.equal(ids, expected.input_ids) and torch.equal(visible == 0, ids == build.pad_id)
        assert [label.tolist() for label in rest] == ([] if expected.labels is None else [expected.labels.tolist()])
    assert build.max_text_len == facts()["max_text_len"] + 1
    assert {name: int(ids) for name, ids in build.sptids_dict.items()}.items() >= facts()["special_token_ids"].items()


def test_other_special_tokens_are_refused():
    with pytest.raises(ValueError, match="special_tokens"):
        compat.UniversalPrompting(AutoTokenizer.from_pretrained(PHI), special_tokens=("<|soi|>",))


def test_published_masks():
    """Two rows with left pads, as generation has them; the published mask is 0 or the least int64, as floats."""
    build, ids = published_prompting(), facts()["special_token_ids"]
    rows, _ = build((facts()["t2i_texts"], tensors()["prompt.t2i_image_ids"]), "t2i_gen")
    settings = {"pad_id": ids["<|pad|>"], "soi_id": ids["<|soi|>"], "eoi_id": ids["<|eoi|>"]}
    mask = compat.create_attention_mask_predict_next(rows, rm_pad_in_image=True, **settings)
    allowed = OmniMask.from_ids(rows, build.rows.vocabulary).dense()
    assert mask.dtype == torch.float32 and torch.equal(mask == 0, allowed) and mask.min() == -(2.0**63)
    assert torch.equal(OmniMask.from_dense(mask).dense(), allowed)
    flags = compat.create_attention_mask_predict_next(rows, rm_pad_in_image=True, return_inverse_mask=False, **settings)
    assert torch.equal(flags, allowed)
    with_pads = compat.create_attention_mask_predict_next(rows, **settings) == 0
    assert with_pads[:, 0, -1].all()  # an image row sees pads, too


def test_published_masks_of_questions():
    build = published_prompting()
    rows, _, _ = build((tensors()["prompt.mmu_image_ids"], facts()["mmu_texts"]), "mmu")
    mask = compat.create_attention_mask_for_mmu(rows, eoi_id=facts()["special_token_ids"]["<|eoi|>"])
    assert torch.equal(mask == 0, OmniMask.from_ids(rows, build.rows.vocabulary).dense())
    mask = compat.create_attention_mask_for_mmu_vit(torch.zeros(2, 600, 8), system_prompt_len=3)
    assert torch.equal(mask == 0, OmniMask.mmu_vit(2, 3, 576, 600).dense())


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (torch.zeros(2, 5, 5), r"must be \(B, 1, L, L\)"),
        (torch.zeros(1, 1, 4, 5), r"must be \(B, 1, L, L\)"),
        (torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()[None, None], "between two rows"),
    ],
)
def test_dense_masks_that_cannot_be(dense, message):
    with pytest.raises(ValueError, match=message):
        OmniMask.from_dense(dense)


def test_unknown_arguments_are_still_refused():
    with pytest.raises(TypeError, match="guidence"):
        tiny_showo().t2i_generate(torch.zeros(1, 3, dtype=torch.long), guidence=3)


def test_configurations(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("a: {b: 1, c: [x, {d: 2}]}\ne: ${a.b}\nf: {}\nwandb: null\n")
    monkeypatch.setattr("sys.argv", ["script.py", f"config={tmp_path}/a.yaml", "a.b=5", "own_key=x *** y"])
    config = get_config()
    config.question = ["any", "type"]
    leaves = {"a.b": 5, "a.c.0": "x", "a.c.1.d": 2, "e": 5, "config": f"{tmp_path}/a.yaml", "own_key": "x *** y"}
    leaves |= {"wandb": None, "question.0": "any", "question.1": "type"}
    assert dict(flatten_omega_conf(config, resolve=True)) == leaves
    assert dict(flatten_omega_conf(OmegaConf.create({"e": "${x}", "x": 1})))["e"] == "${x}"


def test_the_published_spelling():
    assert get_mask_chedule is get_mask_schedule
